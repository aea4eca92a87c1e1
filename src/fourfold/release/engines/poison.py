"""Proof that a loader wrote every parameter. Runs under an engine's interpreter: imports torch, nothing of fourfold.

Engines allocate parameters uninitialized and skip names they do not know, so a load without an error proves nothing.
Every parameter is filled with a value that no checkpoint holds and loaded, then again with another value: an element
that equals the filling both times was never written. Docs: docs/verification.md.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch

# Of the first and of the second load: for floats, and a byte for integers of any width.
FILLINGS = ((-1234.5, 0x5A), (4321.25, 0x33))


def filling(parameter: torch.Tensor, which: int) -> float | int:
    """The value that `parameter` is filled with before load `which`: exact in FP16 and BF16, or one byte repeated."""
    number, byte = FILLINGS[which]
    if parameter.is_floating_point():
        return number if parameter.element_size() > 1 else 16.0 * (1 + which)
    if parameter.dtype is torch.bool:
        return bool(which)
    return int.from_bytes(bytes([byte] * parameter.element_size()), "little")


def load_twice(model: torch.nn.Module, load: Callable[[], object], defaulted: Iterable[str]) -> dict[str, Any]:
    """Load over both fillings and say what stayed unwritten. The engine keeps the second load.

    load: runs the engine's own loader once; defaulted: endings of parameter names that the engine gives a value of its
    own: these may stay unwritten and get that value back.
    Returns JSON types: parameters (how many), elements, unwritten and zero_scales (name -> "n of m").
    """
    endings = tuple(defaulted)
    defaults = {n: p.detach().clone() for n, p in model.named_parameters() if n.endswith(endings)}
    stale: dict[str, torch.Tensor] = {}
    for which in range(len(FILLINGS)):
        for parameter in model.parameters():
            parameter.data.fill_(filling(parameter, which))
        load()
        for name, parameter in model.named_parameters():
            same = parameter.data == parameter.new_full((), filling(parameter, which))
            stale[name] = (same.cpu() & stale[name]) if name in stale else same.cpu()
    found: dict[str, Any] = {"parameters": 0, "elements": 0, "unwritten": {}, "zero_scales": {}}
    for name, parameter in model.named_parameters():
        if name in defaults:
            unwritten = stale[name].to(parameter.device)
            parameter.data.copy_(torch.where(unwritten, defaults[name], parameter.data))
            continue
        found["parameters"] += 1
        found["elements"] += parameter.numel()
        if stale[name].any():
            found["unwritten"][name] = f"{int(stale[name].sum()):,} of {parameter.numel():,}"
        elif "scale" in name and (parameter.numel() == 0 or bool((parameter == 0).any())):
            zeros = int((parameter == 0).sum())
            found["zero_scales"][name] = f"{zeros:,} of {parameter.numel():,}" if parameter.numel() else "empty"
    return found
