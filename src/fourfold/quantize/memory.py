"""Peak memory by stage, predicted from sizes, and the batch sizes that keep it within a budget.

Each figure is a function of its own, so that it can be held against a measurement.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import psutil
import torch

from fourfold.core import widening
from fourfold.core.metrics import VOCABULARY_CHUNK
from fourfold.core.moments import PAIRS_PER_PIECE
from fourfold.datatypes import Placement
from fourfold.model.layer import PAIRS_PER_BATCH
from fourfold.model.skeleton import Skeleton
from fourfold.quantize import pinned
from fourfold.quantize.chunk import POOL_PIECE
from fourfold.quantize.dense import SLAB_ROWS
from fourfold.quantize.estimate import Workload, inputs_bytes
from fourfold.units import size

BF16, FP32 = 2, 4
HOST_BASELINE_BYTES = 760 * 10**6  # torch and transformers 530, tokenized text 70; native kernels, free heap
CUDA_CONTEXT_BYTES = 500 * 10**6
FREE_MARGIN = 0.10  # of free memory, left alone where no budget is given
SQUARES = 4  # fp32 [K, K] per expert at the solve's peak: own H, shrunk H, and two in core/gptq.factorize_
STACKS = 6  # fp32 [N, K] per expert: weight, target, ordered, error, codes, one temporary
LOGITS = 6  # fp32 [T, vocabulary chunk] in core/metrics: two models' and what their sums take
ROW_SQUARES = 5  # fp32 [N, N] where rows have a metric: moments, pool, metric, and two in core's factor
ROW_STACKS = 2  # fp32 [N, K] beside STACKS: what earlier rows leave over, and one temporary
KEPT = 2  # times what an attention batch has at one time: what autograd keeps of it, of linear attention (full: less)
SKEW = 1.5  # pairs of a chunk's busiest experts over an even share
DEALT = 1.1  # pairs of the busiest worker's experts over an even share: they are dealt by tokens
ATTEND_TOKENS = 8_192  # tokens of an attention batch that keep any GPU busy
CPU_ATTEND_TOKENS = 2_048  # likewise a CPU: of four times as many, a third of the time went into fresh memory pages
EXPERT_TOKENS = 16_384  # likewise of an expert batch
EXPERT_TOKENS_LEAST = 256
CPU_CHUNK_BYTES = 128 * 2**20  # of a chunk's solve: eight full-width experts at a time took a sixth longer than one


def rows_bytes(work: Workload) -> int:
    """Hidden states (BF16) and ids of all rows: calibration in one or two streams, held-out in two or three."""
    tokens = work.calibration_streams * work.calibration_tokens + work.heldout_passes
    return tokens * (work.state_width * BF16 + 8)


def traffic_bytes(work: Workload) -> int:
    """Kept of the calibration rows until the layer is solved: what experts are learnt from, routing, sorted pairs."""
    routing = work.topk * (8 + BF16)
    pairs = work.topk * (8 + 8 + BF16)
    return inputs_bytes(work) + work.calibration_streams * work.calibration_tokens * (routing + pairs)


def spilled_bytes(work: Workload) -> int:
    """Hidden states that lie in files where memory is too small for them: of all rows, and what experts are learnt
    from.
    """
    tokens = work.calibration_streams * work.calibration_tokens + work.heldout_passes
    return inputs_bytes(work) + tokens * work.state_width * BF16


def embedding_bytes(work: Workload) -> int:
    """The embedding matrix, or the output head."""
    return work.vocabulary * work.model_width * BF16


def solve_bytes(inputs: int, outputs: int) -> int:
    """Of one expert in the solve of a site, its moments included. fp32."""
    return (SQUARES * inputs * inputs + STACKS * outputs * inputs) * FP32


def activation_bytes(work: Workload) -> int:
    """Of one expert, what down is learnt from: silu(gate) * up of its pairs and of the pool's rows."""
    pairs = int(work.calibration_streams * work.tokens_per_expert * SKEW) * work.width * BF16
    pool = min(work.pool_rows, POOL_PIECE) * work.width * (3 * BF16 + FP32) + 2 * work.width**2 * FP32
    return pairs + (pool if work.pooled else 0)


def row_metric_bytes(work: Workload) -> tuple[int, int]:
    """Of one expert at each site, where rows have a metric (core/guidance): of down only the feedback, as its metric is
    the layer's. At gate_up also what the metric is made from, for the expert's pairs and the pool's rows.
    """
    rows = 2 * work.width
    stacks = tuple(ROW_STACKS * outputs * inputs * FP32 for inputs, outputs in work.sites)
    pairs = int(work.tokens_per_expert * SKEW) * rows * (2 * BF16 + FP32)
    pool = min(work.pool_rows, POOL_PIECE) * rows * (2 * BF16 + 2 * FP32) * work.pooled
    gate_up = stacks[0] + ROW_SQUARES * rows**2 * FP32 + max(pairs, pool)
    return gate_up * work.guided_sites[0], stacks[1] * work.guided_sites[1]


def curvature_bytes(work: Workload) -> int:
    """A layer's curvature and its factor."""
    return ROW_SQUARES * work.hidden**2 * FP32 if work.guidance_tokens else 0


def gap_bytes(work: Workload) -> int:
    """Of one expert: what its outputs are to make up for. fp32."""
    return work.asymmetric * work.hidden * work.width * FP32


def chunk_bytes(work: Workload) -> int:
    """What one more expert in a chunk costs, at the dearer of its two sites."""
    gate_up, down = (solve_bytes(inputs, outputs) for inputs, outputs in work.sites)
    gate_up_rows, down_rows = row_metric_bytes(work)
    return max(gate_up + gate_up_rows, down + down_rows + activation_bytes(work) + gap_bytes(work))


def gather_bytes(work: Workload) -> int:
    """The larger of one expert's inputs in fp32 (core/moments) and a batch of gathered ones, gate and up."""
    pairs = work.calibration_tokens * work.topk
    piece = min(pairs, PAIRS_PER_PIECE) * work.hidden * 3 * FP32
    batch = min(pairs, PAIRS_PER_BATCH) * (work.hidden + 4 * work.width) * BF16
    return max(piece, batch)


def attend_token_bytes(skeleton: Skeleton) -> int:
    """Temporaries of one token in attention and shared experts, of the dearer kind of layer.

    Full attention: query, gate and output, key and value, each with a rotated or permuted copy, BF16. Linear attention:
    its projections in BF16, then transformers' chunked rule in fp32: some ten tensors of the value's size and three of
    heads x 64. Of a model whose config has other names for these sizes: what all matrices of a layer put out, three
    times, and where it has a recurrence ten tensors of its largest in fp32.
    """
    text = skeleton.text
    try:
        head_dim = int(getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads)
        queries, keys = text.num_attention_heads * head_dim, text.num_key_value_heads * head_dim
        mlp = max(getattr(text, "shared_expert_intermediate_size", 0), getattr(text, "intermediate_size", 0) or 0)
        around = (4 * skeleton.state_width + 3 * mlp) * BF16
        attention = 2 * (3 * queries + 2 * keys) * BF16
        if "linear_attention" in (getattr(text, "layer_types", None) or ()):
            heads = text.linear_num_value_heads
            values = heads * max(text.linear_value_head_dim, text.linear_key_head_dim)
            mixed = 2 * text.linear_num_key_heads * text.linear_key_head_dim + heads * text.linear_value_head_dim
            attention = max(attention, (3 * mixed + 2 * values) * BF16 + (10 * values + 3 * heads * 64) * FP32)
        return int(around + attention)
    except (AttributeError, TypeError, RuntimeError):  # the last of transformers, where layers differ
        return max(_layer_token_bytes(skeleton, layer) for layer in range(skeleton.layers))


def _layer_token_bytes(skeleton: Skeleton, layer: int) -> int:
    shapes = [tuple(value.shape) for value in skeleton.blueprint.decoder.layers[layer].parameters()]
    outputs = [int(shape[0]) for shape in shapes if len(shape) == 2]
    recurrent = any(len(shape) == 3 and shape[1] == 1 for shape in shapes)  # a convolution over each channel
    around = 4 * skeleton.state_width + 3 * sum(outputs)
    return int(around * BF16 + 10 * recurrent * max(outputs, default=0) * FP32)


def attend_batch_bytes(work: Workload, rows: int) -> int:
    """Attention over a batch of rows."""
    return rows * max(work.calibration_length, work.heldout_length) * work.attend_token_bytes


def expert_batch_bytes(work: Workload, tokens: int, workers: int = 1) -> int:
    """One worker's experts over a batch of all workers' tokens: the products of its pairs, and beside them first
    inputs, gate and up of some, then all outputs in BF16 and once more in fp32; the tokens' inputs, and fp32 sums, of
    several workers those of the batch before too, and this worker's rows of all sums.
    """
    pairs = tokens * work.topk
    own = pairs if workers == 1 else min(int(pairs * DEALT) // workers, pairs)
    gathered = min(own, PAIRS_PER_BATCH) * (work.hidden + 3 * work.width)
    passing = own * work.width + max(gathered, own * 3 * work.hidden)
    sums = 1 if workers == 1 else 2 + 1 / workers
    return passing * BF16 + tokens * work.hidden * BF16 + int(tokens * work.hidden * FP32 * sums)


def widened_bytes(work: Workload, device: str) -> int:
    """What the largest product of a worker widens (core/widening): the matrix, inputs and outputs in fp32. Of
    attention: query, key, value and output.
    """
    if not widening.widens(device):
        return 0
    tokens = max(CPU_ATTEND_TOKENS, work.calibration_length, work.heldout_length)
    kept = work.kept_matrix + tokens * max(2 * work.kept_width, 4 * work.attention_width)
    experts = (2 * work.width * work.hidden) + widening.PIECE_TOKENS * (work.hidden + 2 * work.width)
    return max(kept, experts) * FP32


def solved_bytes(work: Workload) -> int:
    """A layer's results: packed tensors, and the experts dequantized from them in BF16."""
    return work.shard_bytes + work.expert_bytes


def measure_bytes(work: Workload) -> int:
    """The output head, a chunk of it in fp32, and that chunk's logits of one held-out row in both streams."""
    columns = min(VOCABULARY_CHUNK, work.vocabulary)
    return embedding_bytes(work) + columns * (work.model_width + LOGITS * work.heldout_length) * FP32


def int8_bytes(work: Workload) -> int:
    """Of a layer's weights in int8: dequantized in BF16 and as stored, moments of their inputs, and one solve."""
    return work.int8_weights * (BF16 + 1) + work.int8_squares * FP32 + int8_solve_bytes(work.int8_inputs)


def int8_solve_bytes(inputs: int) -> int:
    """Of a slab of rows of one weight, with its damped moments and their factor. fp32."""
    return (SQUARES * inputs**2 + STACKS * SLAB_ROWS * inputs) * FP32


def draft_bytes(work: Workload) -> int:
    """On the host while draft experts are solved: the draft head's experts and embedding, their inputs, the results."""
    if not work.draft_tokens:
        return 0
    inputs = work.draft_tokens * 5 // 4 * work.hidden * BF16  # a quarter of them in step 2
    return embedding_bytes(work) + 2 * work.expert_bytes + work.expert_bytes // 4 + inputs


def sweep_rows(rows: int) -> int:
    """Rows that go backward through a layer at one time. rows: of an attention batch."""
    return max(rows // KEPT, 1)


def sweep_bytes(work: Workload, rows: int, workers: int) -> tuple[int, int]:
    """Of the sweep before the loop: guidance rows that lie on the host, and a worker's batch on its device, which
    autograd keeps; the head's chunks, and the rows whose gradients become a curvature.

    rows: of an attention batch.
    """
    hidden = work.guidance_tokens * (work.hidden * BF16 + 8)
    tokens = sweep_rows(rows) * work.calibration_length
    through = KEPT * tokens * work.attend_token_bytes + 2 * expert_batch_bytes(work, tokens)
    pooled = min(work.guidance_tokens // workers, PAIRS_PER_PIECE) * work.hidden * 2 * FP32
    pooled += hidden // workers + 2 * work.hidden**2 * FP32
    columns = min(VOCABULARY_CHUNK, work.vocabulary)
    head = columns * (work.hidden + LOGITS * work.calibration_length) * FP32
    lying = 4 * hidden  # before and behind a layer, gathered, and what is being written
    if work.guidance_routing:  # a field beside the gradients; two experts of each token near a tie, of all at most
        swapped = expert_batch_bytes(work, _ceil_div(2 * tokens, work.topk))
        through += swapped + tokens * (4 * work.experts + 3 * work.hidden) * FP32 + work.hidden**2 * FP32
        pooled += work.hidden**2 * FP32
        lying *= 2
    return lying, max(through, pooled, head)


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


def chunk_inputs_bytes(work: Workload) -> int:
    """Of one expert in a chunk: its tokens' inputs, where they are brought from elsewhere."""
    return int(work.inputs_per_token * work.tokens_per_expert * SKEW) * work.hidden * BF16


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
        "read": (max(resident, start + embedding_bytes(work)), 0 if on_cpu else own),
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
