"""From a model to a published release: every step that the commands make, in order, resumed where it was stopped."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fourfold import api
from fourfold.datatypes import Event, FourfoldError, Progress, ignore
from fourfold.formats import EXPORTS
from fourfold.install import require_extra
from fourfold.interpreter import find_python
from fourfold.model.hub import check_repo_id
from fourfold.quantize.identity import joined_digest
from fourfold.quantize.journal import METRICS, require_release
from fourfold.recipe import Recipe
from fourfold.records.results import Level, Metrics, Status, Verdict
from fourfold.release.contents import VERDICT, read_export

if TYPE_CHECKING:
    from fourfold.quantize.plan import Plan

RELEASE_ENGINES = ("sglang", "vllm")  # that read a release; the last one's verdict stays in verify.json
SUFFIXES = {"gguf": "-GGUF", "mlx": "-MLX"}  # of their repositories, as others on the Hub name them
EVALUATED_TOKENS = 64 * 2048  # at most, of release and source each; then drafts, about as many passes as that again


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """model: folder or Hub ID; also: of EXPORTS; run: arguments of api.quantize for devices and memory; licence,
    base_model: as of `fourfold report`; private: of every repository.
    """

    model: str
    repo: str
    out: Path
    recipe: Recipe
    also: tuple[str, ...] = ()
    run: dict[str, Any] = dataclasses.field(default_factory=dict)
    derived: bool = False
    base_model: str | None = None
    licence: str | None = None
    private: bool = False

    def folder(self, form: str) -> Path:
        """Where an export is written, beside OUT."""
        return self.out.with_name(f"{self.out.name}-{form}")


@dataclass(frozen=True, kw_only=True)
class StepDone:
    """found: what there is to say of it; seconds: None where it was done before, or is only planned."""

    name: str
    found: str
    seconds: float | None = None
    data: dict[str, Any] = dataclasses.field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Released:
    """failed: the check that stopped it before anything was published, "" if none did."""

    steps: tuple[StepDone, ...]
    failed: str = ""

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


Work = Callable[[Progress], tuple[str, dict[str, Any]]]


@dataclass(frozen=True)
class Step:
    """before: says what there is if the step was done before, "" if not; work: does it and says what came of it."""

    name: str
    before: Callable[[], str]
    work: Work


class CheckFailed(Exception):
    """A verdict that stops the rest. str: what failed."""


def release(wanted: Wanted, progress: Progress = ignore) -> Released:
    """Quantize, evaluate, verify, report, convert, publish. What an earlier call finished is not repeated.

    A failed check stops it before publishing, with the report written. Raises FourfoldError as the commands do.
    """
    check(wanted)
    steps, done = [*_local_steps(wanted), *_hub_steps(wanted)], []
    for number, step in enumerate(steps):
        found, started = step.before(), time.monotonic()
        if found:
            done.append(StepDone(name=step.name, found=f"done before: {found}"))
            continue
        progress(Event(kind="note", text=f"step {number + 1} of {len(steps)}: {step.name}"))
        try:
            found, data = step.work(progress)
        except CheckFailed as failed:
            _report(wanted)
            return Released(steps=tuple(done), failed=f"{step.name}: {failed}")
        done.append(StepDone(name=step.name, found=found, seconds=time.monotonic() - started, data=data))
    return Released(steps=tuple(done))


def plan(wanted: Wanted, progress: Progress = ignore) -> tuple[Plan, Released]:
    """What `release` would do: the plan of the run, and each step with bytes and, as far as predicted, seconds."""
    check(wanted)
    made = api.plan(wanted.model, recipe=wanted.recipe, out=wanted.out, progress=progress, **wanted.run)
    source = sum(header.size_bytes for header in made.source.headers.values())
    size = sum(part.bytes_after for part in made.parts)
    passes = made.time.forward_seconds / max(made.work.calibration_tokens, 1)
    reading = made.time.read_seconds / source
    rows = {
        "quantize": (f"reads {_gb(source)}, writes {_gb(size)}", made.time.seconds),
        "evaluate": (f"{EVALUATED_TOKENS:,} tokens at most, and drafts", passes * EVALUATED_TOKENS * 2),
        "verify": (f"reads {_gb(source + size)}{_engines(RELEASE_ENGINES)}", reading * (source + size)),
        "report": ("writes the card and the page", None),
        "publish": (f"sends {_gb(size)} to {wanted.repo}", None),
    }
    for form in wanted.also:
        rows[f"convert {form}"] = f"reads and writes {_gb(size)} in {wanted.folder(form)}", reading * 2 * size
        rows[f"verify {form}"] = f"reads {_gb(2 * size)}{_engines((EXPORTS[form],))}", reading * 2 * size
        rows[f"publish {form}"] = f"sends {_gb(size)} to {wanted.repo}{SUFFIXES[form]}", None
    steps = [*_local_steps(wanted), *_hub_steps(wanted)]
    planned = [StepDone(name=step.name, found=rows[step.name][0], seconds=rows[step.name][1]) for step in steps]
    return made, Released(steps=tuple(planned))


def check(wanted: Wanted) -> None:
    """Raise FourfoldError, before any work, for what would stop a later step."""
    check_repo_id("REPO", wanted.repo)
    if wanted.base_model is not None:
        check_repo_id("--base-model", wanted.base_model)
    if unknown := [form for form in wanted.also if form not in EXPORTS]:
        raise FourfoldError(f"--also: got {unknown[0]!r}, expected {' or '.join(EXPORTS)}, or both: gguf,mlx")
    for extra in ("report", *(["gguf"] if "gguf" in wanted.also else [])):
        require_extra(extra, "release")
    if wanted.run.get("layers") is not None:
        raise FourfoldError("--layers: got a trial, expected the whole model: a trial is never published")


def _local_steps(wanted: Wanted) -> Iterator[Step]:
    yield Step("quantize", lambda: "", lambda progress: _quantize(wanted, progress))
    yield Step("evaluate", lambda: _evaluated(wanted), lambda progress: _evaluate(wanted, progress))
    yield Step("verify", lambda: _verified(wanted.out), lambda progress: _verify(wanted, progress))
    yield Step("report", lambda: "", lambda _: (_report(wanted), {}))
    for form in wanted.also:
        folder = wanted.folder(form)

        def work(progress: Progress, form: str = form, folder: Path = folder) -> tuple[str, dict[str, Any]]:
            from fourfold.release.export import export

            made = export(wanted.out, folder, form, progress=progress)
            return f"{folder}: {_gb(made.bytes_after)}", made.to_json()

        yield Step(f"convert {form}", lambda folder=folder: _converted(wanted, folder), work)  # type: ignore[misc]
        yield Step(
            f"verify {form}",
            lambda folder=folder: _verified(folder),  # type: ignore[misc]
            lambda progress, folder=folder, form=form: _verify_export(wanted, folder, form, progress),  # type: ignore[misc]
        )


def _hub_steps(wanted: Wanted) -> Iterator[Step]:
    """The Hub knows what it has: sending again sends nothing."""
    for form in ("", *wanted.also):

        def work(progress: Progress, form: str = form) -> tuple[str, dict[str, Any]]:
            from fourfold.release.publish import publish

            folder = wanted.folder(form) if form else wanted.out
            repo = wanted.repo + SUFFIXES.get(form, "")
            sent = publish(folder, repo, private=wanted.private, progress=progress)
            return sent.url, sent.to_json()

        yield Step(f"publish {form}".strip(), lambda: "", work)


def _quantize(wanted: Wanted, progress: Progress) -> tuple[str, dict[str, Any]]:
    done = api.quantize(
        wanted.model, wanted.out, recipe=wanted.recipe, derived=wanted.derived, progress=progress, **wanted.run
    )
    return f"{wanted.out}: {_gb(done.bytes_before)} to {_gb(done.bytes_after)}", done.to_json()


def _evaluated(wanted: Wanted) -> str:
    found = Metrics.find(wanted.out / METRICS)
    return _quality(found) if found and found.measured_by == "evaluate" else ""


def _evaluate(wanted: Wanted, progress: Progress) -> tuple[str, dict[str, Any]]:
    device = wanted.run.get("devices", "auto").partition(",")[0].partition("*")[0]
    found = api.evaluate(wanted.out, source=wanted.model, devices=device, progress=progress)
    return _quality(found), found.to_json()


def _quality(found: Metrics) -> str:
    return f"mean KL divergence {found.figures.kl_mean:.3g} nats, top-1 agreement {found.figures.top1_agreement:.2%}"


def _verified(folder: Path) -> str:
    """Every level that can be run here was passed by what is there now; publish compares the bytes themselves."""
    found = Verdict.find(folder / VERDICT)
    if found is None or not found.passed or Level.SOURCE not in found.levels or found.content != _content(folder):
        return ""
    record = read_export(folder)
    engines = [name for name in ((EXPORTS[record.after],) if record else RELEASE_ENGINES) if find_python(name, None)]
    ran = Level.ENGINE in found.levels and (record or (found.engine and engines[-1:] == _named(found.engine.engine)))
    return _checks(found) if ran or not engines else ""


def _named(engine: str) -> list[str]:
    """ "vLLM 0.32.0": ["vllm"]."""
    return [engine.partition(" ")[0].lower()]


def _content(folder: Path) -> str:
    """The digest that verify.json has of what engines load."""
    if (record := read_export(folder)) is not None:
        return joined_digest({name: file.sha256 for name, file in record.files.items()})
    return require_release(folder).output.content


def _verify(wanted: Wanted, progress: Progress) -> tuple[str, dict[str, Any]]:
    engines: Sequence[str | None] = [name for name in RELEASE_ENGINES if find_python(name, None)] or [None]
    for engine in engines:
        source = wanted.model if engine == engines[-1] else None
        verdict = api.verify(wanted.out, source=source, engine=engine, progress=progress)
        _require_passed(verdict)
    return _checks(verdict), verdict.to_json()


def _verify_export(wanted: Wanted, folder: Path, form: str, progress: Progress) -> tuple[str, dict[str, Any]]:
    engine = EXPORTS[form] if find_python(EXPORTS[form], None) else None
    verdict = api.verify(folder, source=wanted.out, engine=engine, progress=progress)
    _require_passed(verdict)
    _report(wanted, form)
    return _checks(verdict), verdict.to_json()


def _require_passed(verdict: Verdict) -> None:
    failed = [f"{check.name}: {check.evidence}" for check in verdict.checks if check.status is Status.FAIL]
    if not verdict.passed:
        raise CheckFailed("; ".join(failed) or "not every level was run")


def _checks(verdict: Verdict) -> str:
    engine = verdict.engine.engine if verdict.engine else "no engine is installed"
    return f"{len(verdict.checks)} checks passed; {engine}"


def _report(wanted: Wanted, form: str = "") -> str:
    api.report(
        wanted.folder(form) if form else wanted.out,
        repo=wanted.repo + SUFFIXES.get(form, ""),
        base_model=wanted.base_model,
        licence=wanted.licence,
    )
    return "model card" if form else "model card and report.html"


def _converted(wanted: Wanted, folder: Path) -> str:
    """An export of this very release. Raises FourfoldError for one of another."""
    record = read_export(folder) if folder.is_dir() else None
    if record is None:
        return ""
    if record.content != _content(wanted.out):
        raise FourfoldError(f"{folder}: converted from another release than {wanted.out}. Remove it")
    return f"{folder}: {_gb(record.bytes_after)}"


def _engines(names: Sequence[str]) -> str:
    there = [name for name in names if find_python(name, None)]
    return f", runs {' and '.join(there)}" if there else f"; {' and '.join(names)} not installed, not run"


def _gb(size: int) -> str:
    return f"{size / 1e9:,.2f} GB"
