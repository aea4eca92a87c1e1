"""Level 3, transformers: one prompt with an image, release against source."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil

from fourfold.records.results import Check, Level
from fourfold.release.release import Release
from fourfold.release.verify.check import first_difference, judge, skip
from fourfold.release.verify.engine import Engine

IMAGE = "image prompt, transformers"
NO_IMAGES = "the model takes no images"
SCRIPT = "transformers_image.py"
GENERATED_TOKENS = 8
SPARE = 1.3  # memory for a model of so many times its tensors' bytes


def check_image(
    release: Release, source: Path | None, prompts: Sequence[Sequence[int]], limit: float, engine: Engine
) -> Check:
    """The same greedy tokens as the source's, up to a place where the source's two best are within 2 x `limit`.

    limit: how far log-probabilities may be apart; engine: its logs and time limit are used.
    """
    reason = _why_not(release, source)
    if reason or source is None:
        return skip(Level.ENGINE, IMAGE, reason)
    request = prompt_around(prompts) | {"models": [str(source.resolve()), str(release.folder.resolve())]}
    ours = replace(engine, name="transformers", python=Path(sys.executable), environment={})
    answer = ours.ask(SCRIPT, "image", request)
    if answer.failure:
        return judge(Level.ENGINE, IMAGE, [f"transformers: {answer.failure}"], "")
    wanted, found = answer.content["models"]
    return compare(IMAGE, wanted, found, limit)


def prompt_around(prompts: Sequence[Sequence[int]]) -> dict[str, Any]:
    """Token ids before and after the image, and how many to generate."""
    return {"before": list(prompts[0][:8]), "after": list(prompts[0][8:24]), "tokens": GENERATED_TOKENS}


def compare(name: str, source: Mapping[str, Any], release: Mapping[str, Any], limit: float) -> Check:
    """Both: tokens, and margins, how far the second best was behind at each."""
    wanted, found, margins = source["tokens"], release["tokens"], source["margins"]
    place = first_difference(wanted, found)
    if place is None:
        return judge(Level.ENGINE, name, [], f"{len(wanted)} tokens as the source's")
    apart = f"whose two best are {margins[place]:.3f} apart"
    seen = f"token {place + 1} is {found[place]}, the source's {wanted[place]}, {apart}"
    problems = [seen] if margins[place] > 2 * limit else []
    return judge(Level.ENGINE, name, problems, f"{seen}: a near tie, {place} tokens before it are the same")


def takes_images(release: Release) -> bool:
    return "vision_config" in release.raw


def _why_not(release: Release, source: Path | None) -> str:
    if not takes_images(release):
        return NO_IMAGES
    if source is None:
        return "--source is wanted to compare with"
    form = release.format
    if release.transformers_problem:
        return release.transformers_problem
    if importlib.util.find_spec(form.transformers_package.replace("-", "_")) is None:
        return f"{form.transformers_package} is not installed beside fourfold: pip install {form.transformers_package}"
    wanted = int(SPARE * release.state.source_tensor_bytes)
    free = psutil.virtual_memory().available
    if wanted > free:
        return f"transformers would hold the whole model: {wanted:,} bytes of memory, {free:,} are free"
    return ""
