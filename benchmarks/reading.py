"""How fast weights are read, hashed and checked for NaN, beside what hashing alone makes of memory.

    python benchmarks/reading.py --json benchmarks/results/reading.json

A file of large tensors (stacks of experts) and one of small ones (experts of their own), both in the page cache. With
one thread and with as many as there are cores, at most READERS: bytes a second of `read_finite` with its digests,
and of sha256 over the same bytes in memory, turn by turn. The ratio of the two is what reading and the check for NaN
leave of what is possible.
"""

from __future__ import annotations

import argparse
import datetime
import hashlib
import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import save_file

from fourfold.model import tensors
from fourfold.model.tensors import BLOCK_BYTES, TensorIndex, raw_bytes, side_by_side

TOTAL, SMALL = 768 * 2**20, 2 * 2**20
KINDS = {"stacks": 256 * 2**20, "experts of their own": SMALL}
TURNS = 5


def seconds(work: Callable[[], object]) -> float:
    begin = time.perf_counter()
    work()
    return time.perf_counter() - begin


def read(index: TensorIndex, places: dict[str, torch.Tensor], name: str) -> str:
    sha = hashlib.sha256()
    index.read_finite(name, out=places[name], sha=sha)
    return sha.hexdigest()


def measure(folder: Path, kind: str, size: int) -> list[dict[str, object]]:
    """A row for each number of threads."""
    generator = torch.Generator().manual_seed(0)
    count, values = TOTAL // size, torch.randn(size // 2, generator=generator).bfloat16()
    save_file({f"t{number}": values.clone() for number in range(count)}, folder / "model.safetensors")
    index = TensorIndex.open(folder)
    places = {name: torch.zeros_like(values) for name in index.headers}
    blocks = [
        raw_bytes(place)[first : first + BLOCK_BYTES]
        for place in places.values() for first in range(0, size, BLOCK_BYTES)
    ]  # fmt: skip
    rows = []
    for threads in sorted({1, min(os.cpu_count() or 1, 4)}):
        tensors.READERS = threads
        torch.set_num_threads(1)

        def all_read() -> None:
            if size > BLOCK_BYTES:
                for name in places:
                    read(index, places, name)
            else:
                list(side_by_side(lambda name: read(index, places, name), list(places)))

        def all_hashed() -> None:
            list(side_by_side(lambda block: hashlib.sha256(block).digest(), blocks))

        all_read()
        turns = [(seconds(all_read), seconds(all_hashed)) for _ in range(TURNS)]
        rates = [TOTAL / statistics.median(column) / 1e9 for column in zip(*turns, strict=True)]
        ratio = statistics.median(hashed / whole for whole, hashed in turns)
        rows.append({"kind": kind, "threads": threads, "read": rates[0], "hashed": rates[1], "ratio": ratio})
        print(rows[-1], flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    rows: list[dict[str, object]] = []
    for kind, size in KINDS.items():
        with tempfile.TemporaryDirectory() as name:
            rows += measure(Path(name), kind, size)
    about = {
        "date": f"{datetime.date.today()}",
        "machine": {"cpu": platform.machine(), "cores": os.cpu_count(), "threads": min(os.cpu_count() or 1, 4)},
        "load": os.getloadavg()[0],
        "unit": "GB/s",
    }
    if options.json:
        options.json.write_text(json.dumps(about | {"runs": rows}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
