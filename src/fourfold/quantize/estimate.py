"""What a run will need, from sizes alone: peak memory by stage, disk, time. Predictions, each with its formula."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

import torch


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
