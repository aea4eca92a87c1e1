"""Grids for tests of the solver."""

from __future__ import annotations

from fourfold.core.gptq import Refit
from fourfold.core.grid import INT4, Grid


def int4(group_size: int = 32, dtype: str = "bf16") -> Grid:
    return Grid(levels=INT4, group_size=group_size, scale_dtype=dtype)


def grid_for(refit: Refit | None) -> Grid:
    """FP16 scales where they stay positive, as the older presets have it."""
    return int4(dtype="fp16" if refit is not None and not refit.signed else "bf16")


def int8(group_size: int = 32, dtype: str = "bf16") -> Grid:
    """No format has it yet: kernels take a grid's levels from the grid."""
    return Grid(levels=range(-128, 128), group_size=group_size, scale_dtype=dtype)
