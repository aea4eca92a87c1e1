"""Small checkpoints with a draft layer past the last, as DeepSeek-V3 has it. Nothing here imports fourfold."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import families

LAYERS = 4


def with_nextn(folder: Path, family: str, patch: pytest.MonkeyPatch, vocabulary: int = families.VOCABULARY) -> Any:
    """A small checkpoint whose last layer is a draft layer, with what joins it to the model.

    Returns transformers' model of all layers in fp32.
    """
    case = families.FAMILIES[family]
    patch.setitem(families.FAMILIES, family, dataclasses.replace(case, text={**case.text, "num_hidden_layers": 5}))
    families.tiny(folder, family, vocabulary)
    whole = families.settings(family)[0].from_pretrained(folder, dtype=torch.float32).eval()
    raw = json.loads((folder / "config.json").read_text())
    for key, value in raw.items():
        if isinstance(value, list) and len(value) == LAYERS + 1:
            raw[key] = value[:LAYERS]
    raw["num_hidden_layers"] = LAYERS
    (folder / "config.json").write_text(json.dumps(raw))
    path = folder / "model.safetensors"
    tensors = load_file(path)
    save_file(tensors | joining(tensors), path, metadata={"format": "pt"})
    return whole


def joining(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(5)
    embedding_VD = tensors["model.embed_tokens.weight"]
    width = embedding_VD.shape[1]

    def near_one() -> Tensor:
        return (1 + 0.1 * torch.randn(width, generator=generator)).bfloat16()

    made = {
        "eh_proj.weight": (torch.randn(width, 2 * width, generator=generator) * width**-0.5).bfloat16(),
        **{name: near_one() for name in ("enorm.weight", "hnorm.weight", "shared_head.norm.weight")},
        "embed_tokens.weight": embedding_VD + 0.01,
        "shared_head.head.weight": tensors["lm_head.weight"] * 2 + 0.01,
    }
    return {f"model.layers.{LAYERS}.{name}": value for name, value in made.items()}
