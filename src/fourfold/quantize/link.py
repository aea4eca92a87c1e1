"""What goes between the host and one device, beside the device's arithmetic: on streams of its own, from and to pinned
memory. On a CPU the same calls hand values on as they are.

How torch orders and frees what two streams share: its notes on CUDA semantics, and Tensor.record_stream.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

BEHIND = 4  # values on their way to the host that a device holds: outputs and experts' inputs of two batches


def pinned_bytes(count: int) -> int:
    """What torch takes for so many bytes of pinned memory: the next power of two, kept for later when it is freed."""
    return 1 << (count - 1).bit_length() if count > 0 else 0


class Link:
    """Of one worker's device. `send` may be called on any thread, the rest on the worker's.

    Copies are in the order of the calls. What is sent may be used after `arrive`; what is brought back is there after
    `settle`.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        # One for each way: they do not wait for each other, and a device copies both ways at once.
        self._streams = (torch.cuda.Stream(device), torch.cuda.Stream(device)) if device.type == "cuda" else None
        self._behind: deque[tuple[torch.cuda.Event, Tensor]] = deque()

    def room(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Host memory, pinned where the device is not the host."""
        return torch.empty(shape, dtype=dtype, pin_memory=self._streams is not None)

    # ---- to the device

    def send(self, value: Tensor) -> Tensor:
        """A value of the host on the device, where it may be used after `arrive`."""
        if self._streams is None:
            return value
        with torch.cuda.stream(self._streams[0]):
            sent = value.to(self.device, non_blocking=True)
        # Its memory is the side stream's: not to be taken for the next value while arithmetic still reads it.
        sent.record_stream(torch.cuda.current_stream(self.device))
        return sent

    def arrive(self) -> None:
        """The device's arithmetic from here on waits for all that was sent."""
        if self._streams is not None:
            torch.cuda.current_stream(self.device).wait_stream(self._streams[0])

    def bring(self, values: Iterable[Tensor]) -> Iterator[Tensor]:
        """Each value on the device, the next one on its way while this one is worked on."""
        sent: Tensor | None = None
        for value in values:
            self.arrive()  # what is handed on now, and not yet what follows it
            arrived, sent = sent, self.send(value)
            if arrived is not None:
                yield arrived
        self.arrive()
        if sent is not None:
            yield sent

    # ---- to the host

    def put_(self, room: Tensor, value: Tensor) -> None:
        """Copy a value of the device into `room` on the host, where it is after `settle`."""
        if self._streams is None:
            room.copy_(value)
            return
        self._streams[1].wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self._streams[1]):
            room.copy_(value, non_blocking=True)
            there = torch.cuda.Event(blocking=True)  # the host sleeps until then
            there.record()
        self._behind.append((there, value))  # whose memory arithmetic must not take before
        self._wait_for_all_but(BEHIND)

    def fetch(self, value: Tensor) -> Tensor:
        """A value of the device on the host, where it is after `settle`."""
        if self._streams is None:
            return value
        room = self.room(tuple(value.shape), value.dtype)
        self.put_(room, value)
        return room

    def take(self, values: Iterable[Tensor]) -> Iterator[Tensor]:
        """Each value of the device on the host; the device works on the next one meanwhile. Nothing else is fetched or
        put in between.
        """
        if self._streams is None:
            yield from values
            return
        fetched: Tensor | None = None
        for value in values:
            there, fetched = fetched, self.fetch(value)
            if there is not None:
                self._wait_for_all_but(1)
                yield there
        self.settle()
        if fetched is not None:
            yield fetched

    def give_back(self) -> None:
        """Pinned memory that nobody uses any more, of all workers; torch keeps it, and before 2.11 for good."""
        empty = getattr(torch.accelerator, "empty_host_cache", None)
        if self._streams is not None and empty is not None:
            empty()

    def settle(self) -> None:
        """Wait until all that was put and fetched is there."""
        self._wait_for_all_but(0)

    def _wait_for_all_but(self, count: int) -> None:
        while len(self._behind) > count:
            there, _ = self._behind.popleft()
            there.synchronize()
