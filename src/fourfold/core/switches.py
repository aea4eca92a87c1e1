"""torch's switches for repeatable sums, which belong to the whole process."""

from __future__ import annotations

import torch

Determinism = tuple[bool, bool, bool]  # torch's switches: deterministic, warn only, fill uninitialized memory


def determinism() -> Determinism:
    """Return the switches of this process."""
    filled = torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined] # unknown to torch's stubs
    return torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled(), filled


def set_determinism(switches: Determinism) -> None:
    """Set the switches of this process."""
    deterministic, warn_only, torch.utils.deterministic.fill_uninitialized_memory = switches  # type: ignore[attr-defined]
    torch.use_deterministic_algorithms(deterministic, warn_only=warn_only)
