"""A layer's routed experts: found by the shapes of transformers' modules, and placed among the tensors on disk."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fourfold.datatypes import FourfoldError, TensorHeader, shortened
from fourfold.model import internals
from fourfold.model.arithmetic import BIAS, DOWN_NAME, GATE_UP_NAMES, Arithmetic
from fourfold.model.family import DOWN, GATE, UP
from fourfold.model.internals import Source


@dataclass(frozen=True)
class Experts:
    """The routed experts of one layer.

    module: its name inside the layer; count: E; hidden: D of their input; width: I; output: D of their output.
    separate: by expert, the name on disk of each projection's own tensor; stacked: by projection, the name on disk of
    the stack that holds all experts' (gate and up may share one); in_rows: it holds each projection's rows as they are.
    One of the two is empty, both where the checkpoint lacks them. parameters: tensors of the module, by their name in
    it.
    """

    module: str
    arithmetic: Arithmetic
    count: int
    hidden: int
    width: int
    output: int
    parameters: tuple[str, ...]
    in_rows: bool = False
    separate: tuple[Mapping[str, str], ...] = ()
    stacked: Mapping[str, str] = field(default_factory=dict)

    @property
    def projections(self) -> tuple[str, ...]:
        return (GATE, UP, DOWN) if self.arithmetic.gated else (UP, DOWN)

    def shape(self, projection: str) -> tuple[int, int]:
        """[N, K] of one expert's projection, as it is quantized."""
        return (self.output, self.width) if projection == DOWN else (self.width, self.hidden)


def find_experts(layer: nn.Module, where: str) -> Experts | None:
    """The routed experts inside a layer, found by their shapes: the names on disk are still open."""
    found = [(name, module) for name, module in layer.named_modules() if _is_experts(module)]
    if len(found) > 1:
        raise FourfoldError(
            f"{where} has {len(found)} stacks of experts ({', '.join(name for name, _ in found)}), expected one. "
            "fourfold quantizes one stack a layer"
        )
    if not found:
        return None
    name, module = found[0]
    parameters: dict[str, Tensor] = dict(module.named_parameters(recurse=False))
    up = next(key for key in GATE_UP_NAMES if key in parameters)
    if len(parameters[up]) != len(parameters[DOWN_NAME]):
        raise FourfoldError(
            f"{where}: {name} has {len(parameters[up])} experts in {up} and {len(parameters[DOWN_NAME])} in "
            f"{DOWN_NAME}, expected as many. Experts without weights (identity) need code of their own, which fourfold "
            "does not have"
        )
    arithmetic = Arithmetic.of(module, f"{where}: {name}")
    count, _, hidden = arithmetic.canonical(up, parameters[up]).shape
    _, output, width = arithmetic.canonical(DOWN_NAME, parameters[DOWN_NAME]).shape
    return Experts(name, arithmetic, count, hidden, width, output, tuple(parameters))


def _is_experts(module: nn.Module) -> bool:
    parameters: dict[str, Tensor] = dict(module.named_parameters(recurse=False))
    return (
        DOWN_NAME in parameters
        and parameters[DOWN_NAME].ndim == 3
        and any(name in parameters for name in GATE_UP_NAMES)
        and GATE not in parameters
    )


def place_experts(
    experts: Experts,
    model: Any,
    prefix: str,
    sources: Mapping[str, Source],
    headers: Mapping[str, TensorHeader],
    path: Path,
) -> Experts:
    """The same experts with their places on disk: tensors of their own, or stacks. prefix: of names in memory."""
    separate: list[dict[str, str]] = [{} for _ in range(experts.count)]
    stacked: dict[str, str] = {}
    plain = all(source.converter is None for name, source in sources.items() if name.startswith(f"{prefix}."))
    for parameter in experts.parameters:
        name = f"{prefix}.{parameter}"
        if parameter.endswith(BIAS) or name not in sources:
            continue
        on_disk = sources[name].all_names
        projections = experts.projections[:-1] if parameter in GATE_UP_NAMES else (DOWN,)
        order = _labelled(experts, model, name, len(projections), sources[name], headers)
        blocks = [] if order is None else [block.flatten(1) for block in order.chunk(len(projections), dim=1)]
        if len(blocks) != len(projections) or any((block != block[:, :1]).any() for block in blocks):
            raise FourfoldError(f"{path.parent}: {_difference(experts, model, name, on_disk, headers)}")
        for projection, block in zip(projections, blocks, strict=True):
            labels = [on_disk[label] for label in block[:, 0].tolist()]
            if _is_stack(sources[name], headers):
                stacked[projection] = labels[0]
            else:
                for expert, label in enumerate(labels):
                    separate[expert][projection] = label
    whole = all(len(names) == len(experts.projections) for names in separate)
    return dataclasses.replace(
        experts,
        separate=tuple(separate) if whole else (),
        stacked=stacked if len(stacked) == len(experts.projections) else {},
        in_rows=plain and not experts.arithmetic.transposed and not experts.arithmetic.interleaved,
    )


def _difference(
    experts: Experts, model: Any, name: str, on_disk: Sequence[str], headers: Mapping[str, TensorHeader]
) -> str:
    """How the tensors on disk that make one of the experts' in memory differ from those that transformers writes."""
    written = internals.written_headers(model, {name})
    missing = [each for each in written if each not in headers]
    more = [each for each in on_disk if each not in written]
    wanted = f"one tensor for each of {experts.count} experts and projection, or stacks of them"
    if len(missing) == len(written) or not (missing or more):
        return (
            f"{on_disk[0]} and others make {name} in a way that fourfold does not know, expected {wanted}. Is the "
            "checkpoint complete?"
        )
    problems = [f"{each} is missing" for each in missing] + [f"{each} is one too many" for each in more]
    return (
        f"{shortened(problems)}; expected {wanted}, as config.json has them. Download the checkpoint, or its "
        "config.json, again"
    )


def _labelled(
    experts: Experts, model: Any, name: str, projections: int, source: Source, headers: Mapping[str, TensorHeader]
) -> Tensor | None:
    """Which tensor on disk the rows of each expert come from: indices into `source.all_names`, [E or 2, 2n, 2].

    Runs the converter itself on tiny tensors that hold their own number, so that no operation need be known here. None
    if it gives another number of experts. projections: how many of each expert the tensor in memory holds.
    """
    if {len(headers[each].shape) for each in source.all_names} not in ({2}, {3}):
        return None
    tensors: dict[str, list[Tensor]] = {}
    label = 0
    for pattern, names in source.names.items():
        tensors[pattern] = []
        for each in names:
            tensors[pattern].append(torch.full((2,) * len(headers[each].shape), label))
            label += 1
    is_stack = _is_stack(source, headers)
    if source.converter is None:
        ((order,),) = tensors.values()
    elif not is_stack and [len(names) for names in tensors.values()] != [experts.count] * projections:
        return None
    else:
        order = internals.convert(source.converter, model, name, tensors)[name]
    if order.ndim != 3 or len(order) != (2 if is_stack else experts.count):
        return None
    return experts.arithmetic.canonical(name.rpartition(".")[2], order)


def _is_stack(source: Source, headers: Mapping[str, TensorHeader]) -> bool:
    return len(headers[source.all_names[0]].shape) == 3


def release_prefix(stack: str) -> str:
    """What the names of a release's experts begin with, whose source has them in a stack of this name."""
    head, inside, _ = stack.rpartition(".experts.")
    return f"{head}{inside}" if inside else f"{stack.removesuffix('.weight').rpartition('.')[0]}.experts."
