"""Releases to export: small checkpoints of any family whose experts are rounded to int4, and what transformers makes
of them in fp32. Bits and arithmetic of docs/formats.md, none of fourfold's.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import save_file
from torch import Tensor

import checkpoints
import families
import releases
from command_line import Answer, invoke
from fourfold.formats import COMPRESSED_TENSORS
from fourfold.formats.format import MoreModules

EXPERT = re.compile(r"(?!mtp\.|model\.layers\.4\.).*\.experts\.\d+\.\w+\.weight")
INT8 = re.compile(
    r"lm_head\.weight|.*(?:self_attn\.(?:q|k|v|o)_proj|linear_attn\.(?:in_proj_qkv|in_proj_qkvz|in_proj_z|out_proj)"
    r"|mlp\.shared_experts?\.(?:gate|up|down)_proj)\.weight"
)
DRAFTS: dict[str, dict[str, Any]] = {
    "qwen3_next": {
        "layer": "mtp.layers.0.",
        "ends": "mtp.",
        "names": {"fc": (256, 512), "norm": (256,), "pre_fc_norm_hidden": (256,), "pre_fc_norm_embedding": (256,)},
    },
    "glm4_moe": {
        "layer": "model.layers.4.",
        "ends": "model.layers.4.",
        "names": {
            **{"eh_proj": (256, 512), "enorm": (256,), "hnorm": (256,), "shared_head.norm": (256,)},
            **{"shared_head.head": (checkpoints.VOCABULARY, 256), "embed_tokens": (checkpoints.VOCABULARY, 256)},
        },
    },
}
TOKENS = torch.randint(16, 500, (64,), generator=torch.Generator().manual_seed(0)).tolist()
STACK = re.compile(r"(?!mtp\.)(.*\.experts)\.(gate_up_proj|down_proj)(?:\.weight)?")


def release(folder: Path, family: str, group_size: int = 32, compact: bool = False, **options: Any) -> Path:
    """Write a release of a small checkpoint of a family, experts by round-to-nearest; return its folder.

    compact: attention, shared experts and the head in int8, experts of draft heads in int4; options: of
    checkpoints.tiny.
    """
    if family in checkpoints.CLASSES:
        checkpoints.tiny(folder, family=family, hidden=256, width=128, topk=2, **options)
    else:
        families.tiny(folder, family, vocabulary=checkpoints.VOCABULARY)
        for name in checkpoints.TOKENIZER_FILES:
            shutil.copyfile(checkpoints.EXAMPLE / name, folder / name)
    if family in DRAFTS:
        checkpoints.edit(folder, lambda tensors: _add_draft(tensors, **DRAFTS[family]))
        counts = {"num_nextn_predict_layers": 1, "mtp_num_hidden_layers": 1}
        checkpoints.edit_json(folder / "config.json", lambda raw: raw.update(counts))
    if family == "qwen3_5_moe":
        interval = {"full_attention_interval": 2}
        checkpoints.edit_json(folder / "config.json", lambda raw: raw["text_config"].update(interval))
    if family == "mixtral":
        checkpoints.edit_json(folder / "config.json", lambda raw: raw.update(sliding_window=None))
    if family == "qwen2_moe":
        checkpoints.edit_json(folder / "config.json", lambda raw: raw.update(norm_topk_prob=False))
    checkpoints.edit(folder, lambda tensors: _round_experts(tensors, group_size, compact))
    drafts = {"qwen3_5_moe": ["mtp."], "qwen3_next": ["mtp."], "glm4_moe": ["model.layers.4."]}.get(family, [])
    bits = {
        name.removesuffix(".weight_packed"): 32 * words.shape[1] // int(found[f"{name.removesuffix('packed')}shape"][1])
        for found in [releases.tensors(folder)]
        for name, words in found.items()
        if name.endswith(".weight_packed")
    }
    more = MoreModules.of(bits, drafts, group_size) if compact else None
    settings = COMPRESSED_TENSORS.quantization_config(group_size, drafts, more)
    checkpoints.edit_json(folder / "config.json", lambda raw: raw.update(quantization_config=settings))
    return folder


def _add_draft(tensors: dict[str, Tensor], layer: str, ends: str, names: dict[str, tuple[int, ...]]) -> None:
    """A draft head: a copy of the last layer, and random tensors beside it."""
    generator, last = torch.Generator().manual_seed(2), "model.layers.3."
    for name in [name for name in tensors if name.startswith(last)]:
        tensors[layer + name.removeprefix(last)] = tensors[name].clone()
    for name, shape in names.items():
        tensors[f"{ends}{name}.weight"] = torch.randn(shape, generator=generator).bfloat16() / 16


def _round_experts(tensors: dict[str, Tensor], group_size: int, compact: bool) -> None:
    for name in list(tensors):
        draft = name.startswith(("mtp.", "model.layers.4.")) and ".experts." in name
        if EXPERT.fullmatch(name) or (compact and draft and tensors[name].ndim == 2):
            tensors |= rounded(name.removesuffix("weight"), tensors.pop(name), group_size)
        elif compact and INT8.fullmatch(name):
            tensors |= rounded(name.removesuffix("weight"), tensors.pop(name), group_size, bits=8)
        elif (match := STACK.fullmatch(name.removeprefix("mtp.") if compact else name)) and tensors[name].ndim == 3:
            prefix = "mtp." if name.startswith("mtp.") else ""
            parts = ("gate_proj", "up_proj") if match[2] == "gate_up_proj" else ("down_proj",)
            for expert, rows in enumerate(tensors.pop(name)):
                for part, weight in zip(parts, rows.chunk(len(parts)), strict=True):
                    tensors |= rounded(f"{prefix}{match[1]}.{expert}.{part}.", weight, group_size)


def rounded(stem: str, weight_NK: Tensor, group_size: int, bits: int = 4) -> dict[str, Tensor]:
    """Scales of both signs: the largest weight of a group has the lowest code."""
    weight_NGK, half = weight_NK.double().unflatten(1, (-1, group_size)), 2 ** (bits - 1)
    largest_NG1 = weight_NGK.gather(2, weight_NGK.abs().argmax(2, keepdim=True))
    scale_NG1 = (largest_NG1 / -half).bfloat16().double()
    code_NK = (weight_NGK / scale_NG1).round().clamp(-half, half - 1).flatten(1).to(torch.int64)
    field_NWF = (code_NK + half).unflatten(1, (-1, 32 // bits))
    word_NW = (field_NWF << torch.arange(0, 32, bits)).sum(2)
    return {
        f"{stem}weight_packed": torch.where(word_NW >= 2**31, word_NW - 2**32, word_NW).int(),
        f"{stem}weight_scale": scale_NG1[..., 0].bfloat16(),
        f"{stem}weight_shape": torch.tensor(weight_NK.shape),
    }


def stretch_scales(folder: Path) -> Path:
    """Give an expert and another module the largest and the smallest scales that are allowed, of both signs."""

    def change(tensors: dict[str, Tensor]) -> None:
        names = [name for name in tensors if name.endswith("weight_scale")]
        for name in {min(names), min(name for name in names if ".experts." in name)}:
            tensors[name][:4] = torch.tensor([[65280.0], [-65280.0], [2.0**-17], [-(2.0**-17)]])

    checkpoints.edit(folder, change)
    return folder


def dequantized(folder: Path) -> dict[str, Tensor]:
    """All tensors of a release, int4 projections as weights in fp32, which holds them exactly."""
    found = releases.tensors(folder)
    stems = [name.removesuffix("weight_packed") for name in found if name.endswith("weight_packed")]
    weights = {f"{stem}weight": releases.dequantize(found, stem).float() for stem in stems}
    parts = {f"{stem}weight_{part}" for stem in stems for part in ("packed", "scale", "shape")}
    return weights | {name: value for name, value in found.items() if name not in parts}


@torch.no_grad()
def logprobs(folder: Path, scratch: Path) -> Tensor:
    """Log-probabilities float64 [T, V] that a release gives for TOKENS in transformers, all in fp32."""
    config: dict[str, Any] = json.loads((folder / "config.json").read_text())
    del config["quantization_config"]
    scratch.mkdir()
    (scratch / "config.json").write_text(json.dumps(config | {"dtype": "float32"}))
    tensors = {
        name: (value.float() if value.is_floating_point() else value).contiguous()
        for name, value in dequantized(folder).items()
    }
    save_file(tensors, scratch / "model.safetensors", metadata={"format": "pt"})
    kind = getattr(transformers, config["architectures"][0])
    model = kind.from_pretrained(scratch, dtype=torch.float32, attn_implementation="eager").eval()
    found: Tensor = model(input_ids=torch.tensor([TOKENS])).logits[0].double().log_softmax(dim=-1)
    shutil.rmtree(scratch)
    return found


def divergence(log_p: Tensor, log_q: Tensor) -> float:
    """Mean KL divergence in nats. log_p, log_q: [..., V]."""
    log_q = log_q.double().log_softmax(dim=-1)
    return float((log_p.exp() * (log_p - log_q)).sum(-1).mean())


def check_published(new: Path, checks: Mapping[str, Mapping[str, Any]], engine: str) -> None:
    """`report` and `publish --dry-run` of a folder that passed its engine level; a changed byte is refused.

    checks: of verify.json, by name.
    """
    verdict = json.loads((new / "verify.json").read_text())
    assert verdict["passed"] and verdict["levels"][-1] == "engine"

    def run(*words: str) -> Answer:
        return invoke(words[0], new, *words[1:])

    done = run("report", "--repo", "me/model")
    assert done.exit_code == 0, done.output
    card = (new / "README.md").read_text(encoding="utf-8")
    assert "| verified | passed: files, source, engine |" in card and f"--engine {engine}" in card
    ran = [name for name, check in checks.items() if check["level"] == "engine"]
    assert {"starts", "KL divergence"} <= {*ran}
    for name in ran:
        assert f"\n| engine | {name} | pass | " in card
    done = run("publish", "me/model", "--dry-run", "--json")
    assert done.exit_code == 0, done.output
    sent = {file["name"]: file["sha256"] for file in json.loads(done.output.splitlines()[-1])["files"]}
    made = json.loads((new / "conversion.json").read_text())["files"]
    assert sent.items() >= {name: file["sha256"] for name, file in made.items()}.items()
    assert sent.keys() - made.keys() == {"README.md", "conversion.json", "verify.json"}
    largest = new / max(made, key=lambda name: made[name]["bytes"])
    content = largest.read_bytes()
    largest.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    done = run("publish", "me/model", "--dry-run")
    assert done.exit_code == 2 and "has changed since it was verified" in " ".join(done.output.split())
