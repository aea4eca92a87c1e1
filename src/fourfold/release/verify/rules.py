"""What quantization_config must say for engines to load the release right. docs/formats.md, docs/verification.md."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import Any

from fourfold.model.json_object import brief
from fourfold.release.patterns import match_patterns

GPTQ = {"bits": 4, "sym": True, "desc_act": False}  # with group_size, all that vLLM requires
WEIGHTS = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group"}


def config_problems(
    settings: Mapping[str, Any], group_size: int, *, quantized: Collection[str], kept: Collection[str], draft: bool
) -> list[str]:
    """What is wrong with a quantization_config.

    quantized, kept: names of modules (without `.weight`) that are int4, and of linear ones that are not; draft: the
    release has an MTP head.
    """
    if settings["quant_method"] == "gptq":
        return list(_gptq_problems(settings, group_size, quantized, kept, draft))
    return list(_compressed_problems(settings, group_size, quantized, kept))


def _differences(found: Mapping[str, Any], wanted: Mapping[str, Any], where: str = "") -> Iterator[str]:
    for key, value in wanted.items():
        if key not in found:
            yield f"{where}{key} is missing, wanted {value!r}"
        elif found[key] != value or type(found[key]) is not type(value):
            yield f"{where}{key} is {brief(found[key])}, wanted {value!r}"


def _gptq_problems(
    settings: Mapping[str, Any], group_size: int, quantized: Collection[str], kept: Collection[str], draft: bool
) -> Iterator[str]:
    yield from _differences(settings, GPTQ | {"group_size": group_size})
    dynamic = settings.get("dynamic")
    if not isinstance(dynamic, dict):
        yield f"dynamic is {brief(dynamic)}, wanted the modules that are not quantized: vLLM stops at null"
        return
    patterns = [pattern[2:] for pattern in dynamic if pattern.startswith("-:")]
    # vLLM's models/qwen3_5_mtp.py looks at the text of the keys alone, and builds the draft unquantized only then.
    if draft and not any("mtp" in pattern for pattern in patterns):
        yield 'dynamic has no key that starts with "-:" and names mtp, so vLLM would build the draft head quantized'
    yield from _coverage(patterns, (), "dynamic", quantized, kept)


def _compressed_problems(
    settings: Mapping[str, Any], group_size: int, quantized: Collection[str], kept: Collection[str]
) -> Iterator[str]:
    yield from _differences(settings, {"format": "pack-quantized"})
    groups = settings.get("config_groups")
    group = next(iter(groups.values()), None) if isinstance(groups, dict) and len(groups) == 1 else None
    if not isinstance(group, dict) or not isinstance(group.get("weights"), dict):
        yield f"config_groups is {brief(groups)}, wanted one group with weights"
    else:
        yield from _differences(group, {"targets": ["Linear"]}, "config_groups: ")
        yield from _differences(group["weights"], WEIGHTS | {"group_size": group_size}, "config_groups: weights: ")
        if group.get("input_activations") or group.get("output_activations"):
            yield "config_groups: activations are quantized, wanted weights alone"
    ignore = settings.get("ignore")
    if not isinstance(ignore, list):
        yield f"ignore is {brief(ignore)}, wanted the modules that are not quantized"
        return
    patterns = [entry[3:] for entry in ignore if entry.startswith("re:")]
    yield from _coverage(patterns, {*ignore}, "ignore", quantized, kept)


def _coverage(
    patterns: list[str], exact: Collection[str], key: str, quantized: Collection[str], kept: Collection[str]
) -> Iterator[str]:
    """Each kept module must match a pattern or be one of `exact`, and no quantized one."""
    matched, problem = match_patterns(patterns, [*kept, *quantized], f"config.json: quantization_config.{key}")
    if problem:
        yield f"{key} has a pattern that is no regular expression: {problem}"
        return
    excluded = matched.union(exact)
    for name in kept:
        if name not in excluded:
            yield f"{key} does not exclude {name}, which is not quantized: engines would look for int4 tensors"
    for name in quantized:
        if name in excluded:
            yield f"{key} excludes {name}, which is quantized: engines would look for {name}.weight"
