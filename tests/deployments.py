"""Models and machines that are not here, for the tests of serve."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from fourfold.formats import COMPRESSED_TENSORS, GPTQ_V2
from fourfold.serve.kvcache import Geometry
from fourfold.serve.machine import Gpu, Machine
from fourfold.serve.served import Served

# Qwen3.6-35B-A3B: 30 of its 40 layers are linear attention.
LARGE = Geometry(
    attention=10, linear=30, kv_heads=2, head_dim=256, conv=4, key_heads=16, key_dim=128, value_heads=32, value_dim=128
)
# The reference release, by its card: 24.4 GB with its draft head of 785 tensors.
REFERENCE = Served(
    folder=Path("release"),
    name="Qwen3.6-35B-A3B-GPTQ-Int4",
    model_type="qwen3_5_moe",
    format=GPTQ_V2,
    group_size=128,
    expert_width=512,
    vision=True,
    context=262_144,
    weight_bytes=22_710_000_000,
    draft_bytes=1_690_000_000,
    ends_bytes=2 * 1_017_118_720,
    int8=False,
    quantized_head=False,
    int4_drafts=False,
    geometry=LARGE,
    splits={"attention heads": 16, "key heads of linear attention": 16, "value heads of linear attention": 32},
    template="{% if think %}<think>{% endif %}<function=",
    sampling={"temperature": 1.0, "top_k": 20},
)
OURS = replace(REFERENCE, format=COMPRESSED_TENSORS)
COMPACT = replace(  # the release of recipe compact, from the headers of the same model
    OURS,
    weight_bytes=20_516_043_408,
    draft_bytes=463_983_728,
    ends_bytes=1_533_624_336,
    int8=True,
    quantized_head=True,
    int4_drafts=True,
    splits=OURS.splits | {
        "groups of 128 inputs of linear_attn.out_proj": 32,
        "groups of 128 inputs of shared_expert.down_proj": 4,
        "groups of 128 inputs of self_attn.o_proj": 32,
    },
)  # fmt: skip
CPU = Machine(gpus=(), host_bytes=64 * 2**30, no_gpu="there is no nvidia-smi")


def gpus(count: int, gib: float, capability: tuple[int, int] = (9, 0)) -> Machine:
    gpu = Gpu(name="a GPU", total_bytes=int(gib * 2**30), free_bytes=int(gib * 2**30), capability=capability)
    return Machine(gpus=(gpu,) * count, host_bytes=64 * 2**30)


def changed(served: Served, **fields: Any) -> Served:
    return replace(served, **fields)
