"""What a run will need, from sizes alone: peak memory by stage, disk, time. Predictions, each with its formula."""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch

from fourfold.datatypes import FourfoldError

GB = 10**9
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
TENSOR_OVERHEAD_BYTES = 300  # header entry, index entry and share of quant_log.csv for each tensor written


@dataclass(frozen=True, kw_only=True)
class Workload:
    """The sizes that decide what a run costs.

    hidden D, width I, experts E, topk A, vocabulary V. layers: decoder layers that rows go through; routed_layers:
    those with experts; solved_layers: those whose experts are quantized; full_attention_layers: those whose attention
    is quadratic, over `attention_width` = heads x head_dim. kept_parameters: matrix elements that every token meets,
    all layers together. attend_token_bytes: temporaries of one token in attention. candidates: scales tried per group.
    layer_bytes, expert_bytes, shard_bytes: the largest layer, its routed experts in BF16, its shard of the output.
    """

    hidden: int
    width: int
    experts: int
    topk: int
    vocabulary: int
    calibration_tokens: int
    calibration_length: int
    heldout_tokens: int
    heldout_length: int
    asymmetric: bool
    group_size: int
    candidates: int
    passes: int
    pooled: bool
    pool_rows: int
    layers: int
    routed_layers: int
    solved_layers: int
    full_attention_layers: int
    attention_width: int
    kept_parameters: int
    attend_token_bytes: int
    layer_bytes: int
    expert_bytes: int
    shard_bytes: int
    read_bytes: int
    write_bytes: int

    @property
    def calibration_streams(self) -> int:
        return 2 if self.asymmetric else 1

    @property
    def sites(self) -> tuple[tuple[int, int], tuple[int, int]]:
        """(K, N) of the input sites gate_up and down."""
        return (self.hidden, 2 * self.width), (self.width, self.hidden)

    @property
    def tokens_per_expert(self) -> float:
        return self.calibration_tokens * self.topk / self.experts


# --- memory: bytes -----------------------------------------------------------------------------------------------


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


# --- memory: plan ------------------------------------------------------------------------------------------------


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


# --- disk --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class DiskPlan:
    """tensor_bytes: what the index calls total_size; output_bytes: with headers and copied files; temp_bytes: the
    largest shard while it is written under a temporary name; present_bytes: shards of this plan that OUT holds already;
    free_bytes: where OUT will be, None if OUT is not known."""

    tensor_bytes: int
    output_bytes: int
    temp_bytes: int
    present_bytes: int
    free_bytes: int | None

    @property
    def needed_bytes(self) -> int:
        return self.output_bytes - self.present_bytes + self.temp_bytes

    @property
    def enough(self) -> bool:
        return self.free_bytes is None or self.needed_bytes <= self.free_bytes


def plan_disk(shard_bytes: dict[str, int], tensors: int, copied_bytes: int, out: Path | None) -> DiskPlan:
    """shard_bytes: shards to be written, by name; tensors: in them; copied_bytes: tokenizer and configs."""
    tensor_bytes = sum(shard_bytes.values())
    present = 0
    if out is not None:
        present = sum((out / shard).stat().st_size for shard in shard_bytes if (out / shard).is_file())
    output_bytes = tensor_bytes + tensors * TENSOR_OVERHEAD_BYTES + copied_bytes
    return DiskPlan(
        tensor_bytes=tensor_bytes,
        output_bytes=output_bytes,
        temp_bytes=max(shard_bytes.values()),
        present_bytes=min(present, output_bytes),
        free_bytes=None if out is None else _free_bytes(out),
    )


def _free_bytes(out: Path) -> int:
    folder = out.absolute()
    while not folder.is_dir():
        folder = folder.parent
    return shutil.disk_usage(folder).free


# --- time --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Rates:
    """FLOP per second of one unit (a CPU core, a GPU) by kind of work; disk: bytes per second.

    forward: BF16 GEMMs; moments: BF16 in, fp32 out (fp32 GEMMs on a CPU); gemm: GEMMs of the solve (TF32 on a GPU);
    factor: Cholesky and triangular solves in fp32; elementwise: scale search and the in-block kernel.
    """

    forward: float
    moments: float
    gemm: float
    factor: float
    elementwise: float
    disk: float
    basis: str


RATES = {
    "cpu": Rates(forward=190e9, moments=80e9, gemm=80e9, factor=40e9, elementwise=4e9, disk=1e9,
                 basis="a CPU core at 190 GFLOP/s BF16 and 80 fp32, disk at 1 GB/s"),
    "cuda": Rates(forward=17e12, moments=17e12, gemm=6.4e12, factor=4.4e12, elementwise=3e12, disk=1e9,
                  basis="an RTX 3060 at 17 TFLOP/s BF16 and 6.4 TF32, disk at 1 GB/s"),
}


@dataclass(frozen=True, kw_only=True)
class TimeStep:
    name: str
    kind: str
    pflop: float
    seconds: float


@dataclass(frozen=True, kw_only=True)
class TimeEstimate:
    """seconds: of the whole run, reading and writing behind the arithmetic; basis: where the figures come from."""

    steps: tuple[TimeStep, ...]
    read_seconds: float
    write_seconds: float
    basis: str

    @property
    def pflop(self) -> float:
        return sum(step.pflop for step in self.steps)

    @property
    def compute_seconds(self) -> float:
        return sum(step.seconds for step in self.steps)

    @property
    def seconds(self) -> float:
        return max(self.compute_seconds, self.read_seconds + self.write_seconds)


def forward_flop(work: Workload, tokens: int, length: int) -> float:
    """One pass of `tokens` tokens in rows of `length` through all layers, attention causal."""
    kept = 2 * tokens * work.kept_parameters
    experts = work.routed_layers * 2 * tokens * work.topk * 3 * work.width * work.hidden
    attention = work.full_attention_layers * 2 * tokens * length * work.attention_width
    return float(kept + experts + attention)


def head_flop(work: Workload) -> float:
    """Last norm and output head over the held-out rows of both streams."""
    return 2.0 * 2 * work.heldout_tokens * work.vocabulary * work.hidden


def activations_flop(work: Workload) -> float:
    """Gate and up once more for the down site's moments, in one or two streams."""
    pairs = work.calibration_tokens * work.topk
    return work.solved_layers * work.calibration_streams * 2.0 * pairs * 2 * work.width * work.hidden


def moments_flop(work: Workload) -> float:
    """x x^T of every pair at both sites, as full GEMMs. The cross moment takes as much again."""
    pairs = work.calibration_tokens * work.topk
    return work.solved_layers * 2.0 * pairs * sum(inputs**2 for inputs, _ in work.sites)


def pool_flop(work: Workload) -> float:
    """gate_up: one GEMM over all tokens; down: the pool's rows through every expert's gate and up, then a a^T."""
    gate_up = 2.0 * work.calibration_tokens * work.hidden**2
    down = work.experts * work.pool_rows * (4.0 * work.width * work.hidden + 2 * work.width**2)
    return work.solved_layers * (gate_up + down) if work.pooled else 0.0


def _per_solve(work: Workload, flop_of_site: float) -> float:
    return work.solved_layers * work.experts * flop_of_site


def factor_flop(work: Workload) -> float:
    return _per_solve(work, sum(inputs**3 / 3 for inputs, _ in work.sites))


def target_flop(work: Workload) -> float:
    """W C H^-1: one GEMM and two triangular solves; nothing where the target is the weight itself."""
    return _per_solve(work, sum(4.0 * outputs * inputs**2 for inputs, outputs in work.sites)) * work.asymmetric


def columns_flop(work: Workload) -> float:
    """Left-looking GEMMs before each block of 128 columns."""
    return _per_solve(work, sum(outputs * inputs * max(inputs - 128.0, 0.0) for inputs, outputs in work.sites))


def in_block_flop(work: Workload) -> float:
    return _per_solve(work, sum(128.0 * outputs * inputs for inputs, outputs in work.sites))


def scales_flop(work: Workload) -> float:
    """Five operations for each weight and candidate."""
    return _per_solve(work, sum(5.0 * work.candidates * outputs * inputs for inputs, outputs in work.sites))


def refinement_flop(work: Workload) -> float:
    return _per_solve(work, sum(2.0 * work.passes * outputs * inputs**2 for inputs, outputs in work.sites))


def estimate_time(work: Workload, device: str) -> TimeEstimate:
    kind = device.partition(":")[0]
    rates, units = RATES[kind], torch.get_num_threads() if kind == "cpu" else 1
    calibration = forward_flop(work, work.calibration_tokens, work.calibration_length)
    heldout = forward_flop(work, work.heldout_tokens, work.heldout_length)
    steps = {
        "source stream": ("forward", calibration),
        "release stream": ("forward", calibration * work.asymmetric),
        "held-out rows, both streams": ("forward", 2 * heldout + head_flop(work)),
        "activations for down": ("forward", activations_flop(work)),
        "moments": ("moments", moments_flop(work)),
        "cross moments": ("moments", moments_flop(work) * work.asymmetric),
        "pools": ("moments", pool_flop(work)),
        "factor": ("factor", factor_flop(work)),
        "asymmetric target": ("factor", target_flop(work)),
        "scale search": ("elementwise", scales_flop(work)),
        "columns": ("gemm", columns_flop(work)),
        "columns, in block": ("elementwise", in_block_flop(work)),
        "refinement": ("gemm", refinement_flop(work)),
    }
    counted = f"{units} x {rates.basis}" if kind == "cpu" else rates.basis
    return TimeEstimate(
        steps=tuple(TimeStep(name=name, kind=rate, pflop=flop / 1e15, seconds=flop / (getattr(rates, rate) * units))
                    for name, (rate, flop) in steps.items()),
        read_seconds=work.read_bytes / rates.disk,
        write_seconds=work.write_bytes / rates.disk,
        basis=f"from these constants, a prediction: {counted}; operations counted as in docs/numerics.md",
    )
