"""int8 weights of linear modules beside the routed experts: solved on what they are given. docs/numerics.md section 14.

An engine may join modules that are given the same; codes of one do not depend on the other.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from fourfold.core import gptq, grid, metrics, moments
from fourfold.datatypes import QuantizedGroup
from fourfold.distributed.workers import Worker
from fourfold.formats import named
from fourfold.model.layer import DecoderLayer, LayerTensors, with_kept
from fourfold.model.tensors import TensorIndex
from fourfold.quantize.dense import INT8_SEARCH, SLAB_ROWS, QuantizedWeights, dequantized, round_weight
from fourfold.quantize.plan import Plan
from fourfold.quantize.site import damping
from fourfold.recipe import Recipe


@dataclass
class InputMoments:
    """Sums over tokens x that a module is given. hessian_KK: x x^T; tokens: 1; energy2: |x|^4. fp32."""

    hessian_KK: Tensor
    tokens: Tensor
    energy2: Tensor

    @classmethod
    def zeros(cls, inputs: int, device: torch.device) -> InputMoments:
        return cls(*(torch.zeros(shape, device=device) for shape in ((inputs, inputs), (), ())))

    def add_(self, input_TK: Tensor) -> None:
        self.hessian_KK += moments.pool(input_TK, torch.ones(len(input_TK), device=input_TK.device))
        self.tokens += len(input_TK)
        self.energy2 += input_TK.float().square().sum(dim=1).square().sum()

    def of_all(self, worker: Worker) -> InputMoments:
        """Return those of all workers' tokens."""
        return InputMoments(*map(worker.all_reduce, (self.hessian_KK, self.tokens, self.energy2)))

    def mean(self, n0: float) -> Tensor:
        """Return the mean of x x^T as a stack of one, shrunk towards its diagonal as if that were n0 tokens' mean.

        Tokens count as in moments.effective_tokens.
        """
        mean_KK = self.hessian_KK / self.tokens.clamp(min=1)
        effective = (moments.trace(self.hessian_KK).square() / self.energy2).nan_to_num(0.0, 0.0, 0.0)
        diagonal_K = mean_KK.diagonal().clone()
        mean_KK *= effective / (effective + n0)
        mean_KK.diagonal().copy_(diagonal_K)
        return mean_KK[None]


@dataclass
class LinearInputs:
    """What linear modules are given while hidden states pass them. Modules that are given the same tensor share one.

    modules: by the name of their weight on disk; found: moments by the first module that is given them; first: that of
    each module.
    """

    modules: Mapping[str, nn.Module]
    found: dict[str, InputMoments] = field(default_factory=dict)
    first: dict[str, str] = field(default_factory=dict)

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Add up what the modules are given from now on."""
        last: list[tuple[Tensor, str]] = []  # modules that share an input follow one another

        def watch(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
            def add(module: nn.Module, given: tuple[Tensor, ...]) -> None:
                if last and given[0] is last[0][0]:
                    self.first[name] = last[0][1]
                    return
                last[:] = [(given[0], name)]
                self.first[name] = name
                sums = self.found.setdefault(name, InputMoments.zeros(given[0].shape[-1], given[0].device))
                sums.add_(given[0].flatten(0, -2))

            return add

        hooks = [module.register_forward_pre_hook(watch(name)) for name, module in self.modules.items()]
        try:
            yield
        finally:
            last.clear()
            for hook in hooks:
                hook.remove()

    def of_all(self, worker: Worker, widths: Mapping[str, int]) -> LinearInputs:
        """Return what the modules of all workers were given. widths: inputs of each; a worker may have had no rows."""
        first = max(worker.all_gather_object(self.first), key=len)
        found: dict[str, InputMoments] = {}
        for name in sorted(set(first.values())):
            own = self.found.pop(name, None) or InputMoments.zeros(widths[name], worker.device)
            found[name] = own.of_all(worker)
        return LinearInputs(self.modules, found, first)


def linear_modules(layer: DecoderLayer, names: Sequence[str]) -> dict[str, nn.Module]:
    """A layer's modules whose weights lie on disk as they are multiplied by, of some names there."""
    prefix = layer.skeleton.blueprint.prefix(layer.index)
    found: dict[str, nn.Module] = {}
    for name, source in layer.skeleton.blueprint.within(prefix):
        if source.converter is None and source.all_names[0] in names:
            found[source.all_names[0]] = layer.own.module.get_submodule(
                name.removeprefix(prefix).removesuffix(".weight")
            )
    return found


def solve_weight(
    weight_NK: Tensor, hessian_1KK: Tensor, factor: gptq.Factor, size: int, recipe: Recipe
) -> QuantizedGroup:
    """int8 codes and scales of the least error of the outputs that GPTQ finds; each row that has more than rounding
    leaves it is rounded. hessian_1KK: damped, factor: of it; size: of groups.
    """
    onto = grid.Grid(levels=grid.INT8, group_size=size, scale_dtype=recipe.scheme.scale_dtype)
    parts: list[QuantizedGroup] = []
    for slab_NK in weight_NK.split(SLAB_ROWS):
        weight_1NK = slab_NK.float()[None]
        rounded = round_weight(slab_NK, 8, size, recipe)
        scale_1NG = grid.search_scales(weight_1NK, factor.natural_pivot(), onto, INT8_SEARCH)
        codes_1NK = gptq.solve_codes(weight_1NK, scale_1NG, factor, onto)
        worse_1N = _cost(weight_1NK, codes_1NK, scale_1NG, hessian_1KK) > _cost(
            weight_1NK, rounded.codes_ENK, rounded.scale_ENG, hessian_1KK
        )
        codes_1NK = torch.where(worse_1N[..., None], rounded.codes_ENK, codes_1NK)
        parts.append(QuantizedGroup(codes_1NK, torch.where(worse_1N[..., None], rounded.scale_ENG, scale_1NG), 8))
    codes, scales = [part.codes_ENK for part in parts], [part.scale_ENG for part in parts]
    return QuantizedGroup(torch.cat(codes, dim=1), torch.cat(scales, dim=1), 8)


def _cost(weight_1NK: Tensor, codes_1NK: Tensor, scale_1NG: Tensor, hessian_1KK: Tensor) -> Tensor:
    return metrics.proxy_rows(weight_1NK - grid.dequantize(codes_1NK, scale_1NG), hessian_1KK)


def solve_weights(
    tensors: Mapping[str, Tensor], inputs: LinearInputs, plan: Plan, beat: Callable[[], None]
) -> QuantizedWeights:
    """Quantize weights (by name on disk) for what their modules were given; one that was given nothing is rounded."""
    size, recipe = plan.dense.group_size, plan.recipe
    made = {name: round_weight(tensors[name], plan.dense.bits[name], size, recipe)
            for name in tensors if name not in inputs.first}  # fmt: skip
    for owner, sums in inputs.found.items():
        hessian_1KK = sums.mean(recipe.solver.pool * len(sums.hessian_KK))
        factor = gptq.factorize_(hessian_1KK, damping(recipe.solver), recipe.solver.order, size)
        for name in (name for name, first in inputs.first.items() if first == owner):
            made[name] = solve_weight(tensors[name], hessian_1KK, factor, size, recipe)
            beat()
    return QuantizedWeights.of(made, recipe)


def read_weights(plan: Plan, shard: Path, names: Sequence[str]) -> QuantizedWeights:
    """Quantized weights of a finished shard, dequantized."""
    index, format = TensorIndex.open_shards(shard.parent, [shard.name]), named(plan.recipe.format)
    weights: dict[str, Tensor] = {}
    for name in names:
        stem = name.removesuffix("weight")
        packed = {suffix: index.read(stem + suffix)[None] for suffix in (format.codes, format.scales)}
        weights[name] = dequantized(format.unpack(packed, plan.dense.bits[name]))
    return QuantizedWeights(weights, {})


@dataclass
class LayerLinear:
    """A layer's weights beside its routed experts, as the release has them.

    layer: the source's; kept: its weights by name on disk; shard: OUT's, where the layer is finished.
    """

    plan: Plan
    layer: DecoderLayer
    kept: Mapping[str, Tensor]
    shard: Path | None
    made: QuantizedWeights | None = None

    def __post_init__(self) -> None:
        in_run = self.layer.index in self.plan.solve
        self.names = [name for name in self.kept if in_run and name in self.plan.dense.bits]
        self.inputs = LinearInputs({} if self.shard else linear_modules(self.layer, self.names))

    def release_layer(self, worker: Worker) -> DecoderLayer:
        """The layer with the release's weights, its experts' apart; after the source's rows have passed the layer."""
        if not self.names:
            return self.layer
        if self.made is None:
            self.made = self._read(worker) if self.shard else self._solve(worker)
        return with_kept(self.layer, {**self.kept, **self.made.weights})

    def _read(self, worker: Worker) -> QuantizedWeights:
        assert self.shard is not None
        shard = self.shard
        return worker.run_once(lambda: read_weights(self.plan, shard, self.names))

    def _solve(self, worker: Worker) -> QuantizedWeights:
        tensors = {name: self.kept[name] for name in self.names}
        inputs = self.inputs.of_all(worker, {name: value.shape[1] for name, value in tensors.items()})
        with worker.span("solve linear", self.layer.index):
            return worker.run_once(lambda: solve_weights(tensors, inputs, self.plan, worker.heartbeat))

    def in_place_of(self, tensors: LayerTensors) -> LayerTensors:
        """What the layer's shard is made from: codes and scales in place of the weights."""
        return tensors if self.made is None else self.made.in_place_of(tensors)
