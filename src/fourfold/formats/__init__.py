"""Formats of int4 releases, as values. A new one is a file here and an entry in FORMATS. Imports no torch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from fourfold.formats.compressed_tensors import COMPRESSED_TENSORS
from fourfold.formats.format import Format
from fourfold.formats.gguf import NAME as GGUF
from fourfold.formats.gptq import GPTQ, GPTQ_V2
from fourfold.formats.mlx import NAME as MLX

FORMATS: tuple[Format, ...] = (COMPRESSED_TENSORS, GPTQ, GPTQ_V2)
NAMES = tuple(one.name for one in FORMATS)
if TYPE_CHECKING:
    Name = str
else:
    Name = Literal[NAMES]  # the names that a recipe may hold
EXPORTS = {GGUF: "llama.cpp", MLX: "mlx"}  # what `convert` writes for the one engine that reads it
METHODS = tuple(dict.fromkeys(method for one in FORMATS for method in one.methods))
DRAFTS_IN_SGLANG = next(one.name for one in FORMATS if one.sglang_drafts)  # the format to name as a fix


def named(name: str) -> Format:
    """Return a format by its name in a recipe. Raises KeyError if there is none."""
    return {one.name: one for one in FORMATS}[name]
