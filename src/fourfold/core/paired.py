"""Two models on the same questions: is the difference more than chance."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from fourfold.core.metrics import interval, resample


def mcnemar(lost: int, gained: int) -> float:
    """Return the two-sided p-value of McNemar's exact test: flips are as likely in both directions.

    lost, gained: questions that one model alone answers, out of `lost + gained` that differ.
    """
    flips = lost + gained
    tail = sum(math.comb(flips, count) for count in range(min(lost, gained) + 1))
    return float(min(1.0, 2 * tail / 2**flips))


def mean_interval(values: Sequence[float]) -> list[float]:
    """The bootstrap interval of a mean of paired differences, or of other values that are drawn with replacement."""
    values_Q = torch.tensor(values, dtype=torch.float64)
    return interval(resample(len(values)) @ values_Q / len(values))
