"""Memory and speed of `fourfold convert --format gguf` and `mlx`, beside plain copying of the same release.

    python benchmarks/export_speed.py --layers 2 4 --json benchmarks/results/export_speed.json

The releases are those of verify_speed.py: random weights with the layers of Qwen3.6-35B-A3B, rounded to nearest. Each
export runs in a process of its own, whose peak memory is reported. Copying reads and writes each file in blocks of 8 MB
and syncs it, as an export does. Files lie in the page cache, so that the disk decides little; rounds alternate, and the
fastest of each way counts.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import shutil
import tempfile
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from verify_speed import BLOCK_BYTES, make_both

from fourfold.quantize.finish import peak_memory
from fourfold.release.export import export

FORMATS = ("gguf", "mlx")
Seen = tuple[float, int]  # seconds and peak bytes


def apart(work: Callable[..., None], *arguments: Any) -> Seen:
    """Run in a new process; its seconds without its start, and its peak memory."""
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_timed, args=(sender, work, arguments))
    process.start()
    sender.close()
    seen: Seen = receiver.recv()
    process.join()
    return seen


def _timed(sender: Connection, work: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    begin = time.perf_counter()
    work(*arguments)
    sender.send((time.perf_counter() - begin, peak_memory()["host"]))


def copied(release: Path, new: Path) -> None:
    new.mkdir()
    for path in sorted(release.glob("*.safetensors")):
        with path.open("rb", buffering=0) as source, (new / path.name).open("wb", buffering=0) as target:
            shutil.copyfileobj(source, target, BLOCK_BYTES)
            os.fsync(target.fileno())


def exported(release: Path, new: Path, form: str) -> None:
    export(release, new, form)


def measure(folder: Path, layers: int, rounds: int) -> dict[str, Any]:
    release, new = folder / "release", folder / "new"
    apart(make_both, folder / "source", release, layers, "fast")
    shutil.rmtree(folder / "source")
    ways = {"copy": (copied,), **{form: (exported, form) for form in FORMATS}}
    seen: dict[str, list[Seen]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, (work, *more) in ways.items():
            seen[name].append(apart(work, release, new, *more))
            shutil.rmtree(new)
    seconds = {name: min(each for each, _ in found) for name, found in seen.items()}
    return {
        "layers": layers,
        "bytes": sum(path.stat().st_size for path in release.glob("*.safetensors")),
        "seconds": {name: [round(each, 2) for each, _ in found] for name, found in seen.items()},
        "over_copying": {form: round(seconds[form] / seconds["copy"], 2) for form in FORMATS},
        "peak_host_bytes": {name: max(peak for _, peak in found) for name, found in seen.items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", nargs="+", type=int, default=[2, 4])
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--folder", type=Path, help="where to put the checkpoints (12 GB for 4 layers)")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    runs = []
    for layers in options.layers:
        with tempfile.TemporaryDirectory(prefix="export-speed-", dir=options.folder) as name:
            runs.append(measure(Path(name), layers, options.rounds))
    result = {
        "runs": runs,
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}",
        "date": time.strftime("%Y-%m-%d"),
    }
    text = json.dumps(result, indent=1)
    print(text)
    if options.json:
        options.json.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
