"""One input site of a chunk of experts: its moments to codes and scales, by the recipe."""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from torch import Tensor

from fourfold.core import gptq, grid, guidance, metrics, moments, target
from fourfold.datatypes import Method, Moments, QuantizedGroup, Target
from fourfold.model.layer import DecoderLayer
from fourfold.recipe import Recipe, Scheme, Solver

RETRIES = {"diagonal": (0.1, 0.2, 0.5, 1.0), "mean": tuple(0.01 * step for step in range(6, 101))}


@dataclass(frozen=True, kw_only=True)
class Site:
    """One input site of a chunk of experts: the stack of projections that share it, and what is known of its inputs.

    name: gate_up or down; weight_ENK: the source's BF16 values in fp32; pool_EKK: [K, K] or [E, K, K];
    calibration_tokens: of the whole run; rows: the metric of the stack's rows, None if all weigh the same; judged: how
    many experts are solved without that metric too, to measure its gain.
    """

    name: str
    projections: tuple[str, ...]
    weight_ENK: Tensor
    moments: Moments
    pool_EKK: Tensor
    calibration_tokens: int
    rows: guidance.RowFactor | None = None
    sampled_experts: int = 0


@dataclass(frozen=True, kw_only=True)
class Solved:
    """A site's codes and scales, and for the log what is known per expert, and per row of the stack."""

    group: QuantizedGroup
    error_EN: Tensor  # |W - Wq|^2 of each row
    weight_EN: Tensor  # |W|^2
    proxy_EN: Tensor  # its share of tr(Err H Err^T), H the expert's own mean, undamped
    energy_EP: Tensor  # tr(W H W^T) of each of its P projections
    over_rtn_EP: Tensor  # tr(Err H' Err^T) over that of round-to-nearest, H' shrunk and damped
    level_E: Tensor  # mean of diag H
    tokens_E: Tensor
    effective_E: Tensor
    damping_E: Tensor
    methods: tuple[Method, ...]
    targets: tuple[Target, ...]
    guided: tuple[float, float] = (0.0, 0.0)  # tr(H_O Err H Err^T) of the judged experts, with guidance and without


def grid_of(scheme: Scheme) -> grid.Grid:
    """The grid of a recipe's scheme."""
    return grid.Grid(levels=grid.INT4, group_size=scheme.group, scale_dtype=scheme.scale_dtype)


def damping(solver: Solver) -> gptq.Damping:
    """The damping of a recipe's solver."""
    return gptq.Damping(
        delta=solver.damp, kind=solver.damp_kind, floor=solver.damp_floor, retries=RETRIES[solver.damp_kind]
    )


def solve_site(site: Site, recipe: Recipe) -> Solved:
    """Codes and scales of one site's stack, by the recipe. docs/numerics.md.

    An expert whose outputs have a larger error than those of round-to-nearest is solved again for the outputs of the
    source weights, without a metric of the rows; one that still has is rounded.
    """
    solver, onto, weight_ENK = recipe.solver, grid_of(recipe.scheme), site.weight_ENK
    n0 = solver.pool * weight_ENK.shape[-1]
    hessian_EKK, effective_E = moments.shrink(
        site.moments, site.pool_EKK, n0, effective=solver.effective_tokens, trace_matched=solver.trace_matched
    )
    factor = gptq.factorize_(hessian_EKK, damping(solver), solver.order, onto.group_size)
    target_ENK, aim = _target(site, factor, moments.own_share(effective_E, n0))
    objective = _Objective(target_ENK, factor, hessian_EKK, site.rows)
    scale_ENG = _find_scales(objective, recipe)
    group = _find_codes(objective, scale_ENG, recipe)
    guided = _gain(objective, group, scale_ENG[: site.sampled_experts], recipe)
    del scale_ENG
    methods, targets = objective.methods, [aim] * len(weight_ENK)
    if solver.fallback_share:
        rounded_E = site.moments.count_E < solver.fallback_share * site.calibration_tokens
        group, methods = _round_few(group, weight_ENK, rounded_E, methods, onto)
    judged_EKK = hessian_EKK if n0 else _pooled(site)
    over_rtn_EP = _over_rtn(site.projections, weight_ENK, group, judged_EKK, onto)
    for expert in (over_rtn_EP > 1).any(dim=1).nonzero().flatten().tolist():
        place = slice(expert, expert + 1)
        own_ENK, own_EKK = weight_ENK[place], judged_EKK[place]
        if targets[expert] is not Target.PLAIN or site.rows is not None:
            plain = objective.without_rows(place, own_ENK)
            targets[expert], methods[expert] = Target.PLAIN, plain.methods[0]
            _put(group, place, _find_codes(plain, _find_scales(plain, recipe), recipe))
            over_rtn_EP[place] = _over_rtn(site.projections, own_ENK, _taken(group, place), own_EKK, onto)
        if (over_rtn_EP[place] > 1).any():
            methods[expert] = Method.RTN
            _put(group, place, round_to_nearest(own_ENK, onto))
            over_rtn_EP[place] = _over_rtn(site.projections, own_ENK, _taken(group, place), own_EKK, onto)
    del target_ENK, objective, hessian_EKK, judged_EKK
    error_ENK = weight_ENK - grid.dequantize(group.codes_ENK, group.scale_ENG)
    own_EKK, share_E = _own_moments(site)
    parts = len(site.projections), -1
    return Solved(
        group=group,
        error_EN=error_ENK.square().sum(dim=-1),
        weight_EN=weight_ENK.square().sum(dim=-1),
        proxy_EN=metrics.proxy_rows(error_ENK, own_EKK) * share_E[:, None],
        energy_EP=metrics.energy(weight_ENK.unflatten(1, parts), own_EKK) * share_E[:, None],
        over_rtn_EP=over_rtn_EP,
        level_E=own_EKK.diagonal(dim1=-2, dim2=-1).mean(dim=-1) * share_E,
        tokens_E=site.moments.count_E,
        effective_E=effective_E,
        damping_E=factor.delta_E,
        methods=tuple(methods),
        targets=tuple(targets),
        guided=guided,
    )


def _target(site: Site, factor: gptq.Factor, share_E: Tensor) -> tuple[Tensor, Target]:
    """The weights [E, N, K] that the codes are to come close to. share_E: see moments.own_share."""
    own = site.moments
    if own.gap_ENK is None or own.gap2_EN is None:
        return site.weight_ENK, Target.PLAIN
    weight_E = own.weight_E.where(own.weight_E > 0, 1.0)  # hessian_EKK and gap2_EN are sums
    freedom_E = target.degrees_of_freedom(own.hessian_EKK, share_E / weight_E, factor)
    gap_ENK = moments.shrink_to_zero(own.gap_ENK, own.weight_E, share_E)
    energy_EN = own.gap2_EN / weight_E[:, None]
    gap_ENK = target.james_stein(gap_ENK, energy_EN, own.count_E, share_E, freedom_E, factor)
    return target.retarget(site.weight_ENK, gap_ENK, factor), Target.RESIDUAL


@dataclass(frozen=True)
class _Objective:
    """What is minimised at a site: tr(H_O Err H Err^T) with Err = target - S Q."""

    target_ENK: Tensor
    factor: gptq.Factor
    hessian_EKK: Tensor  # damped
    rows: guidance.RowFactor | None

    @property
    def methods(self) -> list[Method]:
        """Of each expert: GPTQ, or which factorization failed."""
        columns_E = self.factor.diagonal_E
        rows_E = torch.zeros_like(columns_E) if self.rows is None else self.rows.diagonal_E.expand_as(columns_E)
        failures = zip(columns_E.tolist(), rows_E.tolist(), strict=True)
        return [Method.DIAGONAL if columns else Method.ROW_DIAGONAL if rows else Method.GPTQ
                for columns, rows in failures]  # fmt: skip

    def without_rows(self, place: slice, target_ENK: Tensor) -> _Objective:
        """Of some experts with their target, all rows weighing the same."""
        factor = gptq.Factor(*(getattr(self.factor, field.name)[place] for field in fields(gptq.Factor)))
        return _Objective(target_ENK, factor, self.hessian_EKK[place], None)

    def cost(self, group: QuantizedGroup) -> float:
        """Of codes and scales of the first experts, in the metric of their rows."""
        assert self.rows is not None
        experts = len(group.codes_ENK)
        error_ENK = self.target_ENK[:experts] - grid.dequantize(group.codes_ENK, group.scale_ENG)
        ordered_ENK = gptq.take(error_ENK, self.rows.order_EN[:experts].expand(error_ENK.shape[:2]))
        weighed_ENK = torch.matmul(self.rows.metric_ENN[:experts], ordered_ENK)
        return float((weighed_ENK * torch.bmm(ordered_ENK, self.hessian_EKK[:experts])).sum())


def _find_scales(objective: _Objective, recipe: Recipe) -> Tensor:
    """Each group's scale before there are codes, [E, N, G]. A metric of the rows does not change it."""
    solver, target_ENK, onto = recipe.solver, objective.target_ENK, grid_of(recipe.scheme)
    if solver.scale != "search":
        return grid.absmax_scales(target_ENK, onto)
    conditional = solver.scale_weights == "conditional"
    pivot_EK, diagonal_EK = objective.factor.natural_pivot(), objective.hessian_EKK.diagonal(dim1=-2, dim2=-1)
    search = grid.ScaleSearch(
        low=solver.scale_low, high=solver.scale_high, steps=solver.scale_steps, signed=recipe.scheme.signed
    )
    return grid.search_scales(target_ENK, pivot_EK if conditional else diagonal_EK, onto, search)


def _find_codes(objective: _Objective, scale_ENG: Tensor, recipe: Recipe) -> QuantizedGroup:
    """Codes column by column, then both refined."""
    solver, target_ENK, onto = recipe.solver, objective.target_ENK, grid_of(recipe.scheme)
    codes_ENK = gptq.solve_codes(target_ENK, scale_ENG, objective.factor, onto, objective.rows)
    if solver.passes:
        refit = gptq.Refit(signed=recipe.scheme.signed) if solver.refine_scales else None
        codes_ENK, scale_ENG = gptq.refine(
            target_ENK, codes_ENK, scale_ENG, objective.hessian_EKK, solver.passes, refit, onto, objective.rows
        )
    return QuantizedGroup(codes_ENK, scale_ENG)


def _gain(objective: _Objective, group: QuantizedGroup, scale_ENG: Tensor, recipe: Recipe) -> tuple[float, float]:
    """What the first experts' errors cost with guidance and without. See Solved. scale_ENG: theirs, of _find_scales."""
    if objective.rows is None or not len(scale_ENG):
        return 0.0, 0.0
    first = slice(0, len(scale_ENG))
    guided = _taken(group, first)
    unguided = objective.without_rows(first, objective.target_ENK[first])
    return objective.cost(guided), objective.cost(_find_codes(unguided, scale_ENG, recipe))


def round_experts_(layer: DecoderLayer, recipe: Recipe, experts: int) -> None:
    """Round a layer's own experts to nearest (RTN), `experts` of them at a time, in place."""
    onto = grid_of(recipe.scheme)
    for stack_ENK in layer.stacks if layer.is_routed else ():
        for part_ENK in stack_ENK.split(experts):
            group = round_to_nearest(part_ENK.float(), onto)
            part_ENK.copy_(grid.dequantize(group.codes_ENK, group.scale_ENG))


def round_to_nearest(weight_ENK: Tensor, onto: grid.Grid) -> QuantizedGroup:
    """RTN with absmax scales, as GPTQModel's fallback."""
    scale_ENG = grid.absmax_scales(weight_ENK, onto)
    return QuantizedGroup(grid.round_to_nearest(weight_ENK, scale_ENG, onto), scale_ENG)


def _round_few(
    group: QuantizedGroup, weight_ENK: Tensor, rounded_E: Tensor, methods: list[Method], onto: grid.Grid
) -> tuple[QuantizedGroup, list[Method]]:
    """Round to nearest the experts that the recipe's fallback rule names."""
    rtn, where_E11 = round_to_nearest(weight_ENK, onto), rounded_E[:, None, None]
    rounded = QuantizedGroup(
        torch.where(where_E11, rtn.codes_ENK, group.codes_ENK), torch.where(where_E11, rtn.scale_ENG, group.scale_ENG)
    )
    return rounded, [Method.RTN if few else method for few, method in zip(rounded_E.tolist(), methods, strict=True)]


def _over_rtn(
    projections: tuple[str, ...], weight_ENK: Tensor, group: QuantizedGroup, hessian_EKK: Tensor, onto: grid.Grid
) -> Tensor:
    """Error of each projection's outputs, tr(Err H Err^T), over that of round-to-nearest: fp32 [E, P]."""

    def energy(error_ENK: Tensor) -> Tensor:
        error_EPNK = error_ENK.unflatten(1, (len(projections), -1))
        return metrics.energy(error_EPNK, hessian_EKK).clamp_(min=torch.finfo(torch.float32).tiny)

    solved_EP = energy(grid.dequantize(group.codes_ENK, group.scale_ENG).sub_(weight_ENK))
    scale_ENG = grid.absmax_scales(weight_ENK, onto)
    return solved_EP / energy(grid.rounding_error(weight_ENK, scale_ENG, onto))


def _pooled(site: Site) -> Tensor:
    """What an expert without a pool is judged by: its own tokens and the layer's, as the default recipe mixes them."""
    n0 = 0.5 * site.weight_ENK.shape[-1]
    return moments.shrink(site.moments, site.pool_EKK, n0, effective=True, trace_matched=True)[0]


def _taken(group: QuantizedGroup, place: slice) -> QuantizedGroup:
    return QuantizedGroup(group.codes_ENK[place], group.scale_ENG[place])


def _put(group: QuantizedGroup, place: slice, found: QuantizedGroup) -> None:
    group.codes_ENK[place], group.scale_ENG[place] = found.codes_ENK, found.scale_ENG


def _own_moments(site: Site) -> tuple[Tensor, Tensor]:
    """Each expert's own sums (the pool where no token came), and what makes means of them: [E, K, K], [E]."""
    own = site.moments
    unseen = (own.weight_E == 0).nonzero().flatten().tolist()
    hessian_EKK = own.hessian_EKK
    if unseen:
        hessian_EKK = hessian_EKK.clone()
        hessian_EKK[unseen] = site.pool_EKK.expand_as(hessian_EKK)[unseen]
    return hessian_EKK, 1 / own.weight_E.where(own.weight_E > 0, 1.0)
