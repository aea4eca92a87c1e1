"""How long a run takes: operations, temporaries and copies of the busiest worker, over its rates."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from fourfold.datatypes import Placement
from fourfold.model.tensors import READERS
from fourfold.quantize.estimate import BF16, FP32, ROW_POOL_ROWS, Workload, inputs_bytes
from fourfold.quantize.rates import HASH_RATE, RATES, Rates

START_SECONDS = 8.0  # interpreter, imports and tokenized texts, as seen on two cores of an AMD EPYC
LOGIT_PASSES = 6  # over a chunk's fp32 logits in core/metrics
PATCHES = 4  # of an image that a token is made of
SWEEP_PASSES = 4  # forward; forward again with autograd, whose gradients take as long as two more
ROUTING_PASSES = 4  # more: the field of router margins, their gradients, two experts near a tie; 1.9 times in all


@dataclass(frozen=True, kw_only=True)
class TimeEstimate:
    """Seconds of the whole run, at the busiest worker.

    forward_seconds: every pass through layers and output head; solve_seconds: moments, scales, codes; exchange_seconds:
    copies between a GPU and its host, none overlapped; read_seconds: of the thread that reads ahead.
    """

    start_seconds: float
    forward_seconds: float
    solve_seconds: float
    exchange_seconds: float
    read_seconds: float
    basis: str

    @property
    def seconds(self) -> float:
        work = self.forward_seconds + self.solve_seconds + self.exchange_seconds
        return self.start_seconds + max(work, self.read_seconds)

    @property
    def bound(self) -> str:
        """What takes longest."""
        arithmetic = self.forward_seconds + self.solve_seconds
        if self.read_seconds > arithmetic + self.exchange_seconds:
            return "reading"
        return "exchange" if self.exchange_seconds > arithmetic else "arithmetic"


def estimate_time(
    work: Workload, devices: Sequence[str], rates: Rates | None = None, *, inputs: Placement = Placement.DEVICE
) -> TimeEstimate:
    """Predict a run on one host. devices: one per worker; rates: default, the constants of the devices' kind; inputs:
    see Batches. CPU workers share the cores, also with what reads and hashes; their exchange takes no time.
    """
    kind, workers = devices[0].partition(":")[0], len(devices)
    rates = rates or RATES[kind]
    units = torch.get_num_threads() if kind == "cpu" else len(set(devices))
    samples = work.calibration_tokens // work.calibration_length
    busiest = max(-(-count // workers) / count for count in (samples, work.experts))  # things that stay whole
    flop, temporary_bytes = _forward(work)
    reader = 1 / (1 / rates.disk + 1 / (HASH_RATE * (1 if kind == "cpu" else READERS)))
    each = busiest * workers / units
    return TimeEstimate(
        start_seconds=START_SECONDS + (work.ends_bytes + work.layer_bytes) / reader,
        forward_seconds=(flop / rates.bf16 + temporary_bytes / rates.traffic) * each,
        solve_seconds=(moments_flop(work) / rates.bf16 + solve_flop(work) / rates.solve) * each,
        exchange_seconds=0.0 if kind == "cpu" else _exchange_seconds(work, workers, rates, inputs),
        read_seconds=(work.read_bytes - work.ends_bytes) / reader,
        basis=f"a prediction from {units} x {rates.unit}, {rates.basis}; {START_SECONDS:.0f} s for start and texts",
    )


def _forward(work: Workload) -> tuple[float, float]:
    """FLOP of all passes, and bytes of temporaries between the GEMMs."""
    hidden, width, attention = work.hidden, work.width, work.full_attention_layers * work.attention_width
    calibration = work.calibration_streams * work.calibration_tokens
    sweep_passes = SWEEP_PASSES + ROUTING_PASSES * work.guidance_routing
    swept = sweep_passes * work.guidance_tokens * work.swept_layers / work.layers
    passes = (calibration + swept, work.calibration_length), (work.heldout_passes, work.heldout_length)
    tokens = sum(count for count, _ in passes)
    head = 2.0 * (work.heldout_tokens + work.rtn_tokens + work.guidance_tokens) * work.vocabulary
    pairs, again = work.topk * tokens * work.routed_layers, work.topk * calibration * work.solved_layers
    flop = sum(2.0 * count * (work.kept_parameters + length * attention) for count, length in passes)
    # Gate and up run again for the moments of down. Temporaries: inputs, gate, up, their product, outputs, sums.
    flop += 2.0 * head * work.model_width + width * hidden * (6.0 * pairs + 4.0 * again)
    flop += work.image_tokens * PATCHES * work.tower_bytes  # 2 FLOP for each parameter, of 2 bytes
    kept_bytes = tokens * work.layers * work.attend_token_bytes + head * LOGIT_PASSES * FP32
    return flop, kept_bytes + BF16 * (pairs * (3.0 * hidden + 4.0 * width) + again * (hidden + 4.0 * width))


def moments_flop(work: Workload) -> float:
    """BF16 products summed in fp32: moments of both sites, pools, errors for the log; with guidance those of rows."""
    hidden, width, pooled = work.hidden, work.width, work.experts * work.pool_rows * work.pooled
    flop = 2.0 * work.pairs * (hidden**2 + width**2) + work.experts * sum(2.0 * n * k**2 for k, n in work.sites)
    flop += 2.0 * work.calibration_tokens * hidden**2 * work.pooled + pooled * (4.0 * width * hidden + 2.0 * width**2)
    if work.guided_sites[0]:
        pairs = work.pairs + min(pooled, ROW_POOL_ROWS * work.experts)
        flop += pairs * (4.0 * width * hidden + 8.0 * width**2)
    return work.solved_layers * (flop + 2.0 * work.guidance_tokens * hidden**2)


def solve_flop(work: Workload) -> float:
    """fp32: both sites of all experts; with two streams down's target and the gap of all pairs' outputs; with guidance
    the metric of the rows. The scale search, a twentieth, is left out.
    """
    hidden, width, guided = work.hidden, work.width, work.guided_sites
    expert = sum(site_flop(*site, work.passes) for site in work.sites)
    expert += (3.0 * hidden * width**2 + 2.0 * width**3) * work.asymmetric
    expert += (2.0 * width * hidden**2 + 2.0 * width**2 * hidden + (2 * width) ** 3 / 3) * guided[0]
    expert += sum((1 + 2.0 * work.passes) * n**2 * k * has for (k, n), has in zip(work.sites, guided, strict=True))
    layer = 4.0 * work.pairs * width * hidden * work.asymmetric + hidden**3 / 3 * guided[1]
    return work.solved_layers * (work.experts * expert + layer)


def site_flop(inputs: int, outputs: int, passes: int) -> float:
    """Of one expert: a Cholesky, a GEMM of the columns' errors, one of each refinement pass."""
    return inputs**3 / 3 + (1.0 + 2.0 * passes) * outputs * inputs**2


def _exchange_seconds(work: Workload, workers: int, rates: Rates, inputs: Placement) -> float:
    """Copies over one GPU's link, or through the host's memory for all of them, whichever takes longer.

    Samples and weights go to their worker; inputs of all tokens come in, and fp32 sums for all tokens go out and are
    added on the host. So most bytes of a link do not shrink as workers are added.
    """
    several, routed = workers > 1, work.routed_layers
    stream = work.hidden * BF16 * (work.calibration_streams * work.calibration_tokens + work.heldout_passes)
    sums = stream * (FP32 // BF16 if several else 1)
    gap = work.asymmetric * work.calibration_tokens * work.hidden * BF16
    lent = gap if inputs == Placement.DEVICE else inputs_bytes(work) * work.topk / workers  # by chunks of experts
    link = (2 * work.layers + routed) * stream / workers + routed * (stream + sums) + work.solved_layers * lent
    link += work.layers * (work.layer_bytes - work.expert_bytes)
    link += (routed * work.expert_bytes + work.solved_layers * work.shard_bytes) / workers
    return max(link / rates.link, (workers * link + routed * sums * (workers + 1) * several) / rates.host)
