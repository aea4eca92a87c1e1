"""What a run takes, from sizes alone: operations and temporaries by step, disk. Predictions, with their formulas."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

from fourfold.units import size

TENSOR_OVERHEAD_BYTES = 300  # of each tensor written: entries in header and index, its share of quant_log.csv
COLUMNS = 128.0  # of a block in core/gptq
BF16, FP32 = 2, 4
LOGIT_PASSES = 6  # over a chunk's fp32 logits in core/metrics
POOL_ROWS_PER_INPUT = 5  # of down
ROW_POOL_ROWS = 2_048  # random tokens for the pool of gate and up's rows, where they have a metric
SWEPT = Path(".fourfold/guidance")  # under OUT: what the sweep before the loop keeps
ROW_DAMPING = ((32, 0.05), (8, 0.2), (0, 0.3))  # from so many guidance tokens per hidden dimension on


@dataclass(frozen=True, kw_only=True)
class Workload:
    """The sizes that decide what a run costs.

    hidden D, width I, experts E, topk A, vocabulary V; model_width: of embeddings, where experts see another;
    state_width: values of a token in a stream.
    layers: that rows go through; routed_layers: those with experts; solved_layers: those whose experts are quantized.
    guidance_tokens: that go backward before the loop, 0 without guidance; guidance_sites: both, or down alone.
    swept_layers: that they go through, all of the model.
    full_attention_layers: those whose attention is quadratic, over attention_width = heads x head_dim.
    kept_parameters: matrix elements that every token meets, of all layers. candidates: scales tried per
    group. kept_matrix, kept_width: elements and longest side of the largest matrix that is kept in a layer.
    attend_token_bytes: temporaries of one token in attention. layer_bytes: of the largest layer;
    expert_bytes: of a layer's routed experts in BF16; shard_bytes: of the largest layer's output;
    read_bytes, write_bytes: of the whole run.
    """

    hidden: int
    model_width: int
    state_width: int
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
    guidance_tokens: int
    guidance_sites: str
    swept_layers: int
    layers: int
    routed_layers: int
    solved_layers: int
    full_attention_layers: int
    attention_width: int
    kept_parameters: int
    kept_matrix: int
    kept_width: int
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
    def inputs_per_token(self) -> int:
        """Vectors of D that a layer's experts are learnt from: each stream's input, and the gap between the streams."""
        return 3 if self.asymmetric else 1

    @property
    def sites(self) -> tuple[tuple[int, int], tuple[int, int]]:
        """(K, N) of the input sites gate_up and down."""
        return (self.hidden, 2 * self.width), (self.width, self.hidden)

    @property
    def guided_sites(self) -> tuple[bool, bool]:
        """Whether the rows of gate_up and down have a metric."""
        guided = self.guidance_tokens > 0
        return guided and self.guidance_sites == "both", guided

    @property
    def pairs(self) -> int:
        """(token, expert) pairs of the calibration rows."""
        return self.calibration_tokens * self.topk

    @property
    def ends_bytes(self) -> int:
        """Embeddings and output head, BF16."""
        return 2 * self.vocabulary * self.model_width * BF16

    @property
    def tokens_per_expert(self) -> float:
        return self.pairs / self.experts


@dataclass(frozen=True, kw_only=True)
class DiskPlan:
    """Room that OUT takes.

    swept_bytes: hidden states that the sweep before the loop has still to keep, gone before a shard is written;
    curvature_bytes: what it leaves until the run is finished.
    tensor_bytes: what the index calls total_size; output_bytes: with headers, logs and copied files;
    temp_bytes: the largest shard, which is written under a temporary name; present_bytes: shards of this plan
    that OUT holds already; free_bytes: where OUT is or will be, None if OUT is not known.
    """

    swept_bytes: int
    curvature_bytes: int
    tensor_bytes: int
    output_bytes: int
    temp_bytes: int
    present_bytes: int
    free_bytes: int | None

    @property
    def needed_bytes(self) -> int:
        return max(self.output_bytes - self.present_bytes + self.temp_bytes, self.swept_bytes) + self.curvature_bytes

    @property
    def enough(self) -> bool:
        return self.free_bytes is None or self.needed_bytes <= self.free_bytes

    @property
    def problem(self) -> str:
        """What to tell the user where it is not enough."""
        return (
            f"disk: got {size(self.free_bytes or 0)} free where OUT will be, expected {size(self.needed_bytes)}. "
            "Make room, or name an OUT on another disk"
        )


def plan_disk(
    work: Workload, shard_bytes: dict[str, int], tensors: int, sidecar_bytes: int, out: Path | None
) -> DiskPlan:
    """shard_bytes: by shard to be written; tensors: in all of them; sidecar_bytes: tokenizer and configs."""
    tensor_bytes = sum(shard_bytes.values())
    output_bytes = tensor_bytes + tensors * TENSOR_OVERHEAD_BYTES + sidecar_bytes
    present = [out / shard for shard in shard_bytes if (out / shard).is_file()] if out else []
    return DiskPlan(
        swept_bytes=0 if present else _swept_bytes(work, out),
        curvature_bytes=work.solved_layers * work.hidden**2 * FP32 if work.guidance_tokens else 0,
        tensor_bytes=tensor_bytes,
        output_bytes=output_bytes,
        temp_bytes=max(shard_bytes.values()),
        present_bytes=min(sum(path.stat().st_size for path in present), output_bytes),
        free_bytes=None if out is None else _free_bytes(out),
    )


def _swept_bytes(work: Workload, out: Path | None) -> int:
    """Hidden states before every layer but the first and behind the last, and gradients, less what is there already."""
    kept = work.guidance_tokens * work.hidden * BF16 * (work.swept_layers + 1)
    there = sum(path.stat().st_size for path in (out / SWEPT).glob("*")) if out else 0
    return max(kept - there, 0)


def damping_by_rule(work: Workload) -> float:
    """Of the rows' metric, by how many gradients it is made from."""
    return next(damping for least, damping in ROW_DAMPING if work.guidance_tokens >= least * work.hidden)


def pool_rows(least: int, width: int) -> int:
    """Random tokens that go through each expert for the pool of its down: so many for each input, or the least.

    A pool of fewer tokens than inputs is noise itself (docs/numerics.md section 2).
    """
    return max(least, POOL_ROWS_PER_INPUT * width)


def _free_bytes(out: Path) -> int:
    folder = next(parent for parent in (out.absolute(), *out.absolute().parents) if parent.is_dir())
    return shutil.disk_usage(folder).free


def inputs_bytes(work: Workload) -> int:
    """What the experts are learnt from, of all calibration tokens."""
    return work.inputs_per_token * work.calibration_tokens * work.hidden * BF16


def rows_flop(work: Workload, tokens: int, length: int) -> float:
    """One pass of `tokens` tokens, in rows of `length`, through all that is no routed expert; attention causal."""
    kept = 2.0 * tokens * work.kept_parameters
    return kept + work.full_attention_layers * 2.0 * tokens * length * work.attention_width


def experts_flop(work: Workload, tokens: int) -> float:
    """One pass of `tokens` tokens through the routed experts."""
    return work.routed_layers * 6.0 * tokens * work.topk * work.width * work.hidden


def head_flop(work: Workload) -> float:
    """Output head over the held-out rows of both streams."""
    return 4.0 * work.heldout_tokens * work.vocabulary * work.model_width


def rows_bytes(work: Workload, tokens: int) -> float:
    """Temporaries of one pass of `tokens` tokens through all that is no routed expert, beside the operations above."""
    return float(work.layers * tokens * work.attend_token_bytes)


def experts_bytes(work: Workload, tokens: int) -> float:
    """Of the routed experts, BF16: inputs gathered, gate, up and their product, outputs, and these by token."""
    return float(work.routed_layers * tokens * work.topk * (3 * work.hidden + 4 * work.width) * BF16)


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
    """x x^T of every pair at both sites, as full GEMMs."""
    return work.solved_layers * 2.0 * work.pairs * sum(inputs**2 for inputs, _ in work.sites)


def gap_flop(work: Workload) -> float:
    """What the outputs of every pair lack, from its activations, times these, in fp32."""
    return work.solved_layers * 4.0 * work.pairs * work.width * work.hidden * work.asymmetric


def gate_up_pool_flop(work: Workload) -> float:
    """A GEMM over all tokens."""
    return work.solved_layers * 2.0 * work.calibration_tokens * work.hidden**2 * work.pooled


def down_pool_flop(work: Workload) -> float:
    """The pool's rows through all experts' gate and up, then a a^T."""
    row = 4.0 * work.width * work.hidden + 2.0 * work.width**2
    return _per_solve(work, work.pool_rows * row) * work.pooled


def factor_flop(work: Workload) -> float:
    """One Cholesky per expert and site."""
    return _per_solve(work, sum(inputs**3 / 3 for inputs, _ in work.sites))


def target_flop(work: Workload) -> float:
    """Y H^-1 at down: two triangular solves, one more for what may be chance, and two of the degrees of freedom."""
    told = 3.0 * work.hidden * work.width**2 + 2.0 * work.width**3
    return _per_solve(work, told) * work.asymmetric


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


def judge_flop(work: Workload) -> float:
    """Errors and weights against the expert's own moments, for the log: one triangle of each."""
    return _per_solve(work, sum(2.0 * outputs * inputs**2 for inputs, outputs in work.sites))


def sweep_flop(work: Workload) -> float:
    """Guidance rows once through all layers of the source."""
    tokens = work.guidance_tokens
    passed = rows_flop(work, tokens, work.calibration_length) + experts_flop(work, tokens)
    return passed * work.swept_layers / work.layers


def sweep_head_flop(work: Workload) -> float:
    """The end loss's gradient: logits, and what they come from."""
    return 4.0 * work.guidance_tokens * work.vocabulary * work.hidden


def curvature_flop(work: Workload) -> float:
    """delta delta^T of every guidance token and layer, as full GEMMs."""
    return work.solved_layers * 2.0 * work.guidance_tokens * work.hidden**2


def sensitivities_flop(work: Workload) -> float:
    """Gate and up once more, and the second moments of what they let through: of gate_up's rows."""
    rows = 2 * work.width
    pairs = work.pairs + min(work.pool_rows, ROW_POOL_ROWS) * work.experts * work.pooled
    return work.solved_layers * pairs * (4.0 * work.width * work.hidden + 2.0 * rows**2) * work.guided_sites[0]


def row_factor_flop(work: Workload) -> float:
    """Wd^T C Wd and a Cholesky for each expert at gate_up; one Cholesky for a layer at down."""
    width, hidden = work.width, work.hidden
    gate_up = 2.0 * width * hidden**2 + 2.0 * width**2 * hidden + (2 * width) ** 3 / 3
    return _per_solve(work, gate_up) * work.guided_sites[0] + work.solved_layers * hidden**3 / 3 * work.guided_sites[1]


def row_feedback_flop(work: Workload) -> float:
    """What the rows behind take over from those before: in the solve, and twice as much in each refinement pass."""
    each = ((1.0 + 2.0 * work.passes) * outputs**2 * inputs * guided
            for (inputs, outputs), guided in zip(work.sites, work.guided_sites, strict=True))  # fmt: skip
    return _per_solve(work, sum(each))


def _per_solve(work: Workload, flop: float) -> float:
    return work.solved_layers * work.experts * flop
