"""An external drafter: what kind it is and how much memory it takes, from its config.json and headers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fourfold.datatypes import FourfoldError, brief
from fourfold.model.config import CONFIG
from fourfold.model.headers import Headers
from fourfold.model.json_object import read_object
from fourfold.serve.kvcache import Geometry

# By a part of the architecture's or the folder's name, as vLLM 0.32 (config/speculative.py) and SGLang 0.5.23
# (speculative/spec_info.py) tell them apart: vLLM's method, SGLang's algorithm.
METHODS = {
    "dflash": ("dflash", "DFLASH"), "dspark": ("dspark", "DSPARK"), "eagle3": ("eagle3", "EAGLE3"),
    "eagle": ("eagle", "EAGLE"),
}  # fmt: skip
MODEL = ("draft_model", "STANDALONE")  # a small model of its own


@dataclass(frozen=True, kw_only=True)
class Drafter:
    """method: vLLM's; algorithm: SGLang's; geometry: of its KV cache."""

    folder: Path
    method: str
    algorithm: str
    weight_bytes: int
    geometry: Geometry


def open_drafter(folder: Path) -> Drafter:
    """Raises FourfoldError for a folder without config.json and safetensors."""
    if not folder.is_dir():
        raise FourfoldError(f"--draft: got {folder}, expected a folder or Hugging Face model ID of a drafter")
    config = read_object(folder / CONFIG)
    text = config.get("text_config") or config
    names = " ".join([*map(str, config.get("architectures") or ()), folder.resolve().name]).lower()
    method, algorithm = next((found for part, found in METHODS.items() if part in names.replace("-", "")), MODEL)
    size = sum(header.size_bytes for header in Headers.open(folder).headers.values())
    geometry = _geometry(text, folder / CONFIG)
    return Drafter(folder=folder, method=method, algorithm=algorithm, weight_bytes=size, geometry=geometry)


def _geometry(text: Mapping[str, Any], path: Path) -> Geometry:
    """As Llama's config.json has it, which that of other models and drafters follow."""

    def number(key: str, default: int | None = None) -> int:
        value = text.get(key, default)
        if type(value) is not int or value < 1:
            raise FourfoldError(f"{path}: {key}: got {brief(value)}, expected a number from 1 on")
        return value

    heads = number("num_attention_heads")
    head_dim = number("head_dim") if text.get("head_dim") else number("hidden_size") // heads
    return Geometry(
        attention=number("num_hidden_layers", 1), linear=0, kv_heads=number("num_key_value_heads", heads),
        head_dim=head_dim,
    )  # fmt: skip
