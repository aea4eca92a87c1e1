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

from fourfold.datatypes import Event, FourfoldError, LayerResult, Progress, ShardRecord, StreamDrift, Tick
from fourfold.model.layer import DecoderLayer, LayerTensors, build_layer
from fourfold.quantize import calibrate, finish, output, streams
from fourfold.quantize.finish import Measured, Summary
from fourfold.quantize.journal import (
    Identity,
    Journal,
    Settings,
    check_out,
    clear,
    close,
    finished_identity,
    hold,
    log,
    open_journal,
    refuse_changes,
)
from fourfold.quantize.memory import give_back_free_memory
from fourfold.quantize.observe import Batches, Traffic
from fourfold.quantize.output import ReadAhead, Writer
from fourfold.quantize.plan import LayerPlan, Plan, make_plan
from fourfold.quantize.solve import solve_layer
from fourfold.recipe import Recipe

Texts = tuple[calibrate.CalibrationRows, calibrate.HeldoutRows]


def ignore(event: Event) -> None:
    """A progress callback for those who do not watch."""


@dataclass
class Watch:
    """Tells progress and adds up seconds by stage. layers: that rows go through in this run."""

    progress: Progress
    layers: int
    seconds: dict[str, float] = field(default_factory=lambda: defaultdict(float))

    def tell(self, stage: str, layer: int = -1, text: str = "") -> None:
        self.progress(Event(kind="stage", stage=stage, layer=layer, layers=self.layers, text=text))

    @contextmanager
    def stage(self, stage: str, layer: int = -1, total: int = 0, unit: str = "") -> Iterator[Tick]:
        """A timed stage of `total` units, of which the tick it yields tells how many more are done."""
        done = 0

        def tick(count: int) -> None:
            nonlocal done
            done += count
            self.progress(
                Event(kind="stage", stage=stage, layer=layer, layers=self.layers, done=done, total=total, unit=unit)
            )

        self.tell(stage, layer)
        give_back_free_memory()
        start = time.perf_counter()
        yield tick
        self.seconds[stage] += time.perf_counter() - start

    def finished(self, layer: int, drift: StreamDrift) -> None:
        data: dict[str, object] = {"hidden_error": drift.hidden_error, "memory_bytes": finish.peak_memory()}
        if drift.router_agreement is not None:
            data["router_agreement"] = drift.router_agreement
        self.progress(Event(kind="layer", layer=layer, layers=self.layers, data=data))


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
    watch = Watch(progress, plan.solve.stop)
    texts = read_texts(plan, watch)  # the last of what can be wrong before OUT is touched
    with hold(out):
        if restart:
            clear(out)
        watch.progress = _logged(out, progress)
        threads = torch.get_num_threads()
        try:
            return _run(plan, texts, out, torch.device(device), watch)
        except FourfoldError as error:
            log(out, f"error: {error}")
            raise
        finally:
            torch.set_num_threads(threads)  # a run that goes on takes its first start's


def read_texts(plan: Plan, watch: Watch) -> Texts:
    """Calibration rows and held-out rows in the model's tokens. Raises FourfoldError for text that will not do."""
    with watch.stage("calibrate"):
        tokenizer = calibrate.load_tokenizer(plan.index.folder)
        heldout = calibrate.heldout(plan.recipe, tokenizer)
        return calibrate.collect(plan.recipe, tokenizer, progress=watch.progress), heldout


def _logged(out: Path, progress: Progress) -> Progress:
    def tell(event: Event) -> None:
        if event.kind != "stage" or event.done == 0:
            layer = f"layer {event.layer}" if event.layer >= 0 else ""
            log(out, " ".join(filter(None, [event.kind, event.stage, layer, event.text])))
        progress(event)

    return tell


def _run(plan: Plan, texts: Texts, out: Path, device: torch.device, watch: Watch) -> Summary:
    calibration, heldout = texts
    for note in (*plan.warnings, *calibration.notes):
        watch.progress(Event(kind="note", text=note))
    identity = Identity(
        recipe=plan.recipe.digest(),
        source=output.source_digest(plan.index),
        calibration=calibration.digest,
        heldout=heldout.digest,
        layers=f"{plan.solve.start}-{plan.solve.stop - 1}",
    )
    finished = finished_identity(out)
    if finished is not None:
        refuse_changes(out, identity, finished)
        close(out)  # a run killed after its last file left its journal
        watch.progress(Event(kind="note", text=f"{out} is finished already; nothing to do"))
        return finish.read_summary(out)
    settings = Settings(
        batches=Batches(plan.memory.row_batch, plan.memory.token_batch, plan.memory.chunk_experts),
        threads=torch.get_num_threads(),
    )
    journal = open_journal(out, identity, settings)
    torch.set_num_threads(journal.settings.threads)
    job = Job(plan=plan, out=out, device=device, calibration=calibration, heldout=heldout, journal=journal, watch=watch)
    measured = run_layers(job)
    summary = finish.finish(journal, plan, (calibration, heldout), measured, watch.seconds, watch.tell)
    watch.progress(Event(kind="done", layers=watch.layers, data=summary.to_json()))
    return summary


@torch.no_grad()
def run_layers(job: Job) -> Measured:
    """Both streams through all layers; every layer solved once, in this run or an earlier one."""
    plan, watch, batches = job.plan, job.watch, job.journal.settings.batches
    drifts: list[StreamDrift] = []
    with watch.stage("embed"):
        texts = job.calibration.token_RT, job.heldout.token_RT
        source, release = streams.embed(plan.index, plan.skeleton, *texts, plan.recipe.solver.asymmetric)
    with ReadAhead(plan) as ahead, Writer() as writer:
        writer.submit(partial(copy_rest, job))
        for layer_plan in plan.layers[: plan.solve.stop]:
            with watch.stage("read", layer_plan.index):
                tensors = ahead.take(layer_plan.index)  # was read while the layer before was worked on
                layer = build_layer(plan.skeleton, layer_plan.index, tensors, job.device)
            tokens = streams.attended_tokens(source, release)
            with watch.stage("attend", layer_plan.index, tokens, "tokens") as tick:
                traffic = streams.attend(layer, source, release, batches, tick)
            if layer_plan.shard in job.journal:
                release_layer = restore_layer(job, layer_plan, layer, tensors)
            elif layer_plan.index in plan.solve:
                result = solve(job, layer_plan, layer, traffic)
                release_layer = layer.with_experts(result.gate_up_ENK, result.down_ENK)  # None, None of a dense layer
                writer.submit(partial(write_layer, job, layer_plan, tensors, result))
            else:
                release_layer = layer
            if layer_plan.index + 1 == plan.solve.stop:
                source, release = source.without_calibration(), release.without_calibration()
            with watch.stage("advance", layer_plan.index, source.tokens + release.tokens, "tokens") as tick:
                layers, both_streams = (layer, release_layer), (source, release)
                source, release, drift = streams.advance(layers, traffic, both_streams, batches, tick)
            drifts.append(drift)
            watch.finished(layer_plan.index, drift)
        writer.join()
    if plan.partial:
        return Measured(None, tuple(drifts))
    with watch.stage("measure"):
        statistics = streams.measure(plan.index, plan.skeleton, source.heldout, release.heldout, job.device)
    return Measured(statistics, tuple(drifts))


def solve(job: Job, layer_plan: LayerPlan, layer: DecoderLayer, traffic: tuple[Traffic, Traffic | None]) -> LayerResult:
    """Moments, codes and scales of a layer; a dense layer has none and is copied."""
    if not layer.is_routed:
        return LayerResult(tensors={}, gate_up_ENK=None, down_ENK=None, projections=(), seconds={})
    plan, batches = job.plan, job.journal.settings.batches
    prefix = plan.skeleton.family.experts_prefix(layer_plan.index)
    with job.watch.stage("solve", layer_plan.index, plan.skeleton.experts, "experts") as tick:
        return solve_layer(layer, streams.observed(*traffic), plan.recipe, batches, prefix, tick)


def restore_layer(job: Job, layer_plan: LayerPlan, layer: DecoderLayer, tensors: LayerTensors) -> DecoderLayer:
    """A layer that an earlier run finished, its codes read back."""
    record = job.journal[layer_plan.shard]
    with job.watch.stage("restore", layer_plan.index):
        output.check_source(record, tensors.digest)
        stacks = output.read_experts(job.plan, job.out, record, torch.bfloat16)
        return layer if stacks is None else layer.with_experts(*(stack.to(job.device) for stack in stacks))


def write_layer(job: Job, layer_plan: LayerPlan, tensors: LayerTensors, result: LayerResult) -> None:
    """On the writer's thread: the layer's shard, then its record."""
    start = time.perf_counter()
    prefix = job.plan.skeleton.family.layer_prefix(layer_plan.index)
    kept = {prefix + name: value for name, value in tensors.kept.items()}
    job.watch.tell("write", layer_plan.index)
    written = output.write_tensors(job.out, layer_plan.shard, kept | result.tensors)
    job.watch.tell("record", layer_plan.index)
    job.journal.add(
        ShardRecord(
            shard=layer_plan.shard,
            layer=layer_plan.index,
            size_bytes=written.size_bytes,
            sha256=written.sha256,
            source_digest=tensors.digest,
            seconds=result.seconds | {"write": time.perf_counter() - start},
            projections=result.projections,
        )
    )
    job.watch.tell("recorded", layer_plan.index)


def copy_rest(job: Job) -> None:
    """On the writer's thread: everything outside the decoder layers. Not in a trial.

    A shard that an earlier run wrote is read again, and so is its source: like a layer's, they must be what they were.
    """
    for shard in () if job.plan.partial else job.plan.rest:
        job.watch.tell("copy")
        if shard.shard in job.journal:
            record = job.journal[shard.shard]
            output.check_shard(job.out, record)
            output.check_source(record, output.rest_digest(shard, job.plan.index))
        else:
            job.journal.add(output.write_rest(job.out, shard, job.plan.index))
