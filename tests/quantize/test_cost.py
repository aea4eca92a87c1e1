"""The time of a run: operations against a table made by hand, division over workers, machines by their data sheets."""

from __future__ import annotations

import dataclasses
import json
from itertools import pairwise
from pathlib import Path

import pytest
import torch

import checkpoints
from fourfold.datatypes import FourfoldError
from fourfold.quantize.cost import estimate_time, moments_flop, solve_flop
from fourfold.quantize.estimate import Workload
from fourfold.quantize.footprint import attend_token_bytes
from fourfold.quantize.microbenchmark import measure_rates
from fourfold.quantize.plan import Plan, make_plan
from fourfold.quantize.rates import GPUS, RATES, Rates, find_machine
from fourfold.recipe import load_recipe

RECIPE = load_recipe("best")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoints.full_shape(tmp_path_factory.mktemp("full"))


@pytest.fixture(scope="module")
def full(folder: Path) -> Plan:
    return make_plan(folder, RECIPE)


def gpus(count: int) -> list[str]:
    return [f"cuda:{number}" for number in range(count)]


# --- operations: NUMERICS.md 11 ----------------------------------------------------------------------


def test_operations_are_those_of_the_table(full: Plan) -> None:
    """PFLOP of moments, pools and errors for the log; of factors, columns, refinement, target and gap."""
    pairs, log = 262_144 * 8, 40 * 256 * 2 * (1024 * 2048**2 + 2048 * 512**2) / 1e15
    assert moments_flop(full.work) / 1e15 == pytest.approx(0.75 + 0.088 + 0.124 + log, rel=0.02)
    gap = 40 * 4 * pairs * 512 * 2048 / 1e15
    assert solve_flop(full.work) / 1e15 == pytest.approx(0.030 + 0.049 + 0.20 + 0.019 + gap, rel=0.02)


def test_one_stream_has_neither_target_nor_gap(folder: Path, full: Plan) -> None:
    fast = make_plan(folder, load_recipe("fast"))
    per_expert = 3 * 2048 * 512**2 + 2 * 512**3
    more = 40 * (256 * per_expert + 4 * 262_144 * 8 * 512 * 2048)
    assert solve_flop(full.work) - solve_flop(fast.work) == pytest.approx(more)
    free = dataclasses.replace(RATES["cpu"], traffic=1e30)
    two, one = (plan.timed(free).time.forward_seconds for plan in (full, fast))
    flop = (two - one) * free.bf16 * torch.get_num_threads()
    again = 40 * 4 * 262_144 * 8 * 512 * 2048  # gate and up, for the moments of down
    assert flop / 1e15 == pytest.approx(1.35 + again / 1e15, rel=0.1)


def test_a_sweep_takes_a_quarter_of_a_pass_four_times(folder: Path, full: Plan) -> None:
    """65,536 tokens of 262,144; curvatures, moments of the rows, and what their feedback and metric take."""
    guided = make_plan(folder, load_recipe("guided"))
    pairs = 262_144 * 8 + 256 * 2048  # of the pool of down, whose 2,560 tokens are more
    rows = 40 * (pairs * (4 * 512 * 2048 + 2 * 1024**2) + 2 * 65_536 * 2048**2)
    assert moments_flop(guided.work) - moments_flop(full.work) == pytest.approx(rows)
    feedback = 5 * (1024**2 * 2048 + 2048**2 * 512)
    metric = 2 * 512 * 2048**2 + 2 * 512**2 * 2048 + 1024**3 / 3
    solve = 40 * (256 * (feedback + metric) + 2048**3 / 3)
    assert solve_flop(guided.work) - solve_flop(full.work) == pytest.approx(solve)
    down = make_plan(folder, load_recipe("guided", ["guidance.sites=down"]))
    assert moments_flop(down.work) - moments_flop(full.work) == pytest.approx(40 * 2 * 65_536 * 2048**2)
    assert full.time.forward_seconds < down.time.forward_seconds == guided.time.forward_seconds


def test_temporaries_take_time_beside_operations(folder: Path, full: Plan) -> None:
    """Bytes of attention, of the experts and of the held-out logits at the rate of traffic, on all cores."""
    free = dataclasses.replace(RATES["cpu"], traffic=1e30)
    found = (full.time.forward_seconds - full.timed(free).time.forward_seconds) * RATES["cpu"].traffic
    work = full.work
    # Rounded experts take half of the held-out samples: two and a half streams, and logits of the source once more.
    calibration, heldout, logits = 2 * 256 * 1024, 2.5 * work.heldout_tokens, 3 * work.heldout_tokens
    pair_bytes, again_bytes = (3 * 2048 + 4 * 512) * 2, (2048 + 4 * 512) * 2
    expected = 40 * (calibration + heldout) * (attend_token_bytes(full.source) + 8 * pair_bytes)
    expected += 40 * calibration * 8 * again_bytes + logits * 248_320 * 6 * 4
    assert found * torch.get_num_threads() == pytest.approx(expected)


# --- division ---------------------------------------------------------------------------------------


def test_work_is_divided_as_experts_and_samples_are(full: Plan) -> None:
    """256 samples and 256 experts over three GPUs: the busiest has 86 of them."""
    one, three, many = (estimate_time(full.work, gpus(count)) for count in (1, 3, 256))
    assert three.solve_seconds == pytest.approx(one.solve_seconds * 86 / 256)
    assert three.forward_seconds == pytest.approx(one.forward_seconds * 86 / 256)
    assert many.forward_seconds == pytest.approx(one.forward_seconds / 256)
    few = dataclasses.replace(full.work, calibration_tokens=4 * 1024)
    assert estimate_time(few, gpus(3)).solve_seconds == pytest.approx(estimate_time(few, gpus(1)).solve_seconds / 2)


def test_workers_of_one_cpu_share_its_cores(full: Plan) -> None:
    one, four = (estimate_time(full.work, ["cpu"] * count) for count in (1, 4))
    assert one.exchange_seconds == four.exchange_seconds == 0
    assert four.solve_seconds == pytest.approx(one.solve_seconds)


def test_more_gpus_are_never_slower_at_arithmetic(full: Plan) -> None:
    found = [estimate_time(full.work, gpus(2**power)) for power in range(7)]
    for fewer, more in pairwise(found):
        assert more.forward_seconds < fewer.forward_seconds and more.solve_seconds < fewer.solve_seconds


def test_better_rates_are_never_slower(full: Plan) -> None:
    rates = RATES["cpu"]
    before = full.timed(rates).time.seconds
    for name in ("bf16", "solve", "traffic"):
        better = dataclasses.replace(rates, **{name: 2 * getattr(rates, name)})
        assert full.timed(better).time.seconds < before, name
    slow = full.timed(dataclasses.replace(rates, disk=1e6)).time
    assert slow.bound == "reading" and slow.seconds > full.work.read_bytes / 1e6
    assert full.timed(rates).time.bound == "arithmetic"


# --- exchange ---------------------------------------------------------------------------------------


@pytest.fixture
def small(full: Plan) -> Workload:
    """One routed layer, 1,000 tokens in one stream, no held-out rows, weights or output worth a byte."""
    return dataclasses.replace(
        full.work, hidden=100, topk=2, calibration_tokens=1000, calibration_length=1, heldout_tokens=0, rtn_tokens=0,
        asymmetric=False, layers=1, routed_layers=1, solved_layers=1, layer_bytes=0, expert_bytes=0, shard_bytes=0,
    )  # fmt: skip


def exchanged(work: Workload, workers: int, inputs: str = "device", **rates: float) -> float:
    """Seconds at one byte a second over a link, or through the host's memory, the other without limit."""
    slow: Rates = dataclasses.replace(RATES["cuda"], **({"link": 1e30, "host": 1e30} | rates))
    return estimate_time(work, gpus(workers), slow, inputs=inputs).exchange_seconds


def test_exchange_of_one_gpu_is_its_rows(small: Workload) -> None:
    """BF16 rows to it and back, the experts' inputs back and in once, outputs back: five times."""
    assert exchanged(small, 1, link=1.0) == exchanged(small, 1, host=1.0) == 5 * 200_000


def test_exchange_of_four_gpus(small: Workload) -> None:
    """Rows are a quarter; the inputs of all tokens come in once; fp32 sums of all go out, and are added up."""
    link = 3 * 50_000 + 200_000 + 400_000
    assert exchanged(small, 4, link=1.0) == link
    assert exchanged(small, 4, host=1.0) == 4 * link + 5 * 400_000
    assert exchanged(small, 4, "host", link=1.0) == link + 2 / 4 * 200_000
    bound = estimate_time(small, gpus(4), dataclasses.replace(RATES["cuda"], link=1.0)).bound
    assert bound == "exchange"


# --- machines ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*GPUS, "4x3090"])
def test_machines_by_data_sheet(full: Plan, name: str) -> None:
    sheet = find_machine(name)
    found = full.timed(sheet.rates).time
    assert f"{sheet.rates.unit}, by data sheet, not measured" in found.basis
    assert sheet.devices == tuple(gpus(4 if "x30" in name else 1))


def test_shares_and_margins_of_a_data_sheet() -> None:
    sheet = find_machine("H200")
    assert (sheet.rates.bf16, sheet.rates.solve) == (pytest.approx(0.5 * 989e12), pytest.approx(0.4 * 67e12))
    assert (sheet.budget_bytes, sheet.host_budget_bytes) == (int(0.9 * 141e9), int(0.9 * 256 * 2**30))


@pytest.mark.parametrize(
    ("name", "hint"), [("rtx3091", r"Did you mean '3090'\?"), ("0x3090", "up to 16"), ("x", "as in 4x3090")]
)
def test_a_machine_that_is_not_known(name: str, hint: str) -> None:
    with pytest.raises(FourfoldError, match=rf"got '{name}', expected one of 3060, 3090, .*{hint}"):
        find_machine(name)


def test_names_of_machines_as_users_write_them() -> None:
    assert find_machine("RTX 3090") == find_machine("1x3090") == find_machine("rtx3090")
    half = find_machine("dgx-spark")
    assert half.budget_bytes == half.host_budget_bytes == int(0.9 * 64e9)  # one memory, of which each takes half


def test_json_has_the_time_at_the_rates_given(full: Plan) -> None:
    plan = full.timed(find_machine("H200").rates)
    data = json.loads(json.dumps(plan.to_json()["time"]))
    parts = ("forward_seconds", "solve_seconds", "exchange_seconds")
    assert data["seconds"] == data["start_seconds"] + max(sum(data[part] for part in parts), data["read_seconds"])
    assert data["seconds"] == plan.time.seconds != full.time.seconds
    assert data["bound"] == plan.time.bound == "reading"


# --- this machine -----------------------------------------------------------------------------------


def test_this_machine_is_measured(full: Plan) -> None:
    threads = torch.get_num_threads()
    rates = measure_rates("cpu")
    assert torch.get_num_threads() == threads
    assert all(1e9 < rate < 1e13 for rate in (rates.bf16, rates.solve))
    constants = RATES["cpu"]
    measured = {name: getattr(constants, name) for name in ("bf16", "solve", "basis")}
    assert dataclasses.replace(rates, **measured) == constants
    assert full.timed(rates).time.basis.startswith(f"a prediction from {threads} x core, as measured here, idle: ")
