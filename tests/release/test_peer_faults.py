"""Known faults of quantizers, each written into a sound checkpoint: named by `inspect` and by `compare`."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

import checkpoints
import rivals
from fourfold.release.compare import compare
from fourfold.release.inspect import inspect

EXPERT = "model.language_model.layers.0.mlp.experts.0.down_proj."
NORM = "model.language_model.norm.weight"
Change = Callable[[dict[str, Tensor]], object]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoints.tiny(tmp_path_factory.mktemp("faults") / "source", layers=1, experts=2, per_expert=True)


@pytest.fixture(scope="module")
def awq(source: Path) -> Path:
    rivals.make(source.parent / "awq", "awq", layers=1, experts=2)
    return source.parent / "awq"


def faults(source: Path, release: Path) -> tuple[list[str], list[str]]:
    return [*inspect(release).traps], compare(source, release).faults


def test_a_sound_checkpoint_has_none(source: Path, awq: Path) -> None:
    norms = checkpoints.tiny(source.parent / "norms", layers=1, experts=2, per_expert=True, seed=3)
    assert inspect(norms).traps == inspect(source).traps == ()
    assert faults(source, awq) == ([], [])
    found = inspect(awq)
    assert found.quantized is not None and found.quantized.format == "AWQ"
    assert (found.quantized.by_width, found.quantized.group_sizes) == ({"int4": {"experts": 6}}, (32,))


def round_norms(tensors: dict[str, Tensor]) -> None:
    tensors[NORM] = ((1 + tensors[NORM].float()).bfloat16().float() - 1).bfloat16()


def zero_expert(tensors: dict[str, Tensor]) -> None:
    tensors[f"{EXPERT}qweight"].zero_()
    tensors[f"{EXPERT}qzeros"].zero_()


def drop_draft(tensors: dict[str, Tensor]) -> None:
    for name in [name for name in tensors if name.startswith("mtp.")]:
        del tensors[name]


def quantize_draft(tensors: dict[str, Tensor]) -> None:
    name = "mtp.layers.0.self_attn.o_proj."
    parts, _ = rivals.pack(tensors.pop(f"{name}weight"), "awq")
    tensors.update({f"{name}{suffix}": value for suffix, value in parts.items()})


@pytest.mark.parametrize(
    ("change", "inspected", "compared"),
    [
        (round_norms, "1 of 15 norm weights hold 1 + w rounded to BF16", "1 norm weights hold 1 + w rounded to BF16"),
        (zero_expert, "1 of 6 projections of experts are zeros", "1 of 6 projections of experts are zeros"),
        (drop_draft, "names a draft head that is not there", "draft head: dropped, 23 tensors"),
        (quantize_draft, "draft head: 1 of its projections are quantized", "draft head: 1 of its projections"),
    ],
)
def test_a_fault_is_named(
    source: Path, awq: Path, tmp_path: Path, change: Change, inspected: str, compared: str
) -> None:
    folder = shutil.copytree(awq, tmp_path / "release")
    tuned = shutil.copytree(source, tmp_path / "source")
    for one in (folder, tuned):  # trained norms, not the zeros of a new model
        values = torch.linspace(-0.05, 0.05, 128).bfloat16()
        checkpoints.edit(one, lambda tensors: tensors.update({NORM: values.clone()}))  # noqa: B023
    checkpoints.edit(folder, change)
    traps, found = faults(tuned, folder)
    assert len(traps) == 1 and inspected in traps[0], traps
    assert len(found) == 1 and compared in found[0], found
    checkpoints.edit_json(folder / "model.safetensors.index.json", lambda raw: raw["metadata"].update(total_size=0))
    assert any("total_size is 0" in said for said in inspect(folder).traps)


def test_experts_left_at_rtn_are_told_from_gptq(
    source: Path, tmp_path: Path, shipped_source: Path, shipped: dict[str, Path]
) -> None:
    assert compare(shipped_source, shipped["gptq"]).faults == []
    rivals.make(tmp_path / "rtn", "ct-asymmetric", layers=1, experts=2)
    (said,) = compare(source, tmp_path / "rtn").faults
    assert said.startswith("6 of 6 projections of experts are the source's weights rounded to nearest")
