"""A release in transformers itself, with compressed-tensors installed: as its dequantized weights, to the token."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForImageTextToText

import releases
import whole
from fourfold.recipe import load_recipe

TOKENS = 24


@pytest.mark.slow
@torch.no_grad()
def test_greedy_tokens_are_those_of_the_dequantized_model(tmp_path: Path, example_model: Path) -> None:
    recipe = load_recipe(str(releases.write_recipe(tmp_path)), ["solver.passes=0"])
    releases.run(example_model, tmp_path / "out", recipe)
    release = AutoModelForImageTextToText.from_pretrained(tmp_path / "out", dtype=torch.bfloat16).eval()
    dequantized = AutoModelForImageTextToText.from_pretrained(example_model, dtype=torch.bfloat16).eval()
    whole.take_experts_(dequantized, releases.tensors(tmp_path / "out"))
    token_RT = torch.randint(20, 2000, (2, 32), generator=torch.Generator().manual_seed(0))
    options = {"do_sample": False, "min_new_tokens": TOKENS, "max_new_tokens": TOKENS}
    found, wanted = (model.generate(input_ids=token_RT, **options) for model in (release, dequantized))
    assert found.shape == (2, 32 + TOKENS)
    assert torch.equal(found, wanted)
    source = AutoModelForImageTextToText.from_pretrained(example_model, dtype=torch.bfloat16).eval()
    assert not torch.equal(source(input_ids=token_RT).logits, dequantized(input_ids=token_RT).logits)
