"""Errors of stored weights and counts of codes, against naive float64."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

import problems
import reference
import releases
from fourfold.core import fidelity
from fourfold.core.pack import pack_codes
from fourfold.datatypes import QuantizedGroup
from fourfold.formats import named


@pytest.mark.parametrize("form", releases.FORMATS)
@pytest.mark.parametrize(("rows", "inputs", "slab"), [(16, 256, 2**18), (40, 128, 128 * 7), (8, 128, 64)])
def test_squared_errors(monkeypatch: pytest.MonkeyPatch, form: str, rows: int, inputs: int, slab: int) -> None:
    """Also where a slab is a few rows, the last one fewer, and where a row is larger than a slab."""
    monkeypatch.setattr(fidelity, "SLAB_ELEMENTS", slab)
    generator = torch.Generator().manual_seed(rows)
    weight = (torch.randn(rows, inputs, generator=generator) * 0.02).bfloat16()
    codes = torch.randint(-8, 8, (1, rows, inputs), generator=generator, dtype=torch.int8)
    scales = (torch.randn(1, rows, inputs // 64, generator=generator) * 0.01).bfloat16().float()
    format = named(form)
    stored = {name: value[0] for name, value in format.pack(QuantizedGroup(codes, scales)).items()}
    wanted = weight.double() - releases.dequantize({"x." + name: value for name, value in stored.items()}, "x.")
    error, rounded, norm = fidelity.squared_errors(
        weight, format.oriented(stored[format.codes]), format.oriented(stored[format.scales])
    )
    assert error == pytest.approx(float(wanted.square().sum()), rel=1e-5)
    groups = problems.array(weight).reshape(-1, 64)
    steps = [reference.stored(float(np.float32(np.abs(group).max() * (2 / 15))), "bf16") for group in groups]
    missed = [group - step * np.clip(np.rint(group / step), -8, 7) for group, step in zip(groups, steps, strict=True)]
    assert rounded == pytest.approx(float(np.square(missed).sum()), rel=1e-4)
    assert norm == pytest.approx(float(weight.double().square().sum()), rel=1e-5)


def test_an_exact_projection_has_no_error() -> None:
    codes, scales = torch.randint(-8, 8, (1, 8, 128), dtype=torch.int8), torch.full((1, 8, 1), 2.0**-7)
    weight = (codes[0] * 2.0**-7).bfloat16()
    assert fidelity.squared_errors(weight, pack_codes(codes)[0], scales[0])[0] == 0


def test_code_counts() -> None:
    words = torch.randint(-(2**31), 2**31, (24, 40), dtype=torch.int64).int()
    codes = releases.unpack_words(words)
    assert fidelity.code_counts(words).tolist() == [int((codes == code).sum()) for code in range(-8, 8)]


@pytest.mark.parametrize(("counts", "bits"), [([5] * 16, 4), ([0] * 15 + [9], 0), ([3, 3] + [0] * 14, 1)])
def test_entropy(counts: list[int], bits: float) -> None:
    assert math.isclose(fidelity.entropy_bits(torch.tensor(counts)), bits, abs_tol=1e-12)
