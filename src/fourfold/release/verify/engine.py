"""An inference engine in an environment of its own, called through a script that runs there."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from fourfold import process

SCRIPTS = Path(__file__).parents[1] / "engines"


@dataclass(frozen=True, kw_only=True)
class Engine:
    """name: of the package too. python: its interpreter; logs: folder for each run's output; limit_seconds: per run."""

    name: str
    python: Path
    logs: Path
    limit_seconds: float
    environment: Mapping[str, str] = field(default_factory=dict)

    @contextmanager
    def with_cache(self) -> Iterator[Engine]:
        """The same engine, in `environment`; its runs share a cache, which is then removed."""
        with tempfile.TemporaryDirectory(prefix="fourfold-", dir=process.SCRATCH) as cache:
            yield replace(self, environment=environment(Path(cache)))

    def ask(self, script: str, title: str, request: object) -> Answer:
        """Run one of our scripts under the engine's interpreter. title: of the run, for its log's name."""
        log = self.logs / f"verify-{self.name}-{title}.log"
        with tempfile.TemporaryDirectory(prefix="fourfold-", dir=process.SCRATCH) as scratch:
            question, answer = Path(scratch, "request.json"), Path(scratch, "answer.json")
            question.write_text(json.dumps(request), encoding="utf-8")
            command = [str(self.python), str(SCRIPTS / script), str(question), str(answer)]
            ended = process.run(command, log, self.limit_seconds, self.environment)
            if not ended.ok or not answer.is_file():
                return Answer(log=log, failure=ended.why(self.limit_seconds))
            return Answer(log=log, content=json.loads(answer.read_text(encoding="utf-8")))


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What a run gave: content, as JSON, or why it gave none."""

    log: Path
    content: Any = field(default_factory=dict)
    failure: str = ""


def load_problems(load: Mapping[str, Any]) -> list[str]:
    """Elements that a loader left unwritten, and scales that are zero. load: of engines/poison.load_twice."""
    unwritten = [f"{name}: {count} elements never written" for name, count in load["unwritten"].items()]
    return unwritten + [f"{name}: {count} scales are zero" for name, count in load["zero_scales"].items()]


def environment(cache: Path) -> dict[str, str]:
    """For engines: nothing is fetched or reported, little memory for the KV cache on a CPU; the user's own values win.

    cache: a folder that runs of one call share.
    """
    wanted = {
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CACHE_ROOT": str(cache),  # vLLM's notes on model classes, which take a process of their own to make
    }
    return {name: value for name, value in wanted.items() if name not in os.environ}
