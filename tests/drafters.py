"""An external drafter for the example: EAGLE-3 in form, by its content a table of which token follows which."""

from __future__ import annotations

import json
import math
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoTokenizer

SHARPNESS = 60.0  # of the attention, which finds its own position by nothing but the rotation of its queries


def eagle3(folder: Path, model: Path, text: str) -> Path:
    """One Llama layer that reads the token before alone. Names and shapes as in SafeAILab/EAGLE, vLLM's as well.

    Its attention looks at the position itself, and hands its embedding on: the head then has the logarithms of how
    often each token follows in `text`, as far as so few dimensions hold them.
    """
    config = json.loads((model / "config.json").read_text())["text_config"]
    hidden, heads, width = (config[key] for key in ("hidden_size", "num_attention_heads", "head_dim"))
    assert heads * width == hidden
    embedding_VD, head_VD = _following(model, text, config["vocab_size"], hidden)
    to_attention = torch.zeros(hidden, 2 * hidden)  # the embedding, then the hidden states of the model
    to_attention[:, hidden - 1] = SHARPNESS
    values = torch.eye(hidden, 2 * hidden)
    none = torch.zeros(2 * hidden, hidden)
    tensors: dict[str, Tensor] = {
        "embed_tokens": embedding_VD, "lm_head": head_VD, "norm": torch.ones(hidden),
        "fc": torch.zeros(hidden, 3 * hidden),
        "midlayer.self_attn.q_proj": to_attention, "midlayer.self_attn.k_proj": to_attention.clone(),
        "midlayer.self_attn.v_proj": values, "midlayer.self_attn.o_proj": torch.eye(hidden),
        "midlayer.mlp.gate_proj": none, "midlayer.mlp.up_proj": none.clone(),
        "midlayer.mlp.down_proj": torch.zeros(hidden, 2 * hidden),
        **{f"midlayer.{name}": torch.ones(hidden) for name in ("hidden_norm", "input_layernorm")},
        "midlayer.post_attention_layernorm": torch.ones(hidden),
    }  # fmt: skip
    folder.mkdir(parents=True)
    saved = {f"{name}.weight": value.bfloat16().contiguous() for name, value in tensors.items()}
    save_file(saved, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps({
        "architectures": ["LlamaForCausalLMEagle3"], "model_type": "llama", "num_hidden_layers": 1,
        "hidden_act": "silu", "max_position_embeddings": 4096, "rms_norm_eps": 1e-6, "rope_theta": 10000.0,
        "tie_word_embeddings": False, "torch_dtype": "bfloat16", "attention_bias": False, "mlp_bias": False,
        "hidden_size": hidden, "vocab_size": config["vocab_size"], "draft_vocab_size": config["vocab_size"],
        "intermediate_size": 2 * hidden, "num_attention_heads": heads, "num_key_value_heads": heads,
        "head_dim": width, "eagle_aux_hidden_state_layer_ids": [1, 2, 3],
    }))  # fmt: skip
    return folder


def _following(model: Path, text: str, vocabulary: int, hidden: int) -> tuple[Tensor, Tensor]:
    """Embeddings of length sqrt(hidden), whose last dimension is 1, and the head [V, D] that their products are made
    with.
    """
    ids = torch.tensor(AutoTokenizer.from_pretrained(model)(text, add_special_tokens=False)["input_ids"])
    count_VV = torch.zeros(vocabulary, vocabulary)
    count_VV.index_put_((ids[:-1], ids[1:]), torch.ones(len(ids) - 1), accumulate=True)
    share_V = count_VV.sum(dim=0) / count_VV.sum()
    log_VV = ((count_VV + 0.1 * share_V) / (count_VV.sum(dim=1, keepdim=True) + 0.1) + 1e-9).log()
    weight_V1 = count_VV.sum(dim=1, keepdim=True).clamp(min=1).sqrt()
    torch.manual_seed(0)
    weighted_VV = weight_V1 * (log_VV - log_VV.mean(dim=1, keepdim=True))
    left_VK, strength_K, right_VK = torch.svd_lowrank(weighted_VV, q=hidden - 1)
    table_VK = left_VK * strength_K.sqrt()
    table_VK *= math.sqrt(hidden - 1) / table_VK.norm(dim=1, keepdim=True).clamp(min=1e-6)
    head_VK = right_VK * strength_K.sqrt()
    ones_V1, zeros_V1 = torch.ones(vocabulary, 1), torch.zeros(vocabulary, 1)
    return torch.cat([table_VK, ones_V1], dim=1), torch.cat([head_VK, zeros_V1], dim=1)
