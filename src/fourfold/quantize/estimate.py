"""The sizes that decide what a run takes, and the disk that it needs."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

from fourfold.units import size

TENSOR_OVERHEAD_BYTES = 300  # of each tensor written: entries in header and index, its share of quant_log.csv
BF16, FP32 = 2, 4
POOL_ROWS_PER_INPUT = 5  # of down
DRAFT_TOKENS = 98_304  # of draft step 1, at most, that draft experts are solved on
RTN_STEP = 2  # every second held-out row goes through the source with rounded experts, too: half the cost
ROW_POOL_ROWS = 2_048  # random tokens for the pool of gate and up's rows, where they have a metric
SWEPT = Path(".fourfold/guidance")  # under OUT: what the sweep before the loop keeps
ROW_DAMPING = ((32, 0.05), (8, 0.2), (0, 0.3))  # from so many guidance tokens per hidden dimension on


@dataclass(frozen=True, kw_only=True)
class Workload:
    """The sizes that decide what a run costs.

    model_width: of embeddings, where experts see another; state_width: values of a token in a stream.
    image_tokens: of all rows with images; tower_bytes: of the towers that these go through, BF16; image_token_bytes:
    what is kept of such a token beside its state, positions and what the model adds to later layers.
    rtn_tokens: held-out tokens of the stream of rounded experts (`heldout.yardstick`).
    layers: in this run; routed_layers: those with experts; solved_layers: those whose experts are quantized.
    guidance_tokens: in the sweep before the loop, through all swept_layers of the model; guidance_sites: both or down;
    guidance_routing: whether router margins have a part in it.
    full_attention_layers: those whose attention is quadratic, over attention_width = heads x head_dim.
    kept_parameters: matrix elements that every token meets, of all layers.
    kept_matrix, kept_width: elements and longest side of the largest matrix that is kept in a layer.
    int8_weights, int8_squares, int8_inputs: of a layer's weights [N, K] in int8 all N K, all K^2, the largest K;
    int8_head: whether the output head is in int8; draft_tokens: that draft experts are solved on, 0 where they are not.
    attend_token_bytes: temporaries of one token in attention; layer_bytes, shard_bytes: of the largest layer, read and
    written; expert_bytes: of a layer's routed experts in BF16; read_bytes: of the whole run.
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
    rtn_tokens: int
    image_tokens: int
    tower_bytes: int
    image_token_bytes: int
    asymmetric: bool
    passes: int
    pooled: bool
    pool_rows: int
    guidance_tokens: int
    guidance_sites: str
    guidance_routing: bool
    swept_layers: int
    layers: int
    routed_layers: int
    solved_layers: int
    full_attention_layers: int
    attention_width: int
    kept_parameters: int
    kept_matrix: int
    kept_width: int
    int8_weights: int
    int8_squares: int
    int8_inputs: int
    int8_head: bool
    draft_tokens: int
    attend_token_bytes: int
    layer_bytes: int
    expert_bytes: int
    shard_bytes: int
    read_bytes: int

    @property
    def calibration_streams(self) -> int:
        return 2 if self.asymmetric else 1

    @property
    def heldout_passes(self) -> int:
        """Held-out tokens of all streams."""
        return 2 * self.heldout_tokens + self.rtn_tokens

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
    """Disk space of OUT.

    swept_bytes: hidden states that the guidance sweep has still to keep, deleted before a shard is written;
    curvature_bytes: what it leaves until the run is finished; spilled_bytes: hidden states for which memory is too
    small; tensor_bytes: the index's total_size; output_bytes: with headers, logs and copied files; temp_bytes: the
    largest shard, written under a temporary name; present_bytes: shards of this plan that OUT holds already;
    free_bytes: None if OUT is not known.
    """

    swept_bytes: int
    curvature_bytes: int
    spilled_bytes: int
    tensor_bytes: int
    output_bytes: int
    temp_bytes: int
    present_bytes: int
    free_bytes: int | None

    @property
    def needed_bytes(self) -> int:
        loop = self.output_bytes - self.present_bytes + self.temp_bytes + self.spilled_bytes
        return max(loop, self.swept_bytes) + self.curvature_bytes

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
    work: Workload, shard_bytes: dict[str, int], tensors: int, sidecar_bytes: int, out: Path | None, spilled_bytes: int
) -> DiskPlan:
    """shard_bytes: by shard to be written; tensors: in all of them; sidecar_bytes: tokenizer and configs."""
    tensor_bytes = sum(shard_bytes.values())
    output_bytes = tensor_bytes + tensors * TENSOR_OVERHEAD_BYTES + sidecar_bytes
    present = [out / shard for shard in shard_bytes if (out / shard).is_file()] if out else []
    return DiskPlan(
        swept_bytes=0 if present else _swept_bytes(work, out),
        curvature_bytes=work.solved_layers * work.hidden**2 * FP32 if work.guidance_tokens else 0,
        spilled_bytes=spilled_bytes,
        tensor_bytes=tensor_bytes,
        output_bytes=output_bytes,
        temp_bytes=max(shard_bytes.values()),
        present_bytes=min(sum(path.stat().st_size for path in present), output_bytes),
        free_bytes=None if out is None else _free_bytes(out),
    )


def _swept_bytes(work: Workload, out: Path | None) -> int:
    """Hidden states before every layer but the first and behind the last, and gradients, less what is there already."""
    fields = 4 * work.guidance_routing  # of router margins and of the pilot, each one's next beside it
    kept = work.guidance_tokens * work.hidden * BF16 * (work.swept_layers + 1 + fields)
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
