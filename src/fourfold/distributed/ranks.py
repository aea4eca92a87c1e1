"""Collectives between processes under torchrun, over torch.distributed. A rank has one or more workers.

Rows and sums use NCCL if every rank has its own GPU, else gloo; small values and packed tensors always use gloo. Only
the first worker of a rank calls these, in the same order on every rank.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from fourfold.datatypes import FourfoldError
from fourfold.distributed.devices import under_torchrun

T = TypeVar("T")

PATIENCE_SECONDS = 900.0  # timeout of a collective: a rank is frozen or its host is gone
PIECE_BYTES = 64 * 2**20  # of one collective
NCCL_BYTES = 400 * 10**6  # what NCCL itself takes of a GPU: a guess at its buffers, not measured
GPU_BYTES = NCCL_BYTES + 2 * PIECE_BYTES  # what the exchange takes of one


class Ranks:
    """This process's rank and its collectives. device_bytes: memory they take on the first worker's device."""

    def __init__(self, device: torch.device, patience_seconds: float) -> None:
        """Join the process group that torchrun started. device: of this rank's first worker.

        Raises FourfoldError if other processes do not join in time.
        """
        self.waiting = False  # whether this rank waits for others
        patience = timedelta(seconds=patience_seconds)
        with self._errors_named():
            dist.init_process_group("gloo", timeout=patience)
        self.rank, self.size = dist.get_rank(), dist.get_world_size()
        self._device, self._group, self.device_bytes = torch.device("cpu"), None, 0
        gpus = self.all_gather_object(_gpu(device))
        if None not in gpus and len(set(gpus)) == self.size:  # NCCL takes a GPU for one rank only
            with self._errors_named():
                self._group = dist.new_group(backend="nccl", timeout=patience)
            self._device, self.device_bytes = device, GPU_BYTES

    def __str__(self) -> str:
        return f"{self.size} ranks, which exchange rows and sums over {'gloo' if self._group is None else 'NCCL'}"

    def broadcast(self, make: Callable[[], T]) -> T:
        """Return on every rank what `make` returns on rank 0, or raise its FourfoldError."""
        said: list[Any] = [None, None]
        if self.rank == 0:
            try:
                said[0] = make()
            except FourfoldError as error:
                said[1] = str(error)
        with self._errors_named():
            dist.broadcast_object_list(said)
        if said[1] is not None:
            raise FourfoldError(said[1])
        made: T = said[0]
        return made

    def all_gather_object(self, value: T) -> list[T]:
        """Return every rank's value, in order of rank, pickled."""
        values: list[Any] = [None] * self.size
        with self._errors_named():
            dist.all_gather_object(values, value)
        return values

    def gather_object(self, value: T) -> list[T]:
        """Return every rank's value, in order of rank, to rank 0; an empty list elsewhere. Pickled."""
        values: list[Any] | None = [None] * self.size if self.rank == 0 else None
        with self._errors_named():
            dist.gather_object(value, values)
        return values or []

    def all_gather_into_(self, all_TX: Tensor, places: Sequence[slice]) -> None:
        """Copy every rank's rows of a host tensor to all other ranks, in place. places: rows of each rank."""
        with self._collective():
            for rank, place in enumerate(places):
                for piece_TX in all_TX[place].split(_rows_per_piece(all_TX)):
                    there_TX = self._on_exchange_device(piece_TX, full=rank == self.rank)
                    dist.broadcast(there_TX.view(torch.uint8), src=rank, group=self._group)
                    if rank != self.rank and there_TX is not piece_TX:
                        piece_TX.copy_(there_TX, non_blocking=True)

    def reduce_scatter(self, partials: Sequence[Tensor], places: Sequence[slice]) -> list[Tensor]:
        """Return this rank's rows of each rank's partial sum, in order of rank: fp32, on the host.

        partials: of this rank's workers, each with the rows of all ranks; places: rows of each rank.
        """
        total_TD = partials[0].clone()
        for other in partials[1:]:
            total_TD += other
        mine = places[self.rank].stop - places[self.rank].start
        received_TD = total_TD.new_empty(mine * self.size, *total_TD.shape[1:])
        sent = [place.stop - place.start for place in places]
        step = _rows_per_piece(total_TD.T)
        with self._collective():
            for total_TN, room_TN in zip(total_TD.split(step, dim=1), received_TD.split(step, dim=1), strict=True):
                there_TN = self._on_exchange_device(total_TN.contiguous(), full=True)
                came_TN = torch.empty_like(room_TN, device=self._device, memory_format=torch.contiguous_format)
                dist.all_to_all_single(came_TN, there_TN, [mine] * self.size, sent, group=self._group)
                room_TN.copy_(came_TN, non_blocking=True)
        return list(received_TD.split(mine)) if mine else [received_TD] * self.size

    @contextmanager
    def _collective(self) -> Iterator[None]:
        """Wrap collectives over NCCL, which would wait for a dead rank; gloo notices one at once."""
        with self._errors_named():
            if self._group is not None:
                dist.barrier()
            yield
            if self._device.type == "cuda":
                torch.cuda.current_stream(self._device).synchronize()

    def _on_exchange_device(self, value: Tensor, *, full: bool) -> Tensor:
        """Return a host value, or memory like it, where the backend needs it: gloo on the host, NCCL on the device."""
        if self._device == value.device:
            return value
        return value.to(self._device, non_blocking=True) if full else torch.empty_like(value, device=self._device)

    def destroy(self) -> None:
        """Leave the process group."""
        dist.destroy_process_group()

    @contextmanager
    def _errors_named(self) -> Iterator[None]:
        """Raise gloo's errors about a dead or silent rank as a FourfoldError."""
        self.waiting = True
        try:
            yield
        except RuntimeError as error:
            reason = str(error).strip().splitlines()[0]
            raise FourfoldError(
                f"another rank has ended or does not answer ({reason}); its own message says why. The same command "
                "goes on"
            ) from None
        finally:
            self.waiting = False


def join_ranks(device: torch.device) -> Ranks | None:
    """Return the process group if torchrun started this process, else None. device: of its first worker."""
    return Ranks(device, PATIENCE_SECONDS) if under_torchrun() else None


def _gpu(device: torch.device) -> str | None:
    """Return a GPU's UUID; None for a CPU, or without NCCL."""
    if device.type != "cuda" or not dist.is_nccl_available():
        return None
    return str(torch.cuda.get_device_properties(device).uuid)


def _rows_per_piece(value: Tensor) -> int:
    """Return how many rows of a matrix one collective takes."""
    return max(PIECE_BYTES * len(value) // max(value.nbytes, 1), 1)
