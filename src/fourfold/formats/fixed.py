"""What engines with code of their own for each architecture leave no choice in, whatever config.json says."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fourfold.datatypes import brief


def unsupported(text: Any, fixed: Mapping[str, Any]) -> str:
    """Return what an engine that computes an architecture in one way would compute otherwise; "" if there is nothing.

    text: transformers' config of the text model; fixed: the values that the engine has fixed.
    """
    wanted = {"sliding_window": (None, 0), "hidden_act": ("silu",)} | {key: (value,) for key, value in fixed.items()}
    for key, values in wanted.items():
        if getattr(text, key, values[0]) not in values:
            return f"{key}: got {brief(getattr(text, key))}, expected {brief(values[0])}"
    if (kind := (text.rope_parameters or {}).get("rope_type", "default")) != "default":
        return f"rope_type: got {brief(kind)}, expected 'default'"
    kinds, step = list(getattr(text, "layer_types", None) or ()), attention_interval(text)
    if step and kinds != [
        ("linear_attention", "full_attention")[(layer + 1) % step == 0] for layer in range(len(kinds))
    ]:
        return f"layer_types: got {brief(kinds)}, expected full attention in every {step}. layer, linear in all others"
    return ""


def attention_interval(text: Any) -> int:
    """Return in every which layer a hybrid model has full attention, by its first such layer; 0 of other models."""
    kinds = list(getattr(text, "layer_types", None) or ())
    return kinds.index("full_attention") + 1 if {"linear_attention", "full_attention"} <= {*kinds} else 0
