"""Say what SGLang's loader leaves unwritten. Runs under the interpreter of SGLang's environment; no GPU, no kernels.

    python sglang_loader.py REQUEST.json ANSWER.json

REQUEST: model (folder of a Qwen3_5Moe release), method (of quantization, as SGLang's --quantization names it), draft
(whether to load its draft head).
SGLang's own model classes and load_weights build and load target and draft; what only a CUDA machine has is stubbed.
It proves loading alone. Seen to work with SGLang 0.5.23.
"""

from __future__ import annotations

import copy
import json
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import poison
import sglang_stubs
import torch
import transformers
import tvm_ffi  # noqa: F401  the real one, before the stand-ins
from safetensors import safe_open

# transformers' lazy modules must be resolved before the stand-ins are there.
LAZY = ("AutoConfig", "AutoImageProcessor", "AutoModel", "AutoModelForCausalLM", "AutoProcessor", "AutoTokenizer",
        "GenerationConfig", "PretrainedConfig")  # fmt: skip
# Never in a checkpoint: bookkeeping of activation order.
DEFAULTED = ("sort_indices", "_g_idx")
# The draft takes these from the target once both are loaded.
SHARED_WITH_TARGET = ("lm_head.weight", "model.embed_tokens.weight")
FUSED_MODULES = {
    "qkv_proj": ["q_proj", "k_proj", "v_proj"],
    "gate_up_proj": ["gate_proj", "up_proj"],
    "in_proj_qkvz": ["in_proj_qkv", "in_proj_z"],
    "in_proj_ba": ["in_proj_b", "in_proj_a"],
}
SERVER = {
    "device": "cpu", "tp_size": 1, "moe_a2a_backend": "none", "moe_runner_backend": "auto",
    "mm_attention_backend": "sdpa", "attention_backend": "triton", "kv_cache_dtype": "auto",
    "disable_custom_all_reduce": True,
}  # fmt: skip


def start() -> None:
    """The process-wide state that SGLang's layers ask for, as in a server of one process."""
    from sglang.srt import runtime_context, server_args
    from sglang.srt.distributed import parallel_state

    arguments = server_args.ServerArgs(model_path="dummy")
    for name, value in SERVER.items():
        setattr(arguments, name, value)
    runtime_context.get_context().override_server_args(device="cpu").install()
    fields = runtime_context._parallel_fields()
    one_process = {name: 0 for name in fields if name.endswith("_rank")}
    runtime_context.get_parallel().override_permanently(
        **{name: rank for name, rank in one_process.items() if name in ("tp_rank", "pp_rank", "world_rank")}
    )
    meeting_point = f"file://{tempfile.mkdtemp()}/rendezvous"
    parallel_state.init_distributed_environment(
        world_size=1, rank=0, local_rank=0, distributed_init_method=meeting_point, backend="gloo"
    )
    parallel_state.initialize_model_parallel()
    sizes = {name: 1 for name in fields if name.endswith("_size")}
    runtime_context.get_parallel()._overrides.update(sizes | one_process)


class TextConfig(SimpleNamespace):
    """The text model's settings. The draft's class changes interval and depth, so the kinds of layers follow them."""

    @property
    def layers_block_type(self) -> list[str]:
        every = self.full_attention_interval
        return ["linear_attention" if (place + 1) % every else "attention" for place in range(self.num_hidden_layers)]

    layer_types = layers_block_type


def read_config(raw: dict[str, Any]) -> SimpleNamespace:
    """config.json as the object of attributes that SGLang's classes read."""
    text = dict(raw["text_config"])
    kinds, rope = text.pop("layer_types"), text["rope_parameters"]
    text |= {
        "full_attention_interval": kinds.index("full_attention") + 1, "rope_scaling": rope,
        "rope_theta": rope["rope_theta"], "partial_rotary_factor": rope["partial_rotary_factor"],
        "norm_topk_prob": True, "decoder_sparse_step": 1, "mlp_only_layers": [], "attn_output_gate": True,
        "output_gate_type": "silu", "intermediate_size": 0, "torch_dtype": torch.bfloat16, "dtype": torch.bfloat16,
    }  # fmt: skip
    vision = SimpleNamespace(**raw["vision_config"], deepstack_visual_indexes=[])
    parts = {"text_config": TextConfig(**text), "vision_config": vision, "encoder_only": False, "language_only": False}
    return SimpleNamespace(**(text | raw | parts))


def quantization(method: str, settings: dict[str, Any]) -> Any:
    if method == "compressed-tensors":
        from sglang.srt.layers.quantization.compressed_tensors.compressed_tensors import CompressedTensorsConfig

        CompressedTensorsConfig._check_scheme_supported = lambda *_, **__: (
            True
        )  # of int8: it asks for a GPU's capability
        return CompressedTensorsConfig.from_config(settings | {"packed_modules_mapping": FUSED_MODULES})
    from sglang.srt.layers.quantization.gptq.schemes import gptq_marlin
    from sglang.srt.layers.quantization.moe_wna16 import MoeWNA16Config

    gptq_marlin.verify_marlin_supported = lambda *_, **__: None  # of int8: it asks for a GPU's capability
    config = MoeWNA16Config.from_config(settings)
    config.use_marlin = True  # as SGLang decides on a CUDA machine
    return config


def tensors(folder: Path) -> Iterator[tuple[str, torch.Tensor]]:
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as shard:
            for name in shard.keys():
                yield name, shard.get_tensor(name)


def load(model: Any, folder: Path, defaulted: tuple[str, ...]) -> dict[str, Any]:
    return poison.load_twice(model, lambda: model.load_weights(tensors(folder)), defaulted)


def main() -> None:
    request = json.loads(Path(sys.argv[1]).read_text())
    folder = Path(request["model"])
    raw = json.loads((folder / "config.json").read_text())
    settings = raw.pop("quantization_config")
    for name in LAZY:
        getattr(transformers, name)
    sglang_stubs.install()
    start()
    import sglang
    from sglang.srt.models.qwen3_5 import Qwen3_5MoeForConditionalGeneration
    from sglang.srt.models.qwen3_5_mtp import Qwen3_5ForCausalLMMTP

    config, quant = read_config(raw), quantization(request["method"], settings)
    torch.set_default_dtype(torch.bfloat16)
    loads = {}
    draft = request["draft"]
    for build in (Qwen3_5MoeForConditionalGeneration, *([Qwen3_5ForCausalLMMTP] if draft else [])):
        given = SHARED_WITH_TARGET if build is Qwen3_5ForCausalLMMTP else ()
        loads[build.__name__] = load(build(copy.deepcopy(config), quant), folder, (*DEFAULTED, *given))
    Path(sys.argv[2]).write_text(json.dumps({"engine": f"SGLang {sglang.__version__}", "loads": loads}))


if __name__ == "__main__":
    main()
