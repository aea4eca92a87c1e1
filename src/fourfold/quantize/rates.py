"""How quick a device does each kind of work: constants of a kind of device, and machines by their data sheets."""

from __future__ import annotations

from dataclasses import dataclass

from fourfold.datatypes import FourfoldError

MARGIN = 0.10  # of a data sheet's memory, left alone


@dataclass(frozen=True, kw_only=True)
class Rates:
    """FLOP or bytes per second. Those of the first group are of one unit: a CPU core, a GPU.

    forward: BF16 GEMMs; traffic: temporaries between the GEMMs, which the many small operations of attention, experts
    and output head write and read; moments: BF16 in, fp32 out, all of K x K
    counted; gemm: the solve's columns and
    refinement, fp32; factor: Cholesky and triangular solves, fp32; elementwise: scale search, in-block kernel.

    disk: one after the other; thread: of one thread that hashes what it reads or writes and looks for what is no
    number; link: between the host and one GPU, or for a CPU's worker one pass over memory; host: the host's memory,
    over all its workers; network: of one host, each way. unit: what it is called; basis: where the figures are from.
    """

    forward: float
    traffic: float
    moments: float
    gemm: float
    factor: float
    elementwise: float
    disk: float
    thread: float
    link: float
    host: float
    network: float
    unit: str
    basis: str

    @property
    def reader(self) -> float:
        """Of the thread that reads layers: disk, then hash, then the look at every value, for each piece."""
        return 1 / (1 / self.disk + 1 / self.thread)

    def counted(self, units: int) -> str:
        return f"{units} x {self.unit}, {self.basis}"


@dataclass(frozen=True, kw_only=True)
class DataSheet:
    """A machine as its makers state it: FLOP or bytes per second, bytes. bf16 without sparsity, sums in fp32.

    disk, host, network are of the machine around the GPUs: an assumption, as good as any.
    """

    gpu: str
    count: int
    bf16: float
    fp32: float
    memory: float
    memory_bytes: int
    link: float
    host: float
    host_bytes: int
    disk: float
    network: float

    @property
    def devices(self) -> tuple[str, ...]:
        return tuple(f"cuda:{number}" for number in range(self.count))

    @property
    def budget_bytes(self) -> int:
        return int(self.memory_bytes * (1 - MARGIN))

    @property
    def host_budget_bytes(self) -> int:
        return int(self.host_bytes * (1 - MARGIN))

    def rates(self) -> Rates:
        """Shares of the data sheet that long kernels reach as a rule; not measured on these machines."""
        return Rates(
            forward=self.bf16 * SHARES["forward"],
            traffic=self.memory * SHARES["traffic"],
            moments=self.bf16 * SHARES["moments"],
            gemm=self.fp32 * SHARES["gemm"],
            factor=self.fp32 * SHARES["factor"],
            elementwise=self.fp32 * SHARES["elementwise"],
            disk=self.disk,
            thread=HASH_BYTES,
            link=self.link * SHARES["link"],
            host=self.host * SHARES["host"],
            network=self.network * SHARES["network"],
            unit=self.gpu,
            basis=f"by data sheet, not measured ({_terms(self)}), of which "
            + ", ".join(f"{name} {share:.0%}" for name, share in SHARES.items()),
        )


HASH_BYTES = 1.3e9  # sha256 and the look for NaN, one core of a server with SHA extensions
SHARES = {  # of the data sheet's figure
    "forward": 0.5,
    "traffic": 0.6,
    "moments": 0.5,
    "gemm": 0.5,
    "factor": 0.2,
    "elementwise": 0.2,
    "link": 0.8,  # from and to pinned memory
    "host": 0.6,
    "network": 0.5,
}


def _terms(sheet: DataSheet) -> str:
    return (
        f"{sheet.bf16 / 1e12:.4g} TFLOP/s BF16, {sheet.fp32 / 1e12:.4g} FP32, {sheet.memory / 1e9:,.0f} GB/s; link "
        f"{sheet.link / 1e9:.0f}, host memory {sheet.host / 1e9:.0f}, disk {sheet.disk / 1e9:.0f} GB/s"
    )


MACHINES = {
    "rtx3060x4": DataSheet(  # GA106: 28 SMs at 1.78 GHz; 192-bit GDDR6; PCIe 4.0 x8; a desktop's two channels DDR4-3200
        gpu="RTX 3060 12 GB", count=4, bf16=25.5e12, fp32=12.7e12, memory=360e9, memory_bytes=12 * 2**30,
        link=16e9, host=51e9, host_bytes=32 * 2**30, disk=3e9, network=1.25e9,
    ),
    "h200": DataSheet(  # SXM; PCIe 5.0 x16; twelve channels DDR5-4800
        gpu="H200 141 GB", count=1, bf16=989e12, fp32=67e12, memory=4800e9, memory_bytes=141 * 10**9,
        link=64e9, host=460e9, host_bytes=256 * 2**30, disk=6e9, network=12.5e9,
    ),
    "a100x8": DataSheet(  # SXM; PCIe 4.0 x16; two sockets of eight channels DDR4-3200
        gpu="A100 80 GB", count=8, bf16=312e12, fp32=19.5e12, memory=2039e9, memory_bytes=80 * 2**30,
        link=32e9, host=409e9, host_bytes=1024 * 2**30, disk=6e9, network=12.5e9,
    ),
}  # fmt: skip


def find_machine(name: str) -> DataSheet:
    """Raises FourfoldError for a name that is not in MACHINES."""
    if name not in MACHINES:
        raise FourfoldError(f"--machine: got {name!r}, expected one of {', '.join(MACHINES)}")
    return MACHINES[name]


# CPU: as gauge.py measured them for the full shape of Qwen3.6-35B-A3B on a core of an AMD EPYC.
RATES = {
    "cpu": Rates(
        forward=200e9,
        traffic=1.0e9,
        moments=190e9,
        gemm=45e9,
        factor=60e9,
        elementwise=30e9,
        disk=1e9,
        thread=HASH_BYTES,
        link=8e9,
        host=16e9,
        network=1.25e9,
        unit="core",
        basis="constants of an AMD EPYC with AVX-512 BF16: 200 GFLOP/s BF16, 45 to 190 in the solve and 1.0 GB/s of "
        "temporaries each; disk at 1 GB/s",
    ),
    "cuda": MACHINES["rtx3060x4"].rates(),
}
