"""transformers' modules of a blueprint with their weights: one decoder layer at a time, and what stands around them."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Container, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fourfold.model import internals
from fourfold.model.arithmetic import BIAS, DOWN_NAME, GATE_UP_NAMES, Arithmetic, Stacks
from fourfold.model.blueprint import Blueprint
from fourfold.model.experts import Experts
from fourfold.model.family import DOWN, GATE, UP
from fourfold.model.internals import Source
from fourfold.model.tensors import DTYPES, side_by_side

Read = Callable[[str, Tensor | None], Tensor]  # a tensor by its name on disk, into a place that fits where one is given
Room = Callable[..., Tensor]  # as torch.empty: (shape, dtype=)
Given = tuple[Tensor, Tensor, Tensor]  # an experts' call: input [T, D], expert ids and routing weights [T, A]

BF16, HOST = torch.bfloat16, torch.device("cpu")
MADE_UP = 65_537  # random numbers that made-up weights repeat: no power of two, so that rows differ


class Tap:
    """Stands in for the forward of a layer's experts: keeps what they are given.

    answer: what is put out in their place, from the same arguments; None for zeros, which leaves the layer's output
    without routed experts.
    """

    def __init__(self, output: int) -> None:
        self.output = output
        self.given: Given | None = None
        self.answer: Callable[[Tensor, Tensor, Tensor], Tensor] | None = None

    def __call__(self, hidden_states: Tensor, index_TA: Tensor, weight_TA: Tensor) -> Tensor:
        self.given = hidden_states, index_TA, weight_TA
        if self.answer is not None:
            return self.answer(hidden_states, index_TA, weight_TA)
        return hidden_states.new_zeros(*hidden_states.shape[:-1], self.output)

    def take(self) -> Given:
        """What the last forward gave to the experts; the tap forgets it."""
        given, self.given = self.given, None
        assert given is not None, "the layer did not call its experts"
        return given

    @contextmanager
    def answering(self, answer: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Iterator[None]:
        """Put out what `answer` gives, for one forward or more."""
        before, self.answer = self.answer, answer
        try:
            yield
        finally:
            self.answer = before


@dataclass(frozen=True)
class Layer:
    """One decoder layer on a device, its experts' weights apart from it.

    module: the experts in it hold no weights, and their forward is `tap`. experts, arithmetic, tap: None where the
    layer has no routed experts; the arithmetic is of the loaded module, with its norm where experts have one.
    """

    module: nn.Module
    experts: Experts | None
    arithmetic: Arithmetic | None
    tap: Tap | None


def load(
    blueprint: Blueprint, read: Read, prefix: str, device: torch.device, dtype: torch.dtype = BF16
) -> dict[str, Tensor]:
    """All tensors in memory under a prefix, by name, but for routed experts' own.

    Read, cast and converted as transformers' loader does it. dtype: what the model computes in, BF16 or fp32.
    """
    loaded: dict[str, Tensor] = {}
    for name, source in blueprint.within(prefix):
        if name not in blueprint.expert_parameters:
            loaded |= _converted(blueprint, read, name, source, device, dtype)
    return loaded


def _converted(
    blueprint: Blueprint, read: Read, name: str, source: Source, device: torch.device, dtype: torch.dtype
) -> dict[str, Tensor]:
    wanted = torch.promote_types(source.dtype, dtype) if source.dtype.is_floating_point else source.dtype
    tensors = {
        pattern: [read(each, None).to(device, wanted) for each in names] for pattern, names in source.names.items()
    }
    if source.converter is None:
        ((value,),) = tensors.values()
        return {name: value}
    return internals.convert(source.converter, blueprint.model, name, tensors)


def load_stacks(blueprint: Blueprint, read: Read, layer: int, room: Room = torch.empty) -> Stacks | None:
    """A layer's routed experts on the host, in the canonical form; None where it has none.

    Experts that are tensors of their own go straight into their place. room: memory for them.
    """
    experts = blueprint.experts[layer]
    if experts is None:
        return None
    prefix = f"{blueprint.prefix(layer)}{experts.module}."
    stacks: dict[str, Tensor] = {}
    if experts.separate:
        stacks = _gathered(blueprint, read, experts, prefix, room)
    for parameter in experts.parameters:
        if experts.separate and not parameter.endswith(BIAS):
            continue
        name = prefix + parameter
        made = _converted(blueprint, read, name, blueprint.sources[name], HOST, BF16)[name]
        stacks[parameter] = experts.arithmetic.canonical(parameter, made).contiguous()
    up = next(name for name in GATE_UP_NAMES if name in stacks)
    return Stacks(stacks[up], stacks[DOWN_NAME], stacks.get(up + BIAS), stacks.get(DOWN_NAME + BIAS))


def _gathered(blueprint: Blueprint, read: Read, experts: Experts, prefix: str, room: Room) -> dict[str, Tensor]:
    """Stacks of experts that are tensors of their own."""
    up = next(name for name in GATE_UP_NAMES if name in experts.parameters)
    dtype = blueprint.model.get_parameter(prefix + up).dtype
    rows = experts.width * (len(experts.projections) - 1)
    gate_up_ENK = room((experts.count, rows, experts.hidden), dtype=dtype)
    down_ENK = room((experts.count, experts.output, experts.width), dtype=dtype)

    def fill(expert: int) -> None:
        places = {
            GATE: gate_up_ENK[expert, : experts.width],
            UP: gate_up_ENK[expert, rows - experts.width :],
            DOWN: down_ENK[expert],
        }
        for projection, name in experts.separate[expert].items():
            _fill(blueprint, read, name, places[projection])

    for _ in side_by_side(fill, range(len(experts.separate))):
        pass
    return {up: gate_up_ENK, DOWN_NAME: down_ENK}


def _fill(blueprint: Blueprint, read: Read, name: str, place_NK: Tensor) -> None:
    fits = DTYPES[blueprint.headers[name].dtype] == place_NK.dtype
    value = read(name, place_NK if fits else None)
    if not fits:
        place_NK.copy_(value)


def build_layer(blueprint: Blueprint, layer: int, loaded: dict[str, Tensor], device: torch.device) -> Layer:
    """transformers' layer with tensors from `load` under the layer's prefix, on their device."""
    module, prefix = blueprint.layer_module(layer), blueprint.prefix(layer)
    own = {name.removeprefix(prefix): value for name, value in loaded.items()}
    left = module.load_state_dict(own, strict=False, assign=True)
    experts = blueprint.experts[layer]
    apart = {f"{experts.module}.{parameter}" for parameter in experts.parameters} if experts else set()
    missing = sorted(set(left.missing_keys) - apart)
    assert not missing and not left.unexpected_keys, f"layer {layer}: missing {missing}, {left.unexpected_keys}"
    internals.make_buffers(owner(blueprint), module, device)
    module.requires_grad_(False).eval()
    if experts is None:
        return Layer(module, None, None, None)
    expert_module, tap = module.get_submodule(experts.module), Tap(experts.output)
    expert_module.__dict__["forward"] = tap
    return Layer(module, experts, Arithmetic.of(expert_module, f"{prefix}{experts.module}"), tap)


def made_up_layer(blueprint: Blueprint, layer: int, device: torch.device) -> Layer:
    """transformers' layer with small random weights (MADE_UP numbers, repeated) and without its experts' own."""
    experts, prefix = blueprint.experts[layer], blueprint.prefix(layer)
    apart = {f"{experts.module}.{parameter}" for parameter in experts.parameters} if experts else set()
    some_N = torch.randn(MADE_UP, generator=torch.Generator().manual_seed(0)).to(device) * 0.02
    made: dict[str, Tensor] = {}
    for name, value in blueprint.layer_module(layer).state_dict().items():
        if name not in apart:
            filled = some_N.to(value.dtype).repeat(-(-value.numel() // MADE_UP))[: value.numel()]
            made[prefix + name] = filled.view(value.shape)
    return build_layer(blueprint, layer, made, device)


def load_around(
    blueprint: Blueprint, read: Read, without: Container[str], dtype: torch.dtype = BF16
) -> dict[str, Tensor]:
    """Tensors of the decoder outside of its layers and of the output head, by name in memory, on the host.

    without: names in memory that are left out. Other towers (vision, audio) are none of it, but in `load_towers`.
    """
    inside = _around_prefixes(blueprint)
    return _load_some(blueprint, read, lambda name: name.startswith(inside) and name not in without, dtype)


def load_towers(blueprint: Blueprint, read: Read) -> dict[str, Tensor]:
    """Tensors of all other towers (vision, audio) and of what joins them to the decoder, likewise."""
    inside = _around_prefixes(blueprint)
    return _load_some(blueprint, read, lambda name: not name.startswith(inside), BF16)


def tower_bytes(blueprint: Blueprint) -> int:
    """Of what `load_towers` loads, as it is on disk."""
    inside = (*_around_prefixes(blueprint), f"{blueprint.layers_path}.")
    names = {each for name, one in blueprint.sources.items() if not name.startswith(inside) for each in one.all_names}
    return sum(blueprint.headers[name].size_bytes for name in names)


def _load_some(
    blueprint: Blueprint, read: Read, wanted: Callable[[str], bool], dtype: torch.dtype
) -> dict[str, Tensor]:
    loaded: dict[str, Tensor] = {}
    for name, source in blueprint.sources.items():
        if wanted(name) and not name.startswith(f"{blueprint.layers_path}."):
            loaded |= _converted(blueprint, read, name, source, HOST, dtype)
    return loaded


def _around_prefixes(blueprint: Blueprint) -> tuple[str, ...]:
    """What names in memory of the decoder and of the output head begin with."""
    model, path = blueprint.model, blueprint.layers_path.rpartition("layers")[0]
    head = model.get_output_embeddings()
    return path, *(f"{name}." for name, module in model.named_modules() if module is head)


def around(blueprint: Blueprint, loaded: Mapping[str, Tensor], device: torch.device, dtype: torch.dtype) -> Blueprint:
    """The blueprint with a copy of its model, on a device but for its layers and what is not in `loaded`."""
    model = copy.deepcopy(blueprint.model)
    made = dataclasses.replace(
        blueprint, model=model, decoder=model.get_submodule(blueprint.layers_path.rpartition(".")[0])
    )
    cast = {name: value.to(device, torch.promote_types(value.dtype, dtype)) for name, value in loaded.items()}
    model.load_state_dict(cast, strict=False, assign=True)
    layers, made.decoder.layers = made.decoder.layers, nn.ModuleList()
    towers = any(not name.startswith(_around_prefixes(blueprint)) for name in loaded)
    try:
        internals.make_buffers(owner(made), made.decoder, device)
        if towers:
            internals.make_buffers(model, model, device)
    finally:
        made.decoder.layers = layers
    model.requires_grad_(False)
    return made


def owner(blueprint: Blueprint) -> nn.Module:
    """The transformers model that the layers are of."""
    owner: nn.Module = blueprint.decoder if hasattr(blueprint.decoder, "_init_weights") else blueprint.model
    return owner
