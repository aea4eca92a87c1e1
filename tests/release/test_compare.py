"""Two checkpoints beside each other: storage is looked through, each difference is counted."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from statistics import fmean, median

import pytest
import torch
from torch import Tensor

import checkpoints
import foreign
import releases
from command_line import invoke
from fourfold.release.compare import Comparison, compare
from fourfold.release.convert import convert
from fourfold.release.export import export

CT, GPTQ, V2 = releases.FORMATS
NAME = "model.language_model.layers.1.mlp.experts.2.down_proj."
Altered = Callable[[Path], Path]


@pytest.mark.parametrize("other", [CT, GPTQ, V2])
def test_the_same_in_another_storage(shipped: dict[str, Path], other: str) -> None:
    found = compare(shipped[CT], shipped[other])
    assert found.same
    assert (found.projections, found.codes_changed, found.scales.changed) == (24, 0, 0)
    assert found.codes == 24 * 128 * 128
    summary = json.loads((shipped[CT] / "metrics.json").read_text())["summary"]
    assert found.metrics["kl_mean"] == (summary["kl_mean"], summary["kl_mean"]) and found.same_protocol


def test_draft_experts_in_a_stack(tmp_path: Path) -> None:
    stack, split = (checkpoints.tiny(tmp_path / mtp, mtp=mtp) for mtp in ("fused", "split"))
    assert compare(stack, split).same
    name = "mtp.layers.0.mlp.experts.3.up_proj.weight"
    checkpoints.edit(split, lambda tensors: tensors[name].view(-1)[-1:].add_(1))
    assert compare(stack, split).different == [name]


def edited(folder: Path, change: Callable[[dict[str, Tensor]], object], to: Path) -> Comparison:
    checkpoints.edit(to, change)
    return compare(folder, to)


def test_codes_and_scales(shipped: dict[str, Path], altered: Altered) -> None:
    def change(tensors: dict[str, Tensor]) -> None:
        tensors[f"{NAME}qweight"].view(torch.uint8).view(-1)[:3] ^= 0x11  # two codes of each byte
        tensors[f"{NAME}scales"].view(-1)[7] *= 1.5

    found = edited(shipped[CT], change, altered(shipped[GPTQ]))
    assert not found.same
    assert (found.codes_changed, found.projections_changed, found.different) == (6, 1, [])
    assert (found.scales.changed, found.scales.largest) == (1, 0.5)


def test_int8_codes_and_scales(compact: Path, altered: Altered, tmp_path: Path) -> None:
    """Counted beside int4 ones, whatever the storage."""
    stem = "model.language_model.layers.0.linear_attn.in_proj_z."

    def change(tensors: dict[str, Tensor]) -> None:
        tensors[f"{stem}qweight"].view(torch.uint8).view(-1)[:3] ^= 1  # a code of each byte
        tensors[f"{stem}scales"].view(-1)[7] *= 1.5

    convert(compact, tmp_path / "new", GPTQ)
    same = compare(compact, tmp_path / "new")
    assert same.same and same.codes == sum(value.numel() for value in weights(compact).values())
    found = edited(compact, change, tmp_path / "new")
    assert (found.projections, found.int8) == (len(weights(compact)), same.int8) and found.int8 > 10
    assert (found.codes_changed, found.projections_changed, found.different) == (3, 1, [])
    assert (found.scales.changed, found.scales.largest) == (1, 0.5)


def weights(folder: Path) -> dict[str, Tensor]:
    found = releases.tensors(folder)
    stems = [name.removesuffix("weight_packed") for name in found if name.endswith("weight_packed")]
    return {stem: releases.dequantize(found, stem) for stem in stems}


def test_compact_beside_int4_experts_alone(compact: Path, shipped: dict[str, Path]) -> None:
    """Modules that are int8 in one and BF16 in the other have a weight error; so have draft experts."""
    found, plain = compare(compact, shipped[CT]), releases.tensors(shipped[CT])
    assert (found.projections, found.int8, found.only_first, found.only_second, found.different) == (24, 0, [], [], [])
    errors = {}
    for stem, weight in weights(compact).items():
        if f"{stem}weight" in plain:
            wanted = plain[f"{stem}weight"].double()
            errors[stem.rstrip(".")] = float((weight - wanted).norm() / wanted.norm())
    assert found.errors.projections == len(errors) == len(weights(compact)) - 24
    assert found.errors.mean == pytest.approx(fmean(errors.values()), rel=1e-5) and "mtp." in found.errors.worst_name


@pytest.mark.parametrize("form", ["gguf", "mlx"])
def test_exports_of_compact(compact: Path, shipped: dict[str, Path], tmp_path: Path, form: str) -> None:
    export(compact, tmp_path / "new", form)
    found = compare(compact, tmp_path / "new")
    assert found.same and found.projections == len(weights(compact)) and found.int8 > 10
    assert not compare(tmp_path / "new", shipped[CT]).same


def test_names(shipped: dict[str, Path], altered: Altered) -> None:
    def change(tensors: dict[str, Tensor]) -> None:
        tensors["extra"] = torch.zeros(2)
        tensors["mtp.norm.weight"] = tensors["mtp.norm.weight"].bfloat16()
        del tensors["mtp.fc.weight"]

    found = edited(shipped[CT], change, altered(shipped[CT]))
    assert (found.only_first, found.only_second) == (["mtp.fc.weight"], ["extra"])
    assert found.different == ["mtp.norm.weight"] and not found.same


def test_a_release_beside_its_source(shipped: dict[str, Path], shipped_source: Path) -> None:
    found = compare(shipped[CT], shipped_source)
    assert (found.projections, found.only_first, found.only_second, found.same_protocol) == (0, [], [], None)
    assert (found.different, found.same) == ([], False)
    release, source, errors = releases.tensors(shipped[CT]), releases.tensors(shipped_source), {}
    for *_, name in releases.expert_names("model.language_model.", range(2), 4):
        wanted = releases.source_weight(source, name)
        errors[name.rstrip(".")] = float((releases.dequantize(release, name) - wanted).norm() / wanted.norm())
    worst = max(errors, key=lambda name: errors[name])
    assert (found.errors.projections, found.errors.worst_name) == (24, worst)
    values = (found.errors.mean, found.errors.median, found.errors.worst)
    assert values == pytest.approx((fmean(errors.values()), median(errors.values()), errors[worst]), rel=1e-5)
    for pair in ((shipped_source, shipped[GPTQ]), (shipped[V2], shipped_source)):
        assert compare(*pair).errors == found.errors
    shown = " ".join(invoke("compare", str(shipped[CT]), str(shipped_source)).output.split())
    assert f"mean {values[0]:.4f}, median {values[1]:.4f}, |W - Wq| / |W|" in shown
    assert f"largest {values[2]:.4f}, {worst}" in shown and "codes changed" not in shown


def test_asymmetric_weights_are_compared_by_value(gptqmodel: dict[str, Path], altered: Altered) -> None:
    other = altered(gptqmodel["asymmetric"])
    assert compare(gptqmodel["asymmetric"], other).same
    stem = "model.language_model.layers.0.mlp.experts.0.up_proj."
    found = edited(gptqmodel["asymmetric"], lambda tensors: tensors[f"{stem}qzeros"][0, :1].add_(1), other)
    assert found.different == [f"{stem}weight"]


def test_rounded_scales(tmp_path: Path) -> None:
    old = foreign.make(tmp_path / "old", "symmetric")
    done = convert(old, tmp_path / "new", CT)
    found = compare(old, tmp_path / "new")
    assert found.scales == done.scales and found.codes_changed == 0 and found.different == []


def test_command(shipped: dict[str, Path], shipped_source: Path) -> None:
    def run(*arguments: object) -> tuple[int, str]:
        done = invoke("compare", *arguments)
        return done.exit_code, done.output

    code, shown = run(shipped[CT], shipped[V2], "--equal")
    assert code == 0 and "every weight is the same" in shown and "top-1 agreement" in shown
    assert run(shipped[CT], shipped_source)[0] == 0
    code, shown = run(shipped[CT], shipped_source, "--equal", "--json")
    assert code == 1 and json.loads(shown.splitlines()[-1])["same"] is False
    assert run(shipped[CT], shipped_source.parent)[0] == 2
