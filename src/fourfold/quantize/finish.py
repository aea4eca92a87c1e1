"""The last step of a run: sidecars, log, metrics, index and config.json, and fourfold.json, which says it is whole."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import os
import platform
import re
import resource
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import msgspec
import torch

import fourfold
from fourfold.core import metrics
from fourfold.datatypes import ShardRecord, StreamDrift
from fourfold.distributed.trace import Span, waited
from fourfold.formats import named
from fourfold.model.family import UP
from fourfold.model.files import copy_file, dump, sidecars, write_text
from fourfold.model.headers import INDEX_NAME
from fourfold.model.hub import hub_name, stated_terms
from fourfold.model.tensors import TensorIndex
from fourfold.quantize import guide
from fourfold.quantize.calibrate import CalibrationRows, HeldoutRows
from fourfold.quantize.claims import draft_prefixes
from fourfold.quantize.estimate import RTN_STEP
from fourfold.quantize.identity import joined_digest
from fourfold.quantize.journal import FINISHED, LOG, METRICS, RECIPE, REFERENCE, Journal, close
from fourfold.quantize.plan import Plan
from fourfold.quantize.streams import Compared
from fourfold.quantize.summary import Summary, read_summary
from fourfold.recipe import dump_recipe
from fourfold.records.log import write_log
from fourfold.records.release import File, HeldoutFacts, Output, Reference, SourceFacts, State, Worker
from fourfold.records.results import Figures, ImageFigures, Metrics, RoutedImages

LIBRARIES = ("torch", "transformers", "tokenizers", "safetensors", "numpy")


@dataclasses.dataclass(frozen=True)
class Measured:
    """Held-out metrics of a run: statistics over positions, of the release and of RTN, and log-probabilities for
    engines (None for a partial output; RTN's without `heldout.yardstick`); drift by layer; what each worker did when;
    routing of image tokens by layer, if there are any.
    """

    statistics: Compared | None
    rtn: Compared | None
    reference: Reference | None
    drifts: tuple[StreamDrift, ...]
    spans: tuple[Span, ...]
    routing: tuple[RoutedImages, ...] = ()


def finish(
    journal: Journal,
    plan: Plan,
    texts: tuple[CalibrationRows, HeldoutRows],
    measured: Measured,
    seconds: dict[str, float],
    tell: Callable[..., None],
) -> Summary:
    """Write everything but the shards, fourfold.json last, and close the journal. Safe to repeat after a kill.

    tell: is told "finish" with the name of each file in turn.
    """
    out, records = journal.out, journal.records
    index = TensorIndex.open_shards(out, [record.shard for record in records])
    drafts = draft_prefixes(plan.source, index.headers)
    more = plan.dense.more_modules(plan.source, drafts)
    settings = named(plan.recipe.format).quantization_config(plan.recipe.scheme.group, drafts, more)
    texts_by_name = {
        RECIPE: dump_recipe(plan.recipe),
        INDEX_NAME: index_json(index),
        "config.json": dump({**plan.source.raw, "quantization_config": settings}),
    }
    for path in sidecars(plan.source.folder):
        tell("finish", text=path.name)
        copy_file(path, out / path.name)
    for name, text in texts_by_name.items():
        tell("finish", text=name)
        write_text(out / name, text)
    tell("finish", text=LOG)
    write_log(out / LOG, (row for record in records for row in record.projections))
    tell("finish", text=METRICS)
    metrics_record(texts[1], measured).write(out / METRICS)
    if measured.reference is not None:
        measured.reference.write(out / REFERENCE)
    tell("finish", text=FINISHED)
    state_record(journal, plan, texts, measured, index, seconds).write(out / FINISHED)
    tell("finish", text="journal")
    close(out)
    return read_summary(out)


def index_json(index: TensorIndex) -> str:
    """model.safetensors.index.json. total_size: bytes of all tensors, without headers."""
    total_size = sum(header.size_bytes for header in index.headers.values())
    weight_map = {name: index.headers[name].shard for name in sorted(index.headers)}
    return dump({"metadata": {"total_size": total_size}, "weight_map": weight_map})


def metrics_record(heldout: HeldoutRows, measured: Measured) -> Metrics:
    """How it was measured, the figures over all positions, drift by layer."""
    figures: dict[str, Any] = {"summary": None}
    if measured.statistics is not None:
        figures = metrics.measurements(measured.statistics.text, window=heldout.token_RT.shape[1] - 1)
    rtn, images = _rtn(measured, heldout.token_RT.shape[1] - 1), image_figures(heldout, measured)
    return Metrics.of(
        figures, measured.drifts, measured_by="quantize", protocol=heldout.protocol, rtn=rtn, images=images
    )


def image_figures(heldout: HeldoutRows, measured: Measured) -> ImageFigures | None:
    """What was measured on held-out images; None without them."""
    if measured.statistics is None or measured.statistics.images is None:
        return None
    rtn = measured.rtn and measured.rtn.images
    return ImageFigures(
        windows=len(heldout.images),
        window=heldout.token_RT.shape[1],
        samples=sum(len(row.samples) for row in heldout.images.values()),
        summary=msgspec.convert(metrics.summarize(measured.statistics.images), Figures),
        rtn=msgspec.convert(metrics.summarize(rtn), Figures) if rtn else None,
        routing=list(measured.routing),
    )


def _rtn(measured: Measured, window: int) -> dict[str, Any] | None:
    """Round-to-nearest on every RTN_STEP-th window, and the release on the same windows."""
    if measured.rtn is None or measured.statistics is None:
        return None
    rtn = measured.rtn.text
    return {
        "windows": len(rtn.kl_T) // window,
        "summary": metrics.summarize(rtn),
        "intervals": metrics.intervals(rtn, window),
        "release": metrics.summarize(metrics.every(measured.statistics.text, window, RTN_STEP)),
    }


def state_record(
    journal: Journal, plan: Plan, texts: tuple[CalibrationRows, HeldoutRows], measured: Measured, index: TensorIndex,
    seconds: dict[str, float],
) -> State:  # fmt: skip
    """fourfold.json. seconds: by stage, of the last start."""
    calibration, heldout = texts
    records = journal.records
    written = [claim for part in plan.parts if part.shard in journal for claim in part.claims]  # all, but in a trial
    methods = Counter(str(row.method) for record in records for row in record.projections)
    return State(
        fourfold=fourfold.__version__,
        partial=plan.partial,
        layers=f"{plan.solve.start}-{plan.solve.stop - 1}",
        identity=journal.identity,
        recipe=plan.recipe.name,
        format=plan.recipe.format,
        model_type=plan.source.family.model_type,
        source=SourceFacts(
            hub=hub_name(plan.source.folder),
            weights=plan.source.kind or "BF16",
            terms=stated_terms(plan.source.folder),
            headers=plan.source.digest,
            content=joined_digest({record.shard: record.source_digest for record in records}),
        ),
        calibration=calibration.facts(),
        heldout=HeldoutFacts(heldout.digest, heldout.protocol),
        output=Output(
            content=joined_digest({record.shard: record.sha256 for record in records}),
            shards={record.shard: File(record.size_bytes, record.sha256) for record in records},
            tensor_bytes=sum(header.size_bytes for header in index.headers.values()),
        ),
        guidance=guide.facts(plan, journal),
        source_tensor_bytes=sum(claim.header.size_bytes for claim in written),
        metrics={} if measured.statistics is None else metrics.summarize(measured.statistics.text),
        devices=device_names(plan.memory.devices),
        device_memory_bytes=device_memory(plan.memory.devices),
        settings=journal.settings,
        versions={
            "python": platform.python_version(),
            **{name: importlib.metadata.version(name) for name in LIBRARIES},
        },
        projections=methods.total(),
        tokens_per_input=_tokens_per_input(plan, records),
        methods=dict(sorted(methods.items())),
        seconds=seconds,
        layer_seconds=_layer_seconds(records),
        peak_memory_bytes=peak_memory(),
        planned_memory_bytes=_planned_memory(plan),
        workers=_workers(plan, measured),
        finished_at=time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    )


def _tokens_per_input(plan: Plan, records: Sequence[ShardRecord]) -> dict[str, float]:
    """Calibration tokens of the layers' experts for each input of gate and up: the mean, and of the coldest tenth."""
    tokens = sorted(row.tokens / plan.work.hidden for record in records for row in record.projections
                    if row.projection == UP and record.layer >= 0)  # fmt: skip
    return {"mean": sum(tokens) / len(tokens), "coldest_tenth": tokens[len(tokens) // 10]} if tokens else {}


def _layer_seconds(records: tuple[ShardRecord, ...]) -> dict[str, float]:
    """Inside the solve, and behind the loop, of all layers; those of earlier runs too, which `seconds` has not."""
    total: Counter[str] = Counter()
    for record in records:
        total.update(record.seconds)
    return dict(total)


def device_names(devices: Sequence[str]) -> dict[str, str]:
    """The machine's processor, and the GPUs that were used."""
    model = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(encoding="utf-8"), re.MULTILINE)
    names = {"cpu": model[1] if model else platform.machine()}
    return names | {device: torch.cuda.get_device_name(device) for device in devices if device != "cpu"}


def device_memory(devices: Sequence[str]) -> dict[str, int]:
    """Return the installed memory of what `device_names` names."""
    memory = {"cpu": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")}
    return memory | {name: torch.cuda.get_device_properties(name).total_memory for name in devices if name != "cpu"}


def peak_memory() -> dict[str, int]:
    """Peak memory of this process so far: resident on the host, allocated on each CUDA device.

    Not getrusage's, where the kernel gives it: that begins with the peak of the process that started this one.
    """
    peak_kb = re.search(r"^VmHWM:\s*(\d+) kB$", Path("/proc/self/status").read_text(encoding="utf-8"), re.MULTILINE)
    peak = {"host": (int(peak_kb[1]) if peak_kb else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss) * 1024}
    if torch.cuda.is_initialized():
        peak |= {f"cuda:{n}": torch.cuda.max_memory_allocated(n) for n in range(torch.cuda.device_count())}
    return peak


def _planned_memory(plan: Plan) -> dict[str, int]:
    """As `peak_memory` has it."""
    memory = plan.memory
    planned = {"host": memory.host_peak_bytes}
    if not memory.on_cpu:
        planned |= {f"cuda:{torch.device(name).index or 0}": memory.device_peak_bytes for name in memory.devices}
    return planned


def _workers(plan: Plan, measured: Measured) -> list[Worker]:
    """Each worker's device, and how long it waited, and whom for, of the time it was there."""
    return [
        Worker(device=plan.memory.devices[rank], waited_seconds=sum(waits.values()), waited_for=waits, of_seconds=whole)
        for rank, (waits, whole) in waited(measured.spans).items()
    ]
