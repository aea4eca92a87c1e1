"""An external drafter: what kind it is and how much memory it takes, from its config.json and headers."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from fourfold.datatypes import FourfoldError
from fourfold.model.config import CONFIG
from fourfold.model.headers import Headers
from fourfold.model.json_object import read_object

# By a part of the architecture's or the folder's name, as vLLM 0.32 (config/speculative.py) and SGLang 0.5.23
# (speculative/spec_info.py) tell them apart: vLLM's method, SGLang's algorithm.
METHODS = {
    "dflash": ("dflash", "DFLASH"), "dspark": ("dspark", "DSPARK"), "eagle3": ("eagle3", "EAGLE3"),
    "eagle": ("eagle", "EAGLE"),
}  # fmt: skip
MODEL = ("draft_model", "STANDALONE")  # a small model of its own


@dataclass(frozen=True, kw_only=True)
class Drafter:
    """method: vLLM's; algorithm: SGLang's; layers: its own, each with a KV cache."""

    folder: Path
    method: str
    algorithm: str
    weight_bytes: int
    layers: int


def open_drafter(folder: Path) -> Drafter:
    """Raises FourfoldError for a folder without config.json and safetensors."""
    if not folder.is_dir():
        raise FourfoldError(f"--draft: got {folder}, expected a folder or Hugging Face model ID of a drafter")
    config = read_object(folder / CONFIG)
    text = config.get("text_config") or config
    names = " ".join([*map(str, config.get("architectures") or ()), folder.resolve().name]).lower()
    method, algorithm = next((found for part, found in METHODS.items() if part in names.replace("-", "")), MODEL)
    layers = text.get("num_hidden_layers", 1)
    if not isinstance(layers, int):
        raise FourfoldError(f"{folder / CONFIG}: num_hidden_layers: got {layers!r}, expected a number")
    size = sum(header.size_bytes for header in Headers.open(folder).headers.values())
    return Drafter(folder=folder, method=method, algorithm=algorithm, weight_bytes=size, layers=layers)
