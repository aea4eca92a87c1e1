"""What two ranks say to each other, over gloo: rows and sums whole, in pieces, by way of a device."""

from __future__ import annotations

import os
import socket
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.multiprocessing import spawn

from fourfold.distributed import ranks
from fourfold.distributed.ranks import Ranks

COUNTS, WIDTH, PARTIALS = (5, 3), 7, 2
ENDS = [slice(0, 5), slice(5, 8)]


class Elsewhere(Ranks):
    """Collectives work on copies, as where they lie on a GPU: room comes without what is on the host."""

    def _there(self, value: Tensor, *, full: bool) -> Tensor:
        return value.clone() if full else torch.full_like(value, 99)


def rows(places: Sequence[slice], dtype: torch.dtype) -> Tensor:
    return torch.arange(places[-1].stop * WIDTH).view(-1, WIDTH).to(dtype)


def partial(rank: int, worker: int) -> Tensor:
    return torch.randn(sum(COUNTS), WIDTH, generator=torch.Generator().manual_seed(10 * rank + worker))


def speak(rank: int, kind: type[Ranks], port: int, folder: str) -> None:
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    ranks.PIECE_BYTES = 50  # a row or two at one time, a column of sums
    one = kind(torch.device("cpu"), 60.0)
    assert (one.rank, one.size, one.device_bytes) == (rank, 2, 0)
    assert str(one) == "2 ranks, which exchange rows and sums over gloo"
    for dtype in (torch.bfloat16, torch.int64):
        for places in (ENDS, [slice(0, 8), slice(8, 8)]):  # a rank without rows, too
            all_TX = torch.zeros(8, WIDTH, dtype=dtype)
            all_TX[places[rank]] = rows(places, dtype)[places[rank]]
            one.all_gather_into_(all_TX, places)
            assert torch.equal(all_TX, rows(places, dtype))
    sums = one.reduce_scatter([partial(rank, worker) for worker in range(PARTIALS)], ENDS)
    none = one.reduce_scatter([partial(rank, 0)], [slice(0, 8), slice(8, 8)])
    assert [len(each) for each in none] == ([8, 8] if rank == 0 else [0, 0])
    torch.save(sums, f"{folder}/{rank}")
    one.destroy()


@pytest.mark.parametrize("kind", [Ranks, Elsewhere])
def test_rows_and_sums_cross_whole(kind: type[Ranks], tmp_path: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    spawn(speak, (kind, port, str(tmp_path)), nprocs=2)
    for rank, place in enumerate(ENDS):
        sums = torch.load(tmp_path / str(rank))
        wanted = [(partial(of, 0) + partial(of, 1))[place] for of in range(2)]
        assert [torch.equal(each, found) for each, found in zip(wanted, sums, strict=True)] == [True, True]
