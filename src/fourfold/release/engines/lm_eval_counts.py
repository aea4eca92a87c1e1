"""lm-eval's command line, with two models that keep whole answers: lm-eval itself keeps the text alone.

    FOURFOLD_ANSWERS=FILE.jsonl python lm_eval_counts.py run --model fourfold-chat ...

FILE has a line for each answer that was generated, as the server sent it.
"""

from __future__ import annotations

import json
import os
from typing import Any

from lm_eval.__main__ import cli_evaluate
from lm_eval.api.registry import register_model
from lm_eval.models.openai_completions import LocalChatCompletion, LocalCompletionsAPI


class Kept:
    def parse_generations(self, outputs: Any, **others: Any) -> list[str]:
        with open(os.environ["FOURFOLD_ANSWERS"], "a", encoding="utf-8") as file:
            for answer in outputs if isinstance(outputs, list) else [outputs]:
                file.write(json.dumps(answer) + "\n")
        # A thought that never ended has no answer: lm-eval's filters want text.
        return [text or "" for text in super().parse_generations(outputs=outputs, **others)]  # type: ignore[misc]


@register_model("fourfold-completions")
class Completions(Kept, LocalCompletionsAPI):  # type: ignore[misc]
    pass


@register_model("fourfold-chat")
class Chat(Kept, LocalChatCompletion):  # type: ignore[misc]
    pass


if __name__ == "__main__":
    cli_evaluate()
