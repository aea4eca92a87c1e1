"""Checkpoints for tests, made from transformers' own config and model classes; nothing here imports fourfold.

tiny(folder)        a small real one: random BF16 weights of realistic scale, tokenizer, Hub layout
full_shape(folder)  the headers of Qwen3.6-35B-A3B over sparse files: 70 GB of holes, no weights
edit(folder, f)     f(tensors) changes the tensors of a tiny one in place, which is then written again
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
    Qwen3_5MoeConfig,
    Qwen3_5MoeForConditionalGeneration,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

EXAMPLE = Path(__file__).parents[1] / "examples" / "tiny-qwen3.6-moe"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json")
VOCABULARY = 2048  # of the example's tokenizer
SHARD_BYTES = 5 * 10**9
CLASSES = {
    "qwen3_5_moe": Qwen3_5MoeForConditionalGeneration,
    "qwen3_moe": Qwen3MoeForCausalLM,
    "qwen2_moe": Qwen2MoeForCausalLM,
}

Shape = tuple[int, ...]


def tiny(  # noqa: PLR0913  a size each, by keyword only
    folder: Path,
    *,
    family: str = "qwen3_5_moe",
    layers: int = 2,
    hidden: int = 128,
    experts: int = 4,
    topk: int = 2,
    width: int = 128,
    per_expert: bool | None = None,
    mtp: str | None = "fused",
    dense_layers: Sequence[int] = (),
    layer_types: Sequence[str] = (),
    tied: bool = False,
    shards: int = 2,
    seed: int = 0,
) -> Path:
    """Make a small checkpoint that transformers loads and runs, the same bytes for the same arguments.

    family: qwen3_5_moe (vision, linear attention, MTP); qwen3_moe and qwen2_moe (text only, full attention);
    per_expert: the main layers' experts one by one, as save_pretrained writes them, instead of in two
    stacks; by default as on the Hub: False for qwen3_5_moe alone;
    mtp: the draft head's experts "fused" or "split"; None for no draft head (qwen3_5_moe alone has one);
    dense_layers: layers without routed experts (not qwen3_5_moe);
    layer_types: of qwen3_5_moe; by default every fourth layer and the last are full attention.
    Returns the folder.
    """
    assert mtp in ("fused", "split", None)
    sizes: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "moe_intermediate_size": width,
        "num_experts": experts,
        "num_experts_per_tok": topk,
        "max_position_embeddings": 4096,
        "eos_token_id": 2,
        "pad_token_id": 0,
        "tie_word_embeddings": tied,
    }
    if family != "qwen3_5_moe":
        mtp, config = None, _text_alone(family, sizes, dense_layers)
    else:
        assert not dense_layers, "qwen3_5_moe has no dense layers"
        config = _qwen3_5_moe(sizes, layer_types or _layer_types(layers))
    tensors = _weights(family, config, seed)
    if mtp:
        generator = torch.Generator().manual_seed(seed + 1)
        tensors |= {name: _value(name, shape, generator) for name, shape in mtp_shapes(config.text_config)}
    if family != "qwen3_5_moe" if per_expert is None else per_expert:
        tensors = _split(tensors, mtp=False)
    if mtp == "split":
        tensors = _split(tensors, mtp=True)
    _write_config(folder, config, family, mtp is not None)
    _write_shards(folder, tensors, shards)
    return folder


def full_shape(folder: Path, per_expert: bool = False) -> Path:
    """The headers of Qwen3.6-35B-A3B: 40 layers, 256 experts, vision, MTP; the data are holes in files.

    per_expert: a tensor per projection, in main layers and MTP alike, instead of the Hub's stacks.
    Returns the folder.
    """
    config = Qwen3_5MoeConfig(vision_config={"out_hidden_size": 2048})
    with torch.device("meta"):
        model = Qwen3_5MoeForConditionalGeneration(config)
    shapes = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    shapes |= dict(mtp_shapes(config.text_config))
    if per_expert:
        shapes = {part: shape for name in shapes for part, shape in _parts(name, shapes[name])}
    _write_config(folder, config, "qwen3_5_moe", True)
    write_sparse(folder, shapes)
    return folder


def edit(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    """Apply `change` to the dict of all tensors of a small checkpoint, and write it again, as one shard."""
    tensors: dict[str, Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(path)
        path.unlink()
    change(tensors)
    _write_shards(folder, tensors, 1)


def edit_json(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Apply `change` to the content of a JSON file, config.json as a rule."""
    content = json.loads(path.read_text(encoding="utf-8"))
    change(content)
    path.write_text(json.dumps(content, indent=1), encoding="utf-8")


def mtp_shapes(text: Any) -> Iterator[tuple[str, Shape]]:
    """The draft head's tensors, experts fused: 19 of them. FORMAT.md 6. text: the text model's config."""
    hidden, heads = text.hidden_size, text.num_attention_heads * text.head_dim
    keys, shared = text.num_key_value_heads * text.head_dim, text.shared_expert_intermediate_size
    yield "mtp.fc.weight", (hidden, 2 * hidden)
    for norm in ("norm", "pre_fc_norm_hidden", "pre_fc_norm_embedding"):
        yield f"mtp.{norm}.weight", (hidden,)
    inner: dict[str, Shape] = {
        "input_layernorm.weight": (hidden,),
        "post_attention_layernorm.weight": (hidden,),
        "self_attn.q_proj.weight": (2 * heads, hidden),
        "self_attn.k_proj.weight": (keys, hidden),
        "self_attn.v_proj.weight": (keys, hidden),
        "self_attn.o_proj.weight": (hidden, heads),
        "self_attn.q_norm.weight": (text.head_dim,),
        "self_attn.k_norm.weight": (text.head_dim,),
        "mlp.gate.weight": (text.num_experts, hidden),
        "mlp.shared_expert_gate.weight": (1, hidden),
        "mlp.shared_expert.gate_proj.weight": (shared, hidden),
        "mlp.shared_expert.up_proj.weight": (shared, hidden),
        "mlp.shared_expert.down_proj.weight": (hidden, shared),
        "mlp.experts.gate_up_proj": (text.num_experts, 2 * text.moe_intermediate_size, hidden),
        "mlp.experts.down_proj": (text.num_experts, hidden, text.moe_intermediate_size),
    }
    for name, shape in inner.items():
        yield f"mtp.layers.0.{name}", shape


def _layer_types(layers: int) -> list[str]:
    full = [(layer + 1) % 4 == 0 or layer == layers - 1 for layer in range(layers)]
    return ["full_attention" if here else "linear_attention" for here in full]


def _text_alone(family: str, sizes: dict[str, Any], dense_layers: Sequence[int]) -> Any:
    """qwen3_moe, or qwen2_moe: a shared expert, biases in attention, heads of the hidden size over their number."""
    kind: type[Any] = Qwen3MoeConfig
    if family == "qwen2_moe":
        kind, sizes = Qwen2MoeConfig, sizes | {"shared_expert_intermediate_size": 2 * sizes["moe_intermediate_size"]}
        del sizes["head_dim"]
    return kind(
        **sizes,
        intermediate_size=2 * sizes["moe_intermediate_size"],
        mlp_only_layers=list(dense_layers),
        norm_topk_prob=True,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
    )


def _qwen3_5_moe(sizes: dict[str, Any], layer_types: Sequence[str]) -> Any:
    text = sizes | {
        "layer_types": list(layer_types),
        "linear_conv_kernel_dim": 4,
        "linear_key_head_dim": 32,
        "linear_value_head_dim": 32,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "shared_expert_intermediate_size": sizes["moe_intermediate_size"],
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 1e7,
            "partial_rotary_factor": 0.5,
            "mrope_interleaved": True,
            "mrope_section": [3, 3, 2],
        },
    }
    vision = {
        "depth": 1,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_heads": 2,
        "num_position_embeddings": 16,
        "out_hidden_size": sizes["hidden_size"],
    }
    return Qwen3_5MoeConfig(
        text_config=text,
        vision_config=vision,
        tie_word_embeddings=sizes["tie_word_embeddings"],
        image_token_id=7,
        video_token_id=8,
        vision_start_token_id=5,
        vision_end_token_id=6,
    )


def _weights(family: str, config: Any, seed: int) -> dict[str, Tensor]:
    """transformers' own initial vectors (norms, A_log, dt_bias), matrices with unit gain."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = CLASSES[family](config)
    generator = torch.Generator().manual_seed(seed)
    tensors = {
        name: value.detach().bfloat16() if value.ndim == 1 else _value(name, tuple(value.shape), generator)
        for name, value in model.state_dict().items()
    }
    if config.tie_word_embeddings:
        embedding = next(name for name in tensors if name.endswith("embed_tokens.weight"))
        tensors[embedding] = tensors.pop("lm_head.weight")
    return tensors


def _value(name: str, shape: Shape, generator: torch.Generator) -> Tensor:
    """Random, so that a matrix's outputs are as large as its inputs. Vectors: the draft head's norms."""
    if name.endswith("embed_tokens.weight"):
        scale = 1.0
    elif len(shape) == 1:
        scale = 0.02
    elif "visual." in name or "conv1d" in name:
        scale = math.prod(shape[1:]) ** -0.5
    else:
        scale = shape[-1] ** -0.5
    return (torch.randn(shape, generator=generator) * scale).bfloat16()


def _parts(name: str, shape: Shape) -> Iterator[tuple[str, Shape]]:
    """A stack of experts as the shapes of its projections, one by one; any other tensor as it is."""
    prefix, _, stack = name.rpartition(".")
    if not prefix.endswith("mlp.experts"):
        yield name, shape
        return
    experts, rows, inputs = shape
    for expert in range(experts):
        if stack == "down_proj":
            yield f"{prefix}.{expert}.down_proj.weight", (rows, inputs)
        else:
            yield f"{prefix}.{expert}.gate_proj.weight", (rows // 2, inputs)
            yield f"{prefix}.{expert}.up_proj.weight", (rows // 2, inputs)


def _split(tensors: Mapping[str, Tensor], *, mtp: bool) -> dict[str, Tensor]:
    """The same tensors, the experts of the draft head, or else of the main layers, one by one."""
    result: dict[str, Tensor] = {}
    for name, value in tensors.items():
        if ".mlp.experts." not in name or name.startswith("mtp.") != mtp:
            result[name] = value
            continue
        start, rows = 0, value.flatten(0, 1)
        for part, shape in _parts(name, tuple(value.shape)):
            result[part] = rows[start : start + shape[0]].clone()
            start += shape[0]
    return result


def _write_config(folder: Path, config: Any, family: str, mtp: bool) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name in TOKENIZER_FILES:
        shutil.copyfile(EXAMPLE / name, folder / name)
    config.architectures, config.dtype = [CLASSES[family].__name__], "bfloat16"
    content = config.to_dict()
    if mtp:
        content["text_config"]["mtp_num_hidden_layers"] = 1
    (folder / "config.json").write_text(json.dumps(content, indent=1), encoding="utf-8")


def _write_shards(folder: Path, tensors: Mapping[str, Tensor], shards: int) -> None:
    names = list(tensors)
    size = -(-len(names) // shards)
    weight_map = {}
    for number in range(shards):
        shard = f"model-{number + 1:05d}-of-{shards:05d}.safetensors"
        part = {name: tensors[name].contiguous() for name in names[number * size : (number + 1) * size]}
        save_file(part, folder / shard, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, shard)
    _write_index(folder, weight_map, sum(value.nbytes for value in tensors.values()))


def _write_index(folder: Path, weight_map: Mapping[str, str], total: int) -> None:
    content = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(content), encoding="utf-8")


def write_sparse(folder: Path, shapes: Mapping[str, Shape]) -> None:
    """BF16 headers over files of holes, shards of about 5 GB."""
    parts: list[dict[str, int]] = [{}]
    for name, shape in shapes.items():
        size = 2 * math.prod(shape)
        if parts[-1] and sum(parts[-1].values()) + size > SHARD_BYTES:
            parts.append({})
        parts[-1][name] = size
    weight_map = {}
    for number, part in enumerate(parts, start=1):
        shard, end = f"model-{number:05d}-of-{len(parts):05d}.safetensors", 0
        header: dict[str, object] = {"__metadata__": {"format": "pt"}}
        for name, size in part.items():
            header[name] = {"dtype": "BF16", "shape": shapes[name], "data_offsets": [end, end + size]}
            end += size
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        with (folder / shard).open("wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            file.truncate(8 + len(text) + end)
        weight_map |= dict.fromkeys(part, shard)
    _write_index(folder, weight_map, sum(size for part in parts for size in part.values()))
