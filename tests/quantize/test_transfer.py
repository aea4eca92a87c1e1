"""A device's link: what is handed on when, on a CPU, by the order of calls, and on a GPU."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

from fourfold.distributed.team import Team
from fourfold.distributed.transfer import PENDING, Transfer, pinned_bytes
from fourfold.distributed.workers import Worker

CPU = torch.device("cpu")


def test_pinned_memory_comes_in_powers_of_two() -> None:
    assert [pinned_bytes(count) for count in (0, 1, 2, 3, 4096, 4097)] == [0, 1, 2, 4, 4096, 8192]


def test_on_a_cpu_nothing_is_copied() -> None:
    link, values = Transfer(CPU), [torch.full((2,), float(number)) for number in range(3)]
    assert [id(value) for value in link.prefetch(values)] == [id(value) for value in values]
    assert link.to_device(values[0]) is values[0] and link.to_host(values[0]) is values[0]
    room = link.host_buffer((2,), torch.float32)
    link.copy_to_host_(room, values[2])
    link.synchronize()
    assert room.tolist() == [2.0, 2.0]


def test_on_a_cpu_outputs_are_made_one_at_a_time() -> None:
    """Or two would lie in memory where one is enough."""
    said: list[str] = []

    def make() -> Iterator[Tensor]:
        for number in range(3):
            said.append(f"made {number}")
            yield torch.tensor(number)

    for value in Transfer(CPU).drain(make()):
        said.append(f"taken {int(value)}")
    assert said == ["made 0", "taken 0", "made 1", "taken 1", "made 2", "taken 2"]


# ---- what a GPU would be told, in which order


class Told:
    """Stands for a stream or an event of a GPU, and writes down what is asked of it."""

    def __init__(self, name: str, said: list[str]) -> None:
        self.name, self.said = name, said

    def wait_stream(self, other: Told) -> None:
        self.said.append(f"{self.name} waits for {other.name}")

    def record(self) -> None:
        self.name = f"copy {sum(line.startswith('copy') for line in self.said)}"
        self.said.append(self.name)

    def synchronize(self) -> None:
        self.said.append(f"host waits for {self.name}")


@pytest.fixture
def said() -> list[str]:
    return []


@pytest.fixture
def link(said: list[str], monkeypatch: pytest.MonkeyPatch) -> Transfer:
    """A link whose copies are real, between the host and the host, and whose streams only say what they are told."""
    link = Transfer(CPU)
    streams: Any = Told("in", said), Told("out", said)
    link._streams = streams

    @contextmanager
    def on(stream: Told) -> Iterator[None]:
        if stream.name == "in":
            said.append("sent")
        yield

    def record_stream(value: Tensor, stream: Told) -> None:
        said.append(f"kept for {stream.name}")

    monkeypatch.setattr(torch.cuda, "stream", on)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Told("work", said))
    monkeypatch.setattr(torch.cuda, "Event", lambda blocking: Told("event", said))
    monkeypatch.setattr(torch.Tensor, "record_stream", record_stream)
    monkeypatch.setattr(Transfer, "host_buffer", lambda self, shape, dtype: torch.empty(shape, dtype=dtype))
    return link


def test_the_next_value_is_sent_before_this_one_is_worked_on(link: Transfer, said: list[str]) -> None:
    """And work waits for this one alone: it is told to before the next one is sent."""
    for value in link.prefetch(torch.arange(3)):
        said.append(f"work on {int(value)}")
    wait, sent = "work waits for in", ["sent", "kept for work"]
    assert said == [
        wait, *sent, wait, *sent, "work on 0", wait, *sent, "work on 1", wait, "work on 2",
    ]  # fmt: skip


def test_a_copy_to_the_host_waits_for_the_work_and_few_are_held(link: Transfer, said: list[str]) -> None:
    rooms = torch.zeros(PENDING + 2, 3)
    for number, room in enumerate(rooms):
        link.copy_to_host_(room, torch.full((3,), float(number)))
    begun = [line for number in range(PENDING + 1) for line in ("out waits for work", f"copy {number}")]
    behind = ["host waits for copy 0", "out waits for work", f"copy {PENDING + 1}", "host waits for copy 1"]
    assert said == begun + behind
    link.synchronize()
    assert said[len(begun + behind) :] == [f"host waits for copy {number}" for number in range(2, PENDING + 2)]
    assert rooms[:, 0].tolist() == list(range(PENDING + 2))


def test_outputs_are_taken_while_the_next_ones_are_made(link: Transfer, said: list[str]) -> None:
    def make() -> Iterator[Tensor]:
        for number in range(3):
            said.append(f"made {number}")
            yield torch.tensor(number)

    for value in link.drain(make()):
        said.append(f"taken {int(value)}")
    seen = [line for line in said if "out waits" not in line]
    assert seen == [
        "made 0", "copy 0", "made 1", "copy 1", "host waits for copy 0", "taken 0", "made 2", "copy 2",
        "host waits for copy 1", "taken 1", "host waits for copy 2", "taken 2",
    ]  # fmt: skip


# ---- on a GPU


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_on_a_gpu_values_arrive_whole_and_memory_does_not_grow() -> None:
    """Long work and short copies, memory taken again at once: what is read too early or too late is another number."""
    device, shape, count = torch.device("cuda:0"), (64, 1024, 1024), 24

    def job(worker: Worker) -> tuple[float, float]:
        link, first = worker.transfer, 1000 * worker.rank
        given = [link.host_buffer(shape, torch.bfloat16).fill_(number + 1) for number in range(3)]
        back = link.host_buffer((count, *shape[1:]), torch.bfloat16)
        weight_NN = torch.eye(1024, dtype=torch.bfloat16, device=device).expand(shape)
        wrong = 0.0
        for number, value in enumerate(link.prefetch(given[number % 3] for number in range(count))):
            for _ in range(20):
                value = torch.bmm(value, weight_NN)
            link.copy_to_host_(back[number], value[number])
        link.synchronize()
        for number in range(count):
            wrong += float((back[number].float() - (number % 3 + 1)).abs().sum())
        made = (torch.full(shape[1:], float(first + number), device=device) for number in range(count))
        for number, value in enumerate(link.drain(made)):
            assert value.is_pinned()
            wrong += float((value - (first + number)).abs().sum())
        return wrong, torch.cuda.max_memory_allocated(device) / (64 * 2**21)

    for wrong, held in Team([device, device]).run(lambda worker: worker.all_gather_object(job(worker))):
        assert wrong == 0.0
        assert held < 2 * (4 + PENDING)
