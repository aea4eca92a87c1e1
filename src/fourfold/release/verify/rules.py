"""What quantization_config must say for engines to load the release right. docs/formats.md, docs/verification.md."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import Any

from fourfold.formats.format import Format, Selection
from fourfold.release.patterns import match_patterns


def config_problems(
    format: Format,
    settings: Mapping[str, Any],
    group_size: int,
    *,
    quantized: Collection[str],
    kept: Collection[str],
    draft: bool,
) -> list[str]:
    """What is wrong with a quantization_config. draft: the release has an MTP head; quantized, kept: names of modules
    (without `.weight`) that are int4, and of linear ones that are not.
    """
    problems, selection = list(format.config_problems(settings, group_size, draft)), format.selection(settings)
    return problems + (list(_coverage(selection, quantized, kept)) if selection else [])


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
            yield f"{key} does not exclude {name}, which is not quantized: engines would look for int4 tensors"
    for name in quantized:
        if name in excluded:
            yield f"{key} excludes {name}, which is quantized: engines would look for {name}.weight"
    if selection.targets is None:
        return
    targets, problem = match_patterns(selection.targets, quantized, f"{settings}.config_groups: targets")
    if problem:
        yield f"targets has a pattern that is no regular expression: {problem}"
        return
    for name in quantized:
        if name not in targets:
            yield f"targets does not name {name}, which is quantized: engines would look for {name}.weight"
