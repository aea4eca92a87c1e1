"""What each thing of a run takes in memory, in bytes, from sizes. Each figure can be held against a measurement."""

from __future__ import annotations

from fourfold.core import widening
from fourfold.core.metrics import VOCABULARY_CHUNK
from fourfold.core.moments import PAIRS_PER_PIECE
from fourfold.model.layer import PAIRS_PER_BATCH
from fourfold.model.skeleton import Skeleton
from fourfold.quantize.chunk import POOL_PIECE
from fourfold.quantize.dense import SLAB_ROWS
from fourfold.quantize.estimate import Workload, inputs_bytes

BF16, FP32 = 2, 4
SQUARES = 4  # fp32 [K, K] per expert at the solve's peak: own H, shrunk H, and two in core/gptq.factorize_
STACKS = 6  # fp32 [N, K] per expert: weight, target, ordered, error, codes, one temporary
LOGITS = 6  # fp32 [T, vocabulary chunk] in core/metrics: two models' and what their sums take
ROW_SQUARES = 5  # fp32 [N, N] where rows have a metric: moments, pool, metric, and two in core's factor
ROW_STACKS = 2  # fp32 [N, K] beside STACKS: what earlier rows leave over, and one temporary
KEPT = 2  # times what an attention batch has at one time: what autograd keeps of it, of linear attention (full: less)
SKEW = 1.5  # pairs of a chunk's busiest experts over an even share
DEALT = 1.1  # pairs of the busiest worker's experts over an even share: they are dealt by tokens
CPU_ATTEND_TOKENS = 2_048  # of an attention batch on a CPU: four times as many took a third more, for new pages


def rows_bytes(work: Workload) -> int:
    """Hidden states (BF16) and ids of all rows: calibration in one or two streams, held-out in two or three."""
    tokens = work.calibration_streams * work.calibration_tokens + work.heldout_passes
    return tokens * (work.state_width * BF16 + 8) + work.image_tokens * work.image_token_bytes


def image_token_bytes(skeleton: Skeleton) -> int:
    """Kept of a token of a row with images: cosines and sines of its positions, fp32 at most; what deepstack adds."""
    text, vision = skeleton.text, getattr(skeleton.blueprint.model.config, "vision_config", None)
    head_dim = int(getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads)
    deepstack = len(getattr(vision, "deepstack_visual_indexes", None) or ())
    return 2 * head_dim * FP32 + deepstack * skeleton.state_width * BF16


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
        swapped = expert_batch_bytes(work, -(-2 * tokens // work.topk))
        through += swapped + tokens * (4 * work.experts + 3 * work.hidden) * FP32 + work.hidden**2 * FP32
        pooled += work.hidden**2 * FP32
        lying *= 2
    return lying, max(through, pooled, head)


def chunk_inputs_bytes(work: Workload) -> int:
    """Of one expert in a chunk: its tokens' inputs, where they are brought from elsewhere."""
    return int(work.inputs_per_token * work.tokens_per_expert * SKEW) * work.hidden * BF16
