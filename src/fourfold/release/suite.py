"""What running servers of a release and of its source answer to the same questions, and whether the answers differ."""

from __future__ import annotations

import asyncio
import json
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from msgspec import structs

from fourfold.bundled import HELDOUT_TEXTS, TEXT
from fourfold.core.paired import mcnemar, mean_interval
from fourfold.datatypes import Event, FourfoldError, Progress
from fourfold.quantize.calibrate import heldout_windows, load_tokenizer
from fourfold.quantize.journal import METRICS
from fourfold.recipe import Heldout
from fourfold.records.record import Number
from fourfold.records.results import Metrics, Paired, ServerKl, TaskResult, TaskResults, Usage
from fourfold.release.answers import Answer, count_usage
from fourfold.release.questions import AT_ONCE, SHARES, Answered, Ask, Needles, ask_tools
from fourfold.release.served_kl import measure_kl, require_served
from fourfold.release.tasks import SECONDS, TaskRun, Tasks, require_lm_eval, run_task
from fourfold.serve import client
from fourfold.serve.client import RequestError, Session

EXACT = "exact_match,none"
GSM8K = "gsm8k_heldout"  # GSM8K test problems that ship with fourfold, so that a first run needs no network
GSM8K_TASK = {
    "task": GSM8K, "dataset_path": "json", "test_split": "test", "output_type": "generate_until",
    "doc_to_text": "{{messages[0].content}}\nEnd with a line that holds the number alone.",
    "doc_to_target": "{{messages[1].content.split('\n')[-1]}}", "generation_kwargs": {"until": []},
    "metric_list": [{"metric": "exact_match", "regexes_to_ignore": [",", "\\$", "\\.$", "\\.0+$"]}],
    "filter_list": [{"name": "last-number", "filter": [
        {"function": "regex", "group_select": -1, "regex_pattern": "(-?[0-9][0-9.,]*)"}, {"function": "take_first"},
    ]}],
    "metadata": {"version": 1},
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Suite:
    """tasks: of lm-eval; windows, length: of held-out text for the KL; depths: of needles at each length."""

    tasks: Tasks
    windows: int
    length: int
    depths: tuple[float, ...]


SUITES = {
    "quick": Suite(
        tasks=Tasks(names=(GSM8K,), chat=True, tokens=4096, limit=100), windows=16, length=512, depths=(0.5,)
    ),
    "full": Suite(
        tasks=Tasks(names=(GSM8K, "mmlu_pro", "aime25"), chat=True, tokens=16_384, limit=300),
        windows=64, length=2048, depths=(0.1, 0.3, 0.5, 0.7, 0.9),
    ),
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Servers:
    """Where a release runs, and its source, None for nowhere. tasks: of lm-eval, in place of the suite's."""

    url: str
    source_url: str | None = None
    suite: str | None = None
    tasks: tuple[str, ...] = ()

    @classmethod
    def of(cls, url: str, source_url: str | None, suite: str | None, tasks: Sequence[str]) -> Servers:
        """Servers that are asked the suite `quick` if neither a suite nor tasks are named."""
        chosen = suite or (None if tasks else "quick")
        return cls(url=url, source_url=source_url, suite=chosen, tasks=tuple(tasks))

    def sides(self) -> list[tuple[str, str]]:
        """Address and model of each, the release's first. Raises FourfoldError without lm-eval or a server."""
        require_lm_eval(f"--suite {self.suite}" if self.suite else "--tasks")
        addresses = [client.root(url) for url in (self.url, self.source_url) if url]
        if len({*addresses}) < len(addresses):
            raise FourfoldError(f"--source-url: got {self.source_url}, expected another server than --url")
        return [(address, client.model_name(address)) for address in addresses]


def evaluate_servers(out: Path, servers: Servers, progress: Progress) -> Metrics:
    """Ask the servers and put what they answer into OUT/metrics.json. Raises FourfoldError."""
    before = Metrics.find(out / METRICS)
    if before is None:
        raise FourfoldError(f"{out}: got no {METRICS}, expected one. Measure the weights, too: --source MODEL")
    found = structs.replace(before, tasks=measure_servers(out, servers, progress))
    found.write(out / METRICS)
    return found


def measure_servers(out: Path, servers: Servers, progress: Progress) -> TaskResults:
    """Ask both servers the same questions, tokenized as by the release in `out`. Raises FourfoldError."""
    sides, suite = servers.sides(), SUITES.get(servers.suite or "")
    contexts = [length for address, _ in sides if (length := client.context_length(address))]
    asked = Asked(
        suite=suite, sides=sides, tokenizer=load_tokenizer(out), context=min(contexts, default=None), progress=progress
    )
    unknown = asyncio.run(asked.require_served(out))
    found: TaskResults | None = None
    for name in servers.tasks or asked.tasks.names:
        progress(Event(kind="stage", stage=f"lm-eval {name}"))
        with task_file(name) as file:
            runs = [run_task(asked.tasks, file, *side, out) for side in sides]
        rows = (found.tasks if found else {}) | dict(asked.beside(runs))
        found = structs.replace(runs[0].results, tasks=rows)
    assert found is not None, "there is a task"
    named = dict(zip(("source_url", "source_model"), sides[1] if servers.source_url else (), strict=False))
    found = structs.replace(found, suite=servers.suite, unmeasured=unknown, **named)
    return asyncio.run(asked.questions(found, suite)) if suite else found


@dataclass(frozen=True, kw_only=True)
class Asked:
    """sides: address and model of the release's server, and of the source's; context: the shorter of theirs."""

    suite: Suite | None
    sides: Sequence[tuple[str, str]]
    tokenizer: Any  # of transformers
    context: int | None
    progress: Progress

    @property
    def tasks(self) -> Tasks:
        tasks = self.suite.tasks if self.suite else Tasks(names=())
        most = self.context and self.context // 2
        return replace(tasks, tokens=min(tasks.tokens, most)) if tasks.tokens and most else tasks

    async def require_served(self, out: Path) -> dict[str, str]:
        """Raises FourfoldError if the release's server serves another model; returns why that is not known."""
        async with client.open_client() as connection:
            address, model = self.sides[0]
            session = Session(connection=connection, address=address, model=model, limit_seconds=SECONDS)
            try:
                await require_served(session, out)
            except RequestError as error:
                return {"whether the server serves this release": str(error)}
        return {}

    def encode(self, text: str) -> list[int]:
        return list(self.tokenizer.encode(text, add_special_tokens=False)) if text else []

    def decode(self, tokens: Sequence[int]) -> str:
        return str(self.tokenizer.decode(list(tokens)))

    def usage(self, answers: Sequence[Answer]) -> Usage | None:
        return count_usage(answers, lambda text: len(self.encode(text)))

    def beside(self, runs: Sequence[TaskRun]) -> Iterator[tuple[str, TaskResult]]:
        """Yield the tasks of a run of lm-eval, a group and its members, with the source's figures and usage."""
        usages = [self.usage(run.answers) for run in runs]
        for task, result in runs[0].results.tasks.items():
            whole = usages if task not in runs[0].members else [None] * len(runs)
            if len(runs) == 1:
                yield task, structs.replace(result, usage=whole[0])
                continue
            first, second = (run.samples.get(task, {}) for run in runs)
            pairs = {metric: pair(first[metric], second[metric]) for metric in first.keys() & second.keys()}
            other = runs[1].results.tasks[task]
            yield (
                task,
                structs.replace(
                    result, usage=whole[0], source_figures=other.figures, source_usage=whole[1], paired=pairs or None
                ),
            )

    async def questions(self, found: TaskResults, suite: Suite) -> TaskResults:
        """Add what fourfold asks itself. A part that a server refuses is left out, with the reason."""
        tasks, unmeasured = dict(found.tasks), dict(found.unmeasured)
        async with client.open_client(2 * AT_ONCE) as connection:
            sessions = [
                Session(connection=connection, address=address, model=model, limit_seconds=SECONDS)
                for address, model in self.sides
            ]
            for name, make in self._parts(suite):
                self.progress(Event(kind="stage", stage=name))
                try:
                    ask = make()
                    tasks[name] = self._result([await ask(session) for session in sessions])
                except RequestError as error:
                    unmeasured[name] = str(error)
            kl = None
            try:
                self.progress(Event(kind="stage", stage="KL"))
                kl = await self._kl(suite, sessions)
            except RequestError as error:
                unmeasured["KL"] = str(error)
        return structs.replace(found, tasks=tasks, kl=kl, unmeasured=unmeasured)

    def _parts(self, suite: Suite) -> Iterator[tuple[str, Callable[[], Ask]]]:
        yield "tool calls", partial(ask_tools, self.tasks.tokens or 0)
        for share in SHARES:
            yield f"needle at {share:.0%} of the context", partial(self._needle, suite, share)

    def _needle(self, suite: Suite, share: float) -> Ask:
        if self.context is None:
            raise RequestError("the server does not say how long its context is")
        needles = Needles(encode=self.encode, decode=self.decode, context=self.context, depths=suite.depths)
        return needles.ask(share)

    def _result(self, sides: Sequence[Answered]) -> TaskResult:
        figures: list[dict[str, Number | str | None]] = [
            {EXACT: sum(one.scores.values()) / len(one.scores)} for one in sides
        ]
        usages = [self.usage(one.answers) for one in sides]
        tokens = max(one.prompt_tokens for one in sides[0].answers)
        found = TaskResult(
            figures=figures[0], shots=0, samples=len(sides[0].scores), usage=usages[0], prompt_tokens=tokens
        )
        if len(sides) == 1:
            return found
        paired = {EXACT: pair(sides[0].scores, sides[1].scores)}
        return structs.replace(found, source_figures=figures[1], source_usage=usages[1], paired=paired)

    async def _kl(self, suite: Suite, sessions: Sequence[Session]) -> ServerKl:
        if len(sessions) == 1:
            raise RequestError("needs a server of the source: --source-url")
        wanted = Heldout(windows=suite.windows, length=min(suite.length, (self.context or suite.length + 1) - 1))
        rows = heldout_windows(wanted, self.tokenizer, fewer=True)
        return await measure_kl(sessions[0], sessions[1], rows.token_RT.tolist())


def pair(release: Mapping[str, float], source: Mapping[str, float]) -> Paired:
    """Compare scores on the questions that both have."""
    both = [(release[name], source[name]) for name in sorted(release.keys() & source.keys())]
    gains = [ours - theirs for ours, theirs in both]
    lost, gained = (sum(sign * gain > 0 for gain in gains) for sign in (-1, 1))
    exact = all(score in (0, 1) for scores in both for score in scores)
    return Paired(
        questions=len(both), lost=lost, gained=gained, p_value=mcnemar(lost, gained) if exact else None,
        difference=sum(gains) / max(len(gains), 1), interval=tuple(mean_interval(gains)) if gains else (0.0, 0.0),
    )  # fmt: skip


@contextmanager
def task_file(name: str) -> Iterator[str]:
    """What lm-eval knows a task by: its name, or for ours a file for as long as it runs."""
    if name != GSM8K:
        yield name
        return
    with tempfile.TemporaryDirectory(prefix="fourfold-task-") as folder:
        path = Path(folder) / f"{GSM8K}.yaml"
        questions = str((TEXT / HELDOUT_TEXTS["chat"].file).resolve())
        path.write_text(json.dumps({**GSM8K_TASK, "dataset_kwargs": {"data_files": {"test": questions}}}))
        yield str(path)
