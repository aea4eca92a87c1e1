"""External drafters: their kind and size by their own files, in the commands and the predicted memory."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from command_line import invoke
from deployments import COMPACT, OURS, changed, gpus
from fourfold.datatypes import FourfoldError
from fourfold.serve.command import Deployment, build
from fourfold.serve.drafter import Drafter, open_drafter
from fourfold.serve.engines import SGLANG, VLLM
from fourfold.serve.kvcache import Geometry

CACHE = Geometry(attention=1, linear=0, kv_heads=2, head_dim=64)
ARCHITECTURES = {
    "LlamaForCausalLMEagle3": ("eagle3", "EAGLE3"),
    "EagleLlamaForCausalLM": ("eagle", "EAGLE"),
    "DFlashDraftModel": ("dflash", "DFLASH"),
    "Qwen3ForCausalLM": ("draft_model", "STANDALONE"),
}


def make(folder: Path, architecture: str, layers: object = 1) -> Path:
    folder.mkdir()
    config = {"architectures": [architecture], "model_type": "llama", "num_hidden_layers": layers}
    config |= {"num_attention_heads": 8, "num_key_value_heads": 2, "hidden_size": 512}
    (folder / "config.json").write_text(json.dumps(config))
    save_file({"fc.weight": torch.zeros(6, 4, dtype=torch.bfloat16)}, folder / "model.safetensors")
    return folder


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_kind_and_size(tmp_path: Path, architecture: str) -> None:
    found = open_drafter(make(tmp_path / "drafter", architecture))
    assert (found.method, found.algorithm) == ARCHITECTURES[architecture]
    assert (found.weight_bytes, found.geometry) == (48, CACHE)


def test_kind_by_the_folders_name(tmp_path: Path) -> None:
    assert open_drafter(make(tmp_path / "Model-EAGLE-3", "LlamaForCausalLM")).method == "eagle3"


def test_what_is_no_drafter(tmp_path: Path) -> None:
    with pytest.raises(FourfoldError, match=r"--draft: got .*nowhere, expected a folder"):
        open_drafter(tmp_path / "nowhere")
    with pytest.raises(FourfoldError, match=r"num_hidden_layers: got 'x', expected a number from 1 on"):
        open_drafter(make(tmp_path / "broken", "DFlashDraftModel", "x"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(FourfoldError, match=r"config\.json"):
        open_drafter(tmp_path / "empty")


DRAFTER = Drafter(folder=Path("drafter"), method="eagle3", algorithm="EAGLE3", weight_bytes=2 * 10**9, geometry=CACHE)


def test_commands_and_memory() -> None:
    """In place of the draft head: of 80 GB the cache has what the head took, less the drafter's weights."""
    wanted = {engine: Deployment(engine=engine, drafts=3, drafter=DRAFTER) for engine in (VLLM, SGLANG)}
    found = build(OURS, gpus(1, 80), wanted[VLLM])
    config = json.loads(found.words[found.words.index("--speculative-config") + 1])
    assert config == {"method": "eagle3", "model": "drafter", "num_speculative_tokens": 3}
    own = build(OURS, gpus(1, 80), Deployment(engine=VLLM, drafts=3)).forecast.memory_bytes
    assert own - found.forecast.memory_bytes == DRAFTER.weight_bytes - OURS.draft_bytes
    assert any("2.00 GB of weights, KV cache of 1 layers" in note for note in found.notes)
    words = build(OURS, gpus(1, 80), wanted[SGLANG]).words
    assert words[words.index("--speculative-algorithm") + 1] == "EAGLE3"
    assert words[words.index("--speculative-draft-model-path") + 1] == "drafter"


def test_a_release_without_a_draft_head_and_one_whose_head_sglang_leaves_out() -> None:
    assert build(
        changed(OURS, draft_bytes=0), gpus(1, 80), Deployment(engine=VLLM, drafter=DRAFTER)
    ).forecast.cache.drafts
    form = changed(COMPACT, quantized_head=False)
    assert not build(form, gpus(1, 80), Deployment(engine=SGLANG, drafter=DRAFTER)).problems
    with pytest.raises(FourfoldError, match="--draft: got drafter with --mtp 0"):
        build(OURS, gpus(1, 80), Deployment(engine=VLLM, drafts=0, drafter=DRAFTER))


def test_the_command_line(example_model: Path, tmp_path: Path) -> None:
    drafter = make(tmp_path / "drafter", "LlamaForCausalLMEagle3")
    words = ["serve", example_model, "--engine", "vllm", "--print", "--draft", drafter]
    done = invoke(*words)
    assert done.exit_code == 0 and f'"method":"eagle3","model":"{drafter}"' in done.stdout, done.output
    done = invoke(*words, "--docker")
    assert done.exit_code == 2 and "--draft: got" in done.stderr
