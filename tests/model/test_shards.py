"""The writer against safetensors' own, and what is on disk when it is killed or out of space."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import signal
import stat
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from fourfold.datatypes import FourfoldError
from fourfold.model.files import copy_file, write_bytes, write_text
from fourfold.model.shards import OutputTensor, write_shard
from fourfold.model.tensors import DTYPES, TensorIndex, raw_bytes


def random_tensor(dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
    bits = torch.randint(0, 2, (*shape, dtype.itemsize), dtype=torch.uint8)
    return bits.view(dtype).squeeze(-1) if dtype != torch.bool else bits.squeeze(-1).bool()


def outputs(tensors: dict[str, Tensor]) -> list[OutputTensor]:
    return [OutputTensor.of(name, tensor) for name, tensor in tensors.items()]


# The same bytes as safetensors writes


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    tensors=st.dictionaries(
        st.text(st.characters(exclude_categories=["Cs"]), max_size=6).filter(lambda name: name != "__metadata__"),
        st.tuples(st.sampled_from(list(DTYPES)), st.lists(st.integers(0, 4), max_size=3)),
        max_size=8,
    )
)
def test_file_is_what_safetensors_writes(tmp_path: Path, tensors: dict[str, tuple[str, list[int]]]) -> None:
    values = {name: random_tensor(DTYPES[dtype], tuple(shape)) for name, (dtype, shape) in tensors.items()}
    save_file(values, tmp_path / "theirs", metadata={"format": "pt"})
    written = write_shard(tmp_path, "ours", outputs(values))
    content = (tmp_path / "ours").read_bytes()
    assert content == (tmp_path / "theirs").read_bytes()
    assert written.sha256 == hashlib.sha256(content).hexdigest()
    assert (written.name, written.size_bytes) == ("ours", len(content))
    assert written.tensor_bytes == sum(tensor.nbytes for tensor in values.values())
    assert written.keys == tuple(json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")]))[1:]


def test_every_dtype_comes_back_through_both_readers(tmp_path: Path) -> None:
    values = {f"x.{name}": random_tensor(dtype, (3, 2)) for name, dtype in DTYPES.items()}
    write_shard(tmp_path, "model.safetensors", outputs(values))
    index = TensorIndex.open(tmp_path)
    with safe_open(tmp_path / "model.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "pt"}
        for name, tensor in values.items():
            assert raw_bytes(file.get_tensor(name)) == raw_bytes(index.read(name)) == raw_bytes(tensor)


def test_slices_transposes_and_parameters_are_written_by_value(tmp_path: Path) -> None:
    stack = torch.nn.Parameter(torch.arange(24.0).view(2, 3, 4))
    values = {"slice": stack[1], "transposed": stack[0].T, "whole": stack, "scalar": stack[0, 0, 1]}
    write_shard(tmp_path, "x.safetensors", outputs(values))
    for name, tensor in load_file(tmp_path / "x.safetensors").items():
        assert torch.equal(tensor, values[name].detach())


def test_tensor_longer_than_a_chunk(tmp_path: Path) -> None:
    value = torch.arange(2**22 + 3, dtype=torch.int32)  # 16 MiB and 12 bytes
    written = write_shard(tmp_path, "x.safetensors", outputs({"x": value}))
    assert torch.equal(load_file(tmp_path / "x.safetensors")["x"], value)
    assert written.sha256 == hashlib.sha256((tmp_path / "x.safetensors").read_bytes()).hexdigest()


def test_tensors_stream_from_another_checkpoint(tmp_path: Path) -> None:
    source, out = tmp_path / "source", tmp_path / "out"
    source.mkdir()
    out.mkdir()
    values = {"a": torch.randn(5, 3).bfloat16(), "b": torch.randn(7), "c": torch.empty(0, 2)}
    save_file(values, source / "model.safetensors")
    index = TensorIndex.open(source)
    write_shard(
        out,
        "x.safetensors",
        [
            OutputTensor.copied(index.header("a"), partial(index.chunks, "a"), "new.a"),
            OutputTensor.copied(index.header("b"), partial(index.chunks, "b")),
            OutputTensor.copied(index.header("c"), partial(index.chunks, "c")),
        ],
    )
    copied = load_file(out / "x.safetensors")
    assert raw_bytes(copied["new.a"]) == raw_bytes(values["a"])
    assert torch.equal(copied["b"], values["b"]) and copied["c"].shape == (0, 2)


def test_write_that_takes_little_is_asked_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    values = {"a": torch.randn(5, 3), "b": torch.randn(7)}
    save_file(values, tmp_path / "theirs", metadata={"format": "pt"})
    whole = os.write
    monkeypatch.setattr(os, "write", lambda descriptor, content: whole(descriptor, content[:5]))
    write_shard(tmp_path, "ours", outputs(values))
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()


@pytest.mark.parametrize(
    "wrong",
    [
        OutputTensor(name="x", dtype="F32", shape=(2, 1), data=torch.zeros(2)),
        OutputTensor(name="x", dtype="I32", shape=(2,), data=torch.zeros(2)),
        OutputTensor(name="x", dtype="U8", shape=(3,), data=lambda: [b"12"]),
        OutputTensor(name="x", dtype="U8", shape=(3,), data=lambda: [b"12", b"34"]),
    ],
    ids=["shape", "dtype", "too few bytes", "too many bytes"],
)
def test_values_that_are_not_what_was_stated_leave_nothing(tmp_path: Path, wrong: OutputTensor) -> None:
    with pytest.raises(AssertionError, match="x"):
        write_shard(tmp_path, "x.safetensors", [wrong])
    assert not list(tmp_path.iterdir())


def test_same_name_twice_is_refused(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="x is to be written twice"):
        write_shard(tmp_path, "x.safetensors", outputs({"x": torch.zeros(2)}) * 2)


# Durable files


def test_order_is_write_sync_rename_sync_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[str] = []
    sync, replace = os.fsync, Path.replace

    def record_sync(descriptor: int) -> None:
        path = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
        events.append(f"sync {path.name} of {path.stat().st_size}" if path.is_file() else "sync folder")
        sync(descriptor)

    def record_replace(path: Path, target: Path) -> Path:
        events.append(f"rename {path.name} {target.name}")
        return replace(path, target)

    monkeypatch.setattr(os, "fsync", record_sync)
    monkeypatch.setattr(Path, "replace", record_replace)
    write_bytes(tmp_path / "x.json", b"content")
    assert events == ["sync .x.json.tmp of 7", "rename .x.json.tmp x.json", "sync folder"]
    assert [path.name for path in tmp_path.iterdir()] == ["x.json"]


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002])
def test_mode_follows_the_umask(tmp_path: Path, umask: int) -> None:
    (tmp_path / ".x.safetensors.tmp").touch(mode=0o600)  # left by a killed run
    old = os.umask(umask)
    try:
        write_shard(tmp_path, "x.safetensors", [])
        write_text(tmp_path / "x.json", "{}")
    finally:
        os.umask(old)
    for name in ("x.safetensors", "x.json"):
        assert stat.S_IMODE((tmp_path / name).stat().st_mode) == 0o666 & ~umask


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_full_disk_says_how_much_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    whole = os.write

    def fill(descriptor: int, content: memoryview) -> int:
        if os.fstat(descriptor).st_size > 1000:
            raise OSError(code, os.strerror(code))
        return whole(descriptor, content[:500])

    (tmp_path / "x.safetensors").write_text("what was there before")
    monkeypatch.setattr(os, "write", fill)
    with pytest.raises(
        FourfoldError,
        match=r"x\.safetensors: the disk is full .* 4,104 bytes are wanted, "
        r"[\d,]+ are free.*same command.*goes on",
    ):
        write_shard(tmp_path, "x.safetensors", outputs({"x": torch.zeros(1000)}))
    assert [path.name for path in tmp_path.iterdir()] == ["x.safetensors"]
    assert (tmp_path / "x.safetensors").read_text() == "what was there before"


@pytest.mark.parametrize("call", ["fsync", "open"])
def test_failing_disk_is_a_clear_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    def fail(*_: object) -> int:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, call, fail)
    with pytest.raises(FourfoldError, match=r"x\.json: could not be written \(2 bytes\): Input/output error"):
        write_text(tmp_path / "x.json", "{}")
    monkeypatch.undo()
    assert not list(tmp_path.iterdir())


def run_writer(folder: Path, body: str) -> subprocess.Popen[str]:
    """A process that writes x.safetensors, 4 tensors of 4 MiB, to `folder`; `body` runs before the third."""
    script = f"""
import sys, resource, torch
from pathlib import Path
from fourfold.datatypes import FourfoldError
from fourfold.model.shards import OutputTensor, write_shard
def data(number):
    if number == 2:
        {body}
    yield bytes(2**22)
try:
    write_shard(Path(sys.argv[1]), "x.safetensors", [
        OutputTensor(name=f"t{{n}}", dtype="U8", shape=(2**22,), data=lambda n=n: data(n)) for n in range(4)])
except FourfoldError as error:
    print(error)
"""
    return subprocess.Popen(
        [sys.executable, "-c", script, str(folder)],
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
    )


def test_killed_run_leaves_no_shard_and_the_next_one_writes_it(tmp_path: Path) -> None:
    killed = run_writer(tmp_path, "print('half', flush=True); import time; time.sleep(60)")
    assert killed.stdout is not None and killed.stdout.readline() == "half\n"
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    assert [path.name for path in tmp_path.iterdir()] == [".x.safetensors.tmp"]
    assert run_writer(tmp_path, "pass").wait() == 0
    assert [path.name for path in tmp_path.iterdir()] == ["x.safetensors"]
    assert load_file(tmp_path / "x.safetensors")["t3"].shape == (2**22,)


def test_real_limit_on_the_file_leaves_nothing(tmp_path: Path) -> None:
    limited = run_writer(tmp_path, f"resource.setrlimit(resource.RLIMIT_FSIZE, ({9 * 2**20}, {9 * 2**20}))")
    said, _ = limited.communicate()
    assert "x.safetensors: could not be written (16,777," in said and "File too large" in said
    assert not list(tmp_path.iterdir())


def test_failing_source_leaves_nothing(tmp_path: Path) -> None:
    source, out = tmp_path / "source", tmp_path / "out"
    source.mkdir()
    out.mkdir()
    save_file({"a": torch.zeros(1000)}, source / "model.safetensors")
    index = TensorIndex.open(source)
    os.truncate(source / "model.safetensors", 500)
    with pytest.raises(FourfoldError, match=r"source/model\.safetensors: tensor 'a' could not be read"):
        write_shard(out, "x.safetensors", [OutputTensor.copied(index.header("a"), partial(index.chunks, "a"))])
    assert not list(out.iterdir())


def test_interrupted_source_leaves_nothing(tmp_path: Path) -> None:
    def interrupted() -> Iterator[bytes]:
        yield b"1"
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_shard(tmp_path, "x", [OutputTensor(name="x", dtype="U8", shape=(2,), data=interrupted)])
    assert not list(tmp_path.iterdir())


# Sidecars


def test_copy_is_byte_identical_and_follows_links(tmp_path: Path) -> None:
    content = bytes(range(256)) * 70_000  # more than one chunk
    (tmp_path / "blob").write_bytes(content)
    (tmp_path / "tokenizer.json").symlink_to("blob")
    copy_file(tmp_path / "tokenizer.json", tmp_path / "copy.json")
    assert (tmp_path / "copy.json").read_bytes() == content
    assert not (tmp_path / "copy.json").is_symlink()
    with pytest.raises(FourfoldError, match=r"merges\.txt: cannot be read: No such file"):
        copy_file(tmp_path / "merges.txt", tmp_path / "copy.txt")


def test_text_is_utf8(tmp_path: Path) -> None:
    write_text(tmp_path / "LICENSE", "© 折")
    assert (tmp_path / "LICENSE").read_bytes() == "© 折".encode()
