"""What a release lost: source and release on the same held-out text, layer by layer, and their draft heads."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from msgspec import structs

from fourfold.core import metrics
from fourfold.datatypes import Event, FourfoldError, Progress, StreamDrift, ignore
from fourfold.distributed.devices import check_device
from fourfold.model.checkpoint import Checkpoint
from fourfold.model.config import read_source_config
from fourfold.model.head import Head
from fourfold.quantize.calibrate import HeldoutRows, heldout_windows, load_tokenizer
from fourfold.quantize.contamination import refuse_calibrated
from fourfold.quantize.journal import FINISHED, METRICS, read_state, refuse_links
from fourfold.quantize.progress import ProgressReporter
from fourfold.quantize.streams import compare
from fourfold.recipe import Heldout
from fourfold.recipe_table import FILE_KINDS
from fourfold.records.results import Against, Drafted, Drafts, Metrics, Rival
from fourfold.release import drafts
from fourfold.release.suite import Servers, evaluate_servers
from fourfold.release.sweep import Compute, embed, sweep_

Figures = tuple[dict[str, Any], list[StreamDrift]]  # over the text's positions, and by layer
WINDOWS = 64  # by default, or all that a shorter text has
NAME_SOURCE = "Name the checkpoint that was quantized with --source"


@dataclass(frozen=True, kw_only=True)
class Protocol:
    """text: a file in place of the built-in text; windows: None for up to WINDOWS; length: tokens of each; drafts: run
    draft heads; replace: overwrite a measurement on more predictions.
    """

    text: Path | None = None
    windows: int | None = None
    length: int = Heldout.length
    drafts: bool = True
    replace: bool = False


def evaluate(
    out: Path,
    source: Path,
    *,
    protocol: Protocol,
    against: Path | None = None,
    servers: Servers | None = None,
    device: str = "cpu",
    dtype: torch.dtype = torch.bfloat16,
    progress: Progress = ignore,
) -> Metrics:
    """Measure the release in `out`, and a second one, against the BF16 checkpoint in `source`; write OUT/metrics.json.

    dtype: of the arithmetic between the layers; engines run in BF16. Returns the content of metrics.json
    (docs/evaluation.md); parts that this call does not measure are kept. Raises FourfoldError, before the first layer,
    for a release that is unfinished, of another source, in an unknown format, calibrated on the text, or measured on
    more of it already; for a server that does not answer.
    """
    check_device(device)
    refuse_links(out)
    read_source_config(source)
    original = Checkpoint.open(source)
    releases = [open_release(folder, original) for folder in (out, against) if folder is not None]
    before, text = Metrics.find(out / METRICS), read_text(protocol, source)
    if before is not None and not protocol.replace:
        _refuse_smaller(out, before, text)
    rtn = before.rtn if before and before.protocol.same_windows(text.protocol) else None
    overlaps = [refuse_overlap(release.folder, text) for release in releases]
    if servers is not None:
        servers.sides()
    reporter, compute = ProgressReporter(progress, original.layers), Compute(torch.device(device), dtype)
    with torch.no_grad():
        figures = _measure(original, releases, text, compute, reporter)
        drafted = _draft(original, releases, text, compute, reporter) if protocol.drafts else None
    found = Metrics.of(
        *figures[0], measured_by="evaluate", calibration_overlap=overlaps[0],
        source={"name": source.resolve().name, "headers": original.digest},
        protocol=structs.replace(text.protocol, digest=text.digest, dtype=str(dtype).removeprefix("torch.")),
        drafts=before.drafts if before else None, tasks=before.tasks if before else None, rtn=rtn,
        images=before.images if before else None,
    )  # fmt: skip
    if drafted is not None:
        how = drafts.protocol(original, text.token_RT)
        found = structs.replace(found, drafts=Drafts(protocol=how, source=drafted[0], release=drafted[1]))
    for second, values, overlap in zip(releases[1:], figures[1:], overlaps[1:], strict=True):
        kept = drafted[2] if drafted else None
        found = structs.replace(found, rivals=_rivals(found, before, second, values[0]))
        other = Against.of(*values, name=second.folder.resolve().name, calibration_overlap=overlap, drafts=kept)
        found = structs.replace(found, against=other)
    if against is None and before is not None and before.protocol == found.protocol:
        found = structs.replace(found, rivals=before.rivals)
    found.write(out / METRICS)
    if servers is not None:
        found = evaluate_servers(out, servers, progress)
    progress(Event(kind="done", layers=original.layers, data=structs.asdict(found.figures)))
    return found


def _draft(
    original: Checkpoint, releases: list[Checkpoint], text: HeldoutRows, compute: Compute, reporter: ProgressReporter
) -> list[Drafted | None]:
    """Of the source and each release: each on what it writes itself after the same prompts."""
    prompt_RT = drafts.cut_prompts(text.token_RT)
    return [drafts.measure_drafts(one, original, prompt_RT, compute, reporter) for one in (original, *releases)]


def _rivals(found: Metrics, before: Metrics | None, second: Checkpoint, measured: dict[str, Any]) -> list[Rival]:
    """Those that OUT has of this protocol, and the second release."""
    kept = before.rivals if before is not None and before.protocol == found.protocol else []
    rival = Rival(
        name=second.folder.resolve().name,
        format=str(second.format or second.kind or "BF16"),
        size_bytes=sum(header.size_bytes for header in second.disk.headers.values()),
        kl_mean=measured["summary"]["kl_mean"],
    )
    return [*(one for one in kept if one.name != rival.name), rival]


def open_release(folder: Path, source: Checkpoint) -> Checkpoint:
    """A finished release of this source, all its headers checked. Raises FourfoldError for anything else."""
    state = read_state(folder)
    if state is None:
        return Checkpoint.open(folder, source)
    if (headers := state.source.headers) != source.digest:
        digests = f"got headers {source.digest[:16]}..., expected {headers[:16]}..."
        raise FourfoldError(f"{folder}: made from another source than {source.folder}: {digests}. {NAME_SOURCE}")
    release = Checkpoint.open(folder, source)
    _check_kept(release, source)
    return release


def _check_kept(release: Checkpoint, source: Checkpoint) -> None:
    """Headers are alike in all fine-tunes of a model; routers and embeddings are not, and were copied bit for bit."""
    for name in (*source.embedding_names, *source.router_names()):
        if name not in source.headers:
            continue
        if not torch.equal(release.value(name), source.value(name)):
            cause = f"{name} is not that of {source.folder}: made from another checkpoint, or altered"
            raise FourfoldError(f"{release.folder}: {cause}. {NAME_SOURCE}")


def read_text(protocol: Protocol, source: Path) -> HeldoutRows:
    """Windows of the held-out text in the source's tokens."""
    if protocol.text is not None and protocol.text.suffix not in FILE_KINDS:
        raise FourfoldError(f"{protocol.text}: a text of kind {', '.join(FILE_KINDS)} is wanted")
    wanted = Heldout(windows=protocol.windows or WINDOWS, length=protocol.length)
    if protocol.text is not None:
        wanted = dataclasses.replace(wanted, builtin="", path=str(protocol.text))
    fewer = protocol.windows is None
    return heldout_windows(wanted, load_tokenizer(source), fewer=fewer, sizes="--windows or --length")


def refuse_overlap(folder: Path, text: HeldoutRows) -> float | None:
    """Share of the text that the release was calibrated on, None where it is not known. Raises FourfoldError."""
    state = read_state(folder)
    calibrated = state.calibration.shingles if state else None
    if calibrated is None:
        return None
    return refuse_calibrated(text.token_RT, calibrated, str(text.protocol.text), folder / FINISHED)


def _refuse_smaller(out: Path, before: Metrics, text: HeldoutRows) -> None:
    """Raise FourfoldError if OUT holds a measurement on more predictions than these windows have."""
    windows, length = text.token_RT.shape
    predictions, measured = windows * (length - 1), before.summary.positions if before.summary else 0
    if predictions < measured:
        said = before.protocol
        raise FourfoldError(
            f"{out / METRICS}: measured on {said.windows} windows of {said.window} tokens, {measured:,} "
            f"predictions; got {windows} windows of {length}, {predictions:,} predictions.\n"
            "Measure on as many (--windows, --length), or replace the larger measurement with --replace"
        )


def _measure(
    source: Checkpoint, releases: list[Checkpoint], text: HeldoutRows, compute: Compute, reporter: ProgressReporter
) -> list[Figures]:
    """Each release's figures on the text, from one pass of the source."""
    checkpoints = (source, *releases)
    with reporter.stage("embed"):
        rows = [embed(checkpoint, text.token_RT, compute) for checkpoint in checkpoints]
    tokens = sum(stream.token_RT.numel() for stream in rows)

    by_layer = sweep_(
        checkpoints, rows, compute, lambda layer: reporter.stage("advance", layer, tokens, "tokens"),
        lambda layer, drifts: reporter.finish_layer(layer, drifts[0]),
    )  # fmt: skip
    with reporter.stage("measure"):
        head = source.head(compute.device, compute.dtype)
        figures: list[Figures] = []
        for place, release in enumerate(releases):
            statistics = compare((head, _head(release, head, compute)), (rows[0], rows[1 + place]))
            window = text.token_RT.shape[1] - 1
            figures.append((metrics.measurements(statistics, window), [drifts[place] for drifts in by_layer]))
    return figures


def _head(release: Checkpoint, head: Head, compute: Compute) -> Head:
    """The release's own head; its matrix is the source's where both are equal, so that one is held."""
    own = release.head(compute.device, compute.dtype)
    return dataclasses.replace(own, weight_VD=head.weight_VD) if torch.equal(own.weight_VD, head.weight_VD) else own
