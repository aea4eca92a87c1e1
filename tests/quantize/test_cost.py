"""The time of a run on many workers: what is divided and what is not; machines by their data sheets."""

from __future__ import annotations

import dataclasses
import json
from itertools import pairwise
from pathlib import Path

import pytest
import torch

import checkpoints
from fourfold.datatypes import FourfoldError
from fourfold.quantize.cost import TimeEstimate, estimate_time, exchange, patience_seconds
from fourfold.quantize.estimate import Workload
from fourfold.quantize.gauge import disk_rate, measure_rates
from fourfold.quantize.plan import Plan, make_plan
from fourfold.quantize.rates import MACHINES, RATES, find_machine
from fourfold.recipe import load_recipe

RECIPE = load_recipe("best")
GB = 10**9


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory) -> Plan:
    return make_plan(checkpoints.full_shape(tmp_path_factory.mktemp("full")), RECIPE)


def gpus(count: int) -> list[str]:
    return [f"cuda:{number}" for number in range(count)]


def seconds(found: TimeEstimate) -> dict[str, float]:
    return {step.name: step.seconds for step in found.steps}


# --- division ---------------------------------------------------------------------------------------


def test_work_is_divided_as_rows_windows_and_experts_are(full: Plan) -> None:
    """256 rows, 16 held-out windows, 256 experts over three GPUs: the busiest has 86, 6 and 86 of them."""
    one, three = (seconds(estimate_time(full.work, gpus(count))) for count in (1, 3))
    assert three["refinement"] == pytest.approx(one["refinement"] * 86 / 256)
    assert three["pools"] == pytest.approx(one["pools"] * 86 / 256)
    work, rates = full.work, RATES["cuda"]
    head = 4 * work.heldout_tokens * 248_320 * 2048 / rates.forward + 48 * work.heldout_tokens * 248_320 / rates.traffic
    no_head = dataclasses.replace(work, vocabulary=0)
    without = [seconds(estimate_time(no_head, gpus(count)))["held-out rows"] for count in (1, 3)]
    assert one["held-out rows"] - without[0] == pytest.approx(head)
    assert three["held-out rows"] - without[1] == pytest.approx(head * 6 / 16)


def test_of_a_pass_a_worker_has_a_share_and_no_more(full: Plan) -> None:
    """With as many workers as rows and experts."""
    one, many = (seconds(estimate_time(full.work, gpus(count)))["source stream"] for count in (1, 256))
    assert many == pytest.approx(one / 256)


def test_operations_are_the_same_however_many_share_them(full: Plan) -> None:
    one, four = (estimate_time(full.work, gpus(count)) for count in (1, 4))
    assert [(step.name, step.pflop) for step in one.steps] == [(step.name, step.pflop) for step in four.steps]


def test_workers_of_one_cpu_share_its_cores(full: Plan) -> None:
    """As quick as one worker with all cores, but for what they exchange."""
    one, four = (estimate_time(full.work, ["cpu"] * count) for count in (1, 4))
    assert one.exchange_seconds == 0 < four.exchange_seconds
    assert seconds(four)["refinement"] == pytest.approx(seconds(one)["refinement"])


def test_more_gpus_are_never_slower_at_arithmetic_on_one_host(full: Plan) -> None:
    found = [estimate_time(full.work, gpus(2**power)) for power in range(7)]
    for fewer, more in pairwise(found):
        assert more.compute_seconds - more.exchange_seconds < fewer.compute_seconds - fewer.exchange_seconds


def test_better_rates_are_never_slower(full: Plan) -> None:
    rates = RATES["cpu"]
    before = full.timed(rates).time.seconds
    for name in ("forward", "traffic", "moments", "gemm", "factor", "elementwise"):
        quicker = dataclasses.replace(rates, **{name: 2 * getattr(rates, name)})
        assert full.timed(quicker).time.seconds < before, name
    slow = dataclasses.replace(rates, disk=1e6)
    assert full.timed(slow).time.bound == "reading"
    assert full.timed(slow).time.seconds > full.work.read_bytes / 1e6


# --- exchange ---------------------------------------------------------------------------------------


@pytest.fixture
def small(full: Plan) -> Workload:
    """One routed layer, 1,000 tokens in one stream, no held-out rows, weights or output worth a byte."""
    return dataclasses.replace(
        full.work, hidden=100, topk=2, calibration_tokens=1000, heldout_tokens=0, asymmetric=False, layers=1,
        routed_layers=1, solved_layers=1, layer_bytes=0, expert_bytes=0, shard_bytes=0,
    )  # fmt: skip


def test_exchange_of_one_gpu_is_its_rows(small: Workload) -> None:
    """BF16 rows to it and back, the experts' inputs back and in once, outputs back: five times. Of held-out rows
    inputs stay there.
    """
    moved = exchange(small, 1, on_cpu=False)
    assert moved.link_bytes == moved.host_bytes == 5 * 200_000
    heldout = dataclasses.replace(small, heldout_tokens=500)
    assert exchange(heldout, 1, on_cpu=False).link_bytes == 5 * 200_000 + 3 * 200_000
    assert moved.wire_bytes == 0
    assert exchange(small, 1, on_cpu=True).host_bytes == 0


def test_exchange_of_four_gpus(small: Workload) -> None:
    """Rows are a quarter; the inputs of all tokens come in once; fp32 sums of all go out."""
    moved = exchange(small, 4, on_cpu=False)
    link = 3 * 50_000 + 200_000 + 400_000
    assert moved.link_bytes == link
    assert moved.host_bytes == 4 * (link + 100_000 * 5)
    chunks = exchange(small, 4, on_cpu=False, inputs="host")
    assert chunks.link_bytes == link + 2 / 4 * 200_000


def test_exchange_over_hosts(small: Workload) -> None:
    """Inputs and routing once along a ring; three quarters of the fp32 sums leave each of four hosts. Both go by way of
    the first worker's GPU. Gloo takes log2 rounds of broadcasts.
    """
    broadcast, sums = 200_000 + 1000 * 2 * 10, 400_000
    moved = exchange(small, 8, on_cpu=False, hosts=4)
    assert moved.wire_bytes == broadcast + 0.75 * sums
    lifted = broadcast + 2 * sums
    assert moved.link_bytes == exchange(small, 8, on_cpu=False).link_bytes + lifted
    assert moved.host_bytes == 2 * (3 * 25_000 + 200_000 + 400_000 + 50_000 * (2 + 3 + 1)) + lifted
    assert exchange(small, 8, on_cpu=True, hosts=4).wire_bytes == 2 * broadcast + 0.75 * sums
    assert exchange(small, 8, on_cpu=False, hosts=2).wire_bytes < moved.wire_bytes


# --- hanging ----------------------------------------------------------------------------------------


def test_patience_is_twice_a_planned_layer(full: Plan) -> None:
    """On four GPUs a layer takes seconds, on two cores minutes; a disk of 10 MB/s is waited for."""
    work = full.work
    assert patience_seconds(work, estimate_time(work, gpus(4))) < 60
    slow = estimate_time(work, ["cpu"])
    assert patience_seconds(work, slow) == 2 * slow.compute_seconds / 40 > 180
    found = patience_seconds(work, estimate_time(work, gpus(4), dataclasses.replace(RATES["cuda"], disk=10e6)))
    assert found > 4 * (work.write_bytes - 40 * work.shard_bytes) / 10e6 > 180


# --- machines ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", list(MACHINES))
def test_machines_by_data_sheet(full: Plan, name: str) -> None:
    sheet = find_machine(name)
    found = full.timed(sheet.rates()).time
    assert f"{sheet.gpu}, by data sheet, not measured" in found.basis
    assert sheet.rates().forward < sheet.bf16
    assert sheet.budget_bytes < sheet.memory_bytes


def test_a_machine_that_is_not_known() -> None:
    with pytest.raises(FourfoldError, match=r"got 'rtx3060', expected one of rtx3060x4, h200, a100x8"):
        find_machine("rtx3060")


def test_json_has_the_time_at_the_rates_given(full: Plan) -> None:
    plan = full.timed(MACHINES["h200"].rates())
    data = json.loads(json.dumps(plan.to_json()["time"]))
    assert data["seconds"] == plan.time.seconds != full.time.seconds
    assert data["bound"] in ("arithmetic", "exchange", "reading", "writing")
    assert data["steps"][-1]["name"] == "between workers and hosts"


# --- this machine -----------------------------------------------------------------------------------


def test_this_machine_is_measured(example_model: Path) -> None:
    threads = torch.get_num_threads()
    plan = make_plan(example_model, RECIPE)
    rates = measure_rates(plan)
    assert torch.get_num_threads() == threads
    for field in dataclasses.fields(rates):
        value = getattr(rates, field.name)
        if not isinstance(value, str):
            assert 1e6 < value < 1e16, field.name
    assert plan.timed(rates).time.basis.startswith(f"a prediction from {threads} x core, as measured here in ")
    assert "read past the page cache from model-00003-of-00003.safetensors" in rates.basis


def test_a_sparse_shard_says_nothing_of_the_disk(full: Plan) -> None:
    assert disk_rate(full) == (None, "assumed")
