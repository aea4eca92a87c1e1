"""fourfold from Python: the four stages that make a release. The command line stands on these functions.

Arguments are named as the flags are. A model is a folder, or org/name or org/name@revision of the Hub. `progress` is
told every `Event`, from several threads; where it is given, download bars of the Hub are shown on stderr as well. What
a user can mend is raised as `FourfoldError`, before the first expensive step wherever it can be known by then.

Imports wait for a call: `import fourfold` must stay quick, and work beside an engine that has no other part of it.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fourfold.datatypes import Event, FourfoldError, Progress, ignore

if TYPE_CHECKING:
    from fourfold.model.family import Family
    from fourfold.quantize.plan import Plan
    from fourfold.quantize.summary import Summary
    from fourfold.recipe import Recipe
    from fourfold.release.verify.check import Verdict


def plan(
    model: str | Path,
    *,
    recipe: Recipe | str | Path = "best",
    samples: int | None = None,
    sequence_length: int | None = None,
    devices: str = "auto",
    memory_bytes: int | None = None,
    host_bytes: int | None = None,
    machine: str | None = None,
    layers: range | None = None,
    out: Path | None = None,
    progress: Progress = ignore,
) -> Plan:
    """What `quantize` would do: every tensor with what becomes of it, memory, disk and time.

    Reads config.json, the tokenizer files and the safetensors headers, and writes nothing but the Hub's cache. Measures
    this machine for some seconds; with `machine`, another one is predicted from its data sheet and nothing is measured.

    Args:
        recipe: the name of a preset, the path of a .toml file, or what `fourfold.recipe.load_recipe` gives.
        samples: of calibration text in all; the recipe's sources keep their proportions. None: as the recipe has them.
        sequence_length: tokens of a sample; None: the recipe's.
        devices: "auto", "all", "cpu", "cpu*4", "cuda:0,cuda:1": a worker for each.
        memory_bytes: what the run may take on each GPU, or on the CPU; None for what is free.
        host_bytes: the same of the host's memory.
        machine: "rtx3060x4", "h200" or "a100x8"; excludes `devices`.
        layers: a trial on these alone, counted from 0.
        out: where the release would go, if free disk space is to be looked at, and what a sweep there has told.
        progress: is told that the machine is being measured.

    Raises:
        FourfoldError: headers, config.json, tokenizer or recipe do not fit each other; no such model, layers,
            devices or machine; a budget that cannot be kept; text that cannot be read, is held out or too short.
    """
    if machine is not None and devices != "auto":
        raise FourfoldError("--machine and --devices exclude each other: another machine, or devices of this one")
    from fourfold.quantize.rates import find_machine

    chosen = _recipe(recipe, samples, sequence_length)
    sheet = None if machine is None else find_machine(machine)
    folder = _check(model, chosen, devices, out)
    from fourfold.quantize.devices import expand_devices
    from fourfold.quantize.guide import predicted_shares
    from fourfold.quantize.microbenchmark import measure_rates
    from fourfold.quantize.plan import make_plan

    workers: Sequence[str] = sheet.devices if sheet else expand_devices(devices)
    given = memory_bytes is not None or host_bytes is not None
    if sheet and not given:
        memory_bytes, host_bytes = sheet.budget_bytes, sheet.host_budget_bytes
    folder = folder or _download(model, progress)
    _rehearse(folder, progress)
    made = make_plan(
        folder, chosen, devices=workers, memory_bytes=memory_bytes, host_bytes=host_bytes, layers=layers, out=out
    )
    if given:
        made.require_memory()
    made = replace(made, predicted_shares=predicted_shares(made, out))
    if sheet:
        return made.timed(sheet.rates)
    progress(Event(kind="stage", stage="gauge"))
    return made.timed(measure_rates(workers[0]))


def quantize(
    model: str | Path,
    out: str | Path,
    *,
    recipe: Recipe | str | Path = "best",
    samples: int | None = None,
    sequence_length: int | None = None,
    devices: str = "auto",
    memory_bytes: int | None = None,
    host_bytes: int | None = None,
    layers: range | None = None,
    derived: bool = False,
    restart: bool = False,
    trace: Path | None = None,
    progress: Progress = ignore,
) -> Summary:
    """Quantize a BF16 checkpoint into the folder `out`, or go on where an earlier call was cut off.

    On the same devices a run that was cut off ends with the same bytes as one that was not. Under torchrun every
    process calls this with the same arguments.

    Args:
        recipe, samples, sequence_length, devices, memory_bytes, host_bytes, layers: as of `plan`. The output of a trial
            is marked partial.
        derived: quantize an architecture that fourfold's tests do not have; a small copy of it is run first.
        restart: drop what an earlier run left in `out`.
        trace: write there what each worker did when, for chrome://tracing or ui.perfetto.dev.
        progress: is told stages and finished layers, with the drift and the peak memory so far.

    Returns:
        What the run came to: projections by method, bytes, held-out metrics, seconds, peak memory.

    Raises:
        FourfoldError: as `plan`; source, recipe or text are not those that `out` was begun with; the disk is too small.
            What is finished stays in `out`.
    """
    out, chosen = Path(out), _recipe(recipe, samples, sequence_length)
    folder = _check(model, chosen, devices, out)
    if folder is not None:
        _require_asked(folder, derived)
    from fourfold.quantize.devices import Machine, expand_devices, under_torchrun
    from fourfold.quantize.summary import finished_already

    if not restart and not under_torchrun():
        done = finished_already(out, lambda: folder or _download(model, progress), chosen, layers)
        if done is not None:
            progress(Event(kind="note", text=f"{out} is finished already; nothing to do"))
            return done
    expand_devices(devices)
    folder = folder or _download(model, progress)
    _require_asked(folder, derived)
    _rehearse(folder, progress)
    from fourfold.quantize.run import quantize as run

    given = memory_bytes is not None or host_bytes is not None
    taken = Machine(devices=devices, memory_bytes=memory_bytes, host_bytes=host_bytes, strict=given)
    return run(folder, out, chosen, machine=taken, layers=layers, restart=restart, trace=trace, progress=progress)


def evaluate(
    out: str | Path,
    *,
    source: str | Path,
    text: Path | None = None,
    windows: int | None = None,
    length: int = 2048,
    against: str | Path | None = None,
    drafts: bool = True,
    tasks: Sequence[str] = (),
    url: str | None = None,
    replace: bool = False,
    devices: str = "auto",
    progress: Progress = ignore,
) -> dict[str, Any]:
    """Measure what a release lost against the checkpoint it was made of, on held-out text, layer by layer.

    Reads releases of GPTQModel, llm-compressor and AutoRound too. Writes OUT/metrics.json.

    Args:
        out: folder of a finished release.
        source: the BF16 checkpoint.
        text: .txt, or .jsonl or .parquet with a field `text`; None for the built-in text.
        windows: so many of the text; None for up to 64.
        length: tokens of a window.
        against: a second release, measured in the same pass.
        drafts: run the draft (MTP) heads, too.
        tasks: names of lm-eval's tasks, for the server at `url`; both or neither.
        replace: a measurement on more predictions gives way to this one.
        devices: one: "auto", "cpu" or "cuda:N".
        progress: is told stages and finished layers.

    Returns:
        What stands in metrics.json.

    Raises:
        FourfoldError: the release is unfinished, partial, of another source, of a quantization that is not read,
            calibrated on the text, or measured on more of it already; the server does not answer.
    """
    if bool(tasks) != bool(url):
        raise FourfoldError("--tasks and --url go together: which tasks, and the server to ask")
    from fourfold.model.config import check_model, read_config
    from fourfold.quantize.devices import one_device
    from fourfold.quantize.journal import check_checkpoint, read_state

    read_state(Path(out))  # before a model is downloaded
    read_config(Path(out))
    check_model(source)
    if against is not None:
        check_checkpoint(against, whole=True)
    device = one_device(devices)
    from fourfold.release.evaluate import Protocol
    from fourfold.release.evaluate import evaluate as run
    from fourfold.release.tasks import Tasks

    return run(
        Path(out),
        _download(source, progress),
        protocol=Protocol(text=text, windows=windows, length=length, drafts=drafts, replace=replace),
        against=None if against is None else _download(against, progress),
        tasks=Tasks(names=tuple(tasks), url=url) if url else None,
        device=device,
        progress=progress,
    )


def verify(
    out: str | Path,
    *,
    source: str | Path | None = None,
    engine: str | None = None,
    python: Path | None = None,
    timeout: float = 60,
    progress: Progress = ignore,
) -> Verdict:
    """Check a release: its files, every tensor against the source, a run in a real engine. Writes OUT/verify.json.

    Args:
        out: folder of a finished release, or of what `convert` wrote as GGUF or for MLX.
        source: the checkpoint it was made of: every tensor is compared with it. For GGUF and MLX: the release.
        engine: "vllm" (loads and runs it), "sglang" (loads it), "llama.cpp" or "mlx".
        python: interpreter of the engine's environment; None for the first on PATH that has it.
        timeout: minutes that each start of the engine may take.
        progress: is told how many bytes are read, and that the engine runs.

    Returns:
        All checks with what was seen; `passed` says whether what was asked for has passed.

    Raises:
        FourfoldError: `out` is no finished release, is being written, or was not made of `source`; the engine is not
            installed; `python` runs no Python, or is given without an engine.
    """
    if python is not None and engine is None:
        raise FourfoldError("--python is of use with --engine only; wanted both, or neither")
    from fourfold.formats import EXPORTS
    from fourfold.interpreter import require_python
    from fourfold.model.config import check_model, read_config
    from fourfold.quantize.journal import check_checkpoint, require_release
    from fourfold.release.contents import read_export

    record = read_export(Path(out))
    if record is None:
        require_release(Path(out))
        read_config(Path(out))
    runs_in = ("vllm", "sglang") if record is None else (EXPORTS[record["after"]],)
    if engine is not None and engine not in runs_in:
        raise FourfoldError(f"--engine: got {engine}, expected {' or '.join(runs_in)} for {out}")
    if source is not None and record is None:
        check_model(source)
    elif source is not None:
        check_checkpoint(source, whole=True)
    found = None  # the engine is looked for first: a missing one must cost neither a download nor a read
    if engine is not None:
        found = require_python(engine, python)
    from fourfold.release.verify.run import Asked
    from fourfold.release.verify.run import verify as run

    asked = None if engine is None or found is None else Asked(name=engine, python=found, limit_seconds=timeout * 60)
    model = None if source is None else _download(source, progress)
    if record is not None:
        from fourfold.release.verify.export import verify_export

        return verify_export(Path(out), record, out=model, engine=asked, progress=progress)
    return run(Path(out), model=model, engine=asked, progress=progress)


def _recipe(recipe: Recipe | str | Path, samples: int | None, sequence_length: int | None) -> Recipe:
    from fourfold.recipe import Recipe, load_recipe, resize_calibration

    chosen = recipe if isinstance(recipe, Recipe) else load_recipe(str(recipe))
    return resize_calibration(chosen, samples, sequence_length)


def _download(model: str | Path, progress: Progress) -> Path:
    from fourfold.model.hub import resolve_model

    return resolve_model(str(model), progress=progress is not ignore)


def _check(model: str | Path, recipe: Recipe, devices: str, out: Path | None) -> Path | None:
    """The model's folder, None for a Hub ID. All that arguments, paths and config.json tell, before torch is there."""
    from fourfold.model.config import local_folder, read_source_config
    from fourfold.quantize.contamination import check_sources, check_texts
    from fourfold.quantize.devices import parse_devices, under_torchrun
    from fourfold.quantize.journal import check_out

    parse_devices(devices)
    check_sources(recipe)
    folder = local_folder(model)
    if out is not None and not under_torchrun():
        check_out(out, folder)
    if folder is not None:
        read_source_config(folder)
    check_texts(recipe)
    return folder


def _family(folder: Path) -> Family:
    from fourfold.model.config import CONFIG, find_family, read_source_config

    return find_family(read_source_config(folder), folder / CONFIG)


def _require_asked(folder: Path, derived: bool) -> None:
    family = _family(folder)
    if family.derived and not derived:
        raise FourfoldError(
            f"{folder}: {family.model_type} is not among the architectures that fourfold's tests have (docs/models.md "
            "lists them). `fourfold plan` runs a small copy of it; add --derived to quantize it, and the card says so"
        )


def _rehearse(folder: Path, progress: Progress) -> None:
    """Of an architecture that no test proves. Raises FourfoldError where it is not what transformers computes."""
    if _family(folder).derived:
        from fourfold.model.rehearsal import rehearse
        from fourfold.model.skeleton import Skeleton

        progress(Event(kind="stage", stage="rehearse"))
        rehearse(Skeleton.open(folder))


def follows() -> bool:
    """Whether torchrun started this process as one of several, and not as the first."""
    from fourfold.quantize.devices import under_torchrun

    return under_torchrun() and os.environ.get("RANK", "0") != "0"
