"""How fast a device does each kind of work: constants, and machines by their data sheets."""

from __future__ import annotations

from dataclasses import dataclass

from fourfold.datatypes import FourfoldError

HASH_RATE = 1.3e9  # bytes per second: sha256 and the check for NaN, one core of a server with SHA extensions
MARGIN = 0.10  # of a data sheet's memory, left free
# Of the data sheet's figure, as long kernels reach as a rule; not measured on these machines. link: pinned memory.
SHARES = {"bf16": 0.5, "solve": 0.4, "traffic": 0.6, "link": 0.8, "host": 0.6}


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


def data_sheet(  # noqa: PLR0913  a column each, by keyword only
    gpu: str, count: int, *, bf16: float, fp32: float, memory: float, memory_bytes: int, link: float, host: float,
    host_bytes: int, disk: float,
) -> Machine:  # fmt: skip
    """A machine as its makers state it. bf16, fp32: TFLOP/s, bf16 without sparsity and with fp32 sums; memory, link,
    host, disk: GB/s. host, host_bytes and disk are of the machine around the GPUs: an assumption.
    """
    terms = (
        f"{bf16:.4g} TFLOP/s BF16, {fp32:.4g} FP32, {memory:,.0f} GB/s; link {link:.0f}, host memory {host:.0f}, "
        f"disk {disk:.0f} GB/s"
    )
    stated = {
        "bf16": bf16 * 1e12,
        "solve": fp32 * 1e12,
        "traffic": memory * 1e9,
        "link": link * 1e9,
        "host": host * 1e9,
    }
    shares = ", ".join(f"{name} {share:.0%}" for name, share in SHARES.items())
    rates = {name: value * SHARES[name] for name, value in stated.items()}
    basis = f"by data sheet, not measured ({terms}), of which {shares}"
    budgets = (int(size * (1 - MARGIN)) for size in (memory_bytes, host_bytes))
    return Machine(count, Rates(**rates, disk=disk * 1e9, unit=gpu, basis=basis), *budgets)


MACHINES = {
    "rtx3060x4": data_sheet(  # GA106: 28 SMs at 1.78 GHz; 192-bit GDDR6; PCIe 4.0 x8; a desktop's two channels DDR4
        "RTX 3060 12 GB", 4, bf16=25.5, fp32=12.7, memory=360, memory_bytes=12 * 2**30, link=16, host=51,
        host_bytes=32 * 2**30, disk=3,
    ),
    "h200": data_sheet(  # SXM; PCIe 5.0 x16; twelve channels DDR5-4800
        "H200 141 GB", 1, bf16=989, fp32=67, memory=4800, memory_bytes=141 * 10**9, link=64, host=460,
        host_bytes=256 * 2**30, disk=6,
    ),
    "a100x8": data_sheet(  # SXM; PCIe 4.0 x16; two sockets of eight channels DDR4-3200
        "A100 80 GB", 8, bf16=312, fp32=19.5, memory=2039, memory_bytes=80 * 2**30, link=32, host=409,
        host_bytes=1024 * 2**30, disk=6,
    ),
}  # fmt: skip
RATES = {
    "cpu": Rates(  # measured for the full shape of Qwen3.6-35B-A3B
        bf16=360e9, solve=45e9, traffic=1.0e9, link=8e9, host=16e9, disk=1e9, unit="core",
        basis="constants of an AMD EPYC with AVX-512 BF16: 360 GFLOP/s BF16, 45 in the solve and 1.0 GB/s of "
        "temporaries each; disk at 1 GB/s",
    ),
    "cuda": MACHINES["rtx3060x4"].rates,
}  # fmt: skip


def find_machine(name: str) -> Machine:
    """Raises FourfoldError for a name that is not in MACHINES."""
    if name not in MACHINES:
        raise FourfoldError(f"--machine: got {name!r}, expected one of {', '.join(MACHINES)}")
    return MACHINES[name]
