"""How llama.cpp names the tensors and settings of each architecture, and what it changes in them. docs/formats.md.

A new architecture is an entry in ARCHITECTURES, and a test in the real engine.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

from fourfold.formats.fixed import attention_interval

if TYPE_CHECKING:
    from torch import Tensor

Change = Callable[["Tensor", Any], "Tensor"]  # of a tensor, with transformers' config of the text model
EXPERTS = {"gate_proj": "ffn_gate_exps", "up_proj": "ffn_up_exps", "down_proj": "ffn_down_exps"}
ENDS = {"embed_tokens": "token_embd", "norm": "output_norm"}  # beside the layers
SIGMOID = 2  # expert_gating_func


# --- changes -------------------------------------------------------------------------------------------------------


def plus_one(value: Tensor, text: Any) -> Tensor:
    """Norms of Qwen3.5 and Qwen3-Next are stored as the distance from one."""
    return value.float() + 1


def negative_exp(value: Tensor, text: Any) -> Tensor:
    return -value.float().exp()


def flat(value: Tensor, text: Any) -> Tensor:
    """A convolution over each channel alone, [C, 1, W] to [C, W]."""
    return value.flatten(1)


def tiled(value: Tensor, text: Any, *, per_head: str = "", axis: int = 0, behind_keys: bool = False) -> Tensor:
    """V heads that lie grouped by their K head, tiled: head v of K head k goes from k r + v to v K + k.

    per_head: the setting that says how many rows a head has, "" for one; behind_keys: rows of all Q and K heads come
    before and stay.
    """
    import torch

    first = 2 * text.linear_num_key_heads * text.linear_key_head_dim if behind_keys else 0
    kept, moved = value.split([first, value.shape[axis] - first], dim=axis)
    heads = moved.unflatten(axis, (text.linear_num_key_heads, -1, getattr(text, per_head) if per_head else 1))
    return torch.cat([kept, heads.transpose(axis, axis + 1).flatten(axis, axis + 2)], dim=axis)


def qkvz(value: Tensor, text: Any, *, gate: bool) -> Tensor:
    """Rows of in_proj_qkvz, which lie by K head: all Q, all K, all V; or those of the gate."""
    import torch

    heads, key = text.linear_num_key_heads, text.linear_key_head_dim
    wide = text.linear_num_value_heads // heads * text.linear_value_head_dim
    parts = value.unflatten(0, (heads, -1)).split([key, key, wide, wide], dim=1)
    return torch.cat([part.flatten(0, 1) for part in (parts[3:] if gate else parts[:3])])


# --- architectures -------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Row:
    """A tensor of a layer. name: below `blk.N.`, with what follows the last dot; changes: in order."""

    name: str
    changes: tuple[Change, ...] = ()

    @property
    def only_moves(self) -> bool:
        """Whether every value stays as it is, so that codes and scales can be moved in place of weights."""
        return not {plus_one, negative_exp}.intersection(self.changes)


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """One of llama.cpp's.

    layer: by the name on disk below a layer, the rows that it becomes; ends: changes of the last norm; skipped: what
    names begin with that are left out; draft: what names of a draft head begin with, where it is no further layer;
    draft_ends: its tensors beside its layer; integers, floats, flags: settings by llama.cpp's key, as attributes of
    transformers' config; partial_rope: RoPE has a dimension of its own; grouped: whether K heads may be fewer than Q
    heads; dense_layers: whether the first layers may have no experts; fixed: values that llama.cpp has
    fixed; special: tokens by the role that the tokenizer's files do not give.
    """

    name: str
    layer: Mapping[str, tuple[Row, ...]]
    norm: tuple[Change, ...] = ()
    skipped: tuple[str, ...] = ()
    draft: str = ""
    draft_ends: Mapping[str, tuple[Row, ...]] = field(default_factory=dict)
    integers: Mapping[str, str] = field(default_factory=dict)
    floats: Mapping[str, str] = field(default_factory=dict)
    flags: Mapping[str, str] = field(default_factory=dict)
    numbers: Mapping[str, int] = field(default_factory=dict)
    partial_rope: bool = False
    dense_layers: bool = False
    grouped: bool = True
    fixed: Mapping[str, Any] = field(default_factory=dict)
    special: Mapping[str, str] = field(default_factory=dict)


def _rows(**names: str) -> dict[str, tuple[Row, ...]]:
    """Weights and biases, by the name on disk with a double underscore for a dot."""
    return {
        f"{key.replace('__', '.')}.{kind}": (Row(name=f"{name}.{kind}"),)
        for key, name in names.items()
        for kind in ("weight", "bias")
    }


def _norms(*changes: Change, **names: str) -> dict[str, tuple[Row, ...]]:
    return {
        f"{key.replace('__', '.')}.weight": (Row(name=f"{name}.weight", changes=changes),)
        for key, name in names.items()
    }


ATTENTION = _rows(
    self_attn__q_proj="attn_q", self_attn__k_proj="attn_k", self_attn__v_proj="attn_v", self_attn__o_proj="attn_output"
)  # fmt: skip
QK_NORMS = {"self_attn__q_norm": "attn_q_norm", "self_attn__k_norm": "attn_k_norm"}
ROUTER = _rows(mlp__gate="ffn_gate_inp")
SHARED = _rows(
    mlp__shared_expert__gate_proj="ffn_gate_shexp", mlp__shared_expert__up_proj="ffn_up_shexp",
    mlp__shared_expert__down_proj="ffn_down_shexp", mlp__shared_expert_gate="ffn_gate_inp_shexp",
)  # fmt: skip
NORMS = {"input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm"}
POST_NORMS = NORMS | {"post_attention_layernorm": "post_attention_norm"}
LINEAR_KEYS = {
    "ssm.conv_kernel": "linear_conv_kernel_dim",
    "ssm.state_size": "linear_key_head_dim",
    "ssm.group_count": "linear_num_key_heads",
    "ssm.time_step_rank": "linear_num_value_heads",
}
SHARED_KEYS = {"expert_shared_feed_forward_length": "shared_expert_intermediate_size"}
_MTP_ENDS = _rows(fc="nextn.eh_proj") | _norms(
    plus_one, pre_fc_norm_embedding="nextn.enorm", pre_fc_norm_hidden="nextn.hnorm", norm="nextn.shared_head_norm"
)
_LINEAR = {
    "linear_attn.norm.weight": (Row(name="ssm_norm.weight"),),
    "linear_attn.A_log": (Row(name="ssm_a", changes=(negative_exp,)),),
    "linear_attn.dt_bias": (Row(name="ssm_dt.bias"),),
    "linear_attn.conv1d.weight": (Row(name="ssm_conv1d.weight", changes=(flat,)),),
    "linear_attn.out_proj.weight": (Row(name="ssm_out.weight"),),
}
_VALUES = "linear_value_head_dim"
_TILED = {
    "linear_attn.in_proj_qkv.weight": (
        Row(name="attn_qkv.weight", changes=(partial(tiled, per_head=_VALUES, behind_keys=True),)),
    ),
    "linear_attn.in_proj_z.weight": (Row(name="attn_gate.weight", changes=(partial(tiled, per_head=_VALUES),)),),
    "linear_attn.in_proj_a.weight": (Row(name="ssm_alpha.weight", changes=(tiled,)),),
    "linear_attn.in_proj_b.weight": (Row(name="ssm_beta.weight", changes=(tiled,)),),
    "linear_attn.A_log": (Row(name="ssm_a", changes=(negative_exp, tiled)),),
    "linear_attn.dt_bias": (Row(name="ssm_dt.bias", changes=(tiled,)),),
    "linear_attn.conv1d.weight": (
        Row(name="ssm_conv1d.weight", changes=(flat, partial(tiled, per_head=_VALUES, behind_keys=True))),
    ),
    "linear_attn.out_proj.weight": (Row(name="ssm_out.weight", changes=(partial(tiled, per_head=_VALUES, axis=1),)),),
}
_UNTILED = {
    "linear_attn.in_proj_qkvz.weight": (
        Row(name="attn_qkv.weight", changes=(partial(qkvz, gate=False),)),
        Row(name="attn_gate.weight", changes=(partial(qkvz, gate=True),)),
    ),
    "linear_attn.in_proj_ba.weight": (Row(name="ssm_ba.weight"),),
}

ARCHITECTURES: Mapping[str, Architecture] = {
    "qwen3_5_moe": Architecture(
        name="qwen35moe",
        layer=ATTENTION | ROUTER | SHARED | _norms(plus_one, **POST_NORMS, **QK_NORMS) | _LINEAR | _TILED,
        norm=(plus_one,),
        skipped=("model.visual.",),
        draft="mtp.",
        draft_ends=_MTP_ENDS,
        integers=LINEAR_KEYS | SHARED_KEYS,
        partial_rope=True,
    ),
    "qwen3_next": Architecture(
        name="qwen3next",
        layer=ATTENTION | ROUTER | SHARED | _norms(plus_one, **POST_NORMS, **QK_NORMS) | _LINEAR | _UNTILED,
        norm=(plus_one,),
        draft="mtp.",
        draft_ends=_MTP_ENDS,
        integers=LINEAR_KEYS | SHARED_KEYS,
        partial_rope=True,
        fixed={"norm_topk_prob": True},
    ),
    "qwen3_moe": Architecture(
        name="qwen3moe",
        layer=ATTENTION | ROUTER | _norms(**NORMS, **QK_NORMS),
        fixed={"norm_topk_prob": True, "attention_bias": False},
    ),
    "qwen2_moe": Architecture(
        name="qwen2moe",
        layer=ATTENTION | ROUTER | SHARED | _norms(**NORMS),
        integers=SHARED_KEYS,
        fixed={"norm_topk_prob": False},
    ),
    "olmoe": Architecture(
        name="olmoe",
        layer=ATTENTION | ROUTER | _norms(**NORMS, **QK_NORMS),
        grouped=False,
        fixed={"norm_topk_prob": False, "clip_qkv": None, "attention_bias": False},
    ),
    "glm4_moe": Architecture(
        name="glm4moe",
        layer=(
            ATTENTION | ROUTER | _norms(**POST_NORMS, **QK_NORMS)
            | _rows(
                mlp__gate_proj="ffn_gate", mlp__up_proj="ffn_up", mlp__down_proj="ffn_down",
                mlp__shared_experts__gate_proj="ffn_gate_shexp", mlp__shared_experts__up_proj="ffn_up_shexp",
                mlp__shared_experts__down_proj="ffn_down_shexp", eh_proj="nextn.eh_proj",
                embed_tokens="nextn.embed_tokens", shared_head__head="nextn.shared_head_head",
            )
            | _norms(enorm="nextn.enorm", hnorm="nextn.hnorm", shared_head__norm="nextn.shared_head_norm")
            | {"mlp.gate.e_score_correction_bias": (Row(name="exp_probs_b.bias"),)}
        ),
        integers={
            "expert_shared_count": "n_shared_experts",
            "expert_group_count": "n_group",
            "expert_group_used_count": "topk_group",
        },
        floats={"expert_weights_scale": "routed_scaling_factor"},
        flags={"expert_weights_norm": "norm_topk_prob"},
        numbers={"expert_gating_func": SIGMOID},
        partial_rope=True,
        dense_layers=True,
        fixed={"n_group": 1, "topk_group": 1},
        special={"bos": "[gMASK]", "eot": "<|user|>", "unk": "<|endoftext|>", "eom": "<|observation|>"},
    ),
}  # fmt: skip
# Matrices that llama.cpp keeps in fp32: small, and its kernels want them so.
WIDE = ("ffn_gate_inp.weight", "ffn_gate_inp_shexp.weight", "ssm_conv1d.weight")


def settings(
    one: Architecture, text: Any, *, experts: int, topk: int, width: int, dense: int, drafts: int
) -> dict[str, Any]:
    """Return the architecture's keys without its name in front: int, float, bool or lists of them.

    text: transformers' config of the text model; dense: layers before the first with experts; drafts: layers of the
    draft head.
    """
    head = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    rope, layers = text.rope_parameters, text.num_hidden_layers
    found: dict[str, Any] = {
        "block_count": layers + drafts,
        "context_length": text.max_position_embeddings,
        "embedding_length": text.hidden_size,
        "attention.head_count": text.num_attention_heads,
        "attention.head_count_kv": text.num_key_value_heads,
        "attention.key_length": head,
        "attention.value_length": head,
        "attention.layer_norm_rms_epsilon": float(text.rms_norm_eps),
        "rope.freq_base": float(rope["rope_theta"]),
        "expert_count": experts,
        "expert_used_count": topk,
        "expert_feed_forward_length": width,
    }
    if size := getattr(text, "intermediate_size", None):
        found["feed_forward_length"] = size
    if one.partial_rope:
        found["rope.dimension_count"] = int(head * rope.get("partial_rotary_factor", 1.0))
    found |= {key: getattr(text, name) for key, name in one.integers.items()} | dict(one.numbers)
    found |= {key: float(getattr(text, name)) for key, name in one.floats.items()}
    found |= {key: bool(getattr(text, name)) for key, name in one.flags.items()}
    if one.dense_layers:
        found["leading_dense_block_count"] = dense
    if drafts:
        found["nextn_predict_layers"] = drafts
    if interval := attention_interval(text):
        found["ssm.inner_size"] = text.linear_value_head_dim * text.linear_num_value_heads
        found["full_attention_interval"] = interval
        found["attention.recurrent_layers"] = [kind == "linear_attention" for kind in text.layer_types] + [
            False
        ] * drafts
    if "mrope_section" in rope:
        found["rope.dimension_sections"] = [*rope["mrope_section"], 0][:4]
    return found
