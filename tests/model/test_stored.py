"""Weights as other quantizers store them: each against compressed-tensors' own unpacking."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import checkpoints
import rivals
from fourfold.datatypes import FourfoldError
from fourfold.model.checkpoint import Checkpoint

NAME = "model.language_model.layers.0.mlp.experts.0.down_proj."


@pytest.mark.parametrize("kind", rivals.KINDS)
def test_weights_are_what_their_maker_reads(tmp_path: Path, kind: str) -> None:
    wanted = rivals.make(tmp_path, kind, layers=1, experts=2)
    found = Checkpoint.open(tmp_path)
    assert len(wanted) == 6 and wanted.keys() <= found.stored.keys()
    for name, weight in wanted.items():
        assert torch.equal(found.read(name), weight.to(torch.bfloat16)), name
    assert {one.bits for one in found.projections.values()} == {8 if "fp8" in kind else 4}


@pytest.mark.parametrize(
    ("kind", "suffix", "said"),
    [
        ("awq", "qzeros", r"qzeros is missing, .*; wanted I32"),
        ("ct-nvfp4", "weight_global_scale", "weight_global_scale is missing; wanted F8_E4M3"),
        ("ct-fp8-channel", "weight_scale", "weight_scale_inv is missing, wanted"),
    ],
)
def test_a_part_that_is_missing_is_named(tmp_path: Path, kind: str, suffix: str, said: str) -> None:
    rivals.make(tmp_path, kind, layers=1, experts=2)
    checkpoints.edit(tmp_path, lambda tensors: tensors.pop(NAME + suffix))
    with pytest.raises(FourfoldError, match=said):
        Checkpoint.open(tmp_path)


@pytest.mark.parametrize(
    ("kind", "key", "value", "said"),
    [
        ("awq", "version", "gemv", "AWQ with 4 bits, version 'gemv'; expected 4 bits, gemm"),
        ("awq", "bits", 3, "AWQ with 3 bits"),
        ("ct-nvfp4", "config_groups", {"g": {"format": "nvfp4-pack-quantized"}}, "nvfp4-pack-quantized"),
    ],
)
def test_layouts_that_are_not_read_are_refused(tmp_path: Path, kind: str, key: str, value: object, said: str) -> None:
    rivals.make(tmp_path, kind, layers=1, experts=2)
    checkpoints.edit_json(tmp_path / "config.json", lambda raw: raw["quantization_config"].update({key: value}))
    with pytest.raises(FourfoldError) as raised:
        Checkpoint.open(tmp_path)
    assert said in str(raised.value), json.dumps(str(raised.value))
