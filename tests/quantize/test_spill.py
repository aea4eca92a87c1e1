"""Hidden states in files: values stay, memory goes, a full disk is one clear error."""

from __future__ import annotations

import errno
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

import releases
from fourfold.datatypes import FourfoldError
from fourfold.distributed.devices import Machine
from fourfold.distributed.spill import Spill
from fourfold.distributed.team import Team
from fourfold.quantize import footprint
from fourfold.quantize.plan import make_plan

MEGABYTE = 2**20


def resident() -> int:
    found: int = psutil.Process().memory_info().rss
    return found


def test_what_is_dropped_leaves_memory_and_keeps_its_values(tmp_path: Path) -> None:
    spill = Spill(tmp_path)
    room_RTD = spill.allocate((64, 1024, 512), torch.bfloat16)
    before = resident()
    for row, row_TD in enumerate(room_RTD):
        row_TD.fill_(row)
    assert resident() - before > 50 * MEGABYTE
    spill.drop()
    assert resident() - before < 10 * MEGABYTE
    assert all(torch.equal(row_TD, torch.full_like(row_TD, row)) for row, row_TD in enumerate(room_RTD))
    assert not list(tmp_path.iterdir())


def test_files_go_with_their_tensors(tmp_path: Path) -> None:
    spill = Spill(tmp_path)
    files = len(psutil.Process().open_files())
    room = spill.allocate((3, 5), torch.float32)
    part = room[1:]
    del room
    part.fill_(2.0)
    spill.drop()
    assert float(part.sum()) == 20
    del part
    spill.drop()
    assert not list(spill._maps) and len(psutil.Process().open_files()) == files
    assert spill.allocate((0, 5), torch.float32).shape == (0, 5)


def test_a_sign_of_life_drops_what_was_spilled(tmp_path: Path) -> None:
    team = Team((torch.device("cpu"),))
    team.spill = Spill(tmp_path)
    before = resident()
    team.allocate((64, MEGABYTE), torch.uint8).fill_(1)
    team.heartbeat(0)
    assert resident() - before < 10 * MEGABYTE


def test_a_full_disk_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*given: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(FourfoldError, match=r"no room for 2 GB of hidden states: No space left on device"):
        Spill(tmp_path).allocate((1000, 1_000_000), torch.bfloat16)


def test_too_little_memory_for_all_tokens_is_a_plan_with_files(source: Path, small: Any, tmp_path: Path) -> None:
    """On a CPU too; disk is counted, and memory hardly depends on the tokens then."""
    recipe = small()
    sources = tuple(replace(source, rows=1000 * source.rows) for source in recipe.calibration.sources)
    many = replace(recipe, calibration=replace(recipe.calibration, sources=sources))
    plan = make_plan(source, many, memory_bytes=2**40, out=tmp_path)
    assert (plan.memory.spilled_bytes, plan.disk.spilled_bytes) == (0, 0)
    least = make_plan(source, many, memory_bytes=1, out=tmp_path).memory.host_peak_bytes
    spilled = make_plan(source, many, memory_bytes=least * 11 // 10, out=tmp_path)
    assert spilled.memory.inputs == "file" and spilled.memory.fits
    assert spilled.disk.needed_bytes == plan.disk.needed_bytes + footprint.spilled_bytes(plan.work)
    assert spilled.memory.host_peak_bytes < plan.memory.host_peak_bytes - footprint.spilled_bytes(plan.work) // 2


def test_a_run_with_files_gives_the_same_release(source: Path, release: Path, small: Any, tmp_path: Path) -> None:
    releases.run(source, tmp_path / "out", small(), machine=Machine(memory_bytes=2**33, host_bytes=1))
    found, wanted = (releases.tensors(folder) for folder in (tmp_path / "out", release))
    assert all(torch.equal(found[name], value) for name, value in wanted.items())
