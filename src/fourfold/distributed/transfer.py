"""Asynchronous copies between the host and one device through pinned memory, one CUDA stream per direction.

On a CPU the same calls return values unchanged. How torch orders and frees tensors that two streams share: its notes on
CUDA semantics, and Tensor.record_stream.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

PENDING = 4  # copies to the host that a device holds at most: outputs and expert inputs of two batches


def pinned_bytes(count: int) -> int:
    """Return the pinned memory that torch allocates for `count` bytes: the next power of two, cached when freed."""
    return 1 << (count - 1).bit_length() if count > 0 else 0


class Transfer:
    """Copies for one worker's device, in the order of the calls.

    `to_device` may be called on any thread, everything else on the worker's. An upload may be used after
    `wait_for_uploads`, a download after `synchronize`.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        # One for each way: they do not wait for each other, and a device copies both ways at once.
        self._streams = (torch.cuda.Stream(device), torch.cuda.Stream(device)) if device.type == "cuda" else None
        self._pending: deque[tuple[torch.cuda.Event, Tensor]] = deque()

    def host_buffer(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Allocate host memory, pinned unless the device is the host."""
        return torch.empty(shape, dtype=dtype, pin_memory=self._streams is not None)

    # ---- to the device

    def to_device(self, value: Tensor) -> Tensor:
        """Start a copy to the device; use the result after `wait_for_uploads`."""
        if self._streams is None:
            return value
        with torch.cuda.stream(self._streams[0]):
            sent = value.to(self.device, non_blocking=True)
        # Its memory is the side stream's: not to be taken for the next value while arithmetic still reads it.
        sent.record_stream(torch.cuda.current_stream(self.device))
        return sent

    def wait_for_uploads(self) -> None:
        """Make the device's compute stream wait for all uploads so far."""
        if self._streams is not None:
            torch.cuda.current_stream(self.device).wait_stream(self._streams[0])

    def prefetch(self, values: Iterable[Tensor]) -> Iterator[Tensor]:
        """Yield each value on the device while the next one is being copied."""
        sent: Tensor | None = None
        for value in values:
            self.wait_for_uploads()  # what is handed on now, and not yet what follows it
            arrived, sent = sent, self.to_device(value)
            if arrived is not None:
                yield arrived
        self.wait_for_uploads()
        if sent is not None:
            yield sent

    # ---- to the host

    def copy_to_host_(self, room: Tensor, value: Tensor) -> None:
        """Start a copy from the device into `room` on the host; complete after `synchronize`."""
        if self._streams is None:
            room.copy_(value)
            return
        self._streams[1].wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self._streams[1]):
            room.copy_(value, non_blocking=True)
            there = torch.cuda.Event(blocking=True)  # the host sleeps until then
            there.record()
        self._pending.append((there, value))  # whose memory arithmetic must not take before
        self._wait_until_pending(PENDING)

    def to_host(self, value: Tensor) -> Tensor:
        """Start a copy to new host memory; use the result after `synchronize`."""
        if self._streams is None:
            return value
        room = self.host_buffer(tuple(value.shape), value.dtype)
        self.copy_to_host_(room, value)
        return room

    def drain(self, values: Iterable[Tensor]) -> Iterator[Tensor]:
        """Yield each value on the host while the device computes the next one. No other downloads in between."""
        if self._streams is None:
            yield from values
            return
        fetched: Tensor | None = None
        for value in values:
            there, fetched = fetched, self.to_host(value)
            if there is not None:
                self._wait_until_pending(1)
                yield there
        self.synchronize()
        if fetched is not None:
            yield fetched

    def free_pinned_memory(self) -> None:
        """Free the pinned memory that torch caches, of all workers. torch before 2.11 cannot."""
        empty = getattr(torch.accelerator, "empty_host_cache", None)
        if self._streams is not None and empty is not None:
            empty()

    def synchronize(self) -> None:
        """Wait until all copies to the host are complete."""
        self._wait_until_pending(0)

    def _wait_until_pending(self, count: int) -> None:
        while len(self._pending) > count:
            there, _ = self._pending.popleft()
            there.synchronize()
