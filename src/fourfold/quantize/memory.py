"""Peak memory by stage, predicted from sizes, and the batch sizes that keep it within a budget."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import psutil
import torch

from fourfold.core import widening
from fourfold.datatypes import Placement
from fourfold.quantize import pinned
from fourfold.quantize.estimate import Workload, inputs_bytes
from fourfold.quantize.footprint import (
    BF16,
    CPU_ATTEND_TOKENS,
    FP32,
    activation_bytes,
    attend_batch_bytes,
    chunk_bytes,
    chunk_inputs_bytes,
    curvature_bytes,
    draft_bytes,
    embedding_bytes,
    expert_batch_bytes,
    gap_bytes,
    gather_bytes,
    int8_bytes,
    int8_solve_bytes,
    measure_bytes,
    rows_bytes,
    solve_bytes,
    solved_bytes,
    spilled_bytes,
    sweep_bytes,
    traffic_bytes,
    widened_bytes,
)
from fourfold.units import size

HOST_BASELINE_BYTES = 760 * 10**6  # torch and transformers 530, tokenized text 70; native kernels, free heap
CUDA_CONTEXT_BYTES = 500 * 10**6
FREE_MARGIN = 0.10  # of free memory, left alone where no budget is given
ATTEND_TOKENS = 8_192  # tokens of an attention batch that keep any GPU busy
EXPERT_TOKENS = 16_384  # likewise of an expert batch
EXPERT_TOKENS_LEAST = 256
CPU_CHUNK_BYTES = 128 * 2**20  # of a chunk's solve: eight full-width experts at a time took a sixth longer than one


@dataclass(frozen=True, kw_only=True)
class StageMemory:
    """Predicted peak of one stage.

    shared_bytes: rows, layers and buffers on the host, whoever works; worker_bytes: of one worker's own tensors on its
    device; host_bytes: of this process in all; device_bytes: of a device, which on the CPU is the host.
    """

    stage: str
    shared_bytes: int
    worker_bytes: int
    host_bytes: int
    device_bytes: int


@dataclass(frozen=True, kw_only=True)
class MemoryPlan:
    """Batch sizes of the loop, and what they lead to.

    devices: one for each worker; budget_bytes: of a device (of the whole process on the CPU, of one worker there if
    host_budget_bytes is given); chunk_experts: experts of a worker whose moments exist at one time; token_batch: tokens
    of an expert evaluation; row_batch: rows of an attention batch; inputs: where the experts' inputs lie until a layer
    is solved (Batches); spilled_bytes: of hidden states in files of OUT; widened: whether BF16 products are computed in
    fp32 (core/widening).
    """

    devices: tuple[str, ...]
    budget_bytes: int
    host_budget_bytes: int | None
    chunk_experts: int
    token_batch: int
    row_batch: int
    inputs: Placement
    spilled_bytes: int
    stages: tuple[StageMemory, ...]
    widened: bool

    @property
    def on_cpu(self) -> bool:
        return self.devices[0] == "cpu"

    @property
    def host_peak_bytes(self) -> int:
        return max(stage.host_bytes for stage in self.stages)

    @property
    def device_peak_bytes(self) -> int:
        return max(stage.device_bytes for stage in self.stages)

    @property
    def problems(self) -> tuple[str, ...]:
        """Which budget is not kept, and by how much."""
        worker = max(stage.worker_bytes for stage in self.stages)
        shared = max(stage.shared_bytes for stage in self.stages)
        found = []
        if self.on_cpu and self.host_budget_bytes is None:
            worker = self.device_peak_bytes
        if worker > self.budget_bytes:
            found.append(f"got {size(self.budget_bytes)} on {self.devices[0]}, expected at least {size(worker)}")
        if self.host_budget_bytes is not None and shared > self.host_budget_bytes:
            found.append(f"got {size(self.host_budget_bytes)} on the host, expected at least {size(shared)}")
        return tuple(found)

    @property
    def fits(self) -> bool:
        return not self.problems


def device_budget(devices: Sequence[str]) -> int:
    """Bytes that are free now, less a margin: on the host, or on the fullest GPU, shared out among its workers."""
    free: int = psutil.virtual_memory().available
    if devices[0] != "cpu":
        free = min(torch.cuda.mem_get_info(device)[0] // devices.count(device) for device in set(devices))
    return int(free * (1 - FREE_MARGIN))


def plan_memory(
    work: Workload,
    devices: Sequence[str],
    memory_bytes: int | None,
    host_bytes: int | None = None,
    exchange_bytes: int = 0,
) -> MemoryPlan:
    """Batch sizes that keep devices and host within their budgets where that is possible.

    memory_bytes: the budget of each GPU; on the CPU that of the whole process, or of one worker's own tensors if
    host_bytes, the budget of rows and buffers, is given; None for what is free now. exchange_bytes: of a GPU, which the
    exchange between ranks takes. Experts are dealt evenly into as few chunks as fit, on a CPU into chunks that stay
    near its caches. A budget too small for anything gives the smallest sizes; `MemoryPlan.fits` is then False.
    """
    workers, on_cpu = len(devices), devices[0] == "cpu"
    budget = device_budget(devices) if memory_bytes is None else memory_bytes
    own, tokens = _ceil_div(work.experts, workers), EXPERT_TOKENS
    shared, inputs = _resident_bytes(work) + traffic_bytes(work), Placement.DEVICE
    if not on_cpu:
        while tokens > pinned.TOKENS_LEAST and pinned.sums_bytes(work, tokens, workers) > pinned.SUMS_BYTES:
            tokens //= 2
        shared = _shared_bytes(work, devices, Sizes(chunk=own, tokens=tokens, rows=1, inputs=inputs))
    fixed = _own_bytes(work, devices) + exchange_bytes
    if (shared > host_bytes) if host_bytes is not None else on_cpu and shared + workers * fixed > budget:
        shared, inputs = shared - spilled_bytes(work), Placement.FILE
    if on_cpu and host_bytes is None:
        left = (budget - shared) // workers - fixed
    else:
        left = budget - fixed
        if not on_cpu and inputs == Placement.DEVICE and left < inputs_bytes(work) + chunk_bytes(work):
            inputs = Placement.HOST
        left -= inputs_bytes(work) if inputs == Placement.DEVICE and not on_cpu else 0
    left = max(left - solved_bytes(work) // workers - curvature_bytes(work), 0)
    attend_tokens = CPU_ATTEND_TOKENS if on_cpu else ATTEND_TOKENS
    rows = max(attend_tokens // max(work.calibration_length, work.heldout_length), 1)
    while rows > 1 and attend_batch_bytes(work, rows) > left:
        rows //= 2
    while tokens > EXPERT_TOKENS_LEAST and expert_batch_bytes(work, tokens, workers) > left:
        tokens //= 2
    gathered = chunk_inputs_bytes(work) if inputs != Placement.DEVICE else 0
    most = min(max((left - gather_bytes(work)) // (chunk_bytes(work) + gathered), 1), own)
    if on_cpu:
        most = min(most, max(CPU_CHUNK_BYTES // max(solve_bytes(*site) for site in work.sites), 1))
    sizes = Sizes(chunk=_ceil_div(own, _ceil_div(own, most)), tokens=tokens, rows=rows, inputs=inputs)
    return MemoryPlan(
        devices=tuple(devices),
        budget_bytes=budget,
        host_budget_bytes=host_bytes,
        chunk_experts=sizes.chunk,
        token_batch=tokens,
        row_batch=rows,
        inputs=inputs,
        spilled_bytes=spilled_bytes(work) if inputs == Placement.FILE else 0,
        stages=_stages(work, devices, sizes, exchange_bytes),
        widened=widening.widens(devices[0]),
    )


@dataclass(frozen=True)
class Sizes:
    """What plan_memory chose."""

    chunk: int
    tokens: int
    rows: int
    inputs: Placement


def _ceil_div(count: int, size: int) -> int:
    return -(-count // size)


def _resident_bytes(work: Workload) -> int:
    """On the host in every stage of the loop: rows, the layer in work, the next one, what is written."""
    return HOST_BASELINE_BYTES + rows_bytes(work) + 2 * work.layer_bytes + work.shard_bytes


def _shared_bytes(work: Workload, devices: Sequence[str], sizes: Sizes) -> int:
    """On the host while a layer is in work. Beside GPUs memory is pinned, and inputs on a device are not there."""
    whole = _resident_bytes(work) + traffic_bytes(work)
    if devices[0] == "cpu":
        return whole - (spilled_bytes(work) if sizes.inputs == Placement.FILE else 0)
    workers = len(devices)
    beside = pinned.rounding_bytes(work, workers) + pinned.packed_bytes(work, sizes.chunk)
    beside += pinned.sums_bytes(work, sizes.tokens, workers) + pinned.inputs_bytes(work, sizes.inputs)
    return whole - (spilled_bytes(work) if sizes.inputs == Placement.FILE else inputs_bytes(work)) + beside


def _own_bytes(work: Workload, devices: Sequence[str]) -> int:
    """A worker's in every stage of the loop: on a GPU the layer with its own experts, and what is kept of the next one;
    on a CPU its experts where they are not all, and what a product widens.
    """
    own = work.expert_bytes // len(devices)
    if devices[0] == "cpu":
        return own * (len(devices) > 1) + widened_bytes(work, "cpu") + int8_bytes(work)
    kept = 2 * (work.layer_bytes - work.expert_bytes) + int8_bytes(work)
    return CUDA_CONTEXT_BYTES + kept + own + traffic_bytes(work) - inputs_bytes(work)


def _stages(work: Workload, devices: Sequence[str], sizes: Sizes, exchange_bytes: int) -> tuple[StageMemory, ...]:
    workers, on_cpu = len(devices), devices[0] == "cpu"
    spilled = (spilled_bytes(work) - inputs_bytes(work)) * (sizes.inputs == Placement.FILE)
    start = HOST_BASELINE_BYTES + rows_bytes(work) - spilled
    resident = _resident_bytes(work) - spilled
    looped = _shared_bytes(work, devices, sizes)
    dealt = looped - (work.expert_bytes if on_cpu and workers > 1 else 0)  # experts are with their owners by then
    own, wide = _own_bytes(work, devices) + exchange_bytes, widened_bytes(work, devices[0])
    heads = embedding_bytes(work) * (2 if work.int8_head else 1)
    if not on_cpu:
        resident = looped  # what was pinned is kept for the next layer
        start += pinned.rounding_bytes(work, workers)
    kept = own + (inputs_bytes(work) if sizes.inputs == Placement.DEVICE and not on_cpu else 0)
    fetched = 0 if on_cpu else sizes.tokens * work.hidden * BF16  # a worker's last outputs, on their way to the host
    solved = solved_bytes(work) // workers
    gathered = chunk_inputs_bytes(work) if sizes.inputs != Placement.DEVICE else 0
    gate_up, down = (inputs * inputs * FP32 for inputs, _ in work.sites)
    moments = sizes.chunk * (max(gate_up, down + activation_bytes(work) + gap_bytes(work)) + gathered)
    passing, kept = kept, kept + curvature_bytes(work)
    # stage: bytes that lie on the host, whoever works; bytes of each worker
    stages = {
        "read": (
            max(resident, start + embedding_bytes(work) + work.tower_bytes),
            0 if on_cpu else max(own, (embedding_bytes(work) + work.tower_bytes) * bool(work.image_tokens)),
        ),
        "attend": (looped, max(own, (wide if on_cpu else passing) + attend_batch_bytes(work, sizes.rows))),
        "moments": (dealt, kept + solved + moments + gather_bytes(work)),
        "solve": (dealt, kept + solved + sizes.chunk * (chunk_bytes(work) + gathered)),
        "advance": (dealt, passing + solved + fetched + expert_batch_bytes(work, sizes.tokens, workers)),
        "write": (resident, own),
        "measure": (start + heads, measure_bytes(work) - embedding_bytes(work) + heads * (not on_cpu)),
    }
    if work.int8_head or work.draft_tokens:
        written = 2 * embedding_bytes(work) if work.int8_head else 0  # the matrix, its codes, and those packed
        solved = sizes.chunk * (chunk_bytes(work) + gathered) + work.expert_bytes // workers
        in_int8 = (work.model_width**2 * FP32 + int8_solve_bytes(work.model_width)) * work.int8_head
        solving = max(solved if work.draft_tokens else 0, in_int8)
        stages["drafts"] = (start + heads + draft_bytes(work) + written, solving)
    if work.guidance_tokens:
        lying, batch = sweep_bytes(work, sizes.rows, workers)
        ends = max(2 * work.layer_bytes, embedding_bytes(work))
        whole = wide if on_cpu else CUDA_CONTEXT_BYTES + max(work.layer_bytes, embedding_bytes(work))
        stages = {"sweep": (HOST_BASELINE_BYTES + lying + ends, whole + batch)} | stages
    return tuple(
        StageMemory(
            stage=stage,
            shared_bytes=shared,
            worker_bytes=worker,
            host_bytes=shared + workers * worker if on_cpu else shared,
            device_bytes=shared + workers * worker if on_cpu else worker,
        )
        for stage, (shared, worker) in stages.items()
    )
