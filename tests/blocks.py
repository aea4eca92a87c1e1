"""Block sizes so small and odd that a test's problem has several blocks and a shorter last one.

A block size decides how much exists at one time and must not change a result but for the order of sums. Real ones are
larger than any test's problem, so that code for a second block would never run. conftest.py sets these for the tests of
core, model, quantize and release. Sizes that are compiled into kernels (numba, Triton) cannot be set here, nor
gptq.BLOCK, which Triton wants as a power of two: tests of the kernels choose shapes beyond them.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from contextlib import contextmanager

# Folders of tests, and the packages whose sizes are small there: tests of core need not wait for the others' imports.
ROOMS = {"core": ("core",), **dict.fromkeys(("model", "quantize", "release"), ("core", "model", "quantize", "release"))}
SMALL = {
    "core.fidelity": {"SLAB_ELEMENTS": 1009},
    "core.gptq": {"PANEL": 53},
    "core.metrics": {"PANEL": 53, "VOCABULARY_CHUNK": 157, "BOOTSTRAP_ELEMENTS": 1009},
    "core.moments": {"PAIRS_PER_PIECE": 173, "PANEL": 48, "MIRRORED": 16},  # panels begin where a copied block does
    "core.target": {"PANEL": 53},
    "core.widening": {"PIECE_TOKENS": 61},
    "model.tensors": {
        "CHUNK_BYTES": 8 * 3001,
        "BLOCK_BYTES": 8 * 1009,
        "SLAB_ELEMENTS": 1009,
    },  # whole elements of every dtype
    "model.files": {"CHUNK_BYTES": 8 * 3001},
    "model.head": {"VOCABULARY_CHUNK": 157},
    "model.layer": {"PAIRS_PER_BATCH": 101},
    "model.shards": {"CHUNK_BYTES": 8 * 3001},
    "quantize.chunk": {"POOL_PIECE": 211, "GATHERED": 37},
    "distributed.ranks": {"PIECE_BYTES": 10_007},
    "quantize.reference": {"POSITIONS": 3},
    "quantize.streams": {"SLAB_ELEMENTS": 1009},
    "release.compare": {"CHUNK_BYTES": 8 * 3001},
    "release.drafts": {"HEAD_ROWS": 5},
    "release.verify.byte_reader": {"BLOCK_BYTES": 100_003},
}


@contextmanager
def shrunk(*rooms: str) -> Iterator[None]:
    """Set the small sizes in these packages of fourfold."""
    modules = {importlib.import_module(f"fourfold.{name}"): sizes
               for name, sizes in SMALL.items() if name.startswith(rooms)}  # fmt: skip
    real = {module: {name: getattr(module, name) for name in sizes} for module, sizes in modules.items()}
    _set(modules)
    try:
        yield
    finally:
        _set(real)


def _set(sizes: dict[object, dict[str, int]]) -> None:
    for module, values in sizes.items():
        for name, value in values.items():
            setattr(module, name, value)
