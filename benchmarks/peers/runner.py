"""What the scripts for all peers share; it runs under their interpreters and needs torch alone.

A script is called as `X_quantize.py MODEL ROWS.json OUT --group-size N ...`; ROWS.json has lists of token ids, of one
length. The last line that it prints is JSON: seconds and cpu_seconds of quantizing (start-up and loading
left out), peak_bytes, projections, versions, and what the tool says of itself.
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

BATCH_ROWS = 8


def arguments(description: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("model")
    parser.add_argument("rows", type=lambda path: json.loads(Path(path).read_text()))
    parser.add_argument("out")
    parser.add_argument("--group-size", type=int, default=128, help="input features that share a scale")
    return parser


def import_torchvision() -> None:
    """transformers' image processors import it. PyPI's wheel is linked to CUDA: beside a CPU build of torch its library
    does not load, its operators have no schema, and the import fails where it registers their fakes. None is called.
    """
    try:
        importlib.import_module("torchvision")
    except RuntimeError:
        schema = torch.library.Library("torchvision", "FRAGMENT")
        for name in ("nms", "qnms"):
            schema.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
            del sys.modules[name]
        importlib.import_module("torchvision")
        import_torchvision.schema = schema  # a library's definitions end with it


class Stopwatch:
    """Wall and CPU seconds since it was made."""

    def __init__(self) -> None:
        self.wall, self.cpu = time.perf_counter(), time.process_time()

    def read(self) -> dict[str, float]:
        return {"seconds": time.perf_counter() - self.wall, "cpu_seconds": time.process_time() - self.cpu}


def report(spent: dict[str, float], packages: tuple[str, ...], **figures: Any) -> None:
    """Print the last line of a script. packages: those whose versions matter, beside torch and transformers."""
    status = Path("/proc/self/status").read_text().split()
    peak_bytes = int(status[status.index("VmHWM:") + 1]) * 1024
    versions = {name: version(name) for name in (*packages, "torch", "transformers")}
    print("\n" + json.dumps(spent | {"peak_bytes": peak_bytes, "versions": versions} | figures))
