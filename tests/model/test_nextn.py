"""The draft layer past the last against transformers' own modules, put together by hand from the report's formula."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from fourfold.model.checkpoint import Checkpoint
from fourfold.model.nextn import nextn_names, read_nextn_head
from nextn import LAYERS, with_nextn

CPU = torch.device("cpu")
pytestmark = pytest.mark.filterwarnings("ignore")


def by_hand(whole: Any, joined: Mapping[str, Tensor], hidden_TD: Tensor, token_T: Tensor) -> tuple[Tensor, Tensor]:
    """The draft layer's normed output and logits for one row of text, fp32."""
    w = {name.partition(f"layers.{LAYERS}.")[2]: value.float() for name, value in joined.items()}

    def norm(value: Tensor, name: str) -> Tensor:
        return (
            value
            * (value.square().mean(dim=-1, keepdim=True) + whole.config.rms_norm_eps).rsqrt()
            * w[f"{name}.weight"]
        )

    embedded_TD = w["embed_tokens.weight"][token_T[1:]]
    embedded_TD[0] = 0
    pair_TF = torch.cat([norm(embedded_TD, "enorm"), norm(hidden_TD[:-1], "hnorm")], dim=1)
    x_1TD = (pair_TF @ w["eh_proj.weight"].T)[None]
    position_1T = torch.arange(len(token_T) - 1)[None]
    mask = torch.full((len(token_T) - 1,) * 2, -torch.inf).triu(1)[None, None]
    layer: nn.Module = whole.model.layers[LAYERS]
    out_1TD = layer(
        x_1TD, attention_mask=mask, position_ids=position_1T,
        position_embeddings=whole.model.rotary_emb(x_1TD, position_1T),
    )  # fmt: skip
    normed_TD = norm(out_1TD[0], "shared_head.norm")
    return normed_TD, normed_TD @ w["shared_head.head.weight"].T


@torch.no_grad()
@pytest.mark.parametrize("family", ["deepseek_v3", "glm4_moe"])
def test_the_step_is_that_of_the_report(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = with_nextn(tmp_path, family, monkeypatch)
    weights = Checkpoint.open(tmp_path)
    names = nextn_names(weights)
    head = read_nextn_head(weights, names, CPU, torch.float32)
    generator = torch.Generator().manual_seed(3)
    token_RT = torch.randint(3, 480, (2, 20), generator=generator)
    hidden_RTD = torch.randn(2, 20, 256, generator=generator)
    position_RP = torch.arange(19).expand(2, -1)
    found_RTD = head.drafts(hidden_RTD, token_RT).first(position_RP)
    joined = {name: value for name, value in load_file(tmp_path / "model.safetensors").items() if ".4." in name}
    for row in range(2):
        normed_TD, logits_TV = by_hand(whole, joined, hidden_RTD[row], token_RT[row])
        torch.testing.assert_close(found_RTD[row], normed_TD, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(found_RTD[row] @ head.head.weight_VD.T, logits_TV, rtol=1e-3, atol=1e-3)


def test_heads_that_are_built_otherwise_are_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with_nextn(tmp_path, "glm4_moe", monkeypatch)
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)
    assert nextn_names(Checkpoint.open(tmp_path))
    for name in ("enorm.weight", "shared_head.norm.weight"):
        save_file({key: value for key, value in tensors.items() if not key.endswith(f"4.{name}")}, path)
        assert not nextn_names(Checkpoint.open(tmp_path)), name
    second = {"model.layers.5.eh_proj.weight": tensors["model.layers.4.eh_proj.weight"].clone()}
    save_file(tensors | second, path)
    assert not nextn_names(Checkpoint.open(tmp_path))  # two heads
