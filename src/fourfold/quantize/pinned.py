"""What the host of GPUs holds in pinned memory beyond the bytes that lie there: predicted from sizes. See link.py."""

from __future__ import annotations

from fourfold.datatypes import Placement
from fourfold.distributed.transfer import pinned_bytes
from fourfold.quantize.estimate import BF16, FP32, Workload

SUMS_BYTES = 600 * 10**6  # of sums on their way: where there are many workers, batches have fewer tokens
TOKENS_LEAST = 4_096  # but not fewer than these, which keep GPUs busy


def rounding_bytes(work: Workload, workers: int) -> int:
    """Of rows, which each worker has apart, and of two layers, whose kept tensors are many: at most as much again."""
    calibration, heldout = (
        workers * pinned_bytes(tokens // workers * work.hidden * BF16) - tokens * work.hidden * BF16
        for tokens in (work.calibration_tokens, work.heldout_tokens)
    )
    gate_up, down = 2 * work.expert_bytes // 3, work.expert_bytes // 3
    layer = pinned_bytes(gate_up) - gate_up + pinned_bytes(down) - down + work.layer_bytes - work.expert_bytes
    return max(work.calibration_streams * calibration + 2 * heldout, 0) + 2 * layer


def packed_bytes(work: Workload, chunk: int) -> int:
    """Of a layer's results, made while the last ones are written; of these only the rounding, the rest is elsewhere."""
    return 2 * (work.shard_bytes * pinned_bytes(chunk) // chunk) - work.shard_bytes


def sums_bytes(work: Workload, tokens: int, workers: int) -> int:
    """What all workers' experts put out for a batch of tokens and for the one before it; of several, their sum."""
    several = workers > 1
    fetched = pinned_bytes(tokens * work.hidden * (FP32 if several else BF16))
    return 2 * workers * fetched + several * tokens * work.hidden * FP32


def inputs_bytes(work: Workload, inputs: Placement) -> int:
    """Of what experts are learnt from: one stream's on its way to the devices, or all where it stays. inputs: see
    Batches.
    """
    if inputs == Placement.FILE:
        return 0
    several = 1 if inputs == Placement.DEVICE else work.inputs_per_token
    return several * pinned_bytes(work.calibration_tokens * work.hidden * BF16)
