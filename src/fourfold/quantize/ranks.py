"""Many processes under torchrun: what they exchange, over torch.distributed. A rank brings one or more workers.

What is exchanged lies in host memory (experts' inputs, sums of outputs, packed tensors), so it goes over gloo, GPUs or
not. Only the first worker of a rank calls these, in the same order on every rank.
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


class Ranks:
    """This process's place among all, and what it can say to them."""

    def __init__(self, patience_seconds: float) -> None:
        """Meet the other processes that torchrun started. Raises FourfoldError if they do not come."""
        self.asking = False  # whether this rank waits for others
        with self._answered():
            dist.init_process_group("gloo", timeout=timedelta(seconds=patience_seconds))
        self.rank, self.size = dist.get_rank(), dist.get_world_size()

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
        """Bring every rank's rows of a tensor to all others, in place. places: of each rank."""
        with self._answered():
            for rank, place in enumerate(places):
                if place.start < place.stop:
                    dist.broadcast(all_TX[place].view(torch.uint8), src=rank)

    def reduce(self, partials: Sequence[Tensor], places: Sequence[slice]) -> list[Tensor]:
        """This rank's rows as each rank's workers summed them, in order of rank: fp32.

        partials: of this rank's workers, each with the rows of all ranks; places: rows of each rank.
        """
        total_TD = partials[0].clone()
        for other in partials[1:]:
            total_TD += other
        mine = places[self.rank].stop - places[self.rank].start
        received_TD = total_TD.new_empty(mine * self.size, *total_TD.shape[1:])
        sent = [place.stop - place.start for place in places]
        with self._answered():
            dist.all_to_all_single(received_TD, total_TD, [mine] * self.size, sent)
        return list(received_TD.split(mine)) if mine else [received_TD] * self.size

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


def join_ranks() -> Ranks | None:
    """The other processes, where torchrun started this one as one of several."""
    return Ranks(PATIENCE_SECONDS) if under_torchrun() else None

