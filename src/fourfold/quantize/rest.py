"""Shards outside the decoder layers: copied while the loop works; those with quantized weights follow it."""

from __future__ import annotations

import dataclasses
from functools import partial

from fourfold.datatypes import LayerResult, Rows
from fourfold.distributed.workers import Worker
from fourfold.model.head import Head, output_name
from fourfold.quantize import output
from fourfold.quantize.dense import QuantizedWeights
from fourfold.quantize.draft_experts import quantize_draft_experts
from fourfold.quantize.job import Job
from fourfold.quantize.linear import InputMoments, LinearInputs, read_weights, solve_weights
from fourfold.quantize.plan import Plan, RestShard
from fourfold.quantize.solve import STEPS
from fourfold.quantize.streams import Streams


def solves_rest(job: Job) -> bool:
    """Whether weights are still to be quantized on calibration rows behind the last layer."""
    dense = job.plan.dense
    return not job.plan.partial and (dense.draft_experts == 4 or head_name(job.plan) in dense.bits)


def head_name(plan: Plan) -> str:
    """The output head's name on disk."""
    (name,) = plan.source.blueprint.sources[output_name(plan.source.blueprint)].all_names
    return name


def write_quantized_rest(job: Job, worker: Worker, all_streams: Streams, head: Head) -> Head:
    """Shards outside the layers in which something is quantized: output head and draft experts are solved here. Waits
    until they are on disk. head: the source's. Returns the release's.
    """
    plan = job.plan
    quantized = [shard for shard in plan.rest if shard.is_quantized]
    if not quantized:
        return head
    finished = worker.run_once(lambda: [_is_finished(job, shard) for shard in quantized])
    done = [all(places) for places in zip(*worker.all_gather_object(finished), strict=True)]
    rows = all_streams.release.calibration or all_streams.source.calibration
    released, tensors = head, {}
    if (name := head_name(plan)) in plan.dense.bits:
        (shard,) = (place for place, one in enumerate(quantized) if any(name == c.header.name for c in one.claims))
        with job.stage(worker, "head"):
            if done[shard]:
                made = worker.run_once(lambda: read_weights(plan, job.out / quantized[shard].shard, [name]))
            else:
                assert rows is not None, "the loop keeps calibration rows for an output head that is quantized"
                made = solve_head(plan, worker, rows, head, name)
        tensors = {key: value.cpu() for key, value in made.stored.items()}
        released = dataclasses.replace(head, weight_VD=made.weights[name].to(worker.device))
    solved = LayerResult(tensors, None, None, (), {}, 0)
    if plan.dense.draft_experts < 16 and not all(done):
        experts = STEPS * plan.source.widest.count
        with job.stage(worker, "drafts", total=experts) as tick:
            drafts = quantize_draft_experts(plan, worker, rows, released, job.journal.settings.batches, tick)
        solved = dataclasses.replace(drafts, tensors=drafts.tensors | tensors)
    if worker.is_leader:
        job.writer.submit(partial(write_rest, job, quantized=True, solved=solved))
        with worker.span("wait for writer"):
            job.writer.join()
    return released


def solve_head(plan: Plan, worker: Worker, rows: Rows, head: Head, name: str) -> QuantizedWeights:
    """Quantize the output head for this and all other workers' calibration rows behind the last norm."""
    sums = InputMoments.zeros(head.weight_VD.shape[1], worker.device)
    for hidden_TD in rows.hidden_RTD:
        sums.add_(head.norm(hidden_TD.to(worker.device)))
        worker.heartbeat()
    inputs = LinearInputs({}, {name: sums.of_all(worker)}, {name: name})
    return worker.run_once(lambda: solve_weights({name: head.weight_VD}, inputs, plan, worker.heartbeat))


def _is_finished(job: Job, shard: RestShard) -> bool:
    """Whether an earlier run wrote a shard and it is what was written then."""
    record = job.journal[shard.shard] if shard.shard in job.journal else None
    return record is not None and not output.damage(job.out / record.shard, record.sha256)


def write_rest(job: Job, *, quantized: bool, solved: LayerResult | None = None) -> None:
    """On the writer's thread: everything outside the decoder layers. Not in a trial.

    quantized: shards in which something is quantized, or all others; solved: codes and scales of output head and draft
    experts.
    A shard that an earlier run wrote is read again, and so is its source, which must be what it was. A damaged shard is
    written again.
    """
    for shard in () if job.plan.partial else job.plan.rest:
        if shard.is_quantized is not quantized:
            continue
        job.reporter.report("copy")
        before = job.journal[shard.shard] if shard.shard in job.journal else None
        problem = before and output.damage(job.out / before.shard, before.sha256)
        if before and not problem:
            output.check_source(before, output.rest_digest(shard, job.plan.source))
            continue
        if problem:
            job.reporter.note(f"{problem}; written again")
        written = output.write_rest(job.plan, job.out, shard, solved)
        if before:
            output.check_source(before, written.source_digest)
        job.journal.add(written)
