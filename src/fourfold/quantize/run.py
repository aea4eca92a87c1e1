"""THE LOOP: a BF16 checkpoint folder in, an int4 release folder out, layer by layer."""

from __future__ import annotations

import dataclasses
import time
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import torch

from fourfold.core import metrics, widening
from fourfold.datatypes import (
    Batches,
    Event,
    FourfoldError,
    LayerResult,
    Placement,
    Progress,
    ShardRecord,
    StreamDrift,
    ignore,
    system_fault,
)
from fourfold.distributed.devices import WHOLE_CPU, Machine, expand_devices
from fourfold.distributed.ranks import join_ranks
from fourfold.distributed.spill import Spill
from fourfold.distributed.team import Team
from fourfold.distributed.trace import write_trace
from fourfold.distributed.workers import Worker
from fourfold.model.layer import DecoderLayer, LayerTensors, build_layer
from fourfold.model.processor import Processor
from fourfold.model.router import find_router
from fourfold.quantize import calibrate, finish, output, streams
from fourfold.quantize.advice import prediction, start_event
from fourfold.quantize.finish import Measured
from fourfold.quantize.footprint import sweep_rows
from fourfold.quantize.guide import (
    Guide,
    Left,
    find_remaining_sweep,
    spread_rows,
    sweep,
)
from fourfold.quantize.heap import keep_freed_memory
from fourfold.quantize.identity import identify, refuse_changes
from fourfold.quantize.job import Job, Texts
from fourfold.quantize.journal import FINISHED, STATE, Journal, check_out, clear, close, hold, log, open_journal
from fourfold.quantize.linear import LayerLinear
from fourfold.quantize.memory import device_budget
from fourfold.quantize.observe import MoeInputs, Observed, observe, token_importance
from fourfold.quantize.output import ReadAhead, Writer
from fourfold.quantize.plan import LayerPlan, Plan, make_plan
from fourfold.quantize.progress import ProgressReporter
from fourfold.quantize.rest import solves_rest, write_quantized_rest, write_rest
from fourfold.quantize.site import round_experts_
from fourfold.quantize.solve import STEPS, Chunking, Curvature, join_results, solve_layer
from fourfold.quantize.streams import Stream, Streams
from fourfold.quantize.summary import Summary, read_summary
from fourfold.quantize.sweep_files import guided_layers, predicted_shares, read_curvature, row_damping
from fourfold.recipe import Recipe
from fourfold.records.release import Identity, Settings, State
from fourfold.records.results import RoutedImages

DENSE_LAYER = LayerResult(tensors={}, gate_up_ENK=None, down_ENK=None, projections=(), seconds={}, chunk=0)


def quantize(
    model: Path,
    out: Path,
    recipe: Recipe,
    *,
    machine: Machine = WHOLE_CPU,
    layers: range | None = None,
    restart: bool = False,
    trace: Path | None = None,
    progress: Progress = ignore,
) -> Summary:
    """Quantize the checkpoint in `model` into `out`, or go on where an earlier run of the same command was cut off.

    machine: what of it the run may take; layers: solve only these (a trial, the output is partial); restart: drop what
    an earlier run left in `out`; trace: a file for a Chrome trace. Under torchrun all processes call this with the
    same arguments. Returns what the run came to.
    Raises FourfoldError for anything the user can mend; nothing is lost then, the same command goes on.
    """
    keep_freed_memory()
    devices = [torch.device(name) for name in expand_devices(machine.devices)]
    team = Team(devices, join_ranks(devices[0]))
    team.broadcast(lambda: check_out(out, model))
    memory_bytes = machine.memory_bytes
    if memory_bytes is None:
        memory_bytes = team.all_reduce_min(device_budget([str(device) for device in team.devices]))
    plan = make_plan(model, recipe, devices=team.names, memory_bytes=memory_bytes, host_bytes=machine.host_bytes,
                     exchange_bytes=team.ranks.device_bytes if team.ranks else 0, layers=layers, out=out)  # fmt: skip
    plan.require_disk()
    if machine.strict:
        plan.require_memory()
    watch = ProgressReporter(progress if team.is_leader else ignore, plan.solve.stop)
    watch.progress(start_event(plan, out))
    texts = team.broadcast(lambda: read_texts(plan, watch))  # the last of what can be wrong before OUT is touched
    with hold(out) if team.is_leader else nullcontext():
        if restart and team.is_leader:
            clear(out)
        if team.is_leader:
            watch.progress = _logged(out, progress)
        try:
            return _run(plan, texts, out, team, watch, trace)
        except (FourfoldError, MemoryError, RuntimeError, OSError) as error:
            fault = system_fault(error)
            log(out, f"error: {fault or error}")
            if fault:
                raise FourfoldError(fault) from error
            raise
        finally:
            team.destroy()


def read_texts(plan: Plan, watch: ProgressReporter) -> Texts:
    """Calibration rows and held-out rows in the model's tokens. Raises FourfoldError for text that will not do."""
    with watch.stage("calibrate"):
        tokenizer = calibrate.load_tokenizer(plan.source.folder)
        processor = Processor.load(plan.source, tokenizer) if plan.recipe.reads_images else None
        heldout = calibrate.heldout(plan.recipe, tokenizer)
        rows = calibrate.collect(plan.recipe, tokenizer, processor=processor, progress=watch.progress)
        return rows, heldout.with_images(rows.windows) if rows.windows else heldout


def _logged(out: Path, progress: Progress) -> Progress:
    def tell(event: Event) -> None:
        if event.kind != "stage" or event.done == 0:
            layer = f"layer {event.layer}" if event.layer >= 0 else ""
            log(out, " ".join(filter(None, [event.kind, event.stage, layer, event.text])))
        progress(event)

    return tell


def _run(plan: Plan, texts: Texts, out: Path, team: Team, watch: ProgressReporter, trace: Path | None) -> Summary:
    calibration, heldout = texts
    ranks = (str(team.ranks),) if team.ranks else ()
    for note in (*plan.run_warnings, *calibration.notes, *ranks):
        watch.note(note)
    identity = identify(plan, calibration, heldout)
    devices = tuple(map(widening.named, team.names))
    memory = plan.memory
    settings = Settings(
        batches=Batches(memory.row_batch, memory.token_batch, memory.chunk_experts, memory.inputs),
        threads=team.threads,
        devices=devices,
    )
    journal = team.broadcast(lambda: _open(out, identity, settings))
    if journal is None:
        watch.note(f"{out} is finished already; nothing to do")
        return read_summary(out)
    if journal.settings.devices != devices:
        watch.note(_other_devices(journal.settings.devices, devices))
    for shard in journal.unreadable:
        watch.note(f"{shard}: its record in {STATE} cannot be read; written again")
    team.threads = journal.settings.threads
    team.spill = Spill(out / STATE) if journal.settings.batches.inputs == Placement.FILE else None
    left = team.broadcast(lambda: find_remaining_sweep(plan, out)) if guided_layers(plan) else None
    if left and left.problem:
        watch.note(f"guidance: {left.problem}; curvatures are computed again")
    order = [*(left.layers if left else ()), *range(plan.solve.stop)]
    with ReadAhead(plan, team.trace, order, team.transfers) as ahead, Writer(team.trace) as writer:
        job = Job(
            plan=plan,
            out=out,
            texts=texts,
            journal=journal,
            ahead=ahead,
            writer=writer,
            reporter=watch,
            remaining_sweep=left,
        )
        measured = team.run(partial(run_layers, job))
    if not team.is_leader:
        return team.broadcast(lambda: read_summary(out))
    if trace is not None:
        write_trace(trace, measured.spans)
    summary = finish.finish(journal, plan, texts, measured, watch.seconds, watch.report)
    for note in plan.release_warnings:
        watch.progress(Event(kind="note", text=note))
    watch.progress(Event(kind="done", layers=watch.layers, data=summary.to_json()))
    return team.broadcast(lambda: summary)


def _open(out: Path, identity: Identity, settings: Settings) -> Journal | None:
    """The run's journal, or None where OUT is this run's release already."""
    finished = State.find(out / FINISHED)
    if finished is None:
        return open_journal(out, identity, settings)
    refuse_changes(out, identity, finished.identity)
    close(out)  # a run killed after its last file left its journal
    return None


def _other_devices(before: tuple[str, ...], now: tuple[str, ...]) -> str:
    return (
        f"started on {', '.join(before)}, resumed on {', '.join(now)}: the order of sums differs, so the result is "
        "equivalent, but not bit-identical"
    )


def run_layers(job: Job, worker: Worker) -> Measured:
    """Pass all streams through all layers and solve or restore each. A recipe with guidance first runs a forward and a
    backward sweep over the source.
    """
    plan, drifts, routing = job.plan, [], list[RoutedImages]()
    statistics, rtn, reference = None, None, None
    if job.remaining_sweep is not None:
        run_guidance_sweep(job, worker, job.remaining_sweep)
    with job.stage(worker, "embed"):
        calibration, heldout = job.texts
        asymmetric, yardstick = plan.recipe.solver.asymmetric, plan.recipe.heldout.yardstick and not plan.partial
        token_ids, images = (calibration.token_RT, heldout.token_RT), (calibration.images, heldout.images)
        all_streams = streams.embed(worker, plan.source, token_ids, asymmetric=asymmetric, rtn=yardstick, images=images)
    if worker.is_leader:
        job.writer.submit(partial(write_rest, job, quantized=False))
    for layer_plan in plan.layers[: plan.solve.stop]:
        all_streams, drift = pass_layer(job, worker, layer_plan, all_streams, routing)
        drifts.append(drift)
        if worker.is_leader:
            job.reporter.finish_layer(layer_plan.index, drift)
    if worker.is_leader:
        with worker.span("wait for writer"):
            job.writer.join()
    if not plan.partial:
        head = streams.load_head(worker, plan.source)
        heads = head, write_quantized_rest(job, worker, all_streams, head)
        with job.stage(worker, "measure"):
            statistics, rtn, reference = streams.measure(worker, heads, all_streams, job.texts[1].image_RT)
    spans = worker.gather_object(worker.team.trace.spans if worker.local_rank == 0 else [])
    spans_of_all = tuple(span for part in spans for span in part)
    return Measured(statistics, rtn, reference, tuple(drifts), spans_of_all, tuple(routing))


def pass_layer(
    job: Job, worker: Worker, layer_plan: LayerPlan, all_streams: Streams, routing: list[RoutedImages]
) -> tuple[Streams, StreamDrift]:
    """Pass all streams through one layer; quantize it unless it is finished or outside the requested layers.

    routing: is told how the layer's router treats image tokens, if there are any.
    """
    plan, batches, number = job.plan, job.journal.settings.batches, layer_plan.index
    with job.stage(worker, "read", number):
        taken = job.ahead.take(worker, number)  # was read while the layer before was worked on
        kept = taken.at(worker)
        layer = build_layer(plan.source, number, kept, worker.device)
    finished, observed = is_finished(job, worker, layer_plan, taken.tensors.digest), None
    linear = LayerLinear(plan, layer, kept.kept, job.out / layer_plan.shard if finished else None)
    released = partial(linear.release_layer, worker)
    tokens = worker.size * streams.attended_tokens(all_streams)
    with job.stage(worker, "attend", number, tokens, "tokens") as tick:
        with linear.inputs.watched():
            moe_inputs = streams.attend(worker, layer, released if linear.names else None, all_streams, batches, tick)
        routing += routed_images(job, layer, moe_inputs[0])
        layer = streams.own_experts(worker, layer, moe_inputs)
        dense = dataclasses.replace(layer, own=released().own)  # the release's before its experts are quantized
        tensors = linear.in_place_of(taken.tensors.without_experts())
    del taken, kept, linear, released  # the full stacks of experts; each worker holds its own ones now
    if layer.is_routed and number in plan.solve and not finished:
        observed = observe(worker, dense, *moe_inputs)
    source, release = all_streams.source, all_streams.release
    with job.stage(worker, "advance", number, worker.size * source.calibration_tokens, "tokens") as tick:
        source = streams.advance(worker, layer, moe_inputs[0], source, batches, tick)
    if finished:
        release_layer = restore_layer(job, worker, layer_plan, dense)
    elif number in plan.solve:
        release_layer = solve(job, worker, layer_plan, dense, tensors, observed, source)
    else:
        release_layer = layer
    if number + 1 == plan.solve.stop and not solves_rest(job):
        source, release = source.without_calibration(), release.without_calibration()
    tokens = worker.size * (release.calibration_tokens + all_streams.heldout_tokens)
    with job.stage(worker, "advance", number, tokens, "tokens") as tick:
        release = streams.advance(worker, release_layer, moe_inputs[1], release, batches, tick)
        layers, heldout = (layer, release_layer), (source.heldout, release.heldout)
        (drift,) = streams.pass_rows_(worker, layers, heldout, batches, tick)
        if all_streams.rtn is not None:
            round_experts_(layer, plan.recipe, batches.experts)  # in place: no other stream needs it
            streams.pass_rows_(worker, [layer], [all_streams.rtn.rows], batches, tick)
    return Streams(source, release, all_streams.rtn), drift


def routed_images(job: Job, layer: DecoderLayer, moe_inputs: MoeInputs) -> list[RoutedImages]:
    """How the source routes image and other tokens of the calibration rows; nothing without images or experts."""
    image_RT, routing = job.texts[0].image_RT, moe_inputs.routing
    if image_RT is None or routing is None:
        return []
    overlap, experts = metrics.routing_by_kind(routing.index_TA.cpu(), image_RT.flatten(), layer.experts)
    return [RoutedImages(layer=layer.index, overlap=overlap, image_experts=experts)]


def run_guidance_sweep(job: Job, worker: Worker, left: Left) -> None:
    """Run the guidance sweep and report the predicted error reduction of each layer."""
    batch_rows = sweep_rows(job.journal.settings.batches.rows)
    token_RT = spread_rows(job.texts[0].text_RT, job.plan.work.guidance_tokens)
    routing, source = job.plan.work.guidance_routing, job.plan.source
    router = worker.run_once(lambda: find_router(source) if routing and left.layers else "")
    guide = Guide(plan=job.plan, out=job.out, token_RT=token_RT, batch_rows=batch_rows, remaining_sweep=left,
                  ahead=job.ahead, writer=job.writer, router=router)  # fmt: skip
    sweep(worker, guide, partial(job.stage, worker))
    if worker.is_leader:
        shares = predicted_shares(job.plan, job.out)
        data: dict[str, object] = {"predicted_share": {str(layer): share for layer, share in shares.items()}}
        job.reporter.progress(Event(kind="note", text=prediction(shares), data=data))


def solve(
    job: Job, worker: Worker, layer_plan: LayerPlan, layer: DecoderLayer, tensors: LayerTensors,
    observed: Observed | None, source: Stream,
) -> DecoderLayer:  # fmt: skip
    """Codes and scales of a layer's own experts, and all workers' to the writer; a dense layer is copied.

    observed: None for a dense layer; source: the stream after this layer. Returns the layer with dequantized experts.
    """
    result = DENSE_LAYER
    if observed is not None:
        assert source.calibration is not None
        stems, batches = job.plan.source.stems(layer_plan.index), job.journal.settings.batches
        with job.stage(worker, "solve", layer_plan.index, STEPS * job.plan.source.experts) as tick:
            chunking = Chunking(batches.experts, batches.inputs, stems, tick)
            if power := job.plan.recipe.solver.norm_power:
                importance_T = token_importance(worker, source.calibration, power).to(layer.device)
                observed = dataclasses.replace(observed, importance_T=importance_T)
            if (share := job.plan.recipe.calibration.image_share) and (image_RT := job.texts[0].image_RT) is not None:
                image_T = image_RT.flatten().to(layer.device)
                observed = dataclasses.replace(observed, image_T=image_T, image_share=share)
            curvature = None
            if job.remaining_sweep is not None:
                moment_DD = worker.run_once(lambda: read_curvature(job.out, layer_plan.index, tensors.digest))
                curvature = Curvature(moment_DD.to(layer.device), row_damping(job.plan))
            result = solve_layer(worker, layer, observed, job.plan.recipe, chunking, curvature)
    parts = worker.gather_object(dataclasses.replace(result, gate_up_ENK=None, down_ENK=None))
    if worker.is_leader:
        whole = join_results(parts)
        if whole.chunk < job.journal.settings.batches.experts and layer.is_routed:
            job.journal.shrink(whole.chunk)
            text = f"layer {layer.index}: out of memory; chunks of {whole.chunk} experts from now on, the same codes"
            job.reporter.note(text, layer.index)
        with worker.span("wait for writer", layer_plan.index):
            job.writer.submit(partial(write_layer, job, layer_plan, tensors, whole))
    return layer.with_experts(result.gate_up_ENK, result.down_ENK)  # None, None of a dense layer


def is_finished(job: Job, worker: Worker, layer_plan: LayerPlan, digest: str) -> bool:
    """Whether an earlier run finished a layer and its shard is what was written then. All workers decide alike.

    digest: of the source's layer. Raises FourfoldError if it is not what the shard was made from.
    """
    if layer_plan.shard not in job.journal:
        return False
    record = job.journal[layer_plan.shard]
    output.check_source(record, digest)
    with job.stage(worker, "restore", layer_plan.index):
        problems = worker.all_gather_object(
            worker.run_once(lambda: output.damage(job.out / record.shard, record.sha256))
        )
    problem = next(filter(None, problems), "")
    if problem and worker.is_leader:
        job.reporter.note(f"layer {layer_plan.index}: {problem}; quantized again", layer_plan.index)
    return not problem


def restore_layer(job: Job, worker: Worker, layer_plan: LayerPlan, layer: DecoderLayer) -> DecoderLayer:
    """Return a finished layer with its codes read back."""
    if not layer.is_routed:
        return layer
    with job.stage(worker, "restore", layer_plan.index):
        stacks = output.read_experts(job.plan, job.out, job.journal[layer_plan.shard], layer.owned)
        return layer.with_experts(*(stack.to(layer.device) for stack in stacks))


def write_layer(job: Job, layer_plan: LayerPlan, tensors: LayerTensors, result: LayerResult) -> None:
    """On the writer's thread: the layer's shard, then its record."""
    start = time.perf_counter()
    job.reporter.report("write", layer_plan.index)
    written = output.write_tensors(job.out, layer_plan.shard, tensors.kept | result.tensors)
    job.reporter.report("record", layer_plan.index)
    job.journal.add(
        ShardRecord(
            shard=layer_plan.shard,
            layer=layer_plan.index,
            size_bytes=written.size_bytes,
            sha256=written.sha256,
            source_digest=tensors.digest,
            seconds=result.seconds | {"write": time.perf_counter() - start},
            projections=result.projections,
            guided={site: found / plain for site, (found, plain) in result.guided.items() if plain},
        )
    )
    job.reporter.report("recorded", layer_plan.index)
