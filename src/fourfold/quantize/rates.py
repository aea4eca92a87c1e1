"""How fast a device does each kind of work: constants, and machines by the data sheets of their GPUs."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import NamedTuple

from fourfold.datatypes import FourfoldError, nearest

HASH_RATE = 1.3e9  # bytes per second: sha256 and the check for NaN, one core of a server with SHA extensions
MARGIN = 0.10  # of a memory, left free
# Of the data sheet's figure, as long kernels reach as a rule; not measured on these machines. link: pinned memory.
SHARES = {"bf16": 0.5, "solve": 0.4, "traffic": 0.6, "link": 0.8, "host": 0.6}
GIB = 2**30
MOST = 16  # GPUs in one host


@dataclass(frozen=True, kw_only=True)
class Rates:
    """FLOP or bytes per second of one unit: a CPU core or a GPU. basis: where the figures come from.

    bf16: GEMMs of the forward passes and of the moments; solve: scales and codes, fp32; traffic: temporaries between
    the GEMMs; link: between the host and one GPU; host: the host's memory, by all workers; disk: sequential reads.
    """

    bf16: float
    solve: float
    traffic: float
    link: float
    host: float
    disk: float
    unit: str
    basis: str


class Host(NamedTuple):
    """What is around the GPUs: an assumption. memory_bytes; memory, disk: GB/s."""

    memory_bytes: int
    memory: float
    disk: float


class Gpu(NamedTuple):
    """A data sheet. bf16, fp32: TFLOP/s, BF16 without sparsity and with fp32 sums; memory, link: GB/s, link from the
    host. host: None where GPU and host share the memory, of which each then takes half.
    """

    title: str
    bf16: float
    fp32: float
    memory: float
    memory_bytes: int
    link: float
    host: Host | None


@dataclass(frozen=True)
class Machine:
    """`count` GPUs in one host, and what a run may take of each memory, in bytes."""

    count: int
    rates: Rates
    budget_bytes: int
    host_budget_bytes: int

    @property
    def devices(self) -> tuple[str, ...]:
        return tuple(f"cuda:{number}" for number in range(self.count))


DDR4 = Host(32 * GIB, 51, 3)  # a desktop, two channels
DDR5 = Host(64 * GIB, 90, 5)  # likewise
SERVER_DDR4 = Host(1024 * GIB, 409, 6)  # two sockets of eight channels DDR4-3200
SERVER_DDR5 = Host(256 * GIB, 460, 6)  # twelve channels DDR5-4800
GPUS = {
    "3060": Gpu("RTX 3060 12 GB", 25.5, 12.7, 360, 12 * GIB, 16, DDR4),  # 28 SMs at 1.78 GHz; PCIe 4.0 x8 of four cards
    "3090": Gpu("RTX 3090 24 GB", 71, 35.6, 936, 24 * GIB, 32, DDR4),
    "4060ti": Gpu("RTX 4060 Ti 16 GB", 44.1, 22.1, 288, 16 * GIB, 16, DDR5),  # PCIe 4.0 x8
    "4090": Gpu("RTX 4090 24 GB", 165.2, 82.6, 1008, 24 * GIB, 32, DDR5),
    "5090": Gpu("RTX 5090 32 GB", 209.5, 104.8, 1792, 32 * GIB, 64, DDR5),
    "l40s": Gpu("L40S 48 GB", 362, 91.6, 864, 48 * GIB, 32, SERVER_DDR5),
    "a100": Gpu("A100 80 GB", 312, 19.5, 2039, 80 * GIB, 32, SERVER_DDR4),  # SXM
    "h100": Gpu("H100 80 GB", 989, 67, 3350, 80 * GIB, 64, SERVER_DDR5),  # SXM
    "h200": Gpu("H200 141 GB", 989, 67, 4800, 141 * 10**9, 64, SERVER_DDR5),  # SXM
    "b200": Gpu("B200 180 GB", 2250, 75, 7700, 180 * 10**9, 64, SERVER_DDR5),  # SXM
    # BF16 of the two: an eighth of 1 PFLOP/s FP4 with sparsity; 40 compute units of 512 FLOP a cycle at 2.9 GHz
    "dgx-spark": Gpu("DGX Spark 128 GB", 125, 31, 273, 128 * 10**9, 273, None),
    "strix-halo": Gpu("Strix Halo 128 GB", 59.4, 29.7, 256, 128 * 10**9, 256, None),
}


def find_machine(name: str) -> Machine:
    """A machine by what a user calls it: "4x3090", "h200", "RTX4090". Raises FourfoldError for any other name."""
    found = re.fullmatch(r"(?:(\d{1,2})x)?(?:rtx[- _]?)?(.+)", name.strip().lower())
    count, key = (int(found[1] or 1), found[2]) if found else (0, "")
    if key not in GPUS or not 1 <= count <= MOST:
        raise FourfoldError(
            f"--machine: got {name!r}, expected one of {', '.join(GPUS)}, or several as in 4x3090 (up to {MOST})."
            f"{nearest(key, GPUS) if key not in GPUS else ''}"
        )
    return _machine(GPUS[key], count)


def _machine(gpu: Gpu, count: int) -> Machine:
    host = gpu.host or Host(gpu.memory_bytes // 2, gpu.memory, 5)
    stated = {"bf16": gpu.bf16 * 1e12, "solve": gpu.fp32 * 1e12, "traffic": gpu.memory * 1e9, "link": gpu.link * 1e9,
              "host": host.memory * 1e9}  # fmt: skip
    basis = (
        f"by data sheet, not measured ({gpu.bf16:.4g} TFLOP/s BF16, {gpu.fp32:.4g} FP32, {gpu.memory:,.0f} GB/s; link "
        f"{gpu.link:.0f}, host memory {host.memory:.0f}, disk {host.disk:.0f} GB/s), of which "
        f"{', '.join(f'{name} {share:.0%}' for name, share in SHARES.items())}"
    )
    rates = {name: value * SHARES[name] for name, value in stated.items()}
    own = gpu.memory_bytes if gpu.host else gpu.memory_bytes // 2 // count
    budgets = (int(size * (1 - MARGIN)) for size in (own, host.memory_bytes))
    return Machine(count, Rates(**rates, disk=host.disk * 1e9, unit=gpu.title, basis=basis), *budgets)


RATES = {
    "cpu": Rates(  # measured for the full shape of Qwen3.6-35B-A3B
        bf16=360e9, solve=45e9, traffic=1.0e9, link=8e9, host=16e9, disk=1e9, unit="core",
        basis="constants of an AMD EPYC with AVX-512 BF16: 360 GFLOP/s BF16, 45 in the solve and 1.0 GB/s of "
        "temporaries each; disk at 1 GB/s",
    ),
    "cuda": find_machine("3060").rates,
}  # fmt: skip
