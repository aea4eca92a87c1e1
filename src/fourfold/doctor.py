"""What fourfold finds on this machine, and what to do about what it lacks."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import platform
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import psutil

from fourfold import __version__
from fourfold.install import EXTRAS, pip_install
from fourfold.interpreter import PACKAGES, PROBE_SECONDS, find_python
from fourfold.serve import machine

VERSION = "import importlib.metadata, sys; print(importlib.metadata.version(sys.argv[1].replace('_', '-')))"
ENGINES = ("vllm", "sglang", "llama.cpp", "mlx")
FREE_BYTES = 10e9  # less than this is no room for any release


@dataclass(frozen=True, kw_only=True)
class Finding:
    """fix: what to do, "" if there is nothing to do; broken: a command will fail without it."""

    name: str
    found: str
    fix: str = ""
    broken: bool = False


@dataclass(frozen=True)
class Findings:
    findings: tuple[Finding, ...]

    @property
    def sound(self) -> bool:
        return not any(one.broken for one in self.findings)

    def to_json(self) -> dict[str, Any]:
        return {"sound": self.sound, "findings": [dataclasses.asdict(one) for one in self.findings]}


def examine(folder: Path) -> Findings:
    """Look at Python, torch, GPUs, memory, the disk of `folder` and of the Hub cache, the Hub, engines, extras."""
    return Findings((*_software(), *_hardware(), *_disks(folder), _hub(), *_engines(), *_extras()))


def _software() -> Iterator[Finding]:
    yield Finding(name="fourfold", found=__version__)
    yield Finding(name="Python", found=f"{platform.python_version()} ({sys.executable})")
    import torch

    gpus, built = machine.look().gpus, torch.version.cuda or torch.version.hip
    found = f"{torch.__version__}, " + (
        f"for CUDA {built}" if torch.version.cuda else f"for ROCm {built}" if built else "for CPUs"
    )
    if gpus and not torch.cuda.is_available():
        why = "sees no GPU: its CUDA is newer than the driver" if built else "is built for CPUs, and there is a GPU"
        fix = "Install a build of torch for this driver: https://pytorch.org/get-started/locally"
        yield Finding(name="torch", found=f"{found}; it {why}", fix=fix, broken=True)
    else:
        yield Finding(name="torch", found=found)
    yield Finding(name="transformers", found=importlib.metadata.version("transformers"))


def _hardware() -> Iterator[Finding]:
    here = machine.look()
    if not here.gpus:
        yield Finding(name="GPU", found=f"none ({here.no_gpu}): quantize runs on the CPU")
    for gpu in here.gpus:
        memory = f"{gpu.free_bytes / 1e9:.1f} of {gpu.total_bytes / 1e9:.1f} GB free"
        yield Finding(
            name="GPU", found=f"{gpu.name}, compute capability {'.'.join(map(str, gpu.capability))}, {memory}"
        )
    if here.gpus:
        yield Finding(name="driver", found=_driver())
    from fourfold.core.kernels import bf16

    cores = psutil.cpu_count(logical=False) or psutil.cpu_count() or 1
    products = "BF16 products in hardware" if bf16.NATIVE else "no BF16 products in hardware: they are computed in fp32"
    yield Finding(name="CPU", found=f"{platform.machine()}, {cores} cores, {products}")
    memory = psutil.virtual_memory()
    yield Finding(name="memory", found=f"{memory.available / 1e9:.1f} of {memory.total / 1e9:.1f} GB free")


def _driver() -> str:
    words = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    done = subprocess.run(words, capture_output=True, text=True, check=False, timeout=machine.LIMIT_SECONDS)
    return (done.stdout.splitlines() or ["unknown"])[0].strip()


def _disks(folder: Path) -> Iterator[Finding]:
    from huggingface_hub.constants import HF_HUB_CACHE

    for name, place, fix in (
        ("disk", folder, "Name an OUT on a larger disk"),
        ("Hub cache", Path(HF_HUB_CACHE), "Set HF_HOME to a folder on a larger disk"),
    ):
        there = next(parent for parent in (place.absolute(), *place.absolute().parents) if parent.exists())
        free = shutil.disk_usage(there).free
        low = free < FREE_BYTES
        yield Finding(name=name, found=f"{free / 1e9:,.1f} GB free at {place.absolute()}", fix=fix if low else "")


def _hub() -> Finding:
    """Whether there is a token; what it is is never shown."""
    from huggingface_hub import constants, get_token

    if constants.HF_HUB_OFFLINE:
        return Finding(name="Hub", found="offline (HF_HUB_OFFLINE)", fix="Unset HF_HUB_OFFLINE to download or publish")
    if get_token():
        return Finding(name="Hub", found="a token is present")
    fix = "hf auth login, or set HF_TOKEN, for gated models and to publish"
    return Finding(name="Hub", found="no token: public models only", fix=fix)


def _engines() -> Iterator[Finding]:
    for name in ENGINES:
        python = find_python(name, None)
        if python is None:
            fix = "--python names the interpreter of its environment, if it has one"
            yield Finding(name=name, found="not found on PATH: verify and serve run without it", fix=fix)
            continue
        words = [str(python), "-c", VERSION, PACKAGES.get(name, name)]
        done = subprocess.run(words, capture_output=True, text=True, check=False, timeout=PROBE_SECONDS)
        yield Finding(name=name, found=f"{done.stdout.strip() or 'version unknown'} ({python})")


def _extras() -> Iterator[Finding]:
    for extra, package in EXTRAS.items():
        there = find_spec(package) is not None
        yield Finding(
            name=f"[{extra}]", found="installed" if there else "not installed", fix="" if there else pip_install(extra)
        )
