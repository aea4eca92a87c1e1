"""The pass over a release's bytes: every byte once, in the order of the file, in pieces that fit together."""

from __future__ import annotations

import hashlib
import itertools
import threading
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from fourfold.datatypes import FourfoldError
from fourfold.model.tensors import TensorIndex
from fourfold.release.verify import byte_reader

NAMES = ("wide", "long", "tiny", "bytes", "empty", "last")


@pytest.fixture
def shard(tmp_path: Path) -> Path:
    tensors = {
        "wide": torch.randn(7, 33, dtype=torch.float64),
        "long": torch.randn(1031).bfloat16(),
        "tiny": torch.randn(1),
        "bytes": torch.arange(101, dtype=torch.uint8),
        "empty": torch.empty(0, 4),
        "last": torch.arange(9, dtype=torch.int8),
    }
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    return tmp_path / "model.safetensors"


@pytest.mark.parametrize("block_bytes", [16, 24, 100, 512, 10_000])
@pytest.mark.parametrize("whole", [(), ("long",), NAMES])
def test_pieces_make_the_file(
    monkeypatch: pytest.MonkeyPatch, shard: Path, block_bytes: int, whole: tuple[str, ...]
) -> None:
    monkeypatch.setattr(byte_reader, "BLOCK_BYTES", block_bytes)
    index = TensorIndex.open(shard.parent)
    blocks = list(byte_reader.read_blocks(index, whole))
    assert sum(block.size_bytes for block in blocks) == shard.stat().st_size
    assert [bool(block.sha256) for block in blocks] == [False] * (len(blocks) - 1) + [True]
    assert blocks[-1].sha256 == hashlib.sha256(shard.read_bytes()).hexdigest()
    pieces = sorted(
        (piece for block in blocks for piece in block.pieces), key=lambda piece: (piece.header.name, piece.start)
    )
    found = {}
    for name, parts in itertools.groupby(pieces, key=lambda piece: piece.header.name):
        own = list(parts)
        assert len(own) == 1 or name not in whole
        starts = list(itertools.accumulate([piece.data.nbytes for piece in own], initial=0))
        assert [piece.start for piece in own] == starts[:-1]
        found[name] = torch.cat([piece.values for piece in own]).view(own[0].header.shape)
    wanted = load_file(shard)
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


def test_a_file_that_shrinks_is_an_error(shard: Path) -> None:
    index = TensorIndex.open(shard.parent)
    with shard.open("rb+") as file:
        file.truncate(1000)
    with pytest.raises(FourfoldError, match="ends before its header says"):
        list(byte_reader.read_blocks(index, ()))


def test_a_reader_that_is_left_early_ends(monkeypatch: pytest.MonkeyPatch, shard: Path) -> None:
    monkeypatch.setattr(byte_reader, "BLOCK_BYTES", 16)
    blocks = byte_reader.read_blocks(TensorIndex.open(shard.parent), ())
    next(blocks)
    blocks.close()
    names = {thread.name for thread in threading.enumerate()}
    assert not any(name.startswith("verify-reader") for name in names)
