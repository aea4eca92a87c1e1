"""Peak memory by stage, predicted from sizes, and the batch sizes that keep it within a budget.

Each figure is a function of its own, so that it can be held against a measurement.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from typing import Any

import psutil
import torch

from fourfold.core.kernels import cuda
from fourfold.core.metrics import VOCABULARY_CHUNK
from fourfold.core.moments import PAIRS_PER_PIECE
from fourfold.datatypes import FourfoldError
from fourfold.model.layer import PAIRS_PER_BATCH
from fourfold.quantize.estimate import Workload

BF16, FP32 = 2, 4
HOST_BASELINE_BYTES = 600 * 10**6  # interpreter, torch and transformers, imported
CUDA_CONTEXT_BYTES = 500 * 10**6
FREE_MARGIN = 0.10  # of free memory, left alone where no budget is given
SQUARES = 4  # fp32 [K, K] per expert at the solve's peak: own H, shrunk H, and two in core/gptq.factorize_
STACKS = 6  # fp32 [N, K] per expert: weight, target, ordered, error, codes, one temporary
LOGITS = 6  # fp32 [T, vocabulary chunk] in core/metrics: two models' and what their sums take
SKEW = 1.5  # pairs of a chunk's busiest experts over an even share
ATTEND_TOKENS = 8_192  # tokens of an attention batch that keep any GPU busy
CPU_ATTEND_TOKENS = 2_048  # likewise a CPU: of four times as many, a third of the time went into fresh memory pages
EXPERT_TOKENS = 16_384  # likewise of an expert batch
EXPERT_TOKENS_LEAST = 256
CPU_CHUNK_BYTES = 128 * 2**20  # of a chunk's solve: eight full-width experts at a time took a sixth longer than one


def rows_bytes(work: Workload) -> int:
    """Hidden states (BF16) and ids of all rows: calibration in one or two streams, held-out always in two."""
    tokens = work.calibration_streams * work.calibration_tokens + 2 * work.heldout_tokens
    return tokens * (work.hidden * BF16 + 8)


def traffic_bytes(work: Workload) -> int:
    """Kept of each stream's calibration rows until the layer is solved: MoE inputs, routing, sorted pairs."""
    routing = work.topk * (8 + BF16)
    pairs = work.topk * (8 + 8 + BF16)
    return work.calibration_streams * work.calibration_tokens * (work.hidden * BF16 + routing + pairs)


def embedding_bytes(work: Workload) -> int:
    """The embedding matrix, or the output head."""
    return work.vocabulary * work.hidden * BF16


def moments_bytes(work: Workload, inputs: int) -> int:
    """Of one expert at a site with K inputs: hessian, and cross where the target is asymmetric. fp32."""
    return work.calibration_streams * inputs * inputs * FP32


def solve_bytes(work: Workload, inputs: int, outputs: int) -> int:
    """Of one expert in the solve of a site, its moments included. The cross moment is there besides."""
    squares = SQUARES + work.calibration_streams - 1
    return (squares * inputs * inputs + STACKS * outputs * inputs) * FP32


def activation_bytes(work: Workload) -> int:
    """Of one expert, what down is learnt from: silu(gate) * up of its pairs and of the pool's rows."""
    pairs = int(work.calibration_streams * work.tokens_per_expert * SKEW) * work.width * BF16
    pool = work.pool_rows * work.width * (3 * BF16 + FP32) + work.width**2 * FP32
    return pairs + (pool if work.pooled else 0)


def chunk_bytes(work: Workload) -> int:
    """What one more expert in a chunk costs, at the dearer of its two sites."""
    gate_up, down = (solve_bytes(work, inputs, outputs) for inputs, outputs in work.sites)
    return max(gate_up, down + activation_bytes(work))


def gather_bytes(work: Workload) -> int:
    """The larger of one expert's inputs in fp32 (core/moments) and a batch of gathered ones, gate and up."""
    pairs = work.calibration_tokens * work.topk
    piece = min(pairs, PAIRS_PER_PIECE) * work.hidden * (2 + work.calibration_streams) * FP32
    batch = min(pairs, PAIRS_PER_BATCH) * (work.hidden + 4 * work.width) * BF16
    return max(piece, batch)


def attend_token_bytes(text: Any) -> int:
    """Temporaries of one token in attention and shared experts, of the dearer kind of layer.

    text: transformers' config of the text model. Full attention: query, gate and output, key and value, each
    with a rotated or permuted copy, BF16. Linear attention: its projections in BF16, then transformers'
    chunked rule in fp32: some ten tensors of the value's size and three of heads x 64.
    """
    head_dim = int(getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads)
    queries, keys = text.num_attention_heads * head_dim, text.num_key_value_heads * head_dim
    mlp = max(getattr(text, "shared_expert_intermediate_size", 0), getattr(text, "intermediate_size", 0) or 0)
    around = (4 * text.hidden_size + 3 * mlp) * BF16
    attention = 2 * (3 * queries + 2 * keys) * BF16
    if "linear_attention" in (getattr(text, "layer_types", None) or ()):
        heads = text.linear_num_value_heads
        values = heads * max(text.linear_value_head_dim, text.linear_key_head_dim)
        mixed = 2 * text.linear_num_key_heads * text.linear_key_head_dim + heads * text.linear_value_head_dim
        attention = max(attention, (3 * mixed + 2 * values) * BF16 + (10 * values + 3 * heads * 64) * FP32)
    return int(around + attention)


def attend_batch_bytes(work: Workload, rows: int) -> int:
    """Attention over a batch of rows."""
    return rows * max(work.calibration_length, work.heldout_length) * work.attend_token_bytes


def expert_batch_bytes(work: Workload, tokens: int) -> int:
    """Routed experts over a batch of tokens: gate, up, product, outputs sorted and unsorted, all BF16."""
    pairs = tokens * work.topk
    gathered = min(pairs, PAIRS_PER_BATCH) * (work.hidden + 3 * work.width)
    return (pairs * (work.width + 2 * work.hidden) + gathered + 2 * tokens * work.hidden) * BF16


def solved_bytes(work: Workload) -> int:
    """A layer's results: packed tensors, and the experts dequantized from them in BF16."""
    return work.shard_bytes + work.expert_bytes


def measure_bytes(work: Workload) -> int:
    """The output head, a chunk of it in fp32, and that chunk's logits of one held-out row in both streams."""
    columns = min(VOCABULARY_CHUNK, work.vocabulary)
    return embedding_bytes(work) + columns * (work.hidden + LOGITS * work.heldout_length) * FP32


@dataclass(frozen=True, kw_only=True)
class StageMemory:
    """Predicted peak of one stage. On the CPU the device is the host, and both figures are the same."""

    stage: str
    host_bytes: int
    device_bytes: int


@dataclass(frozen=True, kw_only=True)
class MemoryPlan:
    """Batch sizes of the loop, and what they lead to.

    chunk_experts: experts whose moments exist at one time; token_batch: tokens of an expert evaluation;
    row_batch: rows of an attention batch; budget_bytes: of the device (of the host, if that is the device).
    """

    device: str
    budget_bytes: int
    chunk_experts: int
    token_batch: int
    row_batch: int
    stages: tuple[StageMemory, ...]

    @property
    def host_peak_bytes(self) -> int:
        return max(stage.host_bytes for stage in self.stages)

    @property
    def device_peak_bytes(self) -> int:
        return max(stage.device_bytes for stage in self.stages)

    @property
    def fits(self) -> bool:
        return self.device_peak_bytes <= self.budget_bytes


def check_device(device: str) -> None:
    """Raises FourfoldError for a device that is not "cpu", "cuda" or "cuda:N", or that this machine lacks."""
    if device == "cpu":
        return
    kind, _, number = device.partition(":")
    if kind != "cuda" or (device != "cuda" and not number.isdecimal()):
        raise FourfoldError(f"device {device!r}: cpu, cuda or cuda:N is wanted")
    count = torch.cuda.device_count()
    if int(number or 0) >= count:
        raise FourfoldError(
            f"device {device!r}: this machine shows torch {count} CUDA devices; take cpu, or install a "
            "driver and a torch build with CUDA"
        )
    if torch.cuda.get_device_capability(device) < (8, 0):
        name = torch.cuda.get_device_name(device)
        raise FourfoldError(f"device {device!r}: {name} has no BF16; compute capability 8.0 or newer is wanted")
    if not cuda.AVAILABLE:
        raise FourfoldError(f"device {device!r}: triton is not installed, which the kernels are made with; install it")


def device_budget(device: str) -> int:
    """Bytes that are free now, less a margin. A CUDA device is looked at only when one is asked for."""
    free: int = psutil.virtual_memory().available if device == "cpu" else torch.cuda.mem_get_info(device)[0]
    return int(free * (1 - FREE_MARGIN))


def plan_memory(work: Workload, device: str, memory_bytes: int | None) -> MemoryPlan:
    """Batch sizes that keep the device within its budget where that is possible.

    memory_bytes: the budget, None for what is free now. Experts are dealt evenly into as few chunks as fit, on a CPU
    into chunks that stay near its caches. A
    budget too small for anything gives the smallest sizes; `MemoryPlan.fits` is then False.
    """
    budget = device_budget(device) if memory_bytes is None else memory_bytes
    fixed = _resident_bytes(work) + traffic_bytes(work) if device == "cpu" else _on_device_bytes(work)
    left = max(budget - fixed - solved_bytes(work), 0)
    attend_tokens = CPU_ATTEND_TOKENS if device == "cpu" else ATTEND_TOKENS
    rows = max(attend_tokens // max(work.calibration_length, work.heldout_length), 1)
    while rows > 1 and attend_batch_bytes(work, rows) > left:
        rows //= 2
    tokens = EXPERT_TOKENS
    while tokens > EXPERT_TOKENS_LEAST and expert_batch_bytes(work, tokens) > left:
        tokens //= 2
    most = min(max((left - gather_bytes(work)) // chunk_bytes(work), 1), work.experts)
    if device == "cpu":
        most = min(most, max(CPU_CHUNK_BYTES // max(solve_bytes(work, *site) for site in work.sites), 1))
    chunk = _ceil_div(work.experts, _ceil_div(work.experts, most))
    return MemoryPlan(
        device=device,
        budget_bytes=budget,
        chunk_experts=chunk,
        token_batch=tokens,
        row_batch=rows,
        stages=_stages(work, device, chunk, tokens, rows),
    )


def _ceil_div(count: int, size: int) -> int:
    return -(-count // size)


def _resident_bytes(work: Workload) -> int:
    """On the host in every stage of the loop: rows, the layer in work, the next one, what is written."""
    return HOST_BASELINE_BYTES + rows_bytes(work) + 2 * work.layer_bytes + work.writer_bytes


def _on_device_bytes(work: Workload) -> int:
    """On a GPU in every stage of the loop: the layer, and until it is solved its experts' inputs and routing."""
    return CUDA_CONTEXT_BYTES + work.layer_bytes + traffic_bytes(work)


def _stages(work: Workload, device: str, chunk: int, tokens: int, rows: int) -> tuple[StageMemory, ...]:
    start = HOST_BASELINE_BYTES + rows_bytes(work)
    resident = _resident_bytes(work)
    looped = resident + traffic_bytes(work)
    solved = solved_bytes(work)
    gate_up, down = (moments_bytes(work, inputs) for inputs, _ in work.sites)
    moments = chunk * max(gate_up, down + activation_bytes(work))
    # stage: bytes that lie on the host, bytes that lie where the arithmetic is done
    sizes = {
        "read": (max(resident, start + embedding_bytes(work)), 0),
        "attend": (looped, attend_batch_bytes(work, rows)),
        "moments": (looped, solved + moments + gather_bytes(work)),
        "solve": (looped, solved + chunk * chunk_bytes(work)),
        "advance": (looped, solved + expert_batch_bytes(work, tokens)),
        "write": (resident, 0),
        "measure": (start, measure_bytes(work)),
    }
    stages = []
    for stage, (host, arithmetic) in sizes.items():
        on_device = host + arithmetic
        if device != "cpu":
            on_device = arithmetic + (CUDA_CONTEXT_BYTES if stage == "measure" else _on_device_bytes(work))
            host += embedding_bytes(work) if stage == "measure" else 0
        host_bytes = on_device if device == "cpu" else host
        stages.append(StageMemory(stage=stage, host_bytes=host_bytes, device_bytes=on_device))
    return tuple(stages)


def give_back_free_memory() -> None:
    """Return freed heap to the system, between stages. glibc keeps it: on the example 0.3 GB of a peak of 2.0 GB."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc's own; other C libraries have no such heap
    if trim is not None:
        trim(0)
