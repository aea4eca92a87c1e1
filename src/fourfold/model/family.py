"""Facts per architecture that cannot be derived from transformers. Values, no subclasses."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

GATE, UP, DOWN = PROJECTIONS = ("gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True, kw_only=True)
class Family:
    """What cannot be derived of a model type: its name, and what engines make of its int4 experts.

    title: as its makers call it; mtp_prefix: of the draft head that fourfold can run itself ("" = none); proven: what
    tests have seen its releases do, of the values below; refuse: by engine, why it must not be given a release;
    derived: no test proves it, so that it is rehearsed before every run.
    """

    model_type: str
    title: str
    mtp_prefix: str = ""
    proven: tuple[str, ...] = ()
    refuse: Mapping[str, str] = field(default_factory=dict)
    derived: bool = False

    @property
    def mtp_experts_prefix(self) -> str:
        return f"{self.mtp_prefix}layers.0.mlp.experts."


KEPT = (
    ("MTP", "mtp.", "draft head stays BF16: the engines build it unquantized"),
    ("vision", "visual.", "vision tower stays BF16"),
    ("vision", "vision_", "vision tower stays BF16"),
    ("vision", "audio_", "audio tower stays BF16"),
    ("vision", "multi_modal_projector.", "vision tower stays BF16"),
    ("shared experts", "shared_", "runs for every token: kept BF16"),
    ("router", ".gate.", "decides the routing: kept BF16"),
    ("router", ".router.", "decides the routing: kept BF16"),
    ("router", "e_score_correction_bias", "decides the routing: kept as it is"),
    ("router", ".expert_bias", "decides the routing: kept as it is"),
    ("router", ".moe_statics.", "decides the routing: kept as it is"),
    ("linear attention", ".linear_attn.", "attention stays BF16"),
    ("linear attention", ".mamba.", "state space layers stay BF16"),
    ("linear attention", ".conv.", "convolutions stay BF16"),
    ("attention", "attn.", "attention stays BF16"),
    ("attention", "attention.", "attention stays BF16"),
    ("attention", ".mixer.", "attention stays BF16"),
    ("dense MLP", "mlp.", "layer without routed experts: kept BF16"),
    ("dense MLP", "feed_forward.", "layer without routed experts: kept BF16"),
    ("dense MLP", "block_sparse_moe.", "layer without routed experts: kept BF16"),
    ("embeddings", "embed", "embeddings stay BF16"),
    ("embeddings", "lm_head.", "output head stays BF16"),
    ("norms", "norm.", "norms stay BF16"),
    ("norms", "norm1.", "norms stay BF16"),
    ("norms", "norm2.", "norms stay BF16"),
    ("other", "", "kept as it is"),
)  # the first marker found in a tensor's name decides its group


def kept_group(name: str) -> tuple[str, str]:
    """Return the group of a tensor beside the routed experts, by its name on disk, and why it is kept by default."""
    return next((group, reason) for group, marker, reason in KEPT if marker in name)


TRANSFORMERS = "transformers 5.23"  # logits equal, bit for bit, those of the same weights in BF16
VLLM = "vLLM 0.32"  # every parameter written, log-probabilities as in BF16
VLLM_LOADS = "vLLM 0.32 (loaded, not run)"  # every parameter written
SGLANG_LOADS = "SGLang 0.5.23 (loaded, not run)"  # the same
LOADED, RUN = (TRANSFORMERS, VLLM_LOADS), (TRANSFORMERS, VLLM)

SILU_ONLY = "0.5.23 computes int4 experts with SiLU gates only, and stops at this model's"
NO_ALPHA = "0.5.23 leaves out the scale and clamp of this model's gates: wrong numbers, with no error"
NO_BIAS = "0.32 skips the selection bias of this model's routers, with no error: other experts answer"
OTHER_LOGITS = "5.23 computes other logits from a release than from the same weights in BF16"
CONVERTED = "5.23 fails while it joins other tensors of this model, which it does not do for models in BF16"

# Types whose checkpoints tests take through plan, quantize, verify and evaluate (tests/quantize/test_all_families.py).
FAMILIES = {
    family.model_type: family
    for family in (
        Family(
            model_type="qwen3_5_moe",
            title="Qwen3.5, Qwen3.6",
            mtp_prefix="mtp.",
            proven=(*RUN, SGLANG_LOADS),
        ),
        Family(model_type="qwen3_moe", title="Qwen3 MoE: 30B-A3B, 235B-A22B, Coder", proven=RUN),
        Family(model_type="qwen2_moe", title="Qwen2-57B-A14B, Qwen1.5-MoE-A2.7B", proven=RUN),
        Family(model_type="qwen3_next", title="Qwen3-Next-80B-A3B, Qwen3-Coder-Next", proven=RUN),
        Family(model_type="qwen3_vl_moe", title="Qwen3-VL-30B-A3B, 235B-A22B"),
        Family(model_type="qwen3_omni_moe_thinker", title="Qwen3-Omni-30B-A3B (thinker)", proven=(TRANSFORMERS,)),
        Family(model_type="qwen4_exp", title="Qwen3.8-Flash-Next", refuse={"transformers": CONVERTED}),
        Family(model_type="glm4_moe", title="GLM-4.5, 4.6, 4.7, Air", proven=RUN),
        Family(model_type="glm4_moe_lite", title="GLM-4.7-Flash", proven=RUN),
        Family(model_type="glm4v_moe", title="GLM-4.5V, 4.6V", proven=(TRANSFORMERS,)),
        Family(model_type="glm_moe_dsa", title="GLM-5", proven=(TRANSFORMERS,)),
        Family(model_type="glm5_next", title="GLM-5.3-Flash", refuse={"transformers": CONVERTED}),
        Family(model_type="deepseek_v2", title="DeepSeek-V2, V2-Lite, Coder-V2", proven=RUN),
        Family(model_type="deepseek_v3", title="DeepSeek-V3, R1, Moonlight", proven=RUN),
        Family(model_type="deepseek_v32", title="DeepSeek-V3.2", proven=(TRANSFORMERS,)),
        Family(model_type="deepseek_v4", title="DeepSeek-V4 Flash, Pro", proven=(TRANSFORMERS,)),
        Family(model_type="kimi_k25", title="Kimi K2.5, K2.6", proven=(TRANSFORMERS,)),
        Family(model_type="kimi_linear", title="Kimi-Linear-48B-A3B", refuse={"transformers": CONVERTED}),
        Family(model_type="minimax", title="MiniMax-Text-01, M1", proven=(TRANSFORMERS,)),
        Family(model_type="minimax_m2", title="MiniMax-M2, M2.7", proven=RUN),
        Family(model_type="minimax_m3_vl", title="MiniMax-M3", refuse={"sglang": NO_ALPHA, "transformers": CONVERTED}),
        Family(model_type="gemma4", title="Gemma 4 26B-A4B", proven=(VLLM,), refuse={"sglang": SILU_ONLY}),
        Family(
            model_type="nemotron_h", title="Nemotron 3 Nano, Super, Ultra", proven=RUN, refuse={"sglang": SILU_ONLY}
        ),
        Family(model_type="mistral3", title="Mistral Small 4 (with vision)"),
        Family(model_type="mistral4", title="Mistral Small 4", proven=(VLLM_LOADS,)),
        Family(model_type="mistral_large4", title="Mistral Large 4", proven=(TRANSFORMERS,)),
        Family(model_type="laguna", title="Laguna XS, S", proven=(TRANSFORMERS,), refuse={"vllm": NO_BIAS}),
        Family(model_type="cohere2_moe", title="North Mini Code 30B", proven=RUN),
        Family(model_type="lfm2_moe", title="LFM2-8B-A1B, 24B-A2B", proven=LOADED),
        Family(model_type="granitemoe", title="Granite 3 MoE", proven=(VLLM,)),
        Family(model_type="granitemoe_swa", title="Granite MoE with sliding windows"),
        Family(model_type="granitemoeshared", title="Granite MoE with shared experts", proven=(VLLM,)),
        Family(model_type="granitemoehybrid", title="Granite 4.0 H", proven=(VLLM,)),
        Family(model_type="ernie4_5_moe", title="ERNIE-4.5-21B-A3B, 300B-A47B", proven=RUN),
        Family(model_type="hy_v3", title="Hy3", proven=RUN),
        Family(model_type="hy_v4", title="Hy4"),
        Family(model_type="hunyuan_v1_moe", title="Hunyuan-A13B", proven=RUN),
        Family(model_type="afmoe", title="Trinity", proven=RUN),
        Family(model_type="exaone_moe", title="K-EXAONE", proven=RUN),
        Family(model_type="solar_open", title="Solar Open", proven=RUN),
        Family(model_type="dots1", title="dots.llm1", proven=RUN),
        Family(model_type="bailing_hybrid", title="Ling and Ring, hybrid", refuse={"transformers": CONVERTED}),
        Family(model_type="mimo_v2_flash", title="MiMo-V2-Flash", proven=(TRANSFORMERS,)),
        Family(model_type="step3p7", title="Step-3.7-Flash"),
        Family(model_type="mixtral", title="Mixtral 8x7B, 8x22B", proven=RUN),
        Family(model_type="olmoe", title="OLMoE", proven=RUN),
        Family(model_type="phimoe", title="Phi-3.5-MoE", proven=LOADED),
        Family(model_type="jamba", title="Jamba", proven=(VLLM_LOADS,), refuse={"transformers": OTHER_LOGITS}),
        Family(model_type="mellum", title="Mellum", proven=(TRANSFORMERS,)),
        Family(model_type="flint", title="Flint", proven=(TRANSFORMERS,)),
        Family(model_type="axk1", title="A.X K1", proven=(TRANSFORMERS,)),
        Family(model_type="axk2", title="A.X K2", proven=LOADED),
        Family(model_type="kolibri1", title="Kolibri 1", proven=(TRANSFORMERS,)),
        Family(model_type="flex_olmo", title="FlexOlmo", proven=RUN),
        Family(model_type="beam", title="Beam", proven=(TRANSFORMERS,)),
        Family(model_type="zaya", title="ZAYA1"),
        Family(model_type="muse_spark", title="Muse Spark"),
        Family(model_type="inkling_mm_model", title="Inkling", refuse={"transformers": CONVERTED}),
    )
}


def split_stack(stack: str, shape: tuple[int, ...], itemsize: int = 1) -> Iterator[tuple[str, int, tuple[int, int]]]:
    """What a stack of experts holds, in order: (name of a projection's weight, its first byte in the stack, its shape).

    stack: `...mlp.experts.gate_up_proj` [E, 2I, D], gate rows before up rows, or `...mlp.experts.down_proj` [E, D, I].
    """
    prefix, _, name = stack.rpartition(".")
    experts, rows, inputs = shape
    parts = [(GATE, 0, rows // 2), (UP, rows // 2, rows)] if name == "gate_up_proj" else [(DOWN, 0, rows)]
    for expert in range(experts):
        for projection, first, last in parts:
            start = (expert * rows + first) * inputs * itemsize
            yield f"{prefix}.{expert}.{projection}.weight", start, (last - first, inputs)
