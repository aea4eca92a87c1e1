"""What --devices names: one device, several, or all of this machine."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass

from fourfold.datatypes import FourfoldError


@dataclass(frozen=True, kw_only=True)
class Machine:
    """What of this machine a run may take.

    devices: "cpu", "cuda:0,cuda:1", "cpu*4", "auto", "all": a worker for each; memory_bytes, host_bytes: budgets, see
    memory.plan_memory; strict: a budget that cannot be kept is refused, not warned of.
    """

    devices: str = "cpu"
    memory_bytes: int | None = None
    host_bytes: int | None = None
    strict: bool = False


WHOLE_CPU = Machine()
WANTED = "wanted auto, all, cpu, cpu*N, cuda:N, or several GPUs by commas as in cuda:0,cuda:1"


def expand_devices(text: str) -> tuple[str, ...]:
    """A device for each worker of this process: "cpu*4" is the CPU four times, each with its share of the cores.

    "auto": the first GPU, or under torchrun this rank's own, or else the CPU; "all": all GPUs, or else the CPU.
    Raises FourfoldError for devices that this machine lacks, and for CPU and GPUs side by side.
    """
    devices = parse_devices(text)
    for device in devices:
        check_device(device)
    if devices:
        return devices
    gpus = _gpus()
    if not gpus:
        return ("cpu",)
    own = int(os.environ.get("LOCAL_RANK", "0"))
    return (f"cuda:{own}",) if text == "auto" else tuple(f"cuda:{number}" for number in range(gpus))


def parse_devices(text: str) -> tuple[str, ...]:
    """The devices that are named, whether this machine has them or not; none for "auto" and "all". Needs no torch."""
    if text in ("auto", "all"):
        return ()
    devices: list[str] = []
    for part in text.split(","):
        name, times = part.strip(), 1
        if match := re.fullmatch(r"(.+)\*(\d{1,3})", name):
            name, times = match[1], int(match[2])
        if not re.fullmatch(r"cpu|cuda(:\d{1,4})?", name, re.ASCII):
            raise FourfoldError(f"device {name!r}: {WANTED}")
        if not times:
            raise FourfoldError(f"devices {text!r}: {part.strip()} is no device at all; {WANTED}")
        devices += [name] * times
    if len({name.partition(":")[0] for name in devices}) > 1:
        raise FourfoldError(f"devices {text!r}: the CPU beside GPUs would only hold them up; {WANTED}")
    return tuple(devices)


def devices_text(devices: Sequence[str]) -> str:
    """Return "cpu", "cpu*4", "cuda:0, cuda:1" or "cuda:0 to cuda:7", for people."""
    names = list(dict.fromkeys(devices))
    text = ", ".join(names) if len(names) < 3 else f"{names[0]} to {names[-1]}"
    return text if len(names) == len(devices) else f"{text}*{len(devices) // len(names)}"


def one_device(text: str) -> str:
    """The same where one device does all the work. Raises FourfoldError for several."""
    devices = expand_devices(text)
    if len(devices) > 1:
        raise FourfoldError(f"devices {text!r}: {len(devices)} devices, where one is wanted, such as {devices[0]}")
    return devices[0]


def under_torchrun() -> bool:
    """Whether this process is one of several that torchrun started."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def check_device(device: str) -> None:
    """Raises FourfoldError for a GPU, "cuda" or "cuda:N", that this machine lacks or that cannot be used."""
    if device == "cpu":
        return
    import torch

    from fourfold.core.kernels import cuda

    count = _gpus()
    if int(device.partition(":")[2] or 0) >= count:
        raise FourfoldError(
            f"device {device!r}: this machine shows torch {count} CUDA devices; take cpu, or install a "
            "driver and a torch build with CUDA"
        )
    if torch.cuda.get_device_capability(device) < (8, 0):
        name = torch.cuda.get_device_name(device)
        raise FourfoldError(f"device {device!r}: {name} has no BF16; compute capability 8.0 or newer is wanted")
    if not cuda.AVAILABLE:
        raise FourfoldError(f"device {device!r}: triton is not installed, which the kernels are made with; install it")


def _gpus() -> int:
    import torch

    return torch.cuda.device_count()
