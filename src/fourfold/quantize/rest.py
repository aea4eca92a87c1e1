"""Shards outside the decoder layers: copied while the loop works; those with quantized weights follow it."""

from __future__ import annotations

from functools import partial

from torch import Tensor

from fourfold.datatypes import LayerResult
from fourfold.distributed.workers import Worker
from fourfold.model.head import Head, output_name
from fourfold.quantize import output
from fourfold.quantize.dense import round_weights
from fourfold.quantize.draft_experts import quantize_draft_experts
from fourfold.quantize.job import Job
from fourfold.quantize.plan import Plan
from fourfold.quantize.solve import STEPS
from fourfold.quantize.streams import Streams


def rounded_head(plan: Plan, weight_VD: Tensor) -> Tensor:
    """The release's output head: the source's own, or what engines make of its codes."""
    (name,) = plan.skeleton.blueprint.sources[output_name(plan.skeleton.blueprint)].all_names
    return round_weights({name: weight_VD}, plan.dense, plan.recipe).weights.get(name, weight_VD)


def solves_drafts(job: Job) -> bool:
    """Whether draft experts are still to be quantized on calibration rows behind the last layer."""
    return not job.plan.partial and job.plan.dense.draft_experts == 4


def write_quantized_rest(job: Job, worker: Worker, all_streams: Streams, head: Head) -> None:
    """Shards outside the layers in which something is quantized: draft experts are solved here. Waits until they are
    on disk.
    """
    plan = job.plan
    if not any(shard.is_quantized for shard in plan.rest):
        return
    drafts, finished = None, worker.all_gather_object(worker.run_once(lambda: quantized_rest_is_finished(job)))
    if plan.dense.draft_experts < 16 and not all(finished):
        rows = all_streams.release.calibration or all_streams.source.calibration
        experts = STEPS * plan.skeleton.widest.count
        with job.stage(worker, "drafts", total=experts) as tick:
            drafts = quantize_draft_experts(plan, worker, rows, head, job.journal.settings.batches, tick)
    if worker.is_leader:
        job.writer.submit(partial(write_rest, job, quantized=True, drafts=drafts))
        with worker.span("wait for writer"):
            job.writer.join()


def quantized_rest_is_finished(job: Job) -> bool:
    """Whether an earlier run wrote these shards and they are what was written then."""
    shards = [shard.shard for shard in job.plan.rest if shard.is_quantized]
    written = [job.journal[shard] for shard in shards if shard in job.journal]
    return len(written) == len(shards) and not any(output.damage(job.out / one.shard, one.sha256) for one in written)


def write_rest(job: Job, *, quantized: bool, drafts: LayerResult | None = None) -> None:
    """On the writer's thread: everything outside the decoder layers. Not in a trial.

    quantized: shards in which something is quantized, or all others; drafts: codes and scales of draft experts.
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
            output.check_source(before, output.rest_digest(shard, job.plan.index))
            continue
        if problem:
            job.reporter.note(f"{problem}; written again")
        written = output.write_rest(job.plan, job.out, shard, drafts)
        if before:
            output.check_source(before, written.source_digest)
        job.journal.add(written)
