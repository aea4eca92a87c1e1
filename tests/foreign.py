"""Releases as another tool writes them: whole checkpoints around the tensors that GPTQModel made (tests/data)."""

from __future__ import annotations

import json
from pathlib import Path

from safetensors.torch import load_file
from torch import Tensor

import checkpoints

DATA = Path(__file__).parent / "data"
SIZES = {"layers": 1, "hidden": 256, "width": 128, "topk": 2, "seed": 5}  # of make_gptqmodel.py


def make(folder: Path, kind: str, mtp: str = "fused") -> Path:
    """Its experts, int4, in place of the source's in one shard; the draft head as the source has it.

    kind: "symmetric" or "asymmetric", of which one expert was kept.
    """
    experts = 4 if kind == "symmetric" else 1
    checkpoints.tiny(folder, experts=experts, mtp=mtp, **{**SIZES, "topk": min(2, experts)})
    found = load_file(DATA / f"gptqmodel-{kind}.safetensors")

    def put(tensors: dict[str, Tensor]) -> None:
        for name in list(tensors):
            if name.startswith("model.") and ".mlp.experts." in name:
                del tensors[name]
        tensors.update({name: value for name, value in found.items() if not name.startswith("reference.")})

    checkpoints.edit(folder, put)
    settings = json.loads((DATA / "gptqmodel.json").read_text(encoding="utf-8"))[f"gptqmodel-{kind}"]
    checkpoints.edit_json(folder / "config.json", lambda raw: raw.update(quantization_config=settings))
    (folder / "quantize_config.json").write_text(json.dumps(settings), encoding="utf-8")
    return folder


def to_v2(folder: Path) -> Path:
    """The same checkpoint as gptq_v2: zero points stored as they are."""

    def step(tensors: dict[str, Tensor]) -> None:
        tensors.update({name: value + 0x11111111 for name, value in tensors.items() if name.endswith(".qzeros")})

    checkpoints.edit(folder, step)
    checkpoints.edit_json(
        folder / "config.json", lambda raw: raw["quantization_config"].update(checkpoint_format="gptq_v2")
    )
    return folder
