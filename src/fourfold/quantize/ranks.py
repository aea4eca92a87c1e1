"""Many processes under torchrun: what they exchange, over torch.distributed. A rank brings one or more workers.

Rows and sums go over NCCL where every rank has a GPU of its own, else over gloo; small values and packed tensors always
over gloo. Only the first worker of a rank calls these, in the same order on every rank.
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
from fourfold.quantize.devices import under_torchrun

T = TypeVar("T")

PATIENCE_SECONDS = 900.0  # without an answer: a rank is frozen, or its host gone; a worker that hangs ends its own rank
PIECE_BYTES = 64 * 2**20  # of what crosses at one time
NCCL_BYTES = 400 * 10**6  # what NCCL itself takes of a GPU: a guess at its buffers, not measured
GPU_BYTES = NCCL_BYTES + 2 * PIECE_BYTES  # what the exchange takes of one


class Ranks:
    """This process's place among all, and what it can say to them.

    device_bytes: what the exchange takes on the first worker's device.
    """

    def __init__(self, device: torch.device, patience_seconds: float) -> None:
        """Meet the other processes that torchrun started. device: of this rank's first worker.

        Raises FourfoldError if they do not come.
        """
        self.asking = False  # whether this rank waits for others
        patience = timedelta(seconds=patience_seconds)
        with self._answered():
            dist.init_process_group("gloo", timeout=patience)
        self.rank, self.size = dist.get_rank(), dist.get_world_size()
        self._device, self._group, self.device_bytes = torch.device("cpu"), None, 0
        gpus = self.everyone(_gpu(device))
        if None not in gpus and len(set(gpus)) == self.size:  # NCCL takes a GPU for one rank only
            with self._answered():
                self._group = dist.new_group(backend="nccl", timeout=patience)
            self._device, self.device_bytes = device, GPU_BYTES

    def __str__(self) -> str:
        return f"{self.size} ranks, which exchange rows and sums over {'gloo' if self._group is None else 'NCCL'}"

    def agree(self, make: Callable[[], T]) -> T:
        """What `make` gives on rank 0, on every rank. Raises its FourfoldError on every rank."""
        said: list[Any] = [None, None]
        if self.rank == 0:
            try:
                said[0] = make()
            except FourfoldError as error:
                said[1] = str(error)
        with self._answered():
            dist.broadcast_object_list(said)
        if said[1] is not None:
            raise FourfoldError(said[1])
        made: T = said[0]
        return made

    def everyone(self, value: T) -> list[T]:
        """Every rank's value, in order; pickled on the way."""
        values: list[Any] = [None] * self.size
        with self._answered():
            dist.all_gather_object(values, value)
        return values

    def collect(self, value: T) -> list[T]:
        """Every rank's value at rank 0, in order; nothing elsewhere. Pickled on the way."""
        values: list[Any] | None = [None] * self.size if self.rank == 0 else None
        with self._answered():
            dist.gather_object(value, values)
        return values or []

    def fill_(self, all_TX: Tensor, places: Sequence[slice]) -> None:
        """Bring every rank's rows of a tensor of the host to all others, in place. places: of each rank."""
        with self._crossing():
            for rank, place in enumerate(places):
                for piece_TX in all_TX[place].split(_at_one_time(all_TX)):
                    there_TX = self._there(piece_TX, full=rank == self.rank)
                    dist.broadcast(there_TX.view(torch.uint8), src=rank, group=self._group)
                    if rank != self.rank and there_TX is not piece_TX:
                        piece_TX.copy_(there_TX, non_blocking=True)

    def reduce(self, partials: Sequence[Tensor], places: Sequence[slice]) -> list[Tensor]:
        """This rank's rows as each rank's workers summed them, in order of rank: fp32, on the host.

        partials: of this rank's workers, each with the rows of all ranks; places: rows of each rank.
        """
        total_TD = partials[0].clone()
        for other in partials[1:]:
            total_TD += other
        mine = places[self.rank].stop - places[self.rank].start
        received_TD = total_TD.new_empty(mine * self.size, *total_TD.shape[1:])
        sent = [place.stop - place.start for place in places]
        step = _at_one_time(total_TD.T)
        with self._crossing():
            for total_TN, room_TN in zip(total_TD.split(step, dim=1), received_TD.split(step, dim=1), strict=True):
                there_TN = self._there(total_TN.contiguous(), full=True)
                came_TN = torch.empty_like(room_TN, device=self._device, memory_format=torch.contiguous_format)
                dist.all_to_all_single(came_TN, there_TN, [mine] * self.size, sent, group=self._group)
                room_TN.copy_(came_TN, non_blocking=True)
        return list(received_TD.split(mine)) if mine else [received_TD] * self.size

    @contextmanager
    def _crossing(self) -> Iterator[None]:
        """Around collectives over NCCL, which would wait for a rank that has died; gloo notices it at once."""
        with self._answered():
            if self._group is not None:
                dist.barrier()
            yield
            if self._device.type == "cuda":
                torch.cuda.current_stream(self._device).synchronize()

    def _there(self, value: Tensor, *, full: bool) -> Tensor:
        """Where the collectives find a value of the host, or room for it: gloo there, NCCL on the device."""
        if self._device == value.device:
            return value
        return value.to(self._device, non_blocking=True) if full else torch.empty_like(value, device=self._device)

    def leave(self) -> None:
        """Part from the other ranks."""
        dist.destroy_process_group()

    @contextmanager
    def _answered(self) -> Iterator[None]:
        """Gloo's errors, of a rank that died or does not answer, as one that a user can mend."""
        self.asking = True
        try:
            yield
        except RuntimeError as error:
            reason = str(error).strip().splitlines()[0]
            raise FourfoldError(
                f"another rank has ended or does not answer ({reason}); its own message says why. The same command "
                "goes on"
            ) from None
        finally:
            self.asking = False


def join_ranks(device: torch.device) -> Ranks | None:
    """The other processes, where torchrun started this one as one of several. device: of its first worker."""
    return Ranks(device, PATIENCE_SECONDS) if under_torchrun() else None


def _gpu(device: torch.device) -> str | None:
    """Which GPU of all in the world it is; None for a CPU, or without NCCL."""
    if device.type != "cuda" or not dist.is_nccl_available():
        return None
    return str(torch.cuda.get_device_properties(device).uuid)


def _at_one_time(value: Tensor) -> int:
    """Rows of a matrix that cross together."""
    return max(PIECE_BYTES * len(value) // max(value.nbytes, 1), 1)
