"""Whole runs on several workers: the answer of one, whoever ends on the way; ranks under torchrun."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

import releases
from fourfold.core import widening
from fourfold.datatypes import Event, FourfoldError
from fourfold.distributed.devices import Machine
from fourfold.quantize import solve
from fourfold.recipe import Recipe

MakeRecipe = Callable[..., Recipe]
MEMORY = releases.MEMORY_BYTES
CPU = widening.named("cpu")  # as records have it


@pytest.fixture(scope="module")
def on_two(source: Path, small: MakeRecipe, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A release made by two workers."""
    out = tmp_path_factory.mktemp("two") / "out"
    releases.run(source, out, small(), machine=Machine(devices="cpu*2", memory_bytes=MEMORY))
    return out


def equal_codes(first: Path, second: Path) -> dict[int, float]:
    """By layer, the share of codes that two releases have in common. compared nibble by nibble."""
    equal, total = {0: 0, 1: 0}, {0: 0, 1: 0}
    other = releases.tensors(second)
    for name, value in releases.tensors(first).items():
        if name.endswith("weight_packed"):
            layer = int(name.partition("layers.")[2].partition(".")[0])
            one, two = value.view(torch.uint8), other[name].view(torch.uint8)
            same = ((one & 15) == (two & 15)).sum() + ((one >> 4) == (two >> 4)).sum()
            equal[layer], total[layer] = equal[layer] + int(same), total[layer] + 2 * one.numel()
    return {layer: equal[layer] / total[layer] for layer in equal}


def agree(one: Path, many: Path) -> None:
    """Structure is equal, layer 0's codes all but equal, held-out figures close."""
    first, second = releases.tensors(one), releases.tensors(many)
    assert {name: (value.shape, value.dtype) for name, value in first.items()} == {
        name: (value.shape, value.dtype) for name, value in second.items()
    }
    kept = [name for name in first if ".mlp.experts." not in name]
    assert kept and all(torch.equal(first[name], second[name]) for name in kept)
    shares = equal_codes(one, many)
    assert shares[0] >= 0.999 and shares[1] >= 0.9
    before, after = (releases.read_json(out / "fourfold.json")["metrics"] for out in (one, many))
    assert after["perplexity_source"] == pytest.approx(before["perplexity_source"], rel=1e-3)
    # Of some hundred predictions of a model with random weights: a few codes of layer 1 move it.
    assert after["perplexity_release"] == pytest.approx(before["perplexity_release"], rel=4e-3)
    assert after["kl_median"] == pytest.approx(before["kl_median"], rel=0.04)
    assert after["kl_mean"] == pytest.approx(before["kl_mean"], rel=0.1)


# ---- the same answer


def test_two_workers_agree_with_one(release: Path, on_two: Path) -> None:
    agree(release, on_two)
    state = releases.read_json(on_two / "fourfold.json")
    assert state["settings"]["devices"] == [CPU, CPU] and len(state["workers"]) == 2
    assert all(0 <= worker["waited_seconds"] < worker["of_seconds"] for worker in state["workers"])


@pytest.mark.parametrize("workers", [3, pytest.param(4, marks=pytest.mark.slow)])
def test_more_workers_than_rows_share_evenly(
    source: Path, release: Path, small: MakeRecipe, tmp_path: Path, workers: int
) -> None:
    """Eight calibration rows and two held-out rows: some have none of the latter."""
    machine = Machine(devices=f"cpu*{workers}", memory_bytes=MEMORY)
    releases.run(source, tmp_path / "out", small(), machine=machine)
    agree(release, tmp_path / "out")


def test_more_workers_than_experts(small: MakeRecipe, tmp_path: Path) -> None:
    """One of four has none of the three, and rows all the same."""
    model = releases.make_source(tmp_path / "model", experts=3)
    for devices in ("cpu", "cpu*4"):
        releases.run(model, tmp_path / devices, small(), machine=Machine(devices=devices, memory_bytes=MEMORY))
    agree(tmp_path / "cpu", tmp_path / "cpu*4")


def test_the_same_devices_give_the_same_bytes(source: Path, on_two: Path, small: MakeRecipe, tmp_path: Path) -> None:
    """Also of a run that was stopped at its end, its first layer damaged since."""
    machine = Machine(devices="cpu*2", memory_bytes=MEMORY)
    with pytest.raises(KeyboardInterrupt):
        releases.run(source, tmp_path / "out", small(), machine=machine, progress=releases.stop_at("finish"))
    releases.damage(tmp_path / "out/model-00001-of-00003.safetensors")
    releases.run(source, tmp_path / "out", small(), machine=machine)
    found, wanted = releases.tree(tmp_path / "out"), releases.tree(on_two)
    assert found.keys() == wanted.keys()
    assert [name for name in wanted if found[name] != wanted[name]] == []


def test_hidden_states_in_files_give_the_same_codes(
    source: Path, on_two: Path, small: MakeRecipe, tmp_path: Path
) -> None:
    machine = Machine(devices="cpu*2", memory_bytes=MEMORY, host_bytes=1)
    releases.run(source, tmp_path / "out", small(), machine=machine)
    assert releases.read_json(tmp_path / "out/fourfold.json")["settings"]["batches"]["inputs"] == "file"
    assert equal_codes(on_two, tmp_path / "out") == {0: 1.0, 1: 1.0}
    assert {path.name for path in (tmp_path / "out/.fourfold").iterdir()} == {"lock", "run.log"}


def test_a_trace_holds_every_workers_stages(source: Path, small: MakeRecipe, tmp_path: Path) -> None:
    machine = Machine(devices="cpu*2", memory_bytes=MEMORY)
    trace = tmp_path / "trace.json"
    releases.run(source, tmp_path / "out", small(), machine=machine, layers=range(1), trace=trace)
    events = json.loads(trace.read_text())["traceEvents"]
    lanes = {event["tid"]: event["args"]["name"] for event in events if event["ph"] == "M"}
    assert lanes == {-2: "writer", -1: "reader", 0: "worker 0", 1: "worker 1"}
    for lane in (0, 1):
        names = {event["name"] for event in events if event["ph"] == "X" and event["tid"] == lane}
        assert names >= {"embed", "read", "attend", "moments", "solve", "advance", "wait"}
    names = {event["name"] for event in events if event["ph"] == "X" and event["tid"] == 0}
    assert names >= {"wait for reader", "wait for writer"}  # only the first of a process does
    for lane in (0, 1):  # whole microseconds
        own = sorted((event["ts"], event["dur"]) for event in events if event["ph"] == "X" and event["tid"] == lane)
        assert all(first + duration <= second + 2 for (first, duration), (second, _) in pairwise(own))


# ---- faults


def fail_in(layer: int, rank: int, error: BaseException, monkeypatch: pytest.MonkeyPatch) -> None:
    """One worker fails when it begins to solve a layer."""
    original = solve._solve_chunk

    def failing(job: Any, places: range) -> Any:
        if (job.layer.index, job.clock.worker.rank) == (layer, rank):
            raise error
        return original(job, places)

    monkeypatch.setattr(solve, "_solve_chunk", failing)


def test_a_worker_that_fails_leaves_sound_records(
    source: Path, release: Path, small: MakeRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Then the same command goes on, with another device list: layer 0 is what it was, and the notes say it."""
    out, machine = tmp_path / "out", Machine(devices="cpu*2", memory_bytes=MEMORY)
    with monkeypatch.context() as patched:
        fail_in(1, 1, FourfoldError("the device is gone"), patched)
        with pytest.raises(FourfoldError, match=r"worker 1 on cpu, solve of layer 1: the device is gone"):
            releases.run(source, out, small(), machine=machine)
    written = (out / "model-00001-of-00003.safetensors").read_bytes()
    notes: list[str] = []

    def listen(event: Event) -> None:
        notes.extend([event.text] if event.kind == "note" else [])

    releases.run(source, out, small(), machine=Machine(memory_bytes=MEMORY), progress=listen)
    assert (out / "model-00001-of-00003.safetensors").read_bytes() == written
    assert any(note.startswith(f"started on {CPU}, {CPU}, resumed on {CPU}: ") for note in notes)
    state = releases.read_json(out / "fourfold.json")
    assert (state["settings"]["devices"], len(state["workers"])) == ([CPU, CPU], 1)
    agree(release, out)


def test_too_little_memory_halves_the_chunk(
    source: Path, release: Path, small: MakeRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original, notes = solve._solve_chunk, list[str]()

    def scarce(job: Any, places: range) -> Any:
        if len(places) > 1:
            raise torch.OutOfMemoryError
        return original(job, places)

    def listen(event: Event) -> None:
        notes.extend([event.text] if event.kind == "note" else [])

    monkeypatch.setattr(solve, "_solve_chunk", scarce)
    releases.run(source, tmp_path / "out", small(), machine=Machine(memory_bytes=MEMORY), progress=listen)
    assert "layer 0: out of memory; chunks of 1 experts from now on, the same codes" in notes
    assert releases.read_json(tmp_path / "out/fourfold.json")["settings"]["batches"]["experts"] == 1
    assert equal_codes(release, tmp_path / "out") == {0: 1.0, 1: 1.0}


def test_one_expert_too_many_is_said(
    source: Path, small: MakeRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fail_in(0, 0, torch.OutOfMemoryError(), monkeypatch)
    with pytest.raises(FourfoldError, match="layer 0: one expert's moments and solve are too much"):
        releases.run(source, tmp_path / "out", small())


# ---- ranks


def torchrun(*arguments: object) -> subprocess.CompletedProcess[str]:
    """Two ranks on this host."""
    script = Path(__file__).parent / "ranks_run.py"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", script]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    return subprocess.run(
        [str(part) for part in (*command, *arguments)], env=environment, capture_output=True, text=True, timeout=300
    )


@pytest.mark.slow
def test_ranks_do_what_workers_do(source: Path, on_two: Path, small_file: Path, tmp_path: Path) -> None:
    done = torchrun(source, small_file, tmp_path / "out")
    assert done.returncode == 0, done.stderr
    assert min(equal_codes(on_two, tmp_path / "out").values()) >= 0.999
    state = releases.read_json(tmp_path / "out/fourfold.json")
    assert state["settings"]["devices"] == [CPU, CPU] and len(state["workers"]) == 2


@pytest.mark.slow
def test_a_rank_that_hangs_says_so_and_takes_the_others_down(source: Path, small_file: Path, tmp_path: Path) -> None:
    start = time.monotonic()
    done = torchrun(source, small_file, tmp_path / "out", 1, "hang")
    assert done.returncode != 0 and time.monotonic() - start < 120
    assert "worker 1 on cpu hangs: no sign of life for 10 s in solve of layer 1" in done.stderr
    assert "worker 0 on cpu hangs" not in done.stderr
    assert not (tmp_path / "out/fourfold.json").exists()


@pytest.mark.slow
def test_a_rank_that_is_killed_takes_the_others_down(
    source: Path, release: Path, small_file: Path, tmp_path: Path
) -> None:
    """Then the same command goes on, and quantizes a layer again that was damaged since."""
    start = time.monotonic()
    done = torchrun(source, small_file, tmp_path / "out", 1)
    assert done.returncode != 0 and time.monotonic() - start < 120
    assert "SIGKILL" in done.stderr or "Signal 9" in done.stderr
    assert not (tmp_path / "out/fourfold.json").exists()
    releases.damage(tmp_path / "out/model-00001-of-00003.safetensors")
    assert torchrun(source, small_file, tmp_path / "out").returncode == 0
    agree(release, tmp_path / "out")
