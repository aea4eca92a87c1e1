"""THE LOOP: a BF16 checkpoint folder in, an int4 release folder out, layer by layer."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch

from fourfold.core.metrics import Statistics
from fourfold.datatypes import Event, FourfoldError, LayerResult, Progress, ShardRecord, StreamDrift
from fourfold.model.layer import DecoderLayer, LayerTensors, build_layer
from fourfold.quantize import calibrate, output, streams
from fourfold.quantize.journal import (
    Identity,
    Journal,
    Settings,
    check_out,
    clear,
    finished_identity,
    hold,
    log,
    open_journal,
    refuse_changes,
)
from fourfold.quantize.observe import Batches
from fourfold.quantize.output import ReadAhead, Summary, Writer
from fourfold.quantize.plan import LayerPlan, Plan, make_plan
from fourfold.quantize.solve import solve_layer
from fourfold.recipe import Recipe


def ignore(event: Event) -> None:
    """A progress callback for those who do not watch."""


@dataclass
class Watch:
    """Tells progress and adds up seconds by stage."""

    progress: Progress
    layers: int
    seconds: dict[str, float] = field(default_factory=lambda: defaultdict(float))

    @contextmanager
    def stage(self, stage: str, layer: int = -1) -> Iterator[None]:
        self.progress(Event(kind="stage", stage=stage, layer=layer, layers=self.layers))
        start = time.perf_counter()
        yield
        self.seconds[stage] += time.perf_counter() - start


@dataclass(frozen=True, kw_only=True)
class Job:
    """A planned run with its texts, its journal and who watches."""

    plan: Plan
    out: Path
    device: torch.device
    calibration: calibrate.CalibrationRows
    heldout: calibrate.HeldoutRows
    journal: Journal
    watch: Watch


def quantize(
    model: Path,
    out: Path,
    recipe: Recipe,
    *,
    device: str = "cpu",
    memory_bytes: int | None = None,
    layers: range | None = None,
    restart: bool = False,
    progress: Progress = ignore,
) -> Summary:
    """Quantize the checkpoint in `model` into `out`, or go on where an earlier run of the same command was cut off.

    device: a torch device; memory_bytes: budget for its moments and solve; layers: solve only these (a trial, the
    output is partial); restart: drop what an earlier run left in `out`. Returns what the run came to.
    Raises FourfoldError for anything the user can mend; nothing is lost then, the same command goes on.
    """
    check_out(out, model)
    plan = make_plan(model, recipe, device=device, memory_bytes=memory_bytes, layers=layers, out=out)
    plan.require_disk()
    with hold(out):
        if restart:
            clear(out)
        watch = Watch(_logged(out, progress), len(plan.layers))
        try:
            return _run(plan, out, recipe, torch.device(device), watch)
        except FourfoldError as error:
            log(out, f"error: {error}")
            raise


def _logged(out: Path, progress: Progress) -> Progress:
    def tell(event: Event) -> None:
        if event.kind != "stage" or event.done == 0:
            log(out, " ".join(filter(None, [event.kind, event.stage, f"layer {event.layer}" * (event.layer >= 0), event.text])))
        progress(event)

    return tell


def _run(plan: Plan, out: Path, recipe: Recipe, device: torch.device, watch: Watch) -> Summary:
    for warning in plan.warnings:
        watch.progress(Event(kind="note", text=warning))
    with watch.stage("calibrate"):
        tokenizer = calibrate.load_tokenizer(plan.index.folder)
        calibration, heldout = calibrate.collect(recipe, tokenizer), calibrate.heldout(recipe, tokenizer)
    for note in calibration.notes:
        watch.progress(Event(kind="note", text=note))
    identity = Identity(
        recipe=recipe.digest(),
        source=output.source_digest(plan),
        calibration=calibration.digest,
        heldout=heldout.digest,
        layers=f"{plan.solve.start}-{plan.solve.stop - 1}",
    )
    finished = finished_identity(out)
    if finished is not None:
        refuse_changes(out, identity, finished)
        watch.progress(Event(kind="note", text=f"{out} is finished already; nothing to do"))
        return output.read_summary(out)
    settings = Settings(
        batches=Batches(plan.memory.row_batch, plan.memory.token_batch, plan.memory.chunk_experts),
        threads=torch.get_num_threads(),
    )
    journal = open_journal(out, identity, settings)
    torch.set_num_threads(journal.settings.threads)
    job = Job(plan=plan, out=out, device=device, calibration=calibration, heldout=heldout, journal=journal, watch=watch)
    statistics, drifts = run_layers(job)
    with watch.stage("finish"):
        return output.finish(job.plan, out, journal, calibration, heldout, statistics, drifts, dict(watch.seconds))


@torch.no_grad()
def run_layers(job: Job) -> tuple[Statistics | None, list[StreamDrift]]:
    """Both streams through all layers; every layer solved once, in this run or an earlier one."""
    plan, watch, batches = job.plan, job.watch, job.journal.settings.batches
    drifts: list[StreamDrift] = []
    with watch.stage("embed"):
        source, release = streams.embed(
            plan.index, plan.skeleton, job.calibration.token_RT, job.heldout.token_RT, plan.recipe.solver.asymmetric
        )
    with ReadAhead(plan) as ahead, Writer() as writer:
        writer.submit(partial(copy_rest, job))
        for layer_plan in plan.layers[: plan.solve.stop]:
            layer_index = layer_plan.index
            with watch.stage("read", layer_index):
                tensors = ahead.take(layer_index)
                layer = build_layer(plan.skeleton, layer_index, tensors, job.device)
            with watch.stage("attend", layer_index):
                traffic = streams.attend(layer, source, release, batches)
            release_layer = layer
            if layer_plan.shard in job.journal:
                release_layer = restore(job, layer_plan, layer, tensors)
            elif layer_index in plan.solve:
                result = solve(job, layer_plan, layer, traffic)
                release_layer = with_result(layer, result)
                writer.submit(partial(write_layer, job, layer_plan, tensors, result))
            with watch.stage("advance", layer_index):
                source, release, drift = streams.advance((layer, release_layer), traffic, (source, release), batches)
            drifts.append(drift)
            watch.progress(layer_event(layer_plan, drift, len(plan.layers)))
        writer.join()
    if plan.partial:
        return None, drifts
    with watch.stage("measure"):
        return streams.measure(plan.index, plan.skeleton, source.heldout, release.heldout, job.device), drifts
