"""A small random copy of a model, run layer by layer as fourfold runs it, against transformers' own model as a whole.

It shows what no table of architectures can: whether names, calls, arithmetic and tails were derived rightly. The copy
has the model's own config.json, with fewer layers, experts and words, and narrower MLPs.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.utils import logging

from fourfold.datatypes import Beside, FourfoldError, reason
from fourfold.model import internals
from fourfold.model.blueprint import Blueprint
from fourfold.model.checkpoint import Checkpoint
from fourfold.model.config import CONFIG
from fourfold.model.head import Head, logits
from fourfold.model.layer import pass_rows
from fourfold.model.loader import MADE_UP
from fourfold.model.skeleton import TOPK, Skeleton

ROWS, TOKENS = 2, 24
EXPERTS, CHOSEN, WIDTH, VOCABULARY = 4, 2, 256, 512
MOST_LAYERS, MOST_PARAMETERS = 12, 2 * 10**9  # of a copy: 4 GB, and as much again while it is compared
SIZE = 0.02  # of weights, as models begin with
EXPERT_SCALE = 8  # an expert in the wrong place moves the state by far more than rounding does
SPREAD = 0.05  # what norms and biases are moved by, so that each one tells
NOISE = 0.006  # relative: experts are summed in another order than transformers does
DEPTHS = ("num_hidden_layers", "depth", "num_layers", "encoder_layers")
CPU, BF16 = torch.device("cpu"), torch.bfloat16


@dataclass(frozen=True)
class Whole:
    """transformers' own way through a model: the states behind each layer, and the logits."""

    states: tuple[Tensor, ...]
    logits: Tensor


def rehearse(skeleton: Skeleton) -> None:
    """Raise FourfoldError unless a small copy of the model gives the same states and logits layer by layer.

    Takes some seconds, and up to twice the bytes of one decoder layer without its experts for each kind of layer.
    """
    blueprint, bars = skeleton.blueprint, logging.is_progress_bar_enabled()
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]  # transformers' own, of writing and loading the copy
    try:
        with tempfile.TemporaryDirectory(prefix="fourfold-rehearsal-") as name, torch.no_grad():
            write_copy(skeleton, Path(name))
            token_RT = torch.randint(3, VOCABULARY - 32, (ROWS, TOKENS), generator=torch.Generator().manual_seed(0))
            small = Checkpoint.open(Path(name))
            worst, place = max(differences(small, run_whole(small.blueprint, token_RT), token_RT))
    except Exception as error:  # transformers' own code on settings that nobody tried
        why = str(error).rpartition(f"{CONFIG}: ")[2] if isinstance(error, FourfoldError) else reason(error)
        raise FourfoldError(
            f"{blueprint.path}: a small copy of {skeleton.family.model_type} cannot be run layer by layer: {why}"
        ) from error
    finally:
        if bars:
            logging.enable_progress_bar()  # type: ignore[no-untyped-call]
    if worst > NOISE:
        raise FourfoldError(
            f"{blueprint.path}: a small copy of {skeleton.family.model_type}, run layer by layer, is not what "
            f"transformers computes: {place} is off by {worst:.2g}, expected at most {NOISE:g}. This architecture "
            "cannot be quantized"
        )


def differences(checkpoint: Checkpoint, whole: Whole, token_RT: Tensor) -> Iterator[tuple[float, str]]:
    """How far off each layer's output is, from the whole model's own state before it, and the logits: relative norm of
    the difference, and what of. Layers run as `quantize` runs them. Raises FourfoldError as `Around.require_plain`.
    """
    around = checkpoint.around(CPU, BF16)
    around.require_plain(token_RT)
    state, beside = around.calls(token_RT).state, Beside(token_RT, ())
    for index, expected in enumerate(whole.states):
        layer = checkpoint.layer(index, CPU, BF16)
        layer = layer.owning(layer.owned) if layer.is_routed else layer
        output, _, carried = pass_rows(layer, state, beside)
        yield _off(output, expected), f"layer {index}"
        state, beside = expected, Beside(token_RT, tuple(carried))
    head = checkpoint.head(CPU, BF16)
    yield _off(_logits(head, state), whole.logits), "the logits"


def _logits(head: Head, state: Tensor) -> Tensor:
    return torch.stack([logits(head, head.norm(row)) for row in state])


def _off(found: Tensor, expected: Tensor) -> float:
    found, expected = found.float(), expected.float()
    off = float((found - expected).norm() / expected.norm())
    return off if off == off else float("inf")  # NaN compares as false


def run_whole(blueprint: Blueprint, token_RT: Tensor, dtype: torch.dtype = BF16) -> Whole:
    """The checkpoint of a blueprint as transformers loads and runs it."""
    model = type(blueprint.model).from_pretrained(blueprint.path.parent, dtype=dtype).eval()
    states: list[Tensor] = []

    def keep(module: nn.Module, given: Any, answer: Any) -> None:
        states.append((answer[0] if isinstance(answer, tuple) else answer).clone())

    for layer in model.get_submodule(blueprint.layers_path):
        layer.register_forward_hook(keep)
    with torch.no_grad():
        found = model(input_ids=token_RT, use_cache=False).logits
    return Whole(tuple(states), found)


# --- the copy ---------------------------------------------------------------------------------------------------------


def write_copy(skeleton: Skeleton, folder: Path) -> None:
    """A checkpoint with random BF16 weights, config.json cut down. Raises FourfoldError for one that is not small."""
    raw, model_class = cut(skeleton), type(skeleton.blueprint.model)
    empty = internals.build_model(model_class, internals.read_settings(raw))
    count = sum(value.numel() for value in empty.parameters())
    if count > MOST_PARAMETERS:
        raise FourfoldError(f"{CONFIG}: it has {count:.2g} parameters, expected at most {MOST_PARAMETERS:.2g}")
    model = internals.build_model(model_class, internals.read_settings(raw), "cpu")
    fill_(model)
    model.save_pretrained(folder)
    (folder / CONFIG).write_text(json.dumps(raw), encoding="utf-8")


def fill_(model: nn.Module) -> None:
    """Random values that let every tensor tell: norms around 1, large experts, own ones of a token by a table."""
    generator = torch.Generator().manual_seed(1)
    some_N = torch.randn(MADE_UP, generator=generator)  # repeated: quicker than a number for each parameter
    stacks = {id(stack) for module in model.modules() for stack in _stacks(module)}
    for name, value in (*model.named_parameters(), *model.named_buffers()):
        if not value.is_floating_point():
            if value.ndim == 2 and value.shape[1] <= EXPERTS and not value.any():
                value.copy_(torch.rand(len(value), EXPERTS, generator=generator).argsort(dim=1)[:, : value.shape[1]])
        elif value.ndim <= 1:
            around = 0.0 if "bias" in name else 1.0
            value.copy_(torch.randn(value.shape, generator=generator) * SPREAD + around)
        else:
            scale = EXPERT_SCALE if id(value) in stacks else 1
            filled_N = (some_N * (scale * SIZE)).to(value.dtype).repeat(-(-value.numel() // MADE_UP))
            value.copy_(filled_N[: value.numel()].view(value.shape))


def _stacks(module: nn.Module) -> Iterator[Tensor]:
    """Of routed experts."""
    own = dict(module.named_parameters(recurse=False))
    if "down_proj" in own:
        yield from (value for value in own.values() if value.ndim == 3)


def cut(skeleton: Skeleton) -> dict[str, Any]:
    """config.json with a layer of each kind, and one more; few experts and words; narrow MLPs; shallow towers.

    Raises FourfoldError where that takes too many layers.
    """
    raw: dict[str, Any] = json.loads(skeleton.blueprint.model.config.to_json_string(use_diff=False))
    raw |= {key: skeleton.raw[key] for key in ("model_type", "architectures") if key in skeleton.raw}
    raw.pop("quantization_config", None)
    text, layers = _text(raw, skeleton.layers), _least_layers(skeleton)
    for key, value in text.items():
        by_layer = isinstance(value, list) or (isinstance(value, str) and "pattern" in key)
        if by_layer and len(value) == skeleton.layers:
            text[key] = value[:layers]
        elif isinstance(value, dict) and all(str(number).isdecimal() for number in value):
            text[key] = {number: one for number, one in value.items() if int(number) < layers}
        elif key == "num_hidden_layers":
            text[key] = layers
        elif "intermediate_size" in key and isinstance(value, int):
            text[key] = min(value, WIDTH)
        elif isinstance(value, int) and value == skeleton.experts and "expert" in key:
            text[key] = EXPERTS
        elif key in ("n_group", "topk_group") and value:
            text[key] = 1
        elif key in TOPK and isinstance(value, int):
            text[key] = min(value, CHOSEN)
    for part in raw.values():
        if isinstance(part, dict) and part is not text and not any(isinstance(value, list) for value in part.values()):
            part |= {key: 1 for key in DEPTHS if isinstance(part.get(key), int)}
    _fewer_words(raw, iter(range(VOCABULARY - 1, 0, -1)))
    return raw


def _text(raw: dict[str, Any], layers: int) -> dict[str, Any]:
    """The part of config.json that is the decoder's."""
    parts = [raw.get("text_config"), raw, *raw.values()]
    fits = (part for part in parts if isinstance(part, dict) and part.get("num_hidden_layers") == layers)
    return next(fits, raw)


def _fewer_words(part: dict[str, Any], ids: Iterator[int]) -> None:
    """Vocabularies cut, and special tokens among their last."""
    for key, value in part.items():
        if isinstance(value, dict):
            _fewer_words(value, ids)
        elif "vocab_size" in key and isinstance(value, int):
            part[key] = min(value, VOCABULARY)
        elif key.endswith(("token_id", "token_index")) and isinstance(value, int):
            part[key] = next(ids) if value else 0
        elif key.endswith("token_id") and isinstance(value, list):
            part[key] = [next(ids) for _ in value]


def _least_layers(skeleton: Skeleton) -> int:
    """The first layers that have all kinds, and one more; two routed ones at least."""
    kinds = [_kind(skeleton, layer) for layer in range(skeleton.layers)]
    last_new = max(kinds.index(kind) for kind in set(kinds))
    second = skeleton.routed[1] if len(skeleton.routed) > 1 else skeleton.routed[0]
    count = min(max(last_new + 2, second + 1), skeleton.layers)
    if count > MOST_LAYERS:
        raise FourfoldError(
            f"{skeleton.blueprint.path}: {skeleton.family.model_type} has no small copy: only its first {count} layers "
            f"have one of each kind, expected at most {MOST_LAYERS}. This architecture cannot be quantized"
        )
    return count


def _kind(skeleton: Skeleton, layer: int) -> tuple[object, ...]:
    """What makes a layer another than the rest: its tensors, and how config.json names it."""
    module = skeleton.blueprint.decoder.layers[layer]
    shapes = tuple((name, tuple(value.shape)) for name, value in module.state_dict().items())
    return skeleton.layer_kind(layer), type(module).__name__, shapes
