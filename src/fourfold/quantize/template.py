"""The chat template of a checkpoint: its own program, rendered by transformers in a process with limits."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from fourfold.confined import Confined, ConfinedError, Limits, answer_requests
from fourfold.datatypes import FourfoldError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

LIMITS = Limits(cpu_seconds=5, more_seconds=0.1, memory_bytes=2**29)
# Characters that a template may make of a conversation: of a system prompt or tools, and of each of the conversation's.
ADDED, GROWTH = 100_000, 10

Conversation = list[dict[str, Any]]


class ChatTemplate:
    """Renders conversations as `tokenizer.apply_chat_template` does. One child for all of them; `with` ends it."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._setup = tokenizer.chat_template, dict(tokenizer.special_tokens_map)
        self._child: Confined | None = None
        self._ready = False

    def __enter__(self) -> ChatTemplate:
        return self

    def __exit__(self, *error: object) -> None:
        if self._child is not None:
            self._child.__exit__(*error)

    def start(self) -> None:
        """Start the child now, so that it imports transformers while the caller reads other text."""
        if self._child is None:
            self._child = Confined(__name__, LIMITS)

    def render(self, conversation: Conversation, place: str) -> str:
        """Return the text. place: of the conversation, for errors.

        Raises FourfoldError if there is no template, or it refuses the conversation, fails, makes too much text of it
        or exceeds a limit.
        """
        if not self._setup[0]:
            raise FourfoldError(
                f"{place}: a conversation, and the model has no chat template to write it in. "
                "Put the model's chat_template.jinja in its folder, or leave this text out"
            )
        self.start()
        assert self._child is not None
        try:
            if not self._ready:
                self._child.ask(self._setup)
                self._ready = True
            text, refusal = self._child.ask(conversation)
        except ConfinedError as error:
            raise FourfoldError(
                f"{place}: the model's chat template fails on this conversation: {error}. "
                "Take the original model's chat_template.jinja, or a recipe without conversations"
            ) from None
        if refusal:
            raise FourfoldError(f"{place}: the chat template refuses this conversation: {refusal}")
        return str(text)


def _renderer() -> Callable[[Any], Any]:
    """Answer the template with its special tokens by null, then each conversation by (text, refusal)."""
    from jinja2 import TemplateError  # noqa: PLC0415  the parent needs neither
    from transformers import PreTrainedTokenizerBase  # noqa: PLC0415

    class Tokenizer(PreTrainedTokenizerBase):
        """What apply_chat_template asks of a tokenizer, without a vocabulary."""

        special_tokens_map: Any = None

        def __init__(self) -> None:
            """The attributes are set by whoever makes one."""

    tokenizer = Tokenizer()

    def answer(request: Any) -> Any:
        if isinstance(request, tuple):
            vars(tokenizer)["chat_template"], vars(tokenizer)["special_tokens_map"] = request
            return None
        try:
            text = str(tokenizer.apply_chat_template(request, tokenize=False))
        except (TemplateError, TypeError) as error:
            return "", str(error)[:1000] or type(error).__name__
        most = ADDED + GROWTH * len(str(request))
        if len(text) > most:
            return "", f"it makes {len(text):,} characters of it, expected at most {most:,}"
        return text, ""

    return answer


if __name__ == "__main__":
    answer_requests(_renderer(), LIMITS)
