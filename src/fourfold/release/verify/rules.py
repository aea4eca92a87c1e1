"""What quantization_config must say for engines to load the release right. docs/formats.md, docs/verification.md."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import Any

from fourfold.formats.format import Format, Selection, Shape, fused
from fourfold.formats.patterns import check_patterns, match_patterns
from fourfold.quantize.advice import HEAD
from fourfold.recipe_table import NEVER_QUANTIZED

Widths = Mapping[str, tuple[int, int]]  # of modules with codes, by name without suffix: bits, and inputs of a scale
NEVER = {"embed_tokens": NEVER_QUANTIZED["embeddings"], "fc": NEVER_QUANTIZED["draft_fc"]}  # by the end of a name
TIED = (
    f"{HEAD} is quantized, but this model's output head is tied to its embeddings: vLLM answers nonsense and SGLang "
    "drops the head, both without an error"
)


def config_problems(
    format: Format,
    settings: Mapping[str, Any],
    group_size: int,
    *,
    quantized: Widths,
    kept: Collection[str],
    draft: bool,
    tied: bool = False,
) -> list[str]:
    """What is wrong with a quantization_config.

    group_size: of experts; quantized: what is stored; kept: names of linear modules (without `.weight`) that have no
    codes; draft: the release has an MTP head; tied: its output head is tied to its embeddings.
    """
    problems = list(format.config_problems(settings, group_size, draft, quantized))
    selection, in_engines = format.selection(settings), {**quantized, **fused(quantized)}
    if selection:
        problems += _coverage(selection, in_engines, kept)
    if not problems:
        problems += _widths(format, settings, in_engines, group_size)
    ends = {name: NEVER.get(name.rpartition(".")[2]) for name in quantized}
    problems += (f"{name} is quantized: {why}" for name, why in ends.items() if why)
    if tied and (HEAD in quantized or (selection and _names_head(selection, settings))):
        problems.append(TIED)
    return problems


def linear_modules(shapes: Mapping[str, Shape]) -> list[str]:
    """Return the linear modules among tensors without codes, stacks of experts by their names too."""
    return [
        name.removesuffix(".weight")
        for name, shape in sorted(shapes.items())
        if len(shape) == 2 and name.endswith(".weight") and "embed" not in name
    ]


def _widths(format: Format, settings: Mapping[str, Any], stored: Widths, group_size: int) -> Iterator[str]:
    """Engines unpack by the config, so it must have the bits and the group size that are stored."""
    check_patterns(format, settings, stored)
    for name, (bits, size) in stored.items():
        found = format.bits(settings, name), format.settings(settings, name).get("group_size")
        if found != (bits, size if group_size > 0 else found[1]):  # -1: a scale for each row
            yield (
                f"{name} has {bits} bits in groups of {size}, quantization_config says {found[0]} bits in groups of "
                f"{found[1]}: engines would read other weights"
            )


def _names_head(selection: Selection, settings: Mapping[str, Any]) -> bool:
    """Whether the config, not its class of linear modules, makes the output head a target."""
    if selection.targets is None and settings.get("lm_head") is not True:
        return False
    where = f"config.json: quantization_config.{selection.key}"
    excluded, _ = match_patterns(selection.excluded, [HEAD], where)
    targets, _ = match_patterns(selection.targets or (HEAD,), [HEAD], where)
    return bool(targets) and not excluded and HEAD not in selection.exact


def _coverage(selection: Selection, quantized: Collection[str], kept: Collection[str]) -> Iterator[str]:
    """Each kept module must be excluded, as SGLang wants it; each quantized one must be a target, and not excluded."""
    key, settings = selection.key, "config.json: quantization_config"
    excluded, problem = match_patterns(selection.excluded, [*kept, *quantized], f"{settings}.{key}")
    if problem:
        yield f"{key} has a pattern that is no regular expression: {problem}"
        return
    excluded.update(selection.exact)
    for name in kept:
        if name not in excluded:
            yield f"{key} does not exclude {name}, which is not quantized: engines would look for packed tensors"
    for name in sorted(quantized):
        if name in excluded:
            yield f"{key} excludes {name}, which is quantized: engines would look for {name}.weight"
    if selection.targets is None:
        return
    targets, problem = match_patterns(selection.targets, quantized, f"{settings}.config_groups: targets")
    if problem:
        yield f"targets has a pattern that is no regular expression: {problem}"
        return
    for name in sorted(quantized):
        if name not in targets:
            yield f"targets does not name {name}, which is quantized: engines would look for {name}.weight"
