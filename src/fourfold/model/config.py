"""config.json, read and checked before any library interprets it; what else a folder holds that is no model.

Needs neither torch nor transformers, so a mistake costs milliseconds.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fourfold import formats
from fourfold.datatypes import FourfoldError, brief
from fourfold.model.family import FAMILIES, Family
from fourfold.model.json_object import read_object

CONFIG = "config.json"
MAX_DEPTH = 16

# By key, wherever it stands; whole numbers but for RATIOS. The bounds are generous: beyond any model that is published,
# below what exhausts memory or time.
LIMITS: Mapping[str, tuple[float, float]] = {
    key: (least, most)
    for least, most, keys in (
        (1, 2**8, "depth"),
        (1, 2**10, "num_hidden_layers decoder_sparse_step full_attention_interval linear_conv_kernel_dim in_channels"),
        (1, 2**10, "spatial_merge_size"),
        (0, 2**10, "mtp_num_hidden_layers"),
        (1, 2**16, "num_attention_heads num_key_value_heads num_heads linear_num_key_heads linear_num_value_heads"),
        (0, 2**14, "num_experts"),
        (1, 2**14, "num_experts_per_tok"),
        (1, 2**20, "hidden_size intermediate_size moe_intermediate_size out_hidden_size"),
        (0, 2**20, "shared_expert_intermediate_size"),
        (0, 2**20, "head_dim"),  # 0: by other keys
        (1, 2**20, "linear_key_head_dim linear_value_head_dim"),
        (1, 2**24, "vocab_size num_position_embeddings"),
        (1, 2**32, "max_position_embeddings"),
        (0, 1, "rms_norm_eps partial_rotary_factor attention_dropout"),
        (0, 100, "initializer_range"),
        (1, 1e15, "rope_theta"),
        (-1, 2**20, "group_size"),  # -1: a scale for each row
    )
    for key in keys.split()
}
RATIOS = {"rms_norm_eps", "rope_theta", "partial_rotary_factor", "attention_dropout", "initializer_range"}
NONZERO = {"group_size"}
TYPES: Mapping[str, tuple[type, str]] = {
    **dict.fromkeys(
        ("text_config", "vision_config", "rope_parameters", "rope_scaling", "config_groups", "weights"),
        (dict, "an object"),
    ),
    **dict.fromkeys(("model_type", "hidden_act", "dtype", "torch_dtype"), (str, "a text")),
    **dict.fromkeys(("tie_word_embeddings", "attention_bias", "norm_topk_prob"), (bool, "true or false")),
}
TEXTS = {"layer_types", "architectures", "ignore"}
# (what, at most or a multiple of what): of numbers that stand side by side.
AT_MOST = (("num_experts_per_tok", "num_experts"),)
MULTIPLES = (("num_attention_heads", "num_key_value_heads"), ("linear_num_value_heads", "linear_num_key_heads"))
SOURCE_METHODS = (*formats.METHODS, "fp8", "mxfp4")  # that `quantize` reads, dequantized


def check_model(model: str | Path) -> None:
    """Check what a path and config.json tell of a model that is to be quantized; a Hub ID passes.

    Raises FourfoldError, with a message for each: no such folder, a GGUF file, an adapter, a pipeline, pickles,
    a quantized, a dense or an unsupported model, a config.json with values out of bounds.
    """
    folder = local_folder(model)
    if folder is not None:
        read_source_config(folder)


def local_folder(model: str | Path) -> Path | None:
    """Return the folder that is meant, None for what may be a Hub ID. Raises FourfoldError for anything else."""
    path = os.path.expanduser(model)
    if os.path.isdir(path):
        return Path(path)
    if path.endswith(".gguf"):
        raise FourfoldError(f"{model}: {_GGUF}")
    if os.path.exists(path):
        raise FourfoldError(f"{model}: a file; expected the folder of a checkpoint. Name the folder it lies in")
    repo, at, revision = path.partition("@")
    # The Hub's few names without an owner are taken for mistyped folders.
    if repo.count("/") != 1 or not all(repo.split("/")) or repo.startswith(".") or (at and not revision):
        raise no_such_folder(model)
    return None


def no_such_folder(model: str | Path) -> FourfoldError:
    return FourfoldError(
        f"{str(model)!r}: no such folder; expected a folder, or a Hub ID as org/name or org/name@revision"
    )


def read_source_config(folder: Path) -> dict[str, Any]:
    """Return config.json of a model that can be quantized. Raises FourfoldError as check_model does."""
    raw, path = read_config(folder), folder / CONFIG
    settings = quantization(raw)
    if settings and settings.get("quant_method") not in SOURCE_METHODS:
        raise FourfoldError(
            f"{path}: already quantized ({brief(settings.get('quant_method', 'unnamed'))}), expected BF16, FP8 with "
            "block scales, MXFP4, or int4 as GPTQ and compressed-tensors store it. Start from the original; "
            f"`fourfold inspect {folder}` shows what this one is"
        )
    find_family(raw, path)
    if not any(folder.glob("*.safetensors")) and (other := other_contents(folder)):
        raise FourfoldError(f"{folder}: {other}")
    return raw


def read_config(folder: Path) -> dict[str, Any]:
    """Return config.json of any checkpoint, its types and bounds checked as far as fourfold reads it.

    Raises FourfoldError if there is none, it is not JSON, or a value is of the wrong type or out of bounds.
    """
    path = folder / CONFIG
    if not folder.is_dir():
        raise FourfoldError(f"{folder}: no such folder; expected a checkpoint")
    if not path.exists():
        found = other_contents(folder) or "expected a checkpoint as written by save_pretrained"
        raise FourfoldError(f"{folder}: no {CONFIG}: {found}")
    raw = read_object(path)
    check_values(raw, path)
    return raw


def quantization(raw: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return `quantization_config`, or what older tools wrote in its place; empty for a BF16 model."""
    settings: Mapping[str, Any] = raw.get("quantization_config") or raw.get("compression_config") or {}
    return settings


def find_family(raw: Mapping[str, Any], path: Path) -> Family:
    """Return the family of a config.json, a derived one where no test proves it. Raises FourfoldError for a dense
    model.
    """
    model_type = raw.get("model_type")
    got = f"{path}: model_type: got {brief(model_type)}"
    if not isinstance(model_type, str) or not model_type:
        raise FourfoldError(f"{got}, expected the name of an architecture. Download the original file again")
    if not _has_experts(raw):
        raise FourfoldError(
            f"{got}, a dense model: {CONFIG} names no experts. fourfold quantizes Mixture-of-Experts models only; "
            "for dense models use llm-compressor or GPTQModel"
        )
    return FAMILIES.get(model_type) or Family(model_type=model_type, title=model_type, derived=True)


def _has_experts(raw: Mapping[str, Any], depth: int = 0) -> bool:
    return any(
        ("expert" in str(key) and type(value) is int and value > 1)
        or (isinstance(value, dict) and depth < MAX_DEPTH and _has_experts(value, depth + 1))
        for key, value in raw.items()
    )


# --- a folder that holds something else -----------------------------------------------------------------------------

_GGUF = (
    "GGUF, expected a safetensors checkpoint. GGUF is already quantized: download the original BF16 model, "
    "whose name the GGUF's model card gives"
)


def other_contents(folder: Path) -> str:
    """Say what lies there in place of a safetensors checkpoint, and what to do; "" if it is nothing known."""
    names = sorted(path.name for path in folder.iterdir())
    if "adapter_config.json" in names:
        base = read_object(folder / "adapter_config.json").get("base_model_name_or_path")
        return (
            f"a LoRA adapter of {brief(base) if base else 'a model that it does not name'}, expected a whole model. "
            "Merge it into that model with peft's merge_and_unload and save_pretrained, then quantize the result"
        )
    if any(name.endswith(".gguf") for name in names):
        return _GGUF
    if "model_index.json" in names:
        return "a diffusers pipeline, expected a language model. fourfold quantizes Mixture-of-Experts language models"
    pickles = [name for name in names if name.endswith((".bin", ".pt", ".pth"))]
    if pickles:
        return (
            f"its weights are pickles ({pickles[0]}), which are never read, as loading one can run any code. "
            "Save the model again as safetensors"
        )
    return ""


# --- types and bounds -----------------------------------------------------------------------------------------------


def check_values(raw: Mapping[str, Any], path: Path) -> None:
    """Check all that fourfold, or a library on its behalf, computes with. null is as absent.

    Raises FourfoldError with the first key whose value is of the wrong type or out of bounds.
    """
    _check_depth(raw, path, 0)
    settings = quantization(raw)
    if not isinstance(settings, dict):
        raise _wrong(path, "quantization_config", settings, "an object")
    method = settings.get("quant_method")
    if method is not None and not isinstance(method, str):
        raise _wrong(path, "quantization_config.quant_method", method, "a text")
    if method in SOURCE_METHODS:
        _check(settings, path, "quantization_config.")
    text = raw.get("text_config")
    if text is not None and not isinstance(text, dict):
        raise _wrong(path, "text_config", text, "an object")
    if _has_experts(raw):
        _check({key: value for key, value in raw.items() if value is not settings}, path, "")


def _check_depth(value: object, path: Path, depth: int) -> None:
    if depth > MAX_DEPTH:
        raise FourfoldError(f"{path}: nested more than {MAX_DEPTH} deep. Download the original file again")
    for inner in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        _check_depth(inner, path, depth + 1)


def _check(values: Mapping[str, Any], path: Path, where: str) -> None:
    for key, value in values.items():
        if value is not None:
            _check_value(key, value, path, where)
        if isinstance(value, dict):
            _check(value, path, f"{where}{key}.")
    numbers = {key: value for key, value in values.items() if key in LIMITS and isinstance(value, int)}
    for small, large in AT_MOST:
        if small in numbers and large in numbers and numbers[small] > numbers[large] > 0:
            raise _wrong(path, where + small, numbers[small], f"at most {large} = {numbers[large]:,}")
    for product, factor in MULTIPLES:
        if product in numbers and factor in numbers and numbers[product] % numbers[factor]:
            raise _wrong(path, where + product, numbers[product], f"a multiple of {factor} = {numbers[factor]:,}")


def _check_value(key: str, value: object, path: Path, where: str) -> None:
    if key in LIMITS and isinstance(value, list):  # one for each layer, as some families write it
        for one in value:
            _check_value(key, one, path, where)
    elif key in LIMITS:
        least, most = LIMITS[key]
        kinds, word = ((int, float), "a number") if key in RATIOS else ((int,), "a whole number")
        # NaN compares as false
        if type(value) not in kinds or not least <= value <= most or (key in NONZERO and value == 0):  # type: ignore[operator]
            but = ", not 0" if key in NONZERO else ""
            raise _wrong(path, where + key, value, f"{word} from {least:,} to {most:,}{but}")
    if key in TYPES and not isinstance(value, TYPES[key][0]):
        raise _wrong(path, where + key, value, TYPES[key][1])
    if key in TEXTS and not (isinstance(value, list) and all(isinstance(text, str) for text in value)):
        raise _wrong(path, where + key, value, "a list of texts")


def _wrong(path: Path, key: str, value: object, expected: str) -> FourfoldError:
    return FourfoldError(f"{path}: {key}: got {brief(value)}, expected {expected}. Download the original file again")


def has_vision(raw: Mapping[str, Any]) -> bool:
    """Whether a model takes images, by its config.json."""
    return isinstance(raw.get("vision_config"), dict)


def family_in(folder: Path) -> Family:
    """The family of a source in a folder. Raises FourfoldError as `find_family` does."""
    return find_family(read_source_config(folder), folder / CONFIG)


def require_derived(folder: Path, derived: bool) -> None:
    """Raise FourfoldError for an architecture without tests unless it is allowed."""
    family = family_in(folder)
    if family.derived and not derived:
        fix = "`fourfold plan` runs a small copy of it; add --derived to quantize it, and the card says so"
        problem = f"{family.model_type} is not among the architectures that fourfold's tests have (docs/models.md)"
        raise FourfoldError(f"{folder}: {problem}. {fix}")
