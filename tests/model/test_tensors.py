"""The reader against safetensors' own: what both accept and read; and how damaged checkpoints are refused."""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import struct
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from fourfold.datatypes import FourfoldError
from fourfold.model import tensors
from fourfold.model.tensors import DTYPES, TensorIndex, raw_bytes, require_finite

SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")


def write_raw(path: Path, header: object, data: bytes = b"", length: int | None = None) -> None:
    """A safetensors file with any header: a JSON value, or bytes as they are, and any stated length of it."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)


def entry(dtype: object = "F32", shape: object = (2,), offsets: object = (0, 8)) -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def write_index(folder: Path, weight_map: object, **others: object) -> None:
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map, **others}))


def write_two_shards(folder: Path) -> dict[str, Tensor]:
    """A checkpoint of two shards; returns its tensors."""
    generator = torch.Generator().manual_seed(0)
    first = {"a.weight": torch.randn(3, 5, generator=generator).bfloat16(), "a.scale": torch.tensor(0.5)}
    second = {"b.weight": torch.randn(4, 2, generator=generator), "b.none": torch.empty(0, 7)}
    save_file(first, folder / SHARDS[0], metadata={"format": "pt"})
    save_file(second, folder / SHARDS[1])
    write_index(
        folder, {name: SHARDS[0] for name in first} | {name: SHARDS[1] for name in second}, metadata={"total_size": 1}
    )
    return first | second


def random_tensor(dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
    bits = torch.randint(0, 2, (*shape, dtype.itemsize), dtype=torch.uint8)
    return bits.view(dtype).squeeze(-1) if dtype != torch.bool else bits.squeeze(-1).bool()


def same_bytes(left: Tensor, right: Tensor) -> bool:
    return (left.dtype, left.shape) == (right.dtype, right.shape) and raw_bytes(left) == raw_bytes(right)


def test_headers_and_values_are_safetensors_own(tmp_path: Path) -> None:
    wanted = write_two_shards(tmp_path)
    index = TensorIndex.open(tmp_path)
    assert index.headers.keys() == wanted.keys()
    for name, header in index.headers.items():
        assert DTYPES[header.dtype] == wanted[name].dtype
        assert header.shape == tuple(wanted[name].shape)
        assert header.size_bytes == wanted[name].nbytes
        assert same_bytes(index.read(name), wanted[name])
        with safe_open(tmp_path / header.shard, framework="pt") as file:
            assert same_bytes(index.read(name), file.get_tensor(name))


def test_every_dtype_is_read_as_safetensors_reads_it(tmp_path: Path) -> None:
    wanted = {f"x.{name}": random_tensor(dtype, (3, 2)) for name, dtype in DTYPES.items()}
    save_file(wanted, tmp_path / "model.safetensors")
    index = TensorIndex.open(tmp_path)
    for name, tensor in load_file(tmp_path / "model.safetensors").items():
        assert index.headers[name].dtype == name.removeprefix("x.")
        assert same_bytes(index.read(name), tensor)


def test_links_are_followed_as_hub_caches_are_made_of_them(tmp_path: Path) -> None:
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshot"
    blobs.mkdir()
    snapshot.mkdir()
    wanted = write_two_shards(blobs)
    for path in blobs.iterdir():
        (snapshot / path.name).symlink_to(Path("..", "blobs", path.name))
    assert same_bytes(TensorIndex.open(snapshot).read("b.weight"), wanted["b.weight"])


def test_shards_open_without_an_index(tmp_path: Path) -> None:
    wanted = write_two_shards(tmp_path)
    (tmp_path / "model.safetensors.index.json").unlink()
    index = TensorIndex.open_shards(tmp_path, [SHARDS[1]])
    assert set(index.headers) == {"b.weight", "b.none"}
    assert same_bytes(index.read("b.weight"), wanted["b.weight"])


def test_digest_is_of_headers_not_of_data(tmp_path: Path) -> None:
    def digest(**tensors: Tensor) -> str:
        save_file(tensors, tmp_path / "model.safetensors")
        return TensorIndex.open(tmp_path).digest

    first = digest(a=torch.zeros(4, 2), b=torch.zeros(3))
    assert digest(a=torch.ones(4, 2), b=torch.ones(3)) == first
    others = [
        digest(a=torch.zeros(2, 4), b=torch.zeros(3)),
        digest(a=torch.zeros(4, 2), c=torch.zeros(3)),
        digest(a=torch.zeros(4, 2, dtype=torch.int32), b=torch.zeros(3)),
        digest(a=torch.zeros(4, 2)),
    ]
    assert len({first, *others}) == 5


# Damaged headers


def raw(header: object, data: bytes = b"", length: int | None = None) -> Callable[[Path], None]:
    return lambda path: write_raw(path, header, data, length)


def overlong(path: Path) -> None:
    write_raw(path, {"a": entry()}, bytes(8), length=100_000_001)
    os.truncate(path, 200_000_000)


DAMAGED: dict[str, tuple[Callable[[Path], object], str]] = {
    "empty file": (lambda path: path.write_bytes(b""), "0 bytes in a file of 0"),
    "five bytes": (lambda path: path.write_bytes(b"12345"), "a file of 5"),
    "header past the end": (raw({}, length=3), "3 bytes in a file of 10"),
    "header of 2^64 - 1": (raw({}, length=2**64 - 1), "18,446,744,073,709,551,615"),
    "header of 100 MB": (overlong, "<= 100,000,000"),
    "no JSON": (raw(b"{nope"), "not JSON"),
    "deep JSON": (raw(b'{"a":' + b"[" * 100_000), "not JSON"),
    "no UTF-8": (raw(b'{"\xff":1}'), "not JSON"),
    "half a surrogate pair": (raw(rb'{"\ud800":1}'), "not JSON"),
    "number of 5000 digits": (raw(b'{"a":' + b"9" * 5000 + b"}"), "not JSON"),
    "list": (raw([]), "wanted a JSON object"),
    "leading space": (raw(b" {}"), "wanted a JSON object"),
    "metadata": (raw({"__metadata__": {"a": 1}}), "__metadata__"),
    "tensor twice": (raw(b'{"a": {}, "a": {}}'), "'a' is there 2 times"),
    "dtype twice": (raw(b'{"a": {"dtype": "F32", "dtype": "F16"}}'), "'dtype' is there"),
    "no object": (raw({"a": 1}), "tensor 'a': found 1"),
    "no offsets": (raw({"a": {"dtype": "F32", "shape": []}}), "wanted dtype, shape and"),
    "more keys": (raw({"a": entry() | {"x": 1}}, bytes(8)), "wanted dtype, shape and"),
    "unknown dtype": (raw({"a": entry("F4")}, bytes(8)), "tensor 'a': dtype 'F4'"),
    "dtype a list": (raw({"a": entry(["F32"])}, bytes(8)), "dtype"),
    "shape a number": (raw({"a": entry(shape=2)}, bytes(8)), "shape 2"),
    "shape negative": (raw({"a": entry(shape=[-1, -2])}, bytes(8)), "shape"),
    "shape a float": (raw({"a": entry(shape=[2.0])}, bytes(8)), "shape"),
    "shape a bool": (raw({"a": entry(shape=[2, True])}, bytes(8)), "shape"),
    "shape over 2^63": (raw({"a": entry(shape=[2**62, 2**62])}, bytes(8)), r"2\^63"),
    "strides over 2^63": (raw({"a": entry(shape=[0, 2**62, 2**62], offsets=[0, 0])}), r"2\^63"),
    "size and offsets": (raw({"a": entry(shape=[3])}, bytes(8)), "8 bytes; wanted 12"),
    "offsets negative": (raw({"a": entry(offsets=[-8, 0])}, bytes(8)), "data_offsets"),
    "offsets swapped": (raw({"a": entry(offsets=[8, 0])}, bytes(8)), "wanted a start and an end"),
    "three offsets": (raw({"a": entry(offsets=[0, 8, 8])}, bytes(8)), "data_offsets"),
    "offsets of 2^64": (raw({"a": entry(offsets=[0, 2**64])}, bytes(8)), "data_offsets"),
    "truncated": (raw({"a": entry()}, bytes(7)), "is the download complete"),
    "trailing bytes": (raw({"a": entry()}, bytes(9)), "wanted no byte more"),
    "overlap": (raw({"a": entry(), "b": entry(offsets=[4, 12])}, bytes(12)), "overlaps 'a'"),
    "same bytes": (raw({"a": entry(), "b": entry()}, bytes(8)), "overlaps"),
    "hole": (raw({"a": entry(), "b": entry(offsets=[9, 17])}, bytes(17)), "hole after 'a'"),
    "hole at the start": (raw({"a": entry(offsets=[4, 12])}, bytes(12)), "hole after"),
    "pipe": (os.mkfifo, "not a regular file"),
    "folder": (Path.mkdir, "not a regular file"),
    "link to itself": (lambda path: path.symlink_to(path), "symbolic link"),
}


@pytest.mark.parametrize("damage", DAMAGED)
def test_damaged_shard_is_one_clear_error(tmp_path: Path, damage: str) -> None:
    make, message = DAMAGED[damage]
    make(tmp_path / "x.safetensors")
    with pytest.raises(FourfoldError, match=message) as raised:
        TensorIndex.open_shards(tmp_path, ["x.safetensors"])
    assert "x.safetensors" in str(raised.value)


def test_messages_stay_short_whatever_is_in_the_file(tmp_path: Path) -> None:
    write_raw(tmp_path / "model.safetensors", {"a" * 10**6: entry(dtype="b" * 10**6)}, bytes(8))
    with pytest.raises(FourfoldError) as raised:
        TensorIndex.open(tmp_path)
    assert len(str(raised.value)) < 1000


def assert_safetensors_agrees(path: Path) -> None:
    """What we accept, safetensors accepts and understands the same way; what it refuses, we refuse."""
    try:
        index = TensorIndex.open_shards(path.parent, [path.name])
    except FourfoldError:
        return
    with safe_open(path, framework="pt") as file:
        assert set(file.keys()) == set(index.headers)
        for name, header in index.headers.items():
            found = file.get_slice(name)
            assert (found.get_dtype(), tuple(found.get_shape())) == (header.dtype, header.shape)
            assert same_bytes(file.get_tensor(name), index.read(name))


OFFSETS = st.integers(-1, 24) | st.sampled_from([2**63, 2**64, 1.5, None, True])
JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=3),
    max_leaves=4,
)
ENTRIES = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["F32", "BF16", "U8", "BOOL", "F8_E4M3", "F4", "nope"]) | JSON_VALUES,
        "shape": st.lists(st.integers(-1, 5) | st.just(2**62), max_size=3) | JSON_VALUES,
        "data_offsets": st.lists(OFFSETS, min_size=2, max_size=2) | JSON_VALUES,
    }
)
HEADERS = st.dictionaries(st.text(max_size=3) | st.just("__metadata__"), ENTRIES | JSON_VALUES, max_size=3)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(header=HEADERS, data=st.binary(max_size=24), shift=st.sampled_from([0, 0, 0, -1, 1, 2**32]))
def test_any_header_is_refused_or_agreed_on(tmp_path: Path, header: Any, data: bytes, shift: int) -> None:
    text = json.dumps(header).encode()
    write_raw(tmp_path / "x.safetensors", text, data, length=max(0, len(text) + shift))
    assert_safetensors_agrees(tmp_path / "x.safetensors")


@st.composite
def packed_tensors(draw: st.DrawFn) -> tuple[dict[str, object], bytes]:
    """A valid header and its data, or one that is off by a little in one place."""
    header: dict[str, object] = {}
    start = 0
    for number in range(draw(st.integers(1, 3))):
        dtype = draw(st.sampled_from([name for name in DTYPES if name != "BOOL"]))
        shape = draw(st.lists(st.integers(0, 3), max_size=3))
        end = start + DTYPES[dtype].itemsize * math.prod(shape)
        moved = [place + draw(st.sampled_from([0] * 20 + [-1, 1])) for place in (start, end)]
        header[f"t{number}"] = entry(dtype, shape, moved)
        start = end
    return header, bytes(max(0, start + draw(st.sampled_from([0] * 20 + [-1, 1]))))


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(packed=packed_tensors())
def test_nearly_valid_header_is_refused_or_agreed_on(tmp_path: Path, packed: Any) -> None:
    path = tmp_path / "x.safetensors"
    write_raw(path, *packed)
    assert_safetensors_agrees(path)
    try:
        with safe_open(path, framework="pt"):
            pass
    except SafetensorError:
        return
    assert TensorIndex.open_shards(tmp_path, [path.name]).headers.keys() == packed[0].keys()


# Damaged folders and indices


def spoil(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    path = folder / "model.safetensors.index.json"
    content = json.loads(path.read_text())
    change(content["weight_map"])
    path.write_text(json.dumps(content))


def place(shard: object) -> Callable[[Path], object]:
    return lambda folder: spoil(folder, lambda weights: weights.update({"a.weight": shard}))


def put_in_both(folder: Path) -> None:
    save_file(dict.fromkeys(("a.weight", "b.weight", "b.none"), torch.zeros(0)), folder / SHARDS[1])


def empty(folder: Path) -> None:
    for path in folder.iterdir():
        path.unlink()


def only_pickles(folder: Path) -> None:
    empty(folder)
    (folder / "pytorch_model.bin").touch()


def write_text(name: str, text: str) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_text(text)


BROKEN: dict[str, tuple[Callable[[Path], object], str]] = {
    "parent folder": (place(f"../{SHARDS[0]}"), "bare name of a .safetensors file"),
    "absolute path": (place("/etc/model.safetensors"), "bare name of a .safetensors file"),
    "subfolder": (place(f"x/{SHARDS[0]}"), "bare name of a .safetensors file"),
    "backslash": (place(f"..\\{SHARDS[0]}"), "bare name of a .safetensors file"),
    "zero byte": (place("\0.safetensors"), "bare name of a .safetensors file"),
    "no shard": (place(None), "placed in None"),
    "pickle": (place("pytorch_model.bin"), "bare name of a .safetensors file"),
    "overlong name": (place("x" * 300 + ".safetensors"), "name too long"),
    "shard missing": (place("model-00003-of-00002.safetensors"), "missing; is the download complete"),
    "placed elsewhere": (place(SHARDS[1]), f"'a.weight' in {SHARDS[1]}, but it is in {SHARDS[0]}"),
    "tensor missing": (
        lambda folder: spoil(folder, lambda weights: weights.update({"c": SHARDS[0]})),
        f"'c' in {SHARDS[0]}, which lacks it",
    ),
    "tensor not named": (
        lambda folder: spoil(folder, lambda weights: weights.pop("a.weight")),
        f"does not name tensor 'a.weight' of {SHARDS[0]}",
    ),
    "tensor in two shards": (put_in_both, f"'a.weight' is in {SHARDS[0]} and in {SHARDS[1]}"),
    "shard deleted": (lambda folder: (folder / SHARDS[1]).unlink(), f"{SHARDS[1]}: missing"),
    "no index": (lambda folder: (folder / "model.safetensors.index.json").unlink(), "no model.safetensors.i"),
    "index no JSON": (write_text("model.safetensors.index.json", "{"), "not JSON"),
    "weight_map a list": (lambda folder: write_index(folder, ["a"]), "weight_map is"),
    "weight_map empty": (lambda folder: write_index(folder, {}), "weight_map is"),
    "single file beside": (write_text("model.safetensors", ""), "remove the one"),
    "only pickles": (only_pickles, "pytorch_model.bin.*never read"),
    "nothing": (empty, "neither model.safetensors.index"),
}


@pytest.mark.parametrize("damage", BROKEN)
def test_broken_checkpoint_is_one_clear_error(tmp_path: Path, damage: str) -> None:
    write_two_shards(tmp_path)
    TensorIndex.open(tmp_path)
    make, message = BROKEN[damage]
    make(tmp_path)
    with pytest.raises(FourfoldError, match=f"(?i){message}") as raised:
        TensorIndex.open(tmp_path)
    assert str(tmp_path) in str(raised.value)


def test_missing_folder_and_tensor(tmp_path: Path) -> None:
    with pytest.raises(FourfoldError, match="no such folder"):
        TensorIndex.open(tmp_path / "nowhere")
    write_two_shards(tmp_path)
    with pytest.raises(FourfoldError, match=r"no tensor 'c\.weight'"):
        TensorIndex.open(tmp_path).read("c.weight")


# Reading


def open_files() -> int:
    return len(os.listdir("/proc/self/fd"))


def test_read_into_a_slice_of_a_stack_and_hash(tmp_path: Path) -> None:
    wanted = write_two_shards(tmp_path)
    index = TensorIndex.open(tmp_path)
    stack = torch.zeros(3, 8)
    sha = hashlib.sha256()
    returned = index.read("b.weight", out=stack[1], sha=sha)
    assert returned.data_ptr() == stack[1].data_ptr()
    assert torch.equal(stack[1].view(4, 2), wanted["b.weight"])
    assert not stack[0].any() and not stack[2].any()
    assert sha.digest() == of_blocks(wanted["b.weight"])


def of_blocks(*parts: Tensor, size: int = 2**24) -> bytes:
    """sha256 of the sha256 of each block."""
    contents = [bytes(raw_bytes(part)) for part in parts]
    blocks = [content[first : first + size] for content in contents for first in range(0, len(content), size)]
    return hashlib.sha256(b"".join(hashlib.sha256(block).digest() for block in blocks)).digest()


@pytest.mark.parametrize("size", [4, 12, 1000])
def test_blocks_of_a_tensor_are_read_side_by_side(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    wanted = write_two_shards(tmp_path)
    monkeypatch.setattr(tensors, "BLOCK_BYTES", size)
    sha = hashlib.sha256()
    assert same_bytes(TensorIndex.open(tmp_path).read("b.weight", sha=sha), wanted["b.weight"])
    assert sha.digest() == of_blocks(wanted["b.weight"], size=size)


@pytest.mark.parametrize(
    "out",
    [torch.zeros(8).bfloat16(), torch.zeros(9), torch.zeros(2, 4).T, torch.zeros(8, device="meta")],
    ids=["dtype", "size", "strides", "device"],
)
def test_place_that_does_not_fit_is_refused(tmp_path: Path, out: Tensor) -> None:
    write_two_shards(tmp_path)
    with pytest.raises(FourfoldError, match=r"'b.weight' is F32 \[4, 2\]; wanted for a place of"):
        TensorIndex.open(tmp_path).read("b.weight", out=out)


def test_pread_that_gives_little_is_asked_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = write_two_shards(tmp_path)
    index = TensorIndex.open(tmp_path)
    whole = os.preadv
    monkeypatch.setattr(os, "preadv", lambda file, parts, start: whole(file, [parts[0][:7]], start))
    assert same_bytes(index.read("b.weight"), wanted["b.weight"])


@pytest.mark.parametrize("lost_bytes", [1, 32, 1000])
def test_file_truncated_after_opening(tmp_path: Path, lost_bytes: int) -> None:
    write_two_shards(tmp_path)
    index = TensorIndex.open(tmp_path)
    header = index.headers["b.weight"]
    os.truncate(tmp_path / SHARDS[1], max(0, header.end_byte - lost_bytes))
    before = open_files()
    for read in (lambda: index.read("b.weight"), lambda: list(index.chunks("b.weight", 8))):
        with pytest.raises(FourfoldError, match=f"{SHARDS[1]}: tensor 'b.weight' could not.*truncated"):
            read()
    assert open_files() == before


def test_lost_disk_and_deleted_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_two_shards(tmp_path)
    index = TensorIndex.open(tmp_path)

    def fail(*_: object) -> int:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with monkeypatch.context() as patch:
        patch.setattr(os, "preadv", fail)
        with pytest.raises(FourfoldError, match=r"'a\.weight' could not be read: Input/output error"):
            index.read("a.weight")
    (tmp_path / SHARDS[0]).unlink()
    with pytest.raises(FourfoldError, match=r"'a\.weight' could not be read: No such file"):
        index.read("a.weight")


def test_chunks_are_the_bytes_in_order(tmp_path: Path) -> None:
    wanted = write_two_shards(tmp_path)
    index = TensorIndex.open(tmp_path)
    for size in (1, 7, 8, 32, 33, 2**24):
        chunks = [bytes(chunk) for chunk in index.chunks("b.weight", size)]
        assert b"".join(chunks) == bytes(raw_bytes(wanted["b.weight"]))
        assert all(len(chunk) == size for chunk in chunks[:-1])
    assert list(index.chunks("b.none")) == []


def test_chunks_left_half_way_close_their_file(tmp_path: Path) -> None:
    write_two_shards(tmp_path)
    before = open_files()
    chunks = TensorIndex.open(tmp_path).chunks("b.weight", 4)
    next(chunks)
    assert open_files() == before + 1
    del chunks
    assert open_files() == before


def test_threads_share_an_index(tmp_path: Path) -> None:
    wanted = {f"t{number}": torch.full((50_000,), float(number)) for number in range(16)}
    save_file(wanted, tmp_path / "model.safetensors")
    index = TensorIndex.open(tmp_path)
    names = list(wanted) * 4
    with ThreadPoolExecutor(8) as pool:
        for name, tensor in zip(names, pool.map(index.read, names), strict=True):
            assert same_bytes(tensor, wanted[name])


# Finite values


@pytest.mark.parametrize(
    "dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64, torch.float8_e5m2], ids=str
)
def test_one_bad_value_anywhere_is_found_and_counted(dtype: torch.dtype) -> None:
    for place in (0, 1, 17, 63, 64, 98):
        for bad, counts in (
            (float("nan"), "1 NaN and 0 infinite"),
            (float("inf"), "0 NaN and 1 infinite"),
            (float("-inf"), "0 NaN and 1 infinite"),
        ):
            values = torch.ones(99)
            require_finite(values.to(dtype), "x.weight")
            values[place] = bad
            with pytest.raises(FourfoldError, match=f"'x.weight': {counts} values among 99"):
                require_finite(values.to(dtype), "x.weight")


def test_finite_extremes_integers_and_nothing_pass() -> None:
    for dtype in (torch.bfloat16, torch.float16, torch.float32, torch.float64, torch.float8_e4m3fn):
        limits = torch.finfo(dtype)
        require_finite(torch.tensor([limits.min, limits.max], dtype=torch.float64).to(dtype), "x")
    require_finite(torch.tensor([-(2**63), 2**63 - 1]), "x")
    require_finite(torch.empty(0), "x")


def test_counts_go_over_slabs_and_strides() -> None:
    values = torch.zeros(3, 2**20)
    values[:, -1] = float("nan")
    values[0, 0] = float("inf")
    for tensor in (values, values.T):
        with pytest.raises(FourfoldError, match="3 NaN and 1 infinite values among 3,145,728"):
            require_finite(tensor, "x")
