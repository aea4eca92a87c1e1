"""What a run takes, from sizes alone: operations and time by step, disk. Predictions, with their formulas."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

TENSOR_OVERHEAD_BYTES = 300  # of each tensor written: entries in header and index, its share of quant_log.csv
COLUMNS = 128.0  # of a block in core/gptq
BF16, FP32 = 2, 4
LOGIT_PASSES = 6  # over a chunk's fp32 logits in core/metrics


@dataclass(frozen=True, kw_only=True)
class Workload:
    """The sizes that decide what a run costs.

    hidden D, width I, experts E, topk A, vocabulary V.
    layers: that rows go through; routed_layers: those with experts; solved_layers: those whose experts are quantized.
    full_attention_layers: those whose attention is quadratic, over attention_width = heads x head_dim.
    kept_parameters: matrix elements that every token meets, of all layers. candidates: scales tried per
    group. attend_token_bytes: temporaries of one token in attention. layer_bytes: of the largest layer;
    expert_bytes: of a layer's routed experts in BF16; shard_bytes: of the largest layer's output;
    writer_bytes: the most that is held while a shard is written; read_bytes, write_bytes: of the whole run.
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
    writer_bytes: int
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
    def pairs(self) -> int:
        """(token, expert) pairs of the calibration rows."""
        return self.calibration_tokens * self.topk

    @property
    def tokens_per_expert(self) -> float:
        return self.pairs / self.experts


@dataclass(frozen=True, kw_only=True)
class DiskPlan:
    """Room that OUT takes.

    tensor_bytes: what the index calls total_size; output_bytes: with headers, logs and copied files;
    temp_bytes: the largest shard, which is written under a temporary name; present_bytes: shards of this plan
    that OUT holds already; free_bytes: where OUT is or will be, None if OUT is not known.
    """

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

    @property
    def problem(self) -> str:
        """What to tell the user where it is not enough."""
        return (
            f"disk: {gigabytes(self.needed_bytes)} wanted where OUT will be, "
            f"{gigabytes(self.free_bytes or 0)} free; make room, or name an OUT on another disk"
        )


def gigabytes(count: int) -> str:
    """For people to read."""
    return f"{count / 1e9:,.2f} GB"


def plan_disk(shard_bytes: dict[str, int], tensors: int, sidecar_bytes: int, out: Path | None) -> DiskPlan:
    """shard_bytes: by shard to be written; tensors: in all of them; sidecar_bytes: tokenizer and configs."""
    tensor_bytes = sum(shard_bytes.values())
    output_bytes = tensor_bytes + tensors * TENSOR_OVERHEAD_BYTES + sidecar_bytes
    present = [out / shard for shard in shard_bytes if (out / shard).is_file()] if out else []
    return DiskPlan(
        tensor_bytes=tensor_bytes,
        output_bytes=output_bytes,
        temp_bytes=max(shard_bytes.values()),
        present_bytes=min(sum(path.stat().st_size for path in present), output_bytes),
        free_bytes=None if out is None else _free_bytes(out),
    )


def _free_bytes(out: Path) -> int:
    folder = next(parent for parent in (out.absolute(), *out.absolute().parents) if parent.is_dir())
    return shutil.disk_usage(folder).free


def forward_flop(work: Workload, tokens: int, length: int) -> float:
    """One pass of `tokens` tokens, in rows of `length`, through all layers; attention causal."""
    kept = 2.0 * tokens * work.kept_parameters
    experts = work.routed_layers * 6.0 * tokens * work.topk * work.width * work.hidden
    attention = work.full_attention_layers * 2.0 * tokens * length * work.attention_width
    return kept + experts + attention


def head_flop(work: Workload) -> float:
    """Output head over the held-out rows of both streams."""
    return 4.0 * work.heldout_tokens * work.vocabulary * work.hidden


def forward_bytes(work: Workload, tokens: int) -> float:
    """Temporaries of one pass of `tokens` tokens through all layers, beside the operations above."""
    attention = work.layers * tokens * work.attend_token_bytes
    return attention + work.routed_layers * expert_traffic_bytes(work, tokens * work.topk)


def expert_traffic_bytes(work: Workload, pairs: int) -> float:
    """Of a layer's routed experts, BF16: inputs gathered, gate, up and their product, outputs sorted and unsorted."""
    return float(pairs * (3 * work.hidden + 4 * work.width) * BF16)


def head_bytes(work: Workload) -> float:
    """Passes over the fp32 logits of both streams."""
    return 2.0 * work.heldout_tokens * work.vocabulary * LOGIT_PASSES * FP32


def activations_bytes(work: Workload) -> float:
    """Gate and up once more."""
    pairs = work.calibration_streams * work.pairs
    return float(work.solved_layers * pairs * (work.hidden + 4 * work.width) * BF16)


def activations_flop(work: Workload) -> float:
    """Gate and up once more for the down site's moments, in one or two streams."""
    return work.solved_layers * work.calibration_streams * 4.0 * work.pairs * work.width * work.hidden


def moments_flop(work: Workload) -> float:
    """x x^T of every pair at both sites, as full GEMMs. The cross moment takes as much again."""
    return work.solved_layers * 2.0 * work.pairs * sum(inputs**2 for inputs, _ in work.sites)


def pool_flop(work: Workload) -> float:
    """gate_up: a GEMM over all tokens; down: the pool's rows through all experts' gate and up, then a a^T."""
    gate_up = 2.0 * work.calibration_tokens * work.hidden**2
    down = work.experts * work.pool_rows * (4.0 * work.width * work.hidden + 2.0 * work.width**2)
    return work.solved_layers * (gate_up + down) * work.pooled


def factor_flop(work: Workload) -> float:
    """One Cholesky per expert and site."""
    return _per_solve(work, sum(inputs**3 / 3 for inputs, _ in work.sites))


def target_flop(work: Workload) -> float:
    """W C H^-1: one GEMM and two triangular solves; nothing where the target is the weight itself."""
    return _per_solve(work, sum(4.0 * outputs * inputs**2 for inputs, outputs in work.sites)) * work.asymmetric


def columns_flop(work: Workload) -> float:
    """GEMMs over all earlier errors, before each block of columns."""
    return _per_solve(work, sum(outputs * inputs * max(inputs - COLUMNS, 0) for inputs, outputs in work.sites))


def in_block_flop(work: Workload) -> float:
    """Errors fed to the later columns of the same block."""
    return _per_solve(work, sum(COLUMNS * outputs * inputs for inputs, outputs in work.sites))


def scales_flop(work: Workload) -> float:
    """Five operations for each weight and candidate."""
    return _per_solve(work, sum(5.0 * work.candidates * outputs * inputs for inputs, outputs in work.sites))


def refinement_flop(work: Workload) -> float:
    """One GEMM of the errors with H for each pass."""
    return _per_solve(work, sum(2.0 * work.passes * outputs * inputs**2 for inputs, outputs in work.sites))


def _per_solve(work: Workload, flop: float) -> float:
    return work.solved_layers * work.experts * flop


@dataclass(frozen=True, kw_only=True)
class Rates:
    """FLOP per second of one unit (a CPU core, a GPU) by kind of work; traffic, disk: bytes per second.

    forward: BF16 GEMMs; traffic: temporaries between the GEMMs, which the many small operations of attention, experts
    and output head write and read; moments: BF16 in, fp32 out (fp32 GEMMs on a CPU); gemm: GEMMs of the solve (TF32 on
    a GPU); factor: Cholesky and triangular solves, fp32; elementwise: scale search and the in-block kernel.
    """

    forward: float
    traffic: float
    moments: float
    gemm: float
    factor: float
    elementwise: float
    disk: float
    basis: str


# CPU: GEMMs as measured one by one; traffic, moments and elementwise fitted to the CPU seconds by stage of the example
# with `best` at 64 x 512 and 256 x 1024 tokens, on two cores of an AMD EPYC. GPU: an RTX 3060's data sheet and GEMMs.
RATES = {
    "cpu": Rates(
        forward=190e9,
        traffic=0.9e9,
        moments=70e9,
        gemm=80e9,
        factor=40e9,
        elementwise=20e9,
        disk=1e9,
        basis="cores of an AMD EPYC with AVX-512 BF16: 190 GFLOP/s BF16, 70-80 GFLOP/s fp32 and 0.9 GB/s of "
        "temporaries each; disk at 1 GB/s",
    ),
    "cuda": Rates(
        forward=17e12,
        traffic=250e9,
        moments=17e12,
        gemm=6.4e12,
        factor=4.4e12,
        elementwise=3e12,
        disk=1e9,
        basis="GPU at the 17 TFLOP/s BF16 and 6.4 TF32 of an RTX 3060, disk at 1 GB/s",
    ),
}


@dataclass(frozen=True, kw_only=True)
class TimeStep:
    """One kind of work of the whole run; kind: the rate of `Rates` that its operations go at."""

    name: str
    kind: str
    pflop: float
    traffic_bytes: float
    seconds: float


@dataclass(frozen=True, kw_only=True)
class TimeEstimate:
    """seconds: of the whole run, reading and writing behind the arithmetic; basis: of the figures."""

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


def estimate_time(work: Workload, devices: Sequence[str]) -> TimeEstimate:
    """Operations and temporaries of each step over the constant rates of the devices' kind."""
    kind = devices[0].partition(":")[0]
    rates, units = RATES[kind], torch.get_num_threads() if kind == "cpu" else len(devices)
    calibration = forward_flop(work, work.calibration_tokens, work.calibration_length)
    heldout = 2 * forward_flop(work, work.heldout_tokens, work.heldout_length) + head_flop(work)
    passed, held_bytes = forward_bytes(work, work.calibration_tokens), 2 * forward_bytes(work, work.heldout_tokens)
    steps = (
        ("source stream", "forward", calibration, passed),
        ("release stream", "forward", calibration * work.asymmetric, passed * work.asymmetric),
        ("held-out rows", "forward", heldout, held_bytes + head_bytes(work)),
        ("activations for down", "forward", activations_flop(work), activations_bytes(work)),
        ("moments", "moments", moments_flop(work), 0.0),
        ("cross moments", "moments", moments_flop(work) * work.asymmetric, 0.0),
        ("pools", "moments", pool_flop(work), 0.0),
        ("factor", "factor", factor_flop(work), 0.0),
        ("asymmetric target", "factor", target_flop(work), 0.0),
        ("scale search", "elementwise", scales_flop(work), 0.0),
        ("columns", "gemm", columns_flop(work), 0.0),
        ("columns in a block", "elementwise", in_block_flop(work), 0.0),
        ("refinement", "gemm", refinement_flop(work), 0.0),
    )
    return TimeEstimate(
        steps=tuple(
            TimeStep(
                name=name,
                kind=rate,
                pflop=flop / 1e15,
                traffic_bytes=moved,
                seconds=(flop / getattr(rates, rate) + moved / rates.traffic) / units,
            )
            for name, rate, flop, moved in steps
        ),
        read_seconds=work.read_bytes / rates.disk,
        write_seconds=work.write_bytes / rates.disk,
        basis=f"a prediction from constants, start and texts not in it: {units} {rates.basis}",
    )
