"""fourfold from Python: the four stages that make a release. The command line stands on these functions.

An argument has the name, the meaning and the default of the command's option (`fourfold quantize --help`); docstrings
explain only what differs. A model is a local path or a Hugging Face model ID. `progress` receives every `Event`, from
several threads, and shows the Hub's download bars on stderr. Mistakes that a user can fix raise `FourfoldError`.
Imports wait for a call: `import fourfold` stays fast, and works beside an engine without fourfold's dependencies.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from fourfold.datatypes import Event, FourfoldError, Progress, ignore

if TYPE_CHECKING:
    from fourfold.quantize.plan import Plan
    from fourfold.quantize.summary import Summary
    from fourfold.recipe import Recipe
    from fourfold.records.release import Export
    from fourfold.records.results import Metrics, Verdict
    from fourfold.release.verify.engine import Engine


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
    """Return what `quantize` would do: every tensor with what becomes of it, memory, disk and time.

    Reads config.json, the tokenizer files and the safetensors headers; writes only to the Hub cache. Measures this
    machine for some seconds, unless `machine` names another one.

    Args:
        recipe: preset, path of a .toml file, or a recipe from `fourfold.recipe.load_recipe`.
        memory_bytes, host_bytes: limit of each device and of the host; None for the free memory.
        layers: range of layers of a trial, counted from 0.

    Raises:
        FourfoldError: headers, config.json, tokenizer or recipe do not fit each other; no such model, layers,
            devices or machine; a memory limit that is too low; text that is unreadable, held out or too short.
    """
    if machine is not None and devices != "auto":
        raise FourfoldError("--machine and --devices exclude each other: another machine, or devices of this one")
    from fourfold.quantize.rates import find_machine

    chosen = _recipe(recipe, samples, sequence_length)
    sheet = None if machine is None else find_machine(machine)
    folder = _check(model, chosen, devices, out)
    from fourfold.distributed.devices import expand_devices
    from fourfold.model.hub import resolve_headers
    from fourfold.quantize.microbenchmark import measure_rates
    from fourfold.quantize.plan import make_plan
    from fourfold.quantize.sweep_files import predicted_shares

    workers: Sequence[str] = sheet.devices if sheet else expand_devices(devices)
    given = memory_bytes is not None or host_bytes is not None
    if sheet and not given:
        memory_bytes, host_bytes = sheet.budget_bytes, sheet.host_budget_bytes
    folder = folder or resolve_headers(str(model), progress=progress is not ignore)
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
    """Quantize a checkpoint into the folder `out`, or resume an earlier call.

    On the same devices a resumed run gives the same bytes as an uninterrupted one. Under torchrun every process calls
    this with the same arguments.

    Args:
        recipe, memory_bytes, host_bytes, layers: as of `plan`.

    Returns:
        Projections by method, bytes, held-out metrics, seconds, peak memory.

    Raises:
        FourfoldError: as `plan`; source, recipe or text differ from those `out` was started with; the disk is too
            small. Finished layers stay in `out`.
    """
    from fourfold.model.config import require_derived

    out, chosen = Path(out), _recipe(recipe, samples, sequence_length)
    folder = _check(model, chosen, devices, out)
    if folder is not None:
        require_derived(folder, derived)
    from fourfold.distributed.devices import Machine, expand_devices, under_torchrun
    from fourfold.quantize.summary import finished_already

    if not restart and not under_torchrun():
        done = finished_already(out, lambda: folder or _download(model, progress), chosen, layers)
        if done is not None:
            progress(Event(kind="note", text=f"{out} is finished already; nothing to do"))
            return done
    expand_devices(devices)
    folder = folder or _download(model, progress)
    require_derived(folder, derived)
    _rehearse(folder, progress)
    from fourfold.quantize.run import quantize as run

    strict = memory_bytes is not None or host_bytes is not None
    machine = Machine(devices=devices, memory_bytes=memory_bytes, host_bytes=host_bytes, strict=strict)
    return run(folder, out, chosen, machine=machine, layers=layers, restart=restart, trace=trace, progress=progress)


def evaluate(
    out: str | Path,
    *,
    source: str | Path | None = None,
    text: Path | None = None,
    windows: int | None = None,
    length: int = 2048,
    against: str | Path | None = None,
    drafts: bool = True,
    tasks: Sequence[str] = (),
    url: str | None = None,
    source_url: str | None = None,
    suite: str | None = None,
    replace: bool = False,
    devices: str = "auto",
    progress: Progress = ignore,
) -> Metrics:
    """Measure a release against its source on held-out text, layer by layer; or on servers. Writes OUT/metrics.json.

    Reads int4, FP8 and NVFP4 releases of GPTQModel, llm-compressor, AutoAWQ and AutoRound too.

    Args:
        source: of the measurement layer by layer; None for one on servers alone.
        url, source_url: running servers of the release and of its source.
        suite: quick or full, what the servers are asked; quick if neither this nor `tasks` is given.
        tasks: names of lm-eval tasks, in place of the suite's, or alone.

    Returns:
        The content of metrics.json.

    Raises:
        FourfoldError: the release is unfinished, partial, of another source, in an unknown format, calibrated on the
            text, or already measured on more of it; the server does not answer.
    """
    if url is None and (tasks or source_url or suite):
        raise FourfoldError("--tasks, --suite, --source-url: got no --url, expected the server of the release")
    if url is None and source is None:
        raise FourfoldError("--source: got none, expected the checkpoint that OUT was made from, or a server: --url")
    from fourfold.distributed.devices import one_device
    from fourfold.model.config import check_model, read_config
    from fourfold.quantize.journal import check_checkpoint, read_state

    read_state(Path(out))  # before a model is downloaded
    read_config(Path(out))
    if source is not None:
        check_model(source)
    if against is not None:
        check_checkpoint(against, whole=True)
    device = one_device(devices)
    from fourfold.release.evaluate import Protocol
    from fourfold.release.evaluate import evaluate as run
    from fourfold.release.suite import Servers, evaluate_servers

    protocol = Protocol(text=text, windows=windows, length=length, drafts=drafts, replace=replace)
    servers = None if url is None else Servers.of(url, source_url, suite, tasks)
    if source is None:
        assert servers is not None
        return evaluate_servers(Path(out), servers, progress)
    model, second = _download(source, progress), None if against is None else _download(against, progress)
    return run(Path(out), model, protocol=protocol, against=second, servers=servers, device=device, progress=progress)


def verify(
    out: str | Path,
    *,
    source: str | Path | None = None,
    engine: str | None = None,
    python: Path | None = None,
    load: int | None = None,
    signature: str = "",
    issuer: str = "",
    timeout: float = 60,
    progress: Progress = ignore,
) -> Verdict:
    """Check a release: its files, every tensor against the source, a run in an engine. Writes OUT/verify.json.

    Args:
        out: folder of a finished release, or of GGUF or MLX output of `convert`, whose `source` is the release. With
            `load` also the address of a running server, of which nothing is written.
        timeout: minutes for each start of the engine, or for each request to a server.

    Returns:
        All checks with their evidence; `passed` is whether all requested checks have passed.

    Raises:
        FourfoldError: `out` is not a finished release, is being written, or was not made from `source`; the engine is
            not installed; `python` is not a Python, or is given without an engine; no server answers at `out`, or one
            of another model than `source`.
    """
    at_server = str(out).startswith(("http://", "https://"))
    if load is not None:
        from fourfold.release.verify.load import check_size

        check_size(load)
    from fourfold.release.signature import find_signer

    signer = find_signer(signature, issuer)
    if at_server:
        return _verify_server(str(out), source, engine or python or signer, load, timeout, progress)
    if python is not None and engine is None:
        raise FourfoldError("--python is of use with --engine only; wanted both, or neither")
    from fourfold.model.config import check_model, read_config
    from fourfold.quantize.journal import check_checkpoint, require_release
    from fourfold.release.contents import read_export

    record = read_export(Path(out))
    if record is None:
        require_release(Path(out))
        read_config(Path(out))
    _check_engine(Path(out), record, engine, load)
    if source is not None:
        check_model(source) if record is None else check_checkpoint(source, whole=True)
    # Looked for first: a missing engine must cost neither a download nor a read.
    runner = None if engine is None else _find_engine(engine, python, Path(out), timeout)
    model = None if source is None else _download(source, progress)
    if record is not None:
        from fourfold.release.verify.export import verify_export

        return verify_export(Path(out), record, out=model, engine=runner, signer=signer, progress=progress)
    from fourfold.release.verify.run import verify as run

    return run(Path(out), model=model, engine=runner, load=load, signer=signer, progress=progress)


def _check_engine(out: Path, record: Export | None, engine: str | None, load: int | None) -> None:
    """record: of what `convert` wrote for one engine."""
    from fourfold.formats import EXPORTS

    runs_in = ("vllm", "sglang") if record is None else (EXPORTS[record.after],)
    if engine is not None and engine not in runs_in:
        raise FourfoldError(f"--engine: got {engine}, expected {' or '.join(runs_in)} for {out}")
    if load is not None and engine != "vllm":
        got = f"--engine {engine}" if engine else "no --engine"
        raise FourfoldError(f"--load: got {got}, expected --engine vllm, or a running server: fourfold verify URL")


def _find_engine(engine: str, python: Path | None, out: Path, timeout: float) -> Engine:
    """timeout: in minutes."""
    from fourfold.interpreter import require_python
    from fourfold.quantize.journal import STATE
    from fourfold.release.verify.engine import Engine

    found = require_python(engine, python)
    return Engine(name=engine, python=found, logs=out / STATE, limit_seconds=timeout * 60)


def _verify_server(
    url: str, source: str | Path | None, unused: object, load: int | None, timeout: float, progress: Progress
) -> Verdict:
    """source: the release that is served."""
    if load is None or unused is not None:
        got = "no --load" if load is None else "--engine, --python or --signature"
        raise FourfoldError(f"{url}: got {got}, expected --load N alone: a server that runs is tested under load")
    if source is not None:
        from fourfold.quantize.journal import require_release

        require_release(Path(source))
    from fourfold.release.verify.server import verify_server

    return verify_server(url, load, None if source is None else Path(source), timeout * 60, progress)


def report(
    out: str | Path,
    *,
    against: str | Path | None = None,
    repo: str | None = None,
    base_model: str | None = None,
    licence: str | None = None,
) -> tuple[dict[Path, str], list[str]]:
    """Write a release's model card, its plots and report.html; of GGUF and MLX the card alone.

    Args:
        repo: Repository of the release on the Hub; None: the folder's name.

    Returns:
        What each path that was written is, and lines on what was not measured.

    Raises:
        FourfoldError: `out` or `against` is no finished release; a name that the Hub does not take; the extra `report`
            is not installed.
    """
    from fourfold.model.hub import check_repo_id
    from fourfold.release.contents import read_export

    out, against = Path(out), None if against is None else Path(against)
    if repo is not None:
        check_repo_id("--repo", repo)
    record = read_export(out)
    if record is None:
        _require_reportable(out, against)
    elif against:
        raise FourfoldError(f"--against: got {against}, expected none: a GGUF or MLX release is not compared")
    from fourfold.release.report.about import About
    from fourfold.release.report.make import make

    return make(out, record, About(name=repo or out.resolve().name, base_model=base_model, licence=licence), against)


def _require_reportable(out: Path, against: Path | None) -> None:
    from fourfold.install import require_extra
    from fourfold.model.config import read_config
    from fourfold.quantize.journal import require_release

    for folder in filter(None, (out, against)):
        require_release(folder)
        read_config(folder)
    require_extra("report", "report")


def _recipe(recipe: Recipe | str | Path, samples: int | None, sequence_length: int | None) -> Recipe:
    from fourfold.recipe import Recipe, load_recipe, resize_calibration

    chosen = recipe if isinstance(recipe, Recipe) else load_recipe(str(recipe))
    return resize_calibration(chosen, samples, sequence_length)


def _download(model: str | Path, progress: Progress) -> Path:
    from fourfold.model.hub import resolve_model

    return resolve_model(str(model), progress=progress is not ignore)


def _check(model: str | Path, recipe: Recipe, devices: str, out: Path | None) -> Path | None:
    """Check arguments, paths and config.json before torch is imported. The model's folder, None for a Hub ID."""
    from fourfold.distributed.devices import parse_devices, under_torchrun
    from fourfold.model.config import local_folder, read_source_config
    from fourfold.quantize.contamination import check_sources, check_texts
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


def _rehearse(folder: Path, progress: Progress) -> None:
    """Run a small copy of an architecture without tests. Raises FourfoldError if it differs from transformers."""
    from fourfold.model.config import family_in

    if family_in(folder).derived:
        from fourfold.model.checkpoint import Checkpoint
        from fourfold.model.rehearsal import rehearse

        progress(Event(kind="stage", stage="rehearse"))
        rehearse(Checkpoint.open_source(folder))


def follows() -> bool:
    """Whether torchrun started this process as one of several, and not as the first."""
    from fourfold.distributed.devices import under_torchrun

    return under_torchrun() and os.environ.get("RANK", "0") != "0"
