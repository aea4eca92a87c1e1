"""mlx_logits.py mlx_lm|mlx_vlm TOKENS.npy FOLDER LOGITS.npy [FOLDER LOGITS.npy ...]    logits of whole rows, in fp32"""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import mlx.core as mx
import numpy

engine, tokens, *pairs = sys.argv[1:]
load_model = importlib.import_module(f"{engine}.utils").load_model
for folder, out in zip(pairs[::2], pairs[1::2], strict=True):
    model = load_model(Path(folder))
    model = model[0] if isinstance(model, tuple) else getattr(model, "language_model", model)
    found = model(mx.array(numpy.load(tokens)))
    numpy.save(out, numpy.array(getattr(found, "logits", found).astype(mx.float32)))
