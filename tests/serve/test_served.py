"""What is read of a checkpoint that is to be served."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import checkpoints
import families
import releases
from fourfold.datatypes import FourfoldError
from fourfold.recipe import load_recipe
from fourfold.serve.kvcache import Geometry
from fourfold.serve.served import UnknownCache, open_served


def test_the_example(example_model: Path) -> None:
    served = open_served(example_model)
    assert (served.name, served.model_type, served.format) == ("tiny-qwen3.6-moe", "qwen3_5_moe", None)
    assert served.geometry == Geometry(
        attention=1, linear=3, kv_heads=2, head_dim=64, conv=4, key_heads=2, key_dim=64, value_heads=4, value_dim=64
    )
    assert (served.context, served.expert_width, served.group_size, served.vision) == (4096, 128, 0, True)
    index = json.loads((example_model / "model.safetensors.index.json").read_text())
    assert served.weight_bytes + served.draft_bytes == index["metadata"]["total_size"]
    assert served.has_draft
    assert "<think>" in served.template


@pytest.mark.parametrize("form", ["compressed-tensors", "gptq"])
def test_a_release(tmp_path: Path, form: str) -> None:
    source = releases.make_source(tmp_path / "model")
    recipe = load_recipe(str(releases.write_recipe(tmp_path)), [f'format="{form}"', "scheme.group_size=32"])
    releases.run(source, tmp_path / "out", recipe)
    (tmp_path / "out" / "generation_config.json").write_text('{"temperature": 0.6, "top_k": 20, "eos_token_id": 1}')
    served = open_served(tmp_path / "out", "mine")
    assert (served.name, str(served.format), served.group_size) == ("mine", form, 32)
    assert served.sampling == {"temperature": 0.6, "top_k": 20}
    assert served.has_draft


def test_a_folder_that_is_no_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(FourfoldError, match=r"no config\.json"):
        open_served(tmp_path)


def test_a_broken_side_file(tmp_path: Path) -> None:
    model = checkpoints.tiny(tmp_path / "model")
    (tmp_path / "model" / "generation_config.json").write_text("{")
    with pytest.raises(FourfoldError, match=r"generation_config\.json: not JSON"):
        open_served(tmp_path / "model")
    assert model is None or model


def test_a_latent_that_all_heads_share(tmp_path: Path) -> None:
    """MLA keeps kv_lora_rank + qk_rope_head_dim values of a token, whatever the heads, on every rank."""
    families.tiny(tmp_path, "deepseek_v3")
    geometry = open_served(tmp_path).geometry
    assert (geometry.attention, geometry.linear, geometry.latent) == (4, 0, 512 + 64)
    assert [geometry.token_bytes(ranks, 2) for ranks in (1, 2)] == [1152, 1152]


@pytest.mark.parametrize("family", ["deepseek_v32", "gemma4"])
def test_a_cache_that_is_not_known(tmp_path: Path, family: str) -> None:
    families.tiny(tmp_path, family)
    with pytest.raises(UnknownCache, match=f"the cache of {family} cannot be worked out"):
        open_served(tmp_path)
