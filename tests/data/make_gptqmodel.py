"""How gptqmodel-*.safetensors and gptqmodel.json were made, by GPTQModel 7.7.0 (torch 2.13.0, transformers 5.23.0).

    python tests/data/make_gptqmodel.py symmetric|asymmetric    in an environment of GPTQModel's

The source is checkpoints.tiny with the sizes below. Kept are the experts' tensors (asymmetric: of expert 0) and, as
`reference.PROJECTION`, the weights [N, K] of expert 0 as GPTQModel dequantizes them.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from pathlib import Path

os.environ["GPTQMODEL_CPU_WORKERS"] = "2"
sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from gptqmodel import GPTQModel
from gptqmodel.nn_modules.qlinear.torch import TorchLinear
from gptqmodel.quantization.config import GPTQConfig
from safetensors.torch import load_file, save_file

import checkpoints

HERE = Path(__file__).parent
SIZES = {"layers": 1, "hidden": 256, "width": 128, "experts": 4, "topk": 2, "seed": 5}
EXPERTS_ONLY = ("attn", "shared_expert", "mtp", "visual")
KINDS = {
    "symmetric": {"sym": True},
    "asymmetric": {"sym": False, "desc_act": True, "act_group_aware": False, "format": "gptq_v2"},
}


def quantize(kind: str, folder: Path) -> tuple[dict[str, torch.Tensor], dict[str, object]]:
    source = checkpoints.tiny(folder / "source", **SIZES)
    (source / "preprocessor_config.json").write_bytes((checkpoints.EXAMPLE / "preprocessor_config.json").read_bytes())
    dynamic: dict[str, object] = {f"-:.*{part}.*": {} for part in EXPERTS_ONLY}
    model = GPTQModel.load(str(source), GPTQConfig(bits=4, group_size=64, dynamic=dynamic, **KINDS[kind]))
    generator = torch.Generator().manual_seed(3)
    rows = torch.randint(100, 2000, (16, 256), generator=generator).tolist()
    model.quantize([{"input_ids": row, "attention_mask": [1] * len(row)} for row in rows], batch_size=8)
    model.save(str(folder / "out"))
    config = json.loads((folder / "out" / "config.json").read_text())["quantization_config"]
    config.pop("meta")
    return load_file(folder / "out" / "model.safetensors"), config


def dequantized(tensors: dict[str, torch.Tensor], config: dict[str, object]) -> torch.Tensor:
    inputs, outputs = tensors["qweight"].shape[0] * 8, tensors["qweight"].shape[1]
    linear = TorchLinear(
        bits=4,
        group_size=config["group_size"],
        sym=config["sym"],
        desc_act=config["desc_act"],
        in_features=inputs,
        out_features=outputs,
        bias=False,
        pack_dtype=torch.int32,
        register_buffers=True,
    )
    for name, value in tensors.items():
        setattr(linear, name, value.clone())
    if config["checkpoint_format"] == "gptq":
        linear.qzeros = linear.qzeros + 0x11111111  # its loader's step from v1 to v2
    linear.post_init()
    return linear.dequantize_weight().T.contiguous().half()


def main(kind: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        found, config = quantize(kind, Path(folder))
    kept = {name: value for name, value in found.items() if ".mlp.experts." in name and not name.startswith("mtp.")}
    if kind == "asymmetric":
        kept = {name: value for name, value in kept.items() if ".experts.0." in name}
    for projection in ("gate_proj", "up_proj", "down_proj"):
        stem = f"model.language_model.layers.0.mlp.experts.0.{projection}."
        own = {name.removeprefix(stem): value for name, value in kept.items() if name.startswith(stem)}
        kept[f"reference.{projection}"] = dequantized(own, config)
    save_file(kept, HERE / f"gptqmodel-{kind}.safetensors", metadata={"format": "pt"})
    path = HERE / "gptqmodel.json"
    configs = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(configs | {f"gptqmodel-{kind}": config}, indent=1) + "\n")


if __name__ == "__main__":
    main(sys.argv[1])
