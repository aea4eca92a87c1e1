"""Which routers' logits alone decide where a token goes: found by trying, without a list of families."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

import families
from fourfold.model.checkpoint import Checkpoint
from fourfold.model.router import decides, find_router


@pytest.mark.parametrize(
    ("family", "router"),
    [
        ("qwen3_5_moe", "gate.weight"),
        ("mixtral", "gate.weight"),
        ("granitemoeshared", "router.weight"),
        ("deepseek_v2", "gate.weight"),
        ("deepseek_v3", ""),  # sigmoid, a bias for the choice, groups
        ("glm4_moe", ""),
        ("ernie4_5_moe", ""),  # softmax with a bias for the choice
        ("lfm2_moe", ""),  # sigmoid with a bias
        ("gemma4", ""),  # another input than the experts'
    ],
)
def test_routers_are_found_by_what_they_choose(tmp_path: Path, family: str, router: str) -> None:
    found = find_router(Checkpoint.open_source(families.tiny(tmp_path, family)))
    assert found.endswith(router) if router else not found


def test_a_router_with_groups_of_experts_is_none(tmp_path: Path) -> None:
    folder = families.tiny(tmp_path, "deepseek_v2")
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    groups = {"topk_method": "group_limited_greedy", "n_group": 4, "topk_group": 1, "num_experts_per_tok": 2}
    (folder / "config.json").write_text(json.dumps(config | groups), encoding="utf-8")
    assert find_router(Checkpoint.open_source(folder)) == ""


def softmax_router(seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    logits_TE = torch.randn(64, 8, generator=torch.Generator().manual_seed(seed))
    weight_TA, index_TA = logits_TE.softmax(dim=1).topk(2, dim=1)
    return logits_TE, index_TA, weight_TA


def test_a_choice_by_logits_is_one_however_weights_are_made() -> None:
    logits_TE, index_TA, weight_TA = softmax_router()
    assert decides(logits_TE, index_TA, weight_TA)
    assert decides(logits_TE, index_TA.flip(1), (weight_TA / weight_TA.sum(dim=1, keepdim=True)).flip(1))
    assert decides(logits_TE, index_TA, 2.5 * logits_TE.sigmoid().gather(1, index_TA))


def test_other_choices_are_none() -> None:
    logits_TE, index_TA, weight_TA = softmax_router()
    biased_TA = (logits_TE + 0.3 * torch.arange(8) / 8).topk(2, dim=1).indices
    assert not decides(logits_TE, biased_TA, weight_TA)
    scaled_TA = weight_TA * torch.linspace(0.5, 2, 8)[index_TA]  # a scale for each expert
    assert not decides(logits_TE, index_TA, scaled_TA)
    every_TA = torch.arange(8).expand(64, 8)
    assert not decides(logits_TE, every_TA, logits_TE.softmax(dim=1))
