"""Rows with images, layer by layer, against transformers' own model as a whole."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import Qwen3VLMoeConfig, Qwen3VLMoeForConditionalGeneration

from fourfold.datatypes import Beside, FourfoldError
from fourfold.model.checkpoint import HOST, Checkpoint
from fourfold.model.layer import pass_rows
from fourfold.model.processor import require_vision
from fourfold.model.rehearsal import NOISE
from fourfold.model.skeleton import Skeleton
from fourfold.quantize.streams import embeddings

GRIDS = torch.tensor([[1, 4, 6], [1, 4, 4]])  # patches of two images; four make a token


def prompt(image: int, start: int, end: int) -> Tensor:
    """Words, an image, words, another, words."""
    pads = [[start, *[image] * (int(grid.prod()) // 4), end] for grid in GRIDS]
    return torch.tensor([[20, 21, *pads[0], 22, 23, 24, *pads[1], 25, 26]])


def whole_states(folder: Path, token_1T: Tensor, given: dict[str, Tensor]) -> list[Tensor]:
    model_class = type(Checkpoint.open(folder).blueprint.model)
    model: Any = model_class.from_pretrained(folder, dtype=torch.bfloat16).eval()
    states: list[Tensor] = []
    for layer in model.get_decoder().layers:
        layer.register_forward_hook(lambda module, args, out: states.append(out.clone()))
    with torch.no_grad():
        model(input_ids=token_1T, use_cache=False, **given)
    return states


def require_same(folder: Path, token_1T: Tensor, width: int) -> dict[int, Tensor]:
    """Returns what the model adds before layers."""
    pixels = torch.randn(int(GRIDS.prod(1).sum()), width, generator=torch.Generator().manual_seed(1))
    image = int(token_1T.mode().values)
    given = {"pixel_values": pixels, "image_grid_thw": GRIDS, "mm_token_type_ids": (token_1T == image).int()}
    states, checkpoint = whole_states(folder, token_1T, given), Checkpoint.open(folder)
    found = embeddings(checkpoint, towers=True).calls(token_1T, given)
    state, carried = found.state, ()
    for index, expected in enumerate(states):
        layer = checkpoint.layer(index, HOST, torch.bfloat16)
        output, _, _ = pass_rows(layer, state, Beside(token_1T, carried, found.on_host()))
        assert float((output - expected).float().norm() / expected.float().norm()) <= NOISE, index
        plain, _, _ = pass_rows(layer, state, Beside(token_1T, carried))
        if checkpoint.layer_kind(index) == "full_attention":
            assert float((plain - expected).float().norm() / expected.float().norm()) > NOISE, "positions tell"
        state = expected
    return dict(found.added)


def test_an_image_has_its_positions(vision_model: Path) -> None:
    assert not require_same(vision_model, prompt(7, 5, 6), 3 * 2 * 8 * 8)


def test_what_deepstack_adds_is_recorded(tmp_path: Path) -> None:
    text = {
        "hidden_size": 64, "head_dim": 32, "num_attention_heads": 2, "num_key_value_heads": 1, "num_hidden_layers": 3,
        "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "vocab_size": 64,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [6, 5, 5]},
    }  # fmt: skip
    vision = {
        "depth": 3, "hidden_size": 32, "intermediate_size": 32, "num_heads": 2, "patch_size": 4, "out_hidden_size": 64,
        "num_position_embeddings": 64, "deepstack_visual_indexes": [0, 1], "temporal_patch_size": 2,
    }  # fmt: skip
    ids = {"image_token_id": 7, "video_token_id": 8, "vision_start_token_id": 5, "vision_end_token_id": 6}
    torch.manual_seed(0)
    model = Qwen3VLMoeForConditionalGeneration(Qwen3VLMoeConfig(text_config=text, vision_config=vision, **ids))
    for value in model.parameters():
        value.data = value.data * 4 if value.ndim > 1 else value.data  # so that each part tells
    model.bfloat16().save_pretrained(tmp_path)
    added = require_same(tmp_path, prompt(7, 5, 6), 3 * 2 * 4 * 4)
    assert sorted(added) == [1, 2] and all(value.any() for value in added.values())


def test_a_text_model_takes_no_images(tmp_path: Path) -> None:
    raw = {
        "model_type": "qwen3_moe", "architectures": ["Qwen3MoeForCausalLM"], "hidden_size": 64, "head_dim": 32,
        "num_attention_heads": 2, "num_key_value_heads": 1, "num_hidden_layers": 1, "num_experts": 4,
        "num_experts_per_tok": 2, "moe_intermediate_size": 32, "vocab_size": 64,
    }  # fmt: skip
    with pytest.raises(FourfoldError, match="Qwen3MoeForCausalLM takes no images"):
        require_vision(Skeleton.of(raw, tmp_path / "config.json"))
