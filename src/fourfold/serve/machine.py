"""The GPUs of this machine, from nvidia-smi: a CUDA context of ours would take memory from the server."""

from __future__ import annotations

import os
import shutil
import subprocess
from dataclasses import dataclass

import psutil

QUERY = ("index", "uuid", "name", "memory.total", "memory.free", "compute_cap")
LIMIT_SECONDS = 30
MIB = 2**20

# Machines with sizes that are sold, least memory first: (GPUs, GiB of each).
MACHINES = ((1, 12), (1, 16), (1, 24), (2, 16), (1, 32), (4, 12), (1, 48), (1, 80), (2, 80), (4, 80), (8, 80), (8, 141))


@dataclass(frozen=True, kw_only=True)
class Gpu:
    name: str
    total_bytes: int
    free_bytes: int
    capability: tuple[int, int]


@dataclass(frozen=True, kw_only=True)
class Machine:
    """gpus: that a process started from here would see; no_gpu: why there are none."""

    gpus: tuple[Gpu, ...]
    host_bytes: int
    no_gpu: str = ""

    @classmethod
    def of(cls, count: int, gib: int, capability: tuple[int, int], host_bytes: int = 0) -> Machine:
        """Return a machine with `count` empty GPUs of `gib` GiB each, which is not this one."""
        gpu = Gpu(name=f"{gib} GB GPU", total_bytes=gib * 2**30, free_bytes=gib * 2**30, capability=capability)
        return cls(gpus=(gpu,) * count, host_bytes=host_bytes)

    def describe(self) -> str:
        if not self.gpus:
            return f"no GPU ({self.no_gpu}), {self.host_bytes / 2**30:.0f} GiB of memory"
        kinds = {gpu.name: sum(other.name == gpu.name for other in self.gpus) for gpu in self.gpus}
        names = ", ".join(f"{count} x {name}" for name, count in kinds.items())
        smallest = min(self.gpus, key=lambda gpu: gpu.total_bytes)
        major, minor = min(gpu.capability for gpu in self.gpus)
        return f"{names}, {smallest.total_bytes / 2**30:.0f} GiB each, compute capability {major}.{minor}"


def look() -> Machine:
    """Return this machine, with the reason where no GPU is seen: it is then served on the CPU."""
    gpus, no_gpu = _find_gpus()
    return Machine(gpus=gpus, host_bytes=psutil.virtual_memory().total, no_gpu=no_gpu)


def _find_gpus() -> tuple[tuple[Gpu, ...], str]:
    command = shutil.which("nvidia-smi")
    if command is None:
        return (), "there is no nvidia-smi"
    words = [command, f"--query-gpu={','.join(QUERY)}", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=LIMIT_SECONDS, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        return (), f"nvidia-smi does not run: {error}"
    if done.returncode:
        lines = (done.stderr or done.stdout).strip().splitlines() or [f"exit code {done.returncode}"]
        return (), f"nvidia-smi: {lines[0]}"
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    try:
        gpus = parse(done.stdout, visible)
    except ValueError as error:  # a device that shares the host's memory has "[N/A]"
        return (), f"nvidia-smi's table is not understood: {error}"
    hidden = f"CUDA_VISIBLE_DEVICES={visible} leaves none" if visible is not None else "nvidia-smi lists none"
    return gpus, "" if gpus else hidden


def parse(text: str, visible: str | None) -> tuple[Gpu, ...]:
    """nvidia-smi's table of QUERY. visible: CUDA_VISIBLE_DEVICES, indices or starts of UUIDs; None: not set."""
    by_index, by_uuid = dict[str, Gpu](), dict[str, Gpu]()
    for line in text.splitlines():
        index, uuid, name, total, free, capability = (part.strip() for part in line.split(","))
        major, minor = capability.split(".")
        by_index[index] = by_uuid[uuid] = Gpu(
            name=name, total_bytes=int(total) * MIB, free_bytes=int(free) * MIB, capability=(int(major), int(minor))
        )
    if visible is None:
        return tuple(by_index.values())
    found = []
    for wanted in filter(None, (part.strip() for part in visible.split(","))):
        gpu = by_index.get(wanted) or next((g for uuid, g in by_uuid.items() if uuid.startswith(wanted)), None)
        if gpu is None:
            break  # as CUDA does: what follows an unknown device is not seen
        found.append(gpu)
    return tuple(found)
