"""The rehearsal of a small copy: what it lets through, and that it catches what is derived wrongly."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import CONFIG_MAPPING

from families import settings
from fourfold.datatypes import FourfoldError
from fourfold.model import calls, rehearsal, skeleton
from fourfold.model.arithmetic import Arithmetic
from fourfold.model.skeleton import Skeleton

pytestmark = pytest.mark.filterwarnings("ignore")


def small(family: str) -> Skeleton:
    return Skeleton.of(settings(family)[1], Path("config.json"))


@pytest.mark.parametrize(
    "family",
    ["deepseek_v4", "gemma4", "granitemoehybrid", "mistral_large4", "nemotron_h+latent", "qwen3_vl_moe", "zaya"],
)
def test_what_is_derived_rightly_passes(family: str) -> None:
    """Token ids in calls, tails of all kinds, values on disk that calls need, no gate, stacks on disk, a carry."""
    rehearsal.rehearse(small(family))


def no_buffers(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(skeleton, "read_buffers", lambda blueprint, read: {})


def no_carry(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(calls._Stubs, "carry", lambda stubs: {})


def added(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(calls, "measure_tail", lambda *given: 1.0)


def exchanged(patch: pytest.MonkeyPatch) -> None:
    hidden = Arithmetic.hidden
    patch.setattr(Arithmetic, "hidden", lambda own, value: hidden(own, torch.cat(value.chunk(2, dim=-1)[::-1], dim=-1)))


@pytest.mark.parametrize(
    ("family", "spoil", "expected"),
    [
        ("mistral_large4", no_buffers, "layer . is off by"),
        ("zaya", no_carry, "cannot be run layer by layer"),
        ("gemma4", added, "layer . is off by"),
        ("granitemoe", added, "layer . is off by"),
        ("qwen3_moe", exchanged, "layer . is off by"),
    ],
)
def test_what_is_derived_wrongly_is_caught(
    family: str, spoil: Callable[[pytest.MonkeyPatch], None], expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    spoil(monkeypatch)
    with pytest.raises(FourfoldError, match=expected):
        rehearsal.rehearse(small(family))


def test_states_of_other_layers_are_refused() -> None:
    with pytest.raises(
        FourfoldError, match=r"a small copy of inkling2 cannot be run layer by layer: .*code of its own"
    ):
        rehearsal.rehearse(small("inkling2"))


def test_the_copy_has_a_layer_of_each_kind() -> None:
    """Of DeepSeek-V3's own sizes: three dense layers, then routed ones; widths as they are but the MLPs'."""
    config = CONFIG_MAPPING["deepseek_v3"]()
    raw = json.loads(config.to_json_string(use_diff=False)) | {"architectures": ["DeepseekV3ForCausalLM"]}
    model = Skeleton.of(raw, Path("config.json"))
    copy = rehearsal.cut(model)
    assert (model.layers, copy["num_hidden_layers"]) == (61, 5)
    assert (copy["n_routed_experts"], copy["num_experts_per_tok"], copy["n_group"], copy["vocab_size"]) == (
        4,
        2,
        1,
        512,
    )
    assert (copy["hidden_size"], copy["kv_lora_rank"]) == (config.hidden_size, config.kv_lora_rank)
    assert (copy["intermediate_size"], copy["moe_intermediate_size"]) == (256, 256)
    whole = Skeleton.of(copy, Path("config.json"))
    assert [whole.is_routed(layer) for layer in range(5)] == [False, False, False, True, True]


def test_a_kind_that_comes_late_has_no_small_copy() -> None:
    raw = settings("qwen3_5_moe")[1]
    raw["text_config"] |= {"num_hidden_layers": 20, "layer_types": [*["linear_attention"] * 19, "full_attention"]}
    with pytest.raises(FourfoldError, match="only its first 20 layers have one of each kind, expected at most 12"):
        rehearsal.rehearse(Skeleton.of(raw, Path("config.json")))


def test_a_copy_that_is_not_small_is_not_made(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rehearsal, "MOST_PARAMETERS", 1000)
    with pytest.raises(FourfoldError, match=r"small copy of olmoe cannot be run .*parameters, expected at most 1e\+03"):
        rehearsal.rehearse(small("olmoe"))
