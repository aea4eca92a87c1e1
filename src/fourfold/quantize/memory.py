"""Peak memory by stage, predicted from sizes, and the batch sizes that keep it within a budget.

Each figure is a function of its own, so that it can be held against a measurement.
"""

from __future__ import annotations

from dataclasses import dataclass

import psutil
import torch

from fourfold.datatypes import FourfoldError
from fourfold.quantize.estimate import Workload

BF16, FP32 = 2, 4
HOST_BASELINE_BYTES = 600 * 10**6  # interpreter, torch and transformers, imported
CUDA_CONTEXT_BYTES = 500 * 10**6
FREE_MARGIN = 0.10  # of free memory, left alone where no budget is given
STACKS = 7  # fp32 copies of the weights alive in the solve: W, target, T, Err, permuted W, gathered scales, one to spare
SKEW = 1.5  # pairs of the busiest chunk of experts over an even share
PAIRS_PER_BATCH = 65_536  # as in model/layer.py: pairs whose gathered inputs exist at one time
VOCABULARY_CHUNK = 32_768
ATTEND_TOKENS = 8_192  # tokens of an attention batch that keep any device busy
EXPERT_TOKENS = 16_384  # likewise of an expert batch
EXPERT_TOKENS_LEAST = 256


def rows_bytes(work: Workload) -> int:
    """Hidden states (BF16) and ids of all rows: calibration in one or two streams, held-out always in two."""
    tokens = work.calibration_streams * work.calibration_tokens + 2 * work.heldout_tokens
    return tokens * (work.hidden * BF16 + 8)


def traffic_bytes(work: Workload) -> int:
    """Of the calibration rows of each stream, kept until the layer is solved: MoE inputs, routing, sorted pairs."""
    routing = work.topk * (8 + BF16)
    pairs = work.topk * (8 + 8 + BF16)
    return work.calibration_streams * work.calibration_tokens * (work.hidden * BF16 + routing + pairs)


def embedding_bytes(work: Workload) -> int:
    """The embedding matrix, or the output head."""
    return work.vocabulary * work.hidden * BF16


def moments_bytes(work: Workload, inputs: int) -> int:
    """Of one expert at a site with K inputs: hessian, and cross where the target is asymmetric. fp32."""
    return (2 if work.asymmetric else 1) * inputs * inputs * FP32


def solve_bytes(work: Workload, inputs: int, outputs: int) -> int:
    """Of one expert in the solve, its moments included: factor, permuted copy, one panel of the solve, weight stacks."""
    panel = inputs * min(inputs, 256) * FP32
    return moments_bytes(work, inputs) + 2 * inputs * inputs * FP32 + panel + STACKS * outputs * inputs * FP32


def activation_bytes(work: Workload) -> int:
    """Of one expert, what its down site is learnt from: silu(gate) * up of its pairs, and of the pool's rows."""
    pairs = int(work.calibration_streams * work.tokens_per_expert * SKEW) * work.width * BF16
    pool = work.pool_rows * work.width * (2 * BF16 + BF16 + FP32) if work.pooled else 0
    return pairs + pool


def expert_bytes(work: Workload) -> int:
    """What one more expert in a chunk costs, at the dearer of its two sites."""
    (gate_up_inputs, gate_up_outputs), (down_inputs, down_outputs) = work.sites
    gate_up = solve_bytes(work, gate_up_inputs, gate_up_outputs)
    return max(gate_up, solve_bytes(work, down_inputs, down_outputs) + activation_bytes(work))


def gather_bytes(work: Workload) -> int:
    """A batch of gathered expert inputs in BF16 and fp32, with their gate and up."""
    pairs = min(PAIRS_PER_BATCH, work.calibration_tokens * work.topk)
    return pairs * (work.hidden * (BF16 + FP32) + 3 * work.width * BF16)


def attend_batch_bytes(work: Workload, rows: int) -> int:
    return rows * max(work.calibration_length, work.heldout_length) * work.attend_token_bytes


def expert_batch_bytes(work: Workload, tokens: int) -> int:
    """Routed experts over a batch of tokens: gate and up, their product, outputs sorted and unsorted, fp32 no-where."""
    pair = 3 * work.width * BF16 + 2 * work.hidden * BF16
    gathered = min(tokens * work.topk, PAIRS_PER_BATCH) * work.hidden * BF16
    return tokens * work.topk * pair + gathered + 2 * tokens * work.hidden * BF16


def solved_bytes(work: Workload) -> int:
    """A layer's results while it is solved: int8 codes and packed words, and the dequantized experts in BF16."""
    return work.expert_bytes // BF16 + work.shard_bytes + work.expert_bytes


def measure_bytes(work: Workload) -> int:
    """The output head, and fp32 logits of one held-out row of both streams over a chunk of the vocabulary."""
    logits = 3 * work.heldout_length * min(VOCABULARY_CHUNK, work.vocabulary) * FP32
    return embedding_bytes(work) + logits


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
    kind, _, number = device.partition(":")
    if kind not in ("cpu", "cuda") or (number and not number.isdecimal()) or (kind == "cpu" and number):
        raise FourfoldError(f"device {device!r}: cpu, cuda or cuda:N is wanted")
    if kind == "cuda" and (not torch.cuda.is_available() or int(number or 0) >= torch.cuda.device_count()):
        raise FourfoldError(f"device {device!r}: this machine has {torch.cuda.device_count()} CUDA devices; "
                            "use --devices cpu, or a torch build with CUDA")


def device_budget(device: str) -> int:
    """Bytes that are free now, less a margin. A CUDA device is looked at only when one is asked for."""
    free = psutil.virtual_memory().available if device == "cpu" else torch.cuda.mem_get_info(device)[0]
    return int(free * (1 - FREE_MARGIN))


def plan_memory(work: Workload, device: str, memory_bytes: int | None) -> MemoryPlan:
    """Batch sizes that keep the device within its budget where that is possible; chunks of experts are equal.

    A budget that is too small gives the smallest batches; `MemoryPlan.fits` is then False.
    """
    budget = device_budget(device) if memory_bytes is None else memory_bytes
    solved = solved_bytes(work)
    if device == "cpu":
        fixed = _host_resident_bytes(work) + traffic_bytes(work) + solved
    else:
        fixed = CUDA_CONTEXT_BYTES + work.layer_bytes + solved
    left = max(budget - fixed, 0)
    row_batch = max(ATTEND_TOKENS // max(work.calibration_length, work.heldout_length, 1), 1)
    while row_batch > 1 and attend_batch_bytes(work, row_batch) > left // 2:
        row_batch //= 2
    token_batch = EXPERT_TOKENS
    while token_batch > EXPERT_TOKENS_LEAST and expert_batch_bytes(work, token_batch) > left // 2:
        token_batch //= 2
    most = min(max((left - gather_bytes(work)) // expert_bytes(work), 1), work.experts)
    chunks = -(-work.experts // most)
    chunk_experts = -(-work.experts // chunks)
    return MemoryPlan(
        device=device,
        budget_bytes=budget,
        chunk_experts=chunk_experts,
        token_batch=token_batch,
        row_batch=row_batch,
        stages=_stages(work, device, chunk_experts, token_batch, row_batch),
    )


def _host_resident_bytes(work: Workload) -> int:
    """On the host in every stage of the loop: rows, the layer in work, the next one read, the last one written."""
    return HOST_BASELINE_BYTES + rows_bytes(work) + 2 * work.layer_bytes + work.shard_bytes


def _stages(work: Workload, device: str, chunk: int, tokens: int, rows: int) -> tuple[StageMemory, ...]:
    resident, traffic, solved = _host_resident_bytes(work), traffic_bytes(work), solved_bytes(work)
    start = HOST_BASELINE_BYTES + rows_bytes(work)
    (gate_up_inputs, _), (down_inputs, _) = work.sites
    moments = chunk * max(moments_bytes(work, gate_up_inputs), moments_bytes(work, down_inputs) + activation_bytes(work))
    held = {  # stage: bytes on the host, bytes wherever the arithmetic is done
        "read": (max(resident, start + embedding_bytes(work)), 0),
        "attend": (resident + traffic, attend_batch_bytes(work, rows)),
        "moments": (resident + traffic, solved + moments + gather_bytes(work)),
        "solve": (resident + traffic, solved + chunk * expert_bytes(work)),
        "advance": (resident + traffic, solved + expert_batch_bytes(work, tokens)),
        "write": (resident + work.shard_bytes, 0),
        "measure": (start, measure_bytes(work)),
    }
    if device == "cpu":
        return tuple(StageMemory(stage=stage, host_bytes=host + work_bytes, device_bytes=host + work_bytes)
                     for stage, (host, work_bytes) in held.items())
    on_device = {stage: CUDA_CONTEXT_BYTES + (0 if stage == "measure" else work.layer_bytes) for stage in held}
    head = {"measure": embedding_bytes(work)}
    return tuple(StageMemory(stage=stage, host_bytes=host + head.get(stage, 0), device_bytes=on_device[stage] + work_bytes)
                 for stage, (host, work_bytes) in held.items())
