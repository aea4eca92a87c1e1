"""A run from end to end: what it records, chunks, trials, Ctrl-C, and going on with other means than it began with."""

from __future__ import annotations

import dataclasses
import hashlib
import shutil
import subprocess
import sys
import threading
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForImageTextToText, AutoTokenizer

import checkpoints
import reference
import releases
import whole
from fourfold.datatypes import Event, FourfoldError
from fourfold.distributed.devices import Machine
from fourfold.distributed.workers import Worker
from fourfold.model.layer import DecoderLayer
from fourfold.quantize import calibrate
from fourfold.quantize import plan as plan_module
from fourfold.quantize import run as run_module
from fourfold.quantize.memory import MemoryPlan
from fourfold.quantize.observe import Observed
from fourfold.quantize.run import quantize
from fourfold.recipe import Recipe, load_recipe

MakeRecipe = Callable[..., Recipe]
LAYER_SHARDS = [f"model-{number:05d}-of-00003.safetensors" for number in (1, 2)]
REST_SHARD = "model-00003-of-00003.safetensors"


def interrupt(source: Path, out: Path, recipe: Recipe, stage: str, layer: int, **options: Any) -> None:
    with pytest.raises(KeyboardInterrupt):
        releases.run(source, out, recipe, progress=releases.stop_at(stage, layer), **options)
    assert not (out / "fourfold.json").exists()


# --- what a run records ---------------------------------------------------------------------------


def test_state_of_a_finished_run_is_true(source: Path, release: Path, small: MakeRecipe) -> None:
    state = releases.read_json(release / "fourfold.json")
    shards = {path.name: path.read_bytes() for path in release.glob("*.safetensors")}
    assert state["output"]["shards"] == {
        name: {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        for name, content in sorted(shards.items())
    }
    before, after = (sum(value.nbytes for value in releases.tensors(folder).values()) for folder in (source, release))
    assert (state["source_tensor_bytes"], state["output"]["tensor_bytes"]) == (before, after)
    assert (state["partial"], state["layers"], state["projections"]) == (False, "0-1", 2 * 4 * 3)
    assert state["identity"]["recipe"] == small("scheme.group_size=128").digest()
    assert state["metrics"] == releases.read_json(release / "metrics.json")["summary"]
    assert (state["calibration"]["rows"], state["calibration"]["length"]) == (8, 128)
    assert list(state["devices"]) == ["cpu"] and state["devices"]["cpu"]
    assert set(state["seconds"]) == {"calibrate", "embed", "read", "attend", "solve", "advance", "measure"}
    assert set(state["layer_seconds"]) == {"moments", "solve", "write"}
    assert not list((release / ".fourfold").glob("shards/*")), "the records are folded into fourfold.json"


def test_recipe_that_is_kept_gives_the_same_release(
    source: Path, release: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """OUT/recipe.toml is complete, and the run does not look at the folder it is started in."""
    monkeypatch.chdir(tmp_path)
    releases.run(source, tmp_path / "out", load_recipe(str(release / "recipe.toml")))
    assert releases.tree(tmp_path / "out") == releases.tree(release)


def test_progress_comes_to_its_totals(source: Path, small: MakeRecipe, tmp_path: Path) -> None:
    """Each stage that counts gets to 100 %; layers are finished in order; the last event is the summary."""
    events: list[Event] = []
    lock = threading.Lock()

    def tell(event: Event) -> None:
        with lock:
            events.append(event)

    summary = releases.run(source, tmp_path / "out", small("solver.passes=0"), progress=tell)
    ticks: dict[tuple[str, int], list[tuple[int, int]]] = defaultdict(list)
    for event in events:
        if event.total:
            ticks[event.stage, event.layer].append((event.done, event.total))
    assert {stage for stage, _ in ticks} == {"calibrate", "attend", "solve", "advance"}
    assert [event.layer for event in events if event.kind == "layer"] == [0, 1]
    assert events[-1].kind == "done" and events[-1].data == summary.to_json()
    assert all(event.layers == 2 for event in events if event.kind == "layer")
    assert {place: counts[-1] for place, counts in ticks.items() if counts[-1][0] != counts[-1][1]} == {}


# --- what tokens weigh ----------------------------------------------------------------------------


@pytest.mark.parametrize("power", [0.0, 0.5])
def test_tokens_weigh_by_the_sources_states_behind_the_layer(
    source: Path, small: MakeRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, power: float
) -> None:
    """Against a whole model on the calibration rows, whose states get longer from layer to layer."""
    importance: dict[int, list[Tensor]] = defaultdict(list)
    solve_layer = run_module.solve_layer

    def watched(worker: Worker, layer: DecoderLayer, observed: Observed, *rest: Any) -> Any:
        importance[layer.index].append(observed.importance_T)
        return solve_layer(worker, layer, observed, *rest)

    monkeypatch.setattr(run_module, "solve_layer", watched)
    recipe = small("solver.passes=0", 'solver.scale="absmax"', f"solver.norm_power={power}")
    releases.run(source, tmp_path / "out", recipe)
    token_RT = calibrate.collect(recipe, AutoTokenizer.from_pretrained(source)).token_RT
    seen = whole.see(AutoModelForImageTextToText.from_pretrained(source, dtype=torch.bfloat16), token_RT)
    assert sorted(importance) == [0, 1]
    for layer, found in importance.items():
        wanted = reference.token_importance(seen.hidden[layer].flatten(0, 1).double().numpy(), power)
        for found_T in found:  # of each worker, of all tokens
            torch.testing.assert_close(found_T.double(), torch.tensor(wanted, dtype=torch.float64), rtol=0.01, atol=0)
        assert (min(wanted) < 0.97 and max(wanted) > 1.03) == (power > 0)


# --- chunks and batches ---------------------------------------------------------------------------


@pytest.mark.parametrize("experts", [1, 3])
def test_chunks_of_experts_give_the_same_bytes(
    source: Path, release: Path, small: MakeRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, experts: int
) -> None:
    def chunked(*arguments: Any) -> MemoryPlan:
        return dataclasses.replace(plan_memory(*arguments), chunk_experts=experts)

    if releases.machine.devices != "cpu":
        pytest.skip("one device's chunks: `release` was made by several")
    plan_memory = plan_module.plan_memory
    monkeypatch.setattr(plan_module, "plan_memory", chunked)
    releases.run(source, tmp_path / "out", small())
    assert releases.read_json(tmp_path / "out/fourfold.json")["settings"]["batches"]["experts"] == experts
    assert releases.read_json(release / "fourfold.json")["settings"]["batches"]["experts"] == 4
    found, wanted = releases.tree(tmp_path / "out"), releases.tree(release)
    assert [name for name in wanted if found[name] != wanted[name]] == ["fourfold.json"]


def test_smallest_batches_give_the_same_release_but_for_rounding(
    source: Path, release: Path, small: MakeRecipe, tmp_path: Path
) -> None:
    """A budget that nothing fits: a row, an expert, 256 tokens at a time, hidden states in files. BF16
    products may then differ by a bit.
    """
    summary = releases.run(source, tmp_path / "out", small(), machine=Machine(memory_bytes=1))
    batches = releases.read_json(tmp_path / "out/fourfold.json")["settings"]["batches"]
    assert batches == {"rows": 1, "tokens": 256, "experts": 1, "inputs": "file"}
    wanted = releases.read_json(release / "metrics.json")["summary"]
    assert summary.metrics["perplexity_source"] == pytest.approx(wanted["perplexity_source"], rel=0.005)
    assert summary.metrics["kl_mean"] == pytest.approx(wanted["kl_mean"], rel=0.2)
    found, first = releases.tensors(tmp_path / "out"), releases.tensors(release)
    for _, _, _, name in releases.expert_names("model.language_model.", range(2), 4):
        codes, same = (releases.codes_and_scales(tensors, name)[0] for tensors in (found, first))
        assert (codes != same).double().mean() < 0.02, name


@pytest.fixture
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("one_thread")
@pytest.mark.slow
def test_going_on_keeps_the_sizes_of_the_first_start(source: Path, small: MakeRecipe, tmp_path: Path) -> None:
    """Batches and threads decide the order of sums, so a resumed run has those of its first start."""
    releases.run(source, tmp_path / "whole", small(), machine=Machine(memory_bytes=1))
    interrupt(source, tmp_path / "out", small(), "solve", 1, machine=Machine(memory_bytes=1))
    torch.set_num_threads(2)
    releases.run(source, tmp_path / "out", small())
    assert torch.get_num_threads() == 2, "the caller's again"
    assert releases.tree(tmp_path / "out") == releases.tree(tmp_path / "whole")
    assert releases.read_json(tmp_path / "out/fourfold.json")["settings"]["threads"] == 1


# --- trials ---------------------------------------------------------------------------------------


def test_a_trial_writes_its_layers_and_says_that_it_is_one(
    source: Path, release: Path, small: MakeRecipe, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    summary = releases.run(source, out, small(), layers=range(0, 1))
    assert summary.partial and summary.metrics == {} and summary.projections == 4 * 3
    layer = "model.language_model.layers.0."
    own = [value for name, value in releases.tensors(source).items() if name.startswith(layer)]
    assert summary.bytes_before == sum(value.nbytes for value in own), "of what was quantized, not of the whole model"
    assert [path.name for path in out.glob("*.safetensors")] == LAYER_SHARDS[:1]
    assert (out / LAYER_SHARDS[0]).read_bytes() == (release / LAYER_SHARDS[0]).read_bytes()
    state, figures = releases.read_json(out / "fourfold.json"), releases.read_json(out / "metrics.json")
    assert (state["partial"], state["layers"], state["metrics"]) == (True, "0-0", {})
    assert not (out / "reference.json").exists()
    assert figures["summary"] is None and [drift["layer"] for drift in figures["layers"]] == [0]
    index = releases.read_json(out / "model.safetensors.index.json")
    assert set(index["weight_map"].values()) == {LAYER_SHARDS[0]}
    before = releases.tree(out)
    with pytest.raises(FourfoldError, match="begun with another layers than this command gives"):
        releases.run(source, out, small())
    assert releases.run(source, out, small(), layers=range(0, 1)) == summary, "nothing left to do"
    assert releases.tree(out) == before
    releases.run(source, out, small(), restart=True)
    assert releases.tree(out) == releases.tree(release)


def test_a_trial_of_a_later_layer_goes_through_the_first_ones(source: Path, small: MakeRecipe, tmp_path: Path) -> None:
    summary = releases.run(source, tmp_path / "out", small(), layers=range(1, 2))
    assert summary.partial and summary.methods == {"gptq": 4 * 3}
    assert [path.name for path in (tmp_path / "out").glob("*.safetensors")] == LAYER_SHARDS[1:]
    first, second = releases.read_json(tmp_path / "out/metrics.json")["layers"]
    assert first == {"layer": 0, "hidden_error": 0.0, "router_agreement": 1.0}, "not quantized: both streams are one"
    assert second["hidden_error"] > 0 and second["router_agreement"] == 1


# --- Ctrl-C, and what may change before going on --------------------------------------------------


@pytest.mark.parametrize(
    ("stage", "layer"), [("embed", -1), ("solve", 1), ("record", 0), ("write", 1), ("advance", 1), ("finish", -1)]
)
def test_ctrl_c_leaves_an_out_to_go_on_with(
    source: Path, release: Path, small: MakeRecipe, tmp_path: Path, stage: str, layer: int
) -> None:
    """In the loop, on the writer's thread (write, record), and in the last step. No thread, no lock stays behind."""
    threads = set(threading.enumerate())
    interrupt(source, tmp_path / "out", small(), stage, layer)
    assert set(threading.enumerate()) <= threads
    releases.run(source, tmp_path / "out", small())
    assert releases.tree(tmp_path / "out") == releases.tree(release)


@pytest.mark.parametrize("name", ["lm_head.weight", "model.language_model.embed_tokens.weight", "mtp.fc.weight"])
def test_changed_tensors_outside_the_layers_are_refused(
    source: Path, small: MakeRecipe, tmp_path: Path, name: str
) -> None:
    """Same headers, other bytes, in a shard that is written already: going on would mix two models."""
    other = shutil.copytree(source, tmp_path / "other")
    interrupt(source, tmp_path / "out", small(), "solve", 1)
    assert (tmp_path / "out" / REST_SHARD).exists()

    def change(tensors: dict[str, Tensor]) -> None:
        tensors[name] = tensors[name] * 2

    checkpoints.edit(other, change)
    with pytest.raises(FourfoldError, match="the source holds not the bytes"):
        releases.run(other, tmp_path / "out", small())


@pytest.mark.slow
def test_peak_memory_is_not_that_of_the_process_that_started_it() -> None:
    """A kernel's ru_maxrss begins with it: a run started from a big process would be taken for a big one."""
    ballast = bytearray(10**9)
    ballast[::4096] = b"x" * len(ballast[::4096])
    script = "from fourfold.quantize.finish import peak_memory; print(peak_memory()['host'])"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    del ballast
    assert 10**8 < int(done.stdout) < 9 * 10**8


def test_memory_that_a_worker_frees_is_not_asked_of_the_system_again() -> None:
    """Tensors of 96 MB, one after the other on a thread of their own: glibc returns them to the system by itself."""
    script = """
import resource, threading, torch
from fourfold.quantize import heap, run
heap.keep_freed_memory()
def work():
    torch.ones(24 * 2**20)
    before = resource.getrusage(resource.RUSAGE_THREAD).ru_minflt
    for _ in range(8):
        torch.ones(24 * 2**20)
    print(resource.getrusage(resource.RUSAGE_THREAD).ru_minflt - before)
thread = threading.Thread(target=work)
thread.start()
thread.join()
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 2 * 24_576  # pages, of eight tensors


def test_quantize_needs_no_more_than_its_three_arguments(source: Path, small: MakeRecipe, tmp_path: Path) -> None:
    summary = quantize(source, tmp_path / "out", small("solver.passes=0"))
    assert summary.out == str(tmp_path / "out") and summary.peak_memory_bytes["host"] > 10**8
