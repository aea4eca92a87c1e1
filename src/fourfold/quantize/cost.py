"""How long a run takes on one worker or many: work by step over rates, what workers exchange, what nobody shares."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from fourfold.quantize import estimate
from fourfold.quantize.estimate import BF16, FP32, Workload, inputs_bytes
from fourfold.quantize.rates import RATES, Rates

START_SECONDS = 8.0  # interpreter and imports, texts into tokens: seen on two cores of an AMD EPYC
SLOWER = 2  # than a whole layer is planned to take: a worker without a sign of life for so long hangs
CHOICE_BYTES = 8 + BF16  # an expert's number and its router weight, of one (token, expert) pair


@dataclass(frozen=True, kw_only=True)
class TimeStep:
    """One kind of work of the whole run; kind: the rate of `Rates` that its operations go at.

    pflop, traffic_bytes: of all workers; seconds: of the busiest one.
    """

    name: str
    kind: str
    pflop: float
    traffic_bytes: float
    seconds: float


@dataclass(frozen=True, kw_only=True)
class TimeEstimate:
    """Seconds of the whole run.

    start_seconds: until the first layer is there, and reading what lies outside the layers; read_seconds,
    write_seconds: of the threads that read ahead and write behind; disk_seconds: of the disk for both; basis: of the
    figures.
    """

    steps: tuple[TimeStep, ...]
    start_seconds: float
    read_seconds: float
    write_seconds: float
    disk_seconds: float
    workers: int
    basis: str

    @property
    def pflop(self) -> float:
        return sum(step.pflop for step in self.steps)

    @property
    def exchange_seconds(self) -> float:
        return sum(step.seconds for step in self.steps if step.kind == "link")

    @property
    def compute_seconds(self) -> float:
        """Of the workers; their exchange is not hidden behind it."""
        return sum(step.seconds for step in self.steps)

    @property
    def seconds(self) -> float:
        return self.start_seconds + max(self.compute_seconds, self.read_seconds, self.write_seconds, self.disk_seconds)

    @property
    def bound(self) -> str:
        """What takes longest."""
        takes = {
            "arithmetic": self.compute_seconds - self.exchange_seconds,
            "exchange": self.exchange_seconds,
            "reading": max(self.read_seconds, self.disk_seconds),
            "writing": self.write_seconds,
        }
        if self.compute_seconds >= max(takes["reading"], takes["writing"]):
            takes = {name: takes[name] for name in ("arithmetic", "exchange")}
        return max(takes, key=lambda name: takes[name])


@dataclass(frozen=True, kw_only=True)
class Exchange:
    """Bytes that a whole run moves.

    link_bytes: between one worker's device and its host (on a CPU, through memory by one worker); host_bytes: through
    the memory of one host, by all its workers; wire_bytes: through the network of the busiest host, one after the
    other.
    """

    link_bytes: float
    host_bytes: float
    wire_bytes: float

    def seconds(self, rates: Rates) -> float:
        return max(self.link_bytes / rates.link, self.host_bytes / rates.host) + self.wire_bytes / rates.network


def exchange(work: Workload, workers: int, *, on_cpu: bool, inputs: str = "device", hosts: int = 1) -> Exchange:
    """What workers.py and observe.py move, of all layers. inputs: see Batches; a worker on a CPU has none.

    A layer's rows go to their worker and back, and what its experts are given goes out to all; each worker then takes
    the inputs of all tokens, once where they stay on its device, and gives fp32 sums for all tokens, which are added up
    on the host. So most of a link's bytes do not shrink as workers are added. A worker alone keeps held-out rows'
    inputs, and gives its outputs in BF16. Between hosts (ranks.py): a broadcast of each one's inputs and routing, one
    after the other, which gloo sends in rounds that double who has it and NCCL along a ring; fp32 sums from each to
    each; packed tensors to the first.
    """
    tokens = work.calibration_streams * work.calibration_tokens + 2 * work.heldout_tokens
    rows_bytes, sums_bytes = tokens * work.hidden * BF16, tokens * work.hidden * FP32
    gap_bytes = work.asymmetric * work.calibration_tokens * work.hidden * BF16
    here, several = workers // hosts, workers > 1
    parts = here + hosts - 1  # sums that each worker adds up, one of each worker here and of each other host
    if on_cpu:
        routed = (2 * rows_bytes + 2 * rows_bytes / workers + sums_bytes / workers * (parts + 1)) * several
        routed += (gap_bytes + 2 * gap_bytes / workers) * several
        link = work.routed_layers * routed
        host = here * link
    else:
        calibration = work.calibration_streams * work.calibration_tokens
        given = rows_bytes if several else calibration * work.hidden * BF16
        rows = (2 * work.layers * rows_bytes + work.routed_layers * given) / workers
        lent = inputs_bytes(work) * work.topk / workers if inputs != "device" else gap_bytes
        taken = lent * work.solved_layers + given * work.routed_layers
        sums = (sums_bytes if several else rows_bytes) * work.routed_layers
        weights = (
            work.layers * (work.layer_bytes - work.expert_bytes) + work.routed_layers * work.expert_bytes / workers
        )
        link = rows + taken + sums + weights + work.solved_layers * work.shard_bytes / workers
        host = here * (link + sums_bytes / workers * (parts + 1) * work.routed_layers * several)
    if hosts == 1:
        return Exchange(link_bytes=link, host_bytes=host, wire_bytes=0.0)
    others = (hosts - 1) / hosts
    routing_bytes = tokens * work.topk * CHOICE_BYTES
    broadcast = work.routed_layers * (rows_bytes + routing_bytes + gap_bytes)
    summed = work.routed_layers * sums_bytes
    lifted = 0.0 if on_cpu else broadcast + 2 * summed  # NCCL takes and leaves it on the first worker's device
    rounds = math.ceil(math.log2(hosts)) if on_cpu else 1
    wire = rounds * broadcast + others * (summed + work.solved_layers * work.shard_bytes)
    return Exchange(link_bytes=link + lifted, host_bytes=host + lifted, wire_bytes=wire)


@dataclass(frozen=True)
class _Part:
    """Work that is divided in one way. busiest: the share of it that the busiest worker has."""

    flop: float
    traffic_bytes: float
    busiest: float


def _busiest(count: int, workers: int) -> float:
    """The largest share where `count` things that stay whole are dealt out."""
    return -(-count // workers) / count


def _steps(work: Workload, workers: int) -> Iterator[tuple[str, str, tuple[_Part, ...]]]:
    """Name, kind and parts. Rows are split, experts owned."""
    rows = _busiest(work.calibration_tokens // work.calibration_length, workers)
    windows = _busiest(work.heldout_tokens // work.heldout_length, workers)
    experts = _busiest(work.experts, workers)

    def passed(tokens: int, length: int, share: float, times: int) -> tuple[_Part, ...]:
        own = estimate.rows_flop(work, tokens, length), estimate.rows_bytes(work, tokens)
        routed = estimate.experts_flop(work, tokens), estimate.experts_bytes(work, tokens)
        parts = (*own, share), (*routed, experts)
        return tuple(_Part(times * flop, times * moved, busiest) for flop, moved, busiest in parts)

    def solved(flop: float, moved: float = 0.0) -> tuple[_Part, ...]:
        return (_Part(flop, moved, experts),)

    calibration = work.calibration_tokens, work.calibration_length, rows
    heldout = passed(work.heldout_tokens, work.heldout_length, windows, 2)
    head = _Part(estimate.head_flop(work), estimate.head_bytes(work), windows)
    yield from _sweep_steps(work, workers)
    yield "source stream", "forward", passed(*calibration, 1)
    yield "release stream", "forward", passed(*calibration, int(work.asymmetric))
    yield "held-out rows", "forward", (*heldout, head)
    yield "activations for down", "forward", solved(estimate.activations_flop(work), estimate.activations_bytes(work))
    yield "moments", "moments", solved(estimate.moments_flop(work))
    yield "gap between the streams", "gemm", solved(estimate.gap_flop(work))
    pools = _Part(estimate.gate_up_pool_flop(work), 0.0, rows), _Part(estimate.down_pool_flop(work), 0.0, experts)
    yield "pools", "moments", pools
    yield "factor", "factor", solved(estimate.factor_flop(work))
    yield "target of down", "factor", solved(estimate.target_flop(work))
    yield "scale search", "elementwise", solved(estimate.scales_flop(work))
    yield "columns", "gemm", solved(estimate.columns_flop(work))
    yield "columns in a block", "elementwise", solved(estimate.in_block_flop(work))
    yield "refinement", "gemm", solved(estimate.refinement_flop(work))
    if work.guidance_tokens:
        yield "row moments", "moments", solved(estimate.sensitivities_flop(work))
        yield "row factor", "factor", solved(estimate.row_factor_flop(work))
        yield "row feedback", "gemm", solved(estimate.row_feedback_flop(work))
    yield "errors for the log", "moments", solved(estimate.judge_flop(work))


def _sweep_steps(work: Workload, workers: int) -> Iterator[tuple[str, str, tuple[_Part, ...]]]:
    """Of the sweep before the loop: rows are split, and each worker has all experts for them."""
    tokens = work.guidance_tokens
    if not tokens:
        return
    share, layers = _busiest(tokens // work.calibration_length, workers), work.swept_layers / work.layers
    moved = (estimate.rows_bytes(work, tokens) + estimate.experts_bytes(work, tokens)) * layers
    forward, head = estimate.sweep_flop(work), estimate.sweep_head_flop(work)
    yield "sweep forward", "forward", (_Part(forward, moved, share),)
    # Once more and the gradient back, which weights have no part in; autograd goes over what it has kept once more.
    yield "sweep backward", "forward", (_Part(2 * forward, 3 * moved, share),)
    yield "end loss", "gemm", (_Part(head, estimate.head_bytes(work) * tokens / (2 * work.heldout_tokens), share),)
    yield "curvatures", "moments", (_Part(estimate.curvature_flop(work), 0.0, share),)


def estimate_time(
    work: Workload, devices: Sequence[str], rates: Rates | None = None, *, inputs: str = "device", hosts: int = 1
) -> TimeEstimate:
    """Operations, temporaries and exchange of each step over the rates of the devices, at the busiest worker.

    devices: one for each worker, shared evenly among the hosts; rates: left out, the constants of the devices' kind;
    inputs: see Batches. A CPU's workers share its cores, so that its units are torch's threads.
    """
    kind, workers = devices[0].partition(":")[0], len(devices)
    rates = rates or RATES[kind]
    units = torch.get_num_threads() * hosts if kind == "cpu" else len(set(devices))
    steps = [
        TimeStep(
            name=name,
            kind=rate,
            pflop=sum(part.flop for part in parts) / 1e15,
            traffic_bytes=sum(part.traffic_bytes for part in parts),
            seconds=sum(
                (part.flop / getattr(rates, rate) + part.traffic_bytes / rates.traffic) * part.busiest * workers / units
                for part in parts
            ),
        )
        for name, rate, parts in _steps(work, workers)
    ]
    moved = exchange(work, workers, on_cpu=kind == "cpu", inputs=inputs, hosts=hosts)
    steps.append(
        TimeStep(
            name="between workers and hosts",
            kind="link",
            pflop=0.0,
            traffic_bytes=moved.link_bytes * workers,
            seconds=moved.seconds(rates),
        )
    )
    return TimeEstimate(
        steps=tuple(steps),
        start_seconds=START_SECONDS + (work.ends_bytes + work.layer_bytes) / rates.reader,
        read_seconds=(work.read_bytes - work.ends_bytes) / rates.reader,
        write_seconds=work.write_bytes / rates.reader,
        disk_seconds=(work.read_bytes + work.write_bytes) / rates.disk,
        workers=workers,
        basis=f"a prediction from {rates.counted(units)}; {START_SECONDS:.0f} s for start and texts",
    )


def patience_seconds(work: Workload, time: TimeEstimate) -> float:
    """How long a worker may go without a sign of life, of which it gives many in a layer. It may also wait for
    embeddings to be read, or for all that lies outside the layers to be written.
    """
    layer = max(time.compute_seconds, time.read_seconds, time.write_seconds, time.disk_seconds) / work.layers
    rest = 1 - work.solved_layers * work.shard_bytes / work.write_bytes  # of what is written
    return SLOWER * max(layer, time.start_seconds, time.write_seconds * 2 * rest)
