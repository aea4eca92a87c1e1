"""How quick this machine is: a few seconds of the run's own numeric functions on made-up numbers."""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from fourfold.core import gptq, grid, moments, target
from fourfold.datatypes import Moments
from fourfold.model import loader
from fourfold.model.checkpoint import raw_bytes, require_finite
from fourfold.model.grouped import grouped_linear
from fourfold.model.layer import DecoderLayer, attend
from fourfold.quantize.plan import Plan
from fourfold.quantize.rates import RATES, Rates
from fourfold.quantize.site import grid_of

SECONDS, REPETITIONS = 0.15, 3  # a rate is measured for so long, and so often at least
COLUMNS = 1024  # at most, of what is solved: a few milliseconds a step on a CPU core, and near a large one's rate
STACK = {"cpu": 1, "cuda": 16}  # experts at a time
PAIRS = 1024  # of each
ATTEND_SECONDS = 0.2  # attention is tried with more and more tokens until a pass takes so long
LENGTH = 512  # of a row that is tried first
READ_BYTES = 2**26
GROUP = 64


@dataclass(frozen=True)
class _Gauge:
    """A device and its clock: on a CPU the time of its one thread, whatever else the machine has to do."""

    device: torch.device

    def once(self, step: Callable[[], object]) -> float:
        if self.device.type == "cpu":
            start = time.thread_time()
            step()
            return time.thread_time() - start
        torch.cuda.synchronize(self.device)
        start = time.perf_counter()
        step()
        torch.cuda.synchronize(self.device)
        return time.perf_counter() - start

    def least(self, step: Callable[[], object]) -> float:
        """Seconds of a step at its best, after one that warms up."""
        self.once(step)
        seconds: list[float] = []
        while len(seconds) < REPETITIONS or sum(seconds) < SECONDS:
            seconds.append(self.once(step))
        return min(seconds)

    def per_second(self, amount: float, step: Callable[[], object]) -> float:
        return amount / self.least(step)

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=torch.Generator().manual_seed(0)).to(self.device)


def measure_rates(plan: Plan) -> Rates:
    """Rates of this machine, per unit of the first device of a plan: of one core by one thread's own time, so that
    they are those of a machine with nothing else to do; of one GPU by the clock.

    Takes two to four seconds on an idle CPU, longer on a GPU the first time, when its kernels are compiled. For the
    disk's rate up to 64 MiB of a shard are read past the page cache, and dropped: no weight is looked at. Nothing is
    written; the disk is taken to write as it reads. The network's rate and that of a disk that cannot be measured (a
    sparse file, or a system without posix_fadvise) stay constants.
    """
    start = time.perf_counter()
    device, threads = torch.device(plan.memory.devices[0]), torch.get_num_threads()
    constants, gauge = RATES[device.type], _Gauge(device)
    torch.set_num_threads(1)
    try:
        with torch.no_grad():
            forward = _forward(gauge, plan)
            traffic, solving = _traffic(gauge, plan, forward), _solve(gauge, plan)
            link, thread = _link(gauge), _thread()
    finally:
        torch.set_num_threads(threads)
    disk, disk_basis = disk_rate(plan)
    disk = disk or constants.disk
    return Rates(
        forward=forward,
        traffic=traffic,
        **solving,
        disk=disk,
        thread=thread,
        link=link,
        host=constants.host,
        network=constants.network,
        unit="core" if device.type == "cpu" else torch.cuda.get_device_name(device),
        basis=f"as measured here in {time.perf_counter() - start:.1f} s, with nothing else to do: "
        f"{forward / 1e9:,.0f} GFLOP/s BF16, {solving['gemm'] / 1e9:,.0f} to {solving['moments'] / 1e9:,.0f} in the "
        f"solve and {traffic / 1e9:.1f} GB/s of temporaries each; disk at {disk / 1e9:.1f} GB/s ({disk_basis}), hashed "
        f"at {thread / 1e9:.1f} GB/s",
    )


def _forward(gauge: _Gauge, plan: Plan) -> float:
    """Experts' BF16 products."""
    work, count = plan.work, STACK[gauge.device.type]
    hidden, outputs = min(work.hidden, 2 * COLUMNS), min(2 * work.width, COLUMNS)
    input_TK, weight_ENK = gauge.normal(PAIRS, hidden).bfloat16(), gauge.normal(count, outputs, hidden).bfloat16()
    token_S = torch.arange(PAIRS, device=gauge.device).repeat(count)
    offsets = [PAIRS * expert for expert in range(count + 1)]
    flop = 2.0 * count * PAIRS * hidden * outputs
    return gauge.per_second(flop, lambda: grouped_linear(input_TK, token_S, offsets, weight_ENK))


def _traffic(gauge: _Gauge, plan: Plan, forward: float) -> float:
    """Temporaries of the model's own attention: what a pass takes beside its products at `forward`."""
    work, layer = plan.work, _made_up_layer(gauge, plan)
    parameters = sum(value.numel() for value in layer.own.module.parameters() if value.dim() == 2 and not value.is_meta)
    length, rows, most = min(work.calibration_length, LENGTH), 1, plan.memory.row_batch
    state = plan.skeleton.calls((1, 1), gauge.device, torch.bfloat16).state  # a model's stream may be wider than hidden
    hidden_RTD = gauge.normal(most, work.calibration_length, *state.shape[2:]).to(state.dtype)

    def passed() -> float:
        return gauge.once(lambda: attend(layer, hidden_RTD[:rows, :length]))

    passed()
    while (seconds := passed()) < ATTEND_SECONDS and (length < work.calibration_length or 2 * rows <= most):
        if length < work.calibration_length:
            length = work.calibration_length
        else:
            rows *= 2
    seconds = min(seconds, *(passed() for _ in range(1 + int(ATTEND_SECONDS / seconds))))
    products = 2.0 * rows * length * parameters / forward
    return rows * length * work.attend_token_bytes / max(seconds - products, seconds / 10)


def _made_up_layer(gauge: _Gauge, plan: Plan) -> DecoderLayer:
    """The model's first layer with routed experts, its weights made up."""
    skeleton, number, none_ENK = plan.skeleton, plan.skeleton.routed[0], torch.empty(0, 0, 0)
    own = loader.made_up_layer(skeleton.blueprint, number, gauge.device)
    return DecoderLayer(number, own, skeleton, 1.0, torch.bfloat16, (), none_ENK, none_ENK)


def _solve(gauge: _Gauge, plan: Plan) -> dict[str, float]:
    """moments, factor, gemm and elementwise: core's own functions, with the recipe's settings, at the gate_up site."""
    work, solver, scheme = plan.work, plan.recipe.solver, plan.recipe.scheme
    count, (inputs, outputs) = STACK[gauge.device.type], work.sites[0]
    inputs, outputs = min(inputs, COLUMNS), min(outputs, COLUMNS // 2)
    onto = grid_of(scheme)
    offsets = [PAIRS * expert for expert in range(count + 1)]
    input_TK = gauge.normal(count * PAIRS, inputs).bfloat16()
    every_S, ones_S = torch.arange(len(input_TK), device=gauge.device), torch.ones(len(input_TK), device=gauge.device)

    def accumulate() -> Moments:
        return moments.accumulate(input_TK, every_S, ones_S, offsets)

    weight_ENK = gauge.normal(count, outputs, inputs)
    hessian_EKK = accumulate().hessian_EKK / PAIRS
    settings = gptq.Damping(delta=solver.damp, kind=solver.damp_kind, floor=solver.damp_floor, retries=())
    factor = gptq.factorize_(hessian_EKK.clone(), settings, solver.order, onto.group_size)
    search = grid.ScaleSearch(
        low=solver.scale_low, high=solver.scale_high, steps=solver.scale_steps, signed=scheme.signed
    )
    tried = solver.scale_steps * (1 + scheme.signed)
    scale_ENG = grid.absmax_scales(weight_ENK, onto)
    importance_EK = hessian_EKK.diagonal(dim1=-2, dim2=-1)

    def factorize() -> None:
        made = gptq.factorize_(hessian_EKK.clone(), settings, solver.order, onto.group_size)
        target.retarget(weight_ENK, weight_ENK, made)

    def columns() -> None:
        codes_ENK = gptq.solve_codes(weight_ENK, scale_ENG, factor, onto)
        gptq.refine(weight_ENK, codes_ENK, scale_ENG, hessian_EKK, 1, None, onto)

    product, square = count * outputs * inputs**2, count * inputs**2
    return {
        "moments": gauge.per_second(2.0 * PAIRS * square, accumulate),
        "factor": gauge.per_second(square * inputs / 3 + 4.0 * product, factorize),
        "gemm": gauge.per_second(3.0 * product, columns),
        "elementwise": gauge.per_second(
            5.0 * tried * count * outputs * inputs,
            lambda: grid.search_scales(weight_ENK, importance_EK, onto, search),
        ),
    }


def _link(gauge: _Gauge) -> float:
    """Of a copy from the host to the device."""
    host = torch.zeros(READ_BYTES, dtype=torch.uint8)
    away = torch.empty_like(host, device=gauge.device)
    return gauge.per_second(READ_BYTES * (2 if host.device == away.device else 1), lambda: away.copy_(host))


def _thread() -> float:
    """Of what the reading thread does with a layer's bytes."""
    values = torch.ones(2**23, dtype=torch.bfloat16)

    def look() -> None:
        hashlib.sha256(raw_bytes(values))
        require_finite(values, "made up")

    return _Gauge(torch.device("cpu")).per_second(values.nbytes, look)


def disk_rate(plan: Plan) -> tuple[float | None, str]:
    """Bytes per second of the largest shard's first bytes, None where that says nothing; and what to say of it."""
    sizes = {path: path.stat() for path in plan.index.folder.glob("*.safetensors")}
    path = max(sizes, key=lambda path: sizes[path].st_size)
    if sizes[path].st_blocks * 512 < sizes[path].st_size or not hasattr(os, "posix_fadvise"):
        return None, "assumed"
    return _read_rate(path), f"read past the page cache from {path.name}"


def _read_rate(path: Path) -> float:
    with path.open("rb", buffering=0) as file:
        os.posix_fadvise(file.fileno(), 0, READ_BYTES, os.POSIX_FADV_DONTNEED)
        start, read = time.perf_counter(), 0
        while read < READ_BYTES and (piece := file.read(2**22)):
            read += len(piece)
        return read / (time.perf_counter() - start)
