"""mlx_dequantize.py FOLDER OUT.safetensors    all codes of a folder for MLX, in fp32, by mx.dequantize."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import mlx.core as mx

folder, out = map(Path, sys.argv[1:])
config = json.loads((folder / "config.json").read_text())
settings = config["quantization"]
stored = {name: value for path in folder.glob("model*.safetensors") for name, value in mx.load(str(path)).items()}
found = {}
for stem in (name.removesuffix("scales") for name in stored if name.endswith(".scales")):
    scales, biases = (stored[stem + part].astype(mx.float32) for part in ("scales", "biases"))
    path = stem.rstrip(".").replace("model.language_model", "language_model.model")
    path = f"language_model.{path}" if path == "lm_head" and "text_config" in config else path
    own = settings | settings.get(path, {})
    found[f"{stem}weight"] = mx.dequantize(
        stored[f"{stem}weight"], scales, biases, group_size=own["group_size"], bits=own["bits"]
    )
mx.save_safetensors(str(out), found)
