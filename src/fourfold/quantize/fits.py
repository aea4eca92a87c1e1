"""Whether recipe, model and tokenizer fit each other: the group size, what guidance is written for, token ids."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch

from fourfold.core import widening
from fourfold.datatypes import FourfoldError, brief, reason
from fourfold.model import calls, loader
from fourfold.model.head import changes_logits
from fourfold.model.json_object import read_object
from fourfold.model.processor import require_vision
from fourfold.model.router import find_router
from fourfold.model.skeleton import TAIL_TOKENS, Skeleton
from fourfold.recipe import AUTO, GROUP_SIZES, Recipe


def choose_group_size(skeleton: Skeleton, recipe: Recipe) -> Recipe:
    """The recipe with a group size that divides what experts are given, and down's input on each of the GPUs of tensor
    parallel, as vLLM and SGLang split it.

    Raises FourfoldError where the recipe's own does not, or none does.
    """
    experts, gpus = [one for one in skeleton.blueprint.experts if one is not None], recipe.scheme.tensor_parallel
    widths = {("hidden size", str(one.hidden), one.hidden) for one in experts}
    for width in sorted({one.width for one in experts}):
        if width % gpus:
            raise FourfoldError(f"scheme.tensor_parallel = {gpus} does not divide the experts' width {width}")
        widths.add(("width", str(width) if gpus == 1 else f"{width} / {gpus}", width // gpus))
    fits = [size for size in GROUP_SIZES if not any(width % size for *_, width in widths)]
    wanted = recipe.scheme.group_size
    if wanted == AUTO and fits:
        return replace(recipe, scheme=replace(recipe.scheme, group_size=fits[0]))
    if wanted in fits:
        return recipe
    names = [f"{name} {text}" for name, text, width in sorted(widths) if wanted == AUTO or width % int(wanted)]
    if not fits:
        sizes = ", ".join(map(str, GROUP_SIZES))
        raise FourfoldError(f"no group size of {sizes} divides the experts' {' and '.join(names)}, as engines need")
    raise FourfoldError(f"scheme.group_size = {wanted} does not divide the experts' {names[0]}; take {fits[0]}")


def check_guidance(skeleton: Skeleton, recipe: Recipe) -> None:
    """Raise FourfoldError for a recipe with guidance and a model that its mathematics does not cover.

    How experts' output reaches a layer's is measured with made-up weights.
    """
    guidance, device = recipe.guidance, torch.device("cpu")
    if not guidance.tokens:
        return
    problem = ""
    if guidance.sites == "both" and not skeleton.widest.arithmetic.is_swiglu():
        problem = "its experts do not compute silu(gate) * up; take guidance.sites = 'down', or a recipe without it"
    elif not skeleton.is_plain(device):
        problem = "its layers are given more than the state of the layer before; take a recipe without it, as best"
    elif changes_logits(skeleton.blueprint):
        problem = "its logits are more than a product with the output head; take a recipe without it, as best"
    else:
        first, call = skeleton.routed[0], skeleton.calls((1, TAIL_TOKENS), device, torch.bfloat16)
        state = torch.randn(call.state.shape, generator=torch.Generator().manual_seed(0)).bfloat16()
        made_up = loader.made_up_layer(skeleton.blueprint, first, device)
        with widening.products(device):
            tail = calls.measure_tail(made_up, call, first, state)
        if tail is None:
            problem = "what its experts put out is not added to the residual stream; take a recipe without it, as best"
    if not problem and guidance.routing and not find_router(skeleton):
        raise FourfoldError(
            f"{skeleton.blueprint.path}: guidance.routing is not available for {skeleton.family.model_type}: its "
            "routers do not choose the experts with the largest router logits; take guidance.routing = false"
        )
    if problem:
        raise FourfoldError(
            f"{skeleton.blueprint.path}: guidance is not available for {skeleton.family.model_type}: {problem}"
        )


def check_images(skeleton: Skeleton, recipe: Recipe) -> None:
    """Raise FourfoldError for a recipe with images and a model without, and where only text is solved on and there is
    none.
    """
    if not recipe.reads_images:
        return
    require_vision(skeleton)
    if len(recipe.image_sources) == len(recipe.calibration.sources):
        for key, asked in (
            ("guidance.tokens", recipe.guidance.tokens),
            ("scheme.rest.draft_experts", recipe.scheme.rest.draft_experts == "int4"),
        ):
            if asked:
                raise FourfoldError(
                    f"{key}: this is solved on rows of text, and all calibration sources are of images. Add a source "
                    "of text"
                )


def check_tokenizer(folder: Path, vocabulary: int) -> None:
    """Raise FourfoldError unless there is a tokenizer, of tokens that the embedding has."""
    path = folder / "tokenizer.json"
    if not path.is_file():
        if (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file():
            return
        raise FourfoldError(
            f"{folder}: neither tokenizer.json nor vocab.json and merges.txt, so that calibration text "
            "cannot be tokenized; copy the model's tokenizer files there"
        )
    content = read_object(path)
    try:
        vocab = content["model"]["vocab"]
        ids = list(vocab.values()) if isinstance(vocab, dict) else list(range(len(vocab)))
        largest = max(map(int, ids + [token["id"] for token in content.get("added_tokens") or ()]))
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise FourfoldError(f"{path}: not a tokenizer ({reason(error)}). Download it again") from None
    if largest >= vocabulary:
        what = f"got token id {brief(largest)}, expected less than config.json's vocab_size {vocabulary}"
        raise FourfoldError(f"{path}: {what}. This is another model's tokenizer")
