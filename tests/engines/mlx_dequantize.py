"""mlx_dequantize.py FOLDER OUT.safetensors    every int4 stack of a folder for MLX, in fp32, by mx.dequantize."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import mlx.core as mx

folder, out = map(Path, sys.argv[1:])
settings = json.loads((folder / "config.json").read_text())["quantization"]
stored = {name: value for path in folder.glob("model*.safetensors") for name, value in mx.load(str(path)).items()}
found = {}
for stem in (name.removesuffix("scales") for name in stored if name.endswith(".scales")):
    scales, biases = (stored[stem + part].astype(mx.float32) for part in ("scales", "biases"))
    found[f"{stem}weight"] = mx.dequantize(
        stored[f"{stem}weight"], scales, biases, group_size=settings["group_size"], bits=settings["bits"]
    )
mx.save_safetensors(str(out), found)
