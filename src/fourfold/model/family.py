"""Facts per architecture: names on disk, what is routed, what is kept, where MTP lives. Values, no subclasses."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

GATE, UP, DOWN = PROJECTIONS = ("gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True, kw_only=True)
class Family:
    """One architecture that transformers 5 expresses with its experts interface.

    model_type: `config.json`'s key; architecture: the transformers class that writes and loads the checkpoint;
    modeling: transformers module with the layer; layer_class, rotary_class, norm_class: names in it;
    text_key: where the text model's settings live in config.json ("" = top level);
    text_prefix: prefix of the text model's tensors; mtp_prefix: prefix of the draft head ("" = none);
    groups: (group, marker, reason) in order; the first marker found in a tensor's name decides its group.
    """

    model_type: str
    architecture: str
    modeling: str
    layer_class: str
    rotary_class: str
    norm_class: str
    text_key: str
    text_prefix: str
    mtp_prefix: str
    groups: tuple[tuple[str, str, str], ...]

    def layer_prefix(self, layer: int) -> str:
        return f"{self.text_prefix}layers.{layer}."

    def experts_prefix(self, layer: int) -> str:
        return f"{self.layer_prefix(layer)}mlp.experts."

    @property
    def mtp_experts_prefix(self) -> str:
        return f"{self.mtp_prefix}layers.0.mlp.experts."


_KEPT = (
    ("MTP", "mtp.", "draft head stays BF16: the engines build it unquantized"),
    ("vision", "visual.", "vision tower stays BF16"),
    ("shared experts", ".shared_expert", "runs for every token: kept BF16"),
    ("router", ".mlp.gate.", "decides the routing: kept BF16"),
    ("linear attention", ".linear_attn.", "attention stays BF16"),
    ("attention", ".self_attn.", "attention stays BF16"),
    ("dense MLP", ".mlp.", "layer without routed experts: kept BF16"),
    ("embeddings", "embed_tokens.", "embeddings stay BF16"),
    ("embeddings", "lm_head.", "output head stays BF16"),
    ("norms", "norm.", "norms stay BF16"),
)


def _text_alone(model_type: str, classes: str) -> Family:
    """A text model without draft head. classes: what the names of its classes in transformers begin with."""
    return Family(
        model_type=model_type,
        architecture=f"{classes}ForCausalLM",
        modeling=f"transformers.models.{model_type}.modeling_{model_type}",
        layer_class=f"{classes}DecoderLayer",
        rotary_class=f"{classes}RotaryEmbedding",
        norm_class=f"{classes}RMSNorm",
        text_key="",
        text_prefix="model.",
        mtp_prefix="",
        groups=_KEPT,
    )


FAMILIES = {
    family.model_type: family
    for family in (
        Family(
            model_type="qwen3_5_moe",
            architecture="Qwen3_5MoeForConditionalGeneration",
            modeling="transformers.models.qwen3_5_moe.modeling_qwen3_5_moe",
            layer_class="Qwen3_5MoeDecoderLayer",
            rotary_class="Qwen3_5MoeTextRotaryEmbedding",
            norm_class="Qwen3_5MoeRMSNorm",
            text_key="text_config",
            text_prefix="model.language_model.",
            mtp_prefix="mtp.",
            groups=_KEPT,
        ),
        _text_alone("qwen3_moe", "Qwen3Moe"),
        _text_alone("qwen2_moe", "Qwen2Moe"),
    )
}


def split_names(fused: str, shape: tuple[int, ...]) -> Iterator[tuple[str, int, slice]]:
    """Where the rows of a fused expert stack go: (name of the projection's weight, expert, its rows).

    fused: `...mlp.experts.gate_up_proj` [E, 2I, D], gate rows before up rows, or `...mlp.experts.down_proj` [E, D, I].
    """
    prefix, _, name = fused.rpartition(".")
    experts, rows = shape[0], shape[1]
    parts = (
        ((GATE, slice(0, rows // 2)), (UP, slice(rows // 2, rows)))
        if name == "gate_up_proj"
        else ((DOWN, slice(0, rows)),)
    )
    for expert in range(experts):
        for projection, place in parts:
            yield f"{prefix}.{expert}.{projection}.weight", expert, place
