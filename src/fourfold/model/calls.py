"""How a model calls its decoder layers, recorded from its own forward, and what an output head makes of the last state.

Every layer is replaced by a stub that keeps its arguments. Masks, positions, rotary embeddings and whatever else a
family hands to its layers come from the model itself, for full rows of text, or of text and images.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from fourfold.datatypes import FourfoldError, reason
from fourfold.model.blueprint import Blueprint
from fourfold.model.loader import Layer

STATE = "hidden_states"
ANSWERS = (1, 2, 3)  # how many values a layer may answer with, its state first
LINEAR = 0.02  # what may be left of the experts' output by BF16 rounding, of its size
Argument = int | str


@dataclass(frozen=True)
class Call:
    """One layer's arguments, None in place of the state, which is another at every use."""

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]

    @property
    def state(self) -> Argument:
        return 0 if self.args else STATE

    def value(self, argument: Argument) -> Any:
        return self.args[argument] if isinstance(argument, int) else self.kwargs[argument]

    def arguments(self) -> Iterator[Argument]:
        yield from range(len(self.args))
        yield from self.kwargs

    def with_values(self, values: Mapping[Argument, Any]) -> tuple[list[Any], dict[str, Any]]:
        args, kwargs = list(self.args), dict(self.kwargs)
        for argument, value in values.items():
            if isinstance(argument, int):
                args[argument] = value
            else:
                kwargs[argument] = value
        return args, kwargs


@dataclass(frozen=True)
class Calls:
    """A batch of token ids [R, T] on its way through a model, as far as no layer decides it.

    state: the start of the stream, [R, T, D] or wider; layers: each one's call; answers: how many values a layer
    returns; carry: arguments that a layer takes from the layer before, by the place among that one's values; ids:
    arguments that are the token ids; added: what the model adds to the state before a layer, of images, by layer.
    """

    token_RT: Tensor
    state: Tensor
    layers: tuple[Call, ...]
    answers: int
    carry: Mapping[Argument, int]
    ids: frozenset[Argument]
    added: Mapping[int, Tensor] = field(default_factory=dict)

    def on_host(self) -> Calls:
        """The calls without the state, their tensors on the host; what layers share stays shared."""
        known: dict[int, Tensor] = {}

        def to_host(value: Tensor) -> Tensor:
            return known.setdefault(id(value), value.cpu())

        layers = tuple(Call(*_mapped((call.args, call.kwargs), to_host)) for call in self.layers)
        blank = self.state.new_zeros((), device="cpu").expand(self.state.shape)
        token_RT = self.token_RT.cpu()
        return replace(self, token_RT=token_RT, state=blank, layers=layers, added=_mapped(self.added, to_host))


Carried = Sequence[Any]


def record(blueprint: Blueprint, token_RT: Tensor, images: Mapping[str, Tensor] | None = None) -> Calls:
    """The calls of a batch. token_RT: int64, full rows, on the device of what was loaded around the layers; images:
    what a processor gives beside the ids, of rows with images.

    A state of two rows unpacks like a pair of values: whether it was handed on whole is looked at.
    Raises FourfoldError where the state is not handed from layer to layer as it is.
    """
    failure: Exception | None = None
    for answers in ANSWERS:
        stubs = _Stubs(blueprint, answers, factor=0.0 if images else 1.0)  # of zeros is left what the model adds
        try:
            with torch.no_grad(), stubs.in_place():
                blueprint.model(input_ids=token_RT, use_cache=False, **(images or {}))
        except (AttributeError, LookupError, TypeError, ValueError) as error:
            failure = error.with_traceback(None)  # its frames hold the model, until garbage is collected
            continue
        if stubs.first is not None and stubs.handed_on and len(stubs.calls) == blueprint.layers:
            carry, ids = stubs.carry(), stubs.given(token_RT)
            return Calls(token_RT, stubs.first, tuple(stubs.calls), answers, carry, ids, stubs.added)
    raise FourfoldError(
        f"{blueprint.path}: {type(blueprint.model).__name__} does not hand its state from layer to layer as it is, "
        f"expected one that does{f' ({reason(failure)})' if failure else ''}. This family needs code of its own, which "
        "fourfold does not have"
    )


def run_out(blueprint: Blueprint, token_RT: Tensor, answers: int, state: Tensor) -> Tensor:
    """The same without a recording, with gradients where they are on. answers: see Calls."""
    stubs = _Stubs(blueprint, answers, last=state)
    with stubs.in_place():
        logits: Tensor = blueprint.model(input_ids=token_RT, use_cache=False).logits
    return logits


def require_independent(blueprint: Blueprint, token_RT: Tensor) -> None:
    """Raise FourfoldError if a layer's call depends on the state of another layer beyond its carry.

    Recorded twice, the stubs answering with their state times 1.0 and 1.5: what else differs depends on it.
    """
    calls = record(blueprint, token_RT)
    stubs = _Stubs(blueprint, calls.answers, factor=1.5)
    with stubs.in_place():
        blueprint.model(input_ids=token_RT, use_cache=False)
    for layer, argument in _differences(calls, stubs.calls):
        raise FourfoldError(
            f"{blueprint.path}: layer {layer} of {type(blueprint.model).__name__} is given earlier layers' states as "
            f"argument {argument}, expected its own layer's input alone. This family needs code of its own, which "
            "fourfold does not have"
        )


def varies(blueprint: Blueprint, token_RT: Tensor) -> bool:
    """Whether calls depend on the tokens otherwise than by their ids, so that every batch must be recorded, not only
    every shape of one.
    """
    other = record(blueprint, token_RT.flip(0, 1))
    return any(_differences(record(blueprint, token_RT), other.layers))


def _differences(calls: Calls, others: Sequence[Call]) -> Iterator[tuple[int, Argument]]:
    """Layers and arguments whose values differ between two recordings, but for the state and what is carried."""
    for layer, (first, second) in enumerate(zip(calls.layers, others, strict=True)):
        for argument in first.arguments():
            exempt = argument == first.state or argument in calls.carry or argument in calls.ids
            if not exempt and not _same(first.value(argument), second.value(argument)):
                yield layer, argument


def pass_layer(layer: Layer, calls: Calls, index: int, state: Tensor, carried: Carried = ()) -> tuple[Tensor, Carried]:
    """A batch of `calls.token_RT` through one layer; its experts put out what the layer's tap does.

    carried: what the layer before returned beside its state. Returns the new state and what is carried on.
    """
    call = calls.layers[index]
    if index in calls.added:
        state = state + calls.added[index].to(state.device)
    values: dict[Argument, Any] = {call.state: state}
    if index:
        values |= {argument: carried[place] if carried else None for argument, place in calls.carry.items()}
    values |= {argument: calls.token_RT for argument in call.arguments() if argument in calls.ids}
    args, kwargs = _mapped(call.with_values(values), lambda value: value.to(state.device))
    answer = layer.module(*args, **kwargs)
    return (answer[0], answer[1:]) if isinstance(answer, tuple) else (answer, ())


def measure_tail(layer: Layer, calls: Calls, index: int, state: Tensor, carried: Carried = ()) -> float | None:
    """How the experts' output e reaches the layer's output y: y = y0 + factor * e, y0 the output for e = 0.

    Returns the factor, 1.0 where e is added as it is; None where y is anything else of e (a norm, a projection, mixed
    streams): such a layer must be run again with e in place. Measured with random e, of another size for every token,
    so that a norm shows. state, carried: as for `pass_layer`, a few tokens.
    """
    assert layer.tap is not None, "a layer without routed experts has no tail"
    zero, _ = pass_layer(layer, calls, index, state, carried)
    input_TD, _, _ = layer.tap.take()
    generator = torch.Generator().manual_seed(0)
    shape = (*input_TD.shape[:-1], layer.tap.output)
    size_T1 = 2.0 ** torch.randint(0, 4, (*shape[:-1], 1), generator=generator)
    experts = torch.randn(shape, generator=generator) * size_T1 * max(float(zero.float().std()), 1e-3) * 8
    experts = experts.to(input_TD.device, input_TD.dtype)
    with layer.tap.answering(lambda *_: experts.clone()):
        full, _ = pass_layer(layer, calls, index, state, carried)
    layer.tap.take()
    if full.numel() != experts.numel():
        return None
    change, e = (full.double() - zero.double()).flatten(), experts.double().flatten()
    factor = float(change @ e / (e @ e))
    if float((change - factor * e).norm()) > LINEAR * float(change.norm()):
        return None
    return float(f"{factor:.3g}")  # further digits are rounding


class _Stubs:
    """One forward's stubs in place of all layers. last: what the last of them answers with; factor: times the state."""

    def __init__(self, blueprint: Blueprint, answers: int, *, last: Tensor | None = None, factor: float = 1.0) -> None:
        self.layers = list(blueprint.decoder.layers)
        self.answers, self.last, self.factor = answers, last, factor
        self.calls: list[Call] = []
        self.first: Tensor | None = None  # the state before the first layer
        self.handed_on = True  # whether each layer's state is the object that the previous layer returned
        self.added: dict[int, Tensor] = {}  # where zeros are returned: what they are when they are handed on
        self._given: Any = None
        self._beside: list[tuple[Tensor, ...]] = []  # what each answered with beside it

    @contextmanager
    def in_place(self) -> Iterator[None]:
        for layer in self.layers:
            layer.__dict__["forward"] = self._forward
        try:
            yield
        finally:
            for layer in self.layers:
                layer.__dict__.pop("forward", None)

    def _forward(self, *args: Any, **kwargs: Any) -> Any:
        call = Call(args, kwargs)
        state = call.value(call.state)
        if self.calls:
            if self.factor == 0.0 and state is not self._given and state.shape == self._given.shape:
                self.added[len(self.calls)] = state
                state = self._given
            self.handed_on = self.handed_on and state is self._given
        else:
            self.first = state
        others, named = call.with_values({call.state: None})  # or a batch for each layer lies in memory
        self.calls.append(Call(tuple(others), named))
        if self.last is not None and len(self.calls) == len(self.layers):
            state = self.last
        # A new tensor each time, to be known again.
        self._given = state.view_as(state) if self.factor == 1.0 else state * self.factor
        self._beside.append(tuple(torch.zeros(1, device=state.device) for _ in range(self.answers - 1)))
        return self._given if self.answers == 1 else (self._given, *self._beside[-1])

    def carry(self) -> dict[Argument, int]:
        """Arguments that are the layer before's further values, as in the calls of all layers but the first."""
        found: dict[Argument, int] = {}
        for call, values in zip(self.calls[1:], self._beside, strict=False):
            for place, value in enumerate(values):
                found |= {argument: place for argument in call.arguments() if call.value(argument) is value}
        return found

    def given(self, token_RT: Tensor) -> frozenset[Argument]:
        """Arguments that are the tensor of token ids itself."""
        return frozenset(
            argument for call in self.calls for argument in call.arguments() if call.value(argument) is token_RT
        )


def _mapped(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """Nested arguments with each tensor changed."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, Mapping):
        return {key: _mapped(one, change) for key, one in value.items()}
    if isinstance(value, tuple | list) and not hasattr(value, "_fields"):
        return type(value)(_mapped(one, change) for one in value)
    return value


def _same(first: Any, second: Any) -> bool:
    if isinstance(first, Tensor) or isinstance(second, Tensor):
        return type(first) is type(second) and first.shape == second.shape and torch.equal(first, second)
    if isinstance(first, Mapping):
        return all(_same(value, second[key]) for key, value in first.items())
    if isinstance(first, tuple | list):
        return len(first) == len(second) and all(map(_same, first, second))
    return first == second if isinstance(first, int | float | str) else True
