"""Workers: who has which rows and experts, what they say to each other, and what happens when one of them ends."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fourfold.datatypes import FourfoldError
from fourfold.distributed import team as teams
from fourfold.distributed.devices import expand_devices, one_device
from fourfold.distributed.ranks import Ranks
from fourfold.distributed.spill import Spill
from fourfold.distributed.team import LONGEST_STAGES, LOOKS, Team, alone
from fourfold.distributed.trace import Trace, waited
from fourfold.distributed.workers import Worker, assign_experts

CPU = torch.device("cpu")


def run_all(count: int, job: Callable[[Worker], Any]) -> list[Any]:
    """What a job gives on each of so many workers."""
    return Team([CPU] * count).run(lambda worker: worker.all_gather_object(job(worker)))


# ---- who has what


@given(count=st.integers(0, 50), size=st.integers(1, 7))
def test_rows_are_shared_out_evenly_and_in_order(count: int, size: int) -> None:
    team = Team([CPU] * size)
    shares = [Worker(team, place).own_samples(count) for place in range(size)]
    assert [row for share in shares for row in range(count)[share]] == list(range(count))
    lengths = [share.stop - share.start for share in shares]
    assert max(lengths) - min(lengths) <= 1


@given(tokens=st.lists(st.integers(0, 1000), min_size=1, max_size=64), hands=st.integers(1, 5))
def test_every_expert_is_dealt_once(tokens: list[int], hands: int) -> None:
    dealt = assign_experts(torch.tensor(tokens), hands)
    assert sorted(expert for hand in dealt for expert in hand) == list(range(len(tokens)))
    assert all(list(hand) == sorted(hand) for hand in dealt)
    assert max(map(len, dealt)) - min(map(len, dealt)) <= 1


def test_busy_experts_are_spread() -> None:
    """Snake order by hand: 0 1 2 3 by tokens, two hands: {0, 3}, {1, 2}."""
    assert assign_experts(torch.tensor([40, 30, 20, 10]), 2) == [(0, 3), (1, 2)]
    assert assign_experts(torch.tensor([10, 10, 10]), 2) == [(0,), (1, 2)]
    loads = torch.randint(0, 1000, (256,), generator=torch.Generator().manual_seed(0))
    sums = [int(loads[list(hand)].sum()) for hand in assign_experts(loads, 4)]
    assert max(sums) / min(sums) < 1.02


# ---- what they say


@pytest.mark.parametrize("size", [1, 2, 3])
def test_gather_is_in_order_of_rank_and_in_one_piece(size: int) -> None:
    def job(worker: Worker) -> tuple[torch.Tensor, tuple[int, ...], int]:
        rows = torch.full((worker.rank, 4), float(worker.rank))  # the first has none
        parts = list(rows.split(1)) if worker.rank else ([] if size > 1 else [rows])
        all_TX, counts = worker.all_gather(parts)
        assert not parts
        return all_TX, counts, all_TX.data_ptr()

    for all_TX, counts, place in (found := run_all(size, job)):
        assert counts == tuple(range(size))
        assert all_TX.tolist() == [[float(rank)] * 4 for rank in range(size) for _ in range(rank)]
        assert place == found[0][2]


def test_a_file_stands_in_for_memory_and_leaves_none_behind(tmp_path: Path) -> None:
    team = Team([CPU, CPU])
    team.spill = Spill(tmp_path)
    gathered = team.run(lambda worker: worker.all_gather([torch.full((2, 3), worker.rank, dtype=torch.bfloat16)])[0])
    assert gathered.tolist() == [[0.0] * 3] * 2 + [[1.0] * 3] * 2
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("size", [1, 2, 3])
def test_sum_gives_each_worker_its_rows_of_all(size: int) -> None:
    counts = [2, 0, 3][:size]

    def job(worker: Worker) -> torch.Tensor:
        partial = torch.arange(sum(counts), dtype=torch.float32)[:, None] * 10.0**worker.rank
        return worker.reduce_scatter(partial, counts)

    found = torch.cat(run_all(size, job))
    assert found[:, 0].tolist() == [row * sum(10.0**rank for rank in range(size)) for row in range(sum(counts))]


def test_sums_are_added_in_order_of_rank() -> None:
    """fp32: (1e8 + 1) - 1e8 is 0, (1e8 - 1e8) + 1 is 1."""
    values = [1e8, 1.0, -1e8]
    found = run_all(3, lambda worker: worker.all_reduce(torch.tensor(values[worker.rank])).item())
    assert found == [0.0] * 3


def test_once_is_made_once_and_collect_reaches_the_leading_worker() -> None:
    made: list[int] = []

    def job(worker: Worker) -> tuple[int, list[int]]:
        worker.run_once(lambda: made.append(worker.rank))
        return len(made), worker.gather_object(worker.rank)

    assert run_all(3, job) == [(1, [0, 1, 2]), (1, []), (1, [])]
    assert made == [0]


def test_threads_and_gradients_are_each_workers_own() -> None:
    def job(worker: Worker) -> tuple[int, bool, str]:
        return torch.get_num_threads(), torch.is_grad_enabled(), threading.current_thread().name

    share = max(torch.get_num_threads() // 2, 1)
    assert run_all(2, job) == [(share, False, "worker 0"), (share, False, "worker 1")]


# ---- when one of them ends


def test_what_one_raises_stops_the_others_and_says_where() -> None:
    stopped: list[int] = []

    def job(worker: Worker) -> None:
        try:
            with worker.span("solve", 3):
                worker.all_gather_object(None)
                if worker.rank == 1:
                    raise FourfoldError("expert 5 is not finite")
                worker.all_gather_object(None)
        finally:
            stopped.append(worker.rank)

    with pytest.raises(FourfoldError, match="worker 1 on cpu, solve of layer 3: expert 5 is not finite"):
        Team([CPU] * 3).run(job)
    assert sorted(stopped) == [0, 1, 2]


def test_a_bug_keeps_its_traceback_and_says_where() -> None:
    def job(worker: Worker) -> None:
        worker.team.enter(worker.local_rank, "attend", 2)
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError) as caught:
        Team([CPU]).run(job)
    assert caught.value.__notes__ == ["worker 0 on cpu, attend of layer 2"]


def test_a_worker_alone_needs_no_name_in_its_errors() -> None:
    def job(worker: Worker) -> None:
        raise FourfoldError("no such file")

    with pytest.raises(FourfoldError, match=r"^no such file$"):
        Team([CPU]).run(job)


def test_a_worker_that_hangs_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(teams, "GRACE_SECONDS", 0.1)
    release = threading.Event()

    def job(worker: Worker) -> None:
        with worker.span("solve", 7):
            if worker.rank == 1:
                release.wait(30)
            worker.all_gather_object(None)

    start = time.monotonic()
    with pytest.raises(FourfoldError, match=r"worker 1 on cpu hangs: no sign of life .* in solve of layer 7"):
        Team([CPU] * 2, patience_seconds=0.3).run(job)
    assert time.monotonic() - start < 20
    release.set()


def test_a_worker_alone_that_hangs_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(teams, "GRACE_SECONDS", 0.1)
    release = threading.Event()
    with pytest.raises(FourfoldError, match=r"worker 0 on cpu hangs: no sign of life for 0 s in start"):
        Team([CPU], patience_seconds=0.2).run(lambda worker: release.wait(30))
    release.set()


def looked_at(looks: int, *, asking: bool = False, arrived: bool = False, beats: bool = False, stage: int = 0) -> bool:
    """Whether the first of two workers is said to hang after so many looks. Nobody looks at a clock.

    stage: looks within a stage that it went through before.
    """
    team = Team([CPU] * 2)
    team.ranks = cast(Ranks, SimpleNamespace(waiting=asking))
    for look in range(stage + looks):
        team.heartbeat(1)
        team.heartbeat(0) if beats or look < stage else None
        team._arrived = {0} if arrived else set()
        team._look()
        if look + 1 == stage:
            team.enter(0, "solve", 0)
    return team._failure is not None


def test_looks_are_counted_and_those_who_wait_do_not_hang() -> None:
    """The first look sees where it begins. A stopped process misses looks: however long, that is one of them."""
    assert not looked_at(LOOKS + 1) and looked_at(LOOKS + 2)
    assert not any(looked_at(50, **{how: True}) for how in ("asking", "arrived", "beats"))


def test_patience_is_many_times_the_longest_stage() -> None:
    """A look within a stage may be anywhere in it; two are at least one interval."""
    assert looked_at(LOOKS + 2, stage=1)
    assert not looked_at(LONGEST_STAGES + 1, stage=2) and looked_at(LONGEST_STAGES + 2, stage=2)


def test_signs_of_life_are_enough() -> None:
    def job(worker: Worker) -> int:
        for _ in range(8 if worker.rank else 0):
            time.sleep(0.1)
            worker.heartbeat()
        return len(worker.all_gather_object(None))

    assert Team([CPU] * 2, patience_seconds=0.4).run(job) == 2


def test_an_interrupt_reaches_every_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    ended: list[int] = []
    team = Team([CPU] * 2)

    def interrupt() -> None:
        while len(team.trace.spans) < 2:
            time.sleep(0.01)
        raise KeyboardInterrupt

    monkeypatch.setattr(team, "_watch", interrupt)

    def job(worker: Worker) -> None:
        try:
            while True:
                with worker.span("solve"):
                    time.sleep(0.01)
        finally:
            ended.append(worker.rank)

    with pytest.raises(KeyboardInterrupt):
        team.run(job)
    assert sorted(ended) == [0, 1]


# ---- devices, and where the time went


def test_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    assert expand_devices("cpu*3") == ("cpu",) * 3
    assert expand_devices("auto") == expand_devices("all") == ("cpu",)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 6))
    assert expand_devices("all") == expand_devices("cuda:0, cuda:1") == ("cuda:0", "cuda:1")
    assert (expand_devices("auto"), expand_devices("cuda:1*2")) == (("cuda:0",), ("cuda:1", "cuda:1"))
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert expand_devices("auto") == ("cuda:1",)
    for bad, said in (("cpu*0", "no device at all"), ("cpu,cuda:0", "would only hold them up"), ("gpu", "wanted auto")):
        with pytest.raises(FourfoldError, match=said):
            expand_devices(bad)
    with pytest.raises(FourfoldError, match="3 devices, where one is wanted, such as cpu"):
        one_device("cpu*3")


def test_waiting_is_counted() -> None:
    def job(worker: Worker) -> None:
        with worker.span("solve"):
            if worker.rank:
                time.sleep(0.2)
        worker.all_gather_object(None)

    team = Team([CPU] * 2)
    team.run(job)
    wait = {rank: waits["other workers"] for rank, (waits, _) in waited(team.trace.spans).items()}
    assert wait[0] > 0.15 and wait[1] < wait[0] / 2
    assert waited(Trace().spans) == {}


def test_what_is_inside_a_stage_is_not_counted_twice() -> None:
    def job(worker: Worker) -> None:
        with worker.span("solve", 3):
            time.sleep(0.02)
            with worker.span("moments", 3):
                time.sleep(0.02)
            with worker.span("wait for writer", 3):
                time.sleep(0.02)
            worker.all_gather_object(None)

    team = Team([CPU] * 2)
    team.run(job)
    for lane, (waits, whole) in waited(team.trace.spans).items():
        own = sorted((span for span in team.trace.spans if span.lane == lane), key=lambda span: span.start)
        assert [span.name for span in own[:4]] == ["solve", "moments", "solve", "wait for writer"]
        assert all(before.end <= after.start for before, after in pairwise(own))
        assert sum(span.end - span.start for span in own) == pytest.approx(whole, abs=1e-3)
        assert 0.02 <= waits["the writer"] < whole - 0.04 and waits["the reader"] == 0


def test_a_worker_alone_waits_for_nobody() -> None:
    worker = alone(CPU)
    assert (worker.rank, worker.size, worker.is_leader, worker.own_samples(5)) == (0, 1, True, slice(0, 5))
    values = torch.ones(3, 2)
    assert (
        worker.all_gather([values])[0] is values
        and worker.reduce_scatter(values, [3]) is values
        and worker.all_reduce(values) is values
    )
    assert not worker.team.trace.spans
