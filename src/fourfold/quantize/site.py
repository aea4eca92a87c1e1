"""One input site of a chunk of experts: its moments to codes and scales, by the recipe."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from fourfold.core import gptq, grid, guidance, metrics, moments
from fourfold.datatypes import Method, Moments, QuantizedGroup
from fourfold.recipe import Recipe

RETRIES = {"diagonal": (0.1, 0.2, 0.5, 1.0), "mean": tuple(0.01 * step for step in range(6, 101))}


@dataclass(frozen=True, kw_only=True)
class Site:
    """One input site of a chunk of experts: the stack of projections that share it, and what is known of its inputs.

    weight_ENK: the source's BF16 values in fp32; pool_EKK: [K, K] or [E, K, K]; calibration_tokens: of the whole run;
    rows: the metric of the stack's rows, None where all weigh the same; judged: experts, from the first on, whose gain
    by it is measured.
    """

    projections: tuple[str, ...]
    weight_ENK: Tensor
    moments: Moments
    pool_EKK: Tensor
    calibration_tokens: int
    rows: guidance.RowFactor | None = None
    judged: int = 0


@dataclass(frozen=True, kw_only=True)
class Solved:
    """A site's codes and scales, and for the log what is known per expert, and per row of the stack."""

    group: QuantizedGroup
    error_EN: Tensor  # |W - Wq|^2 of each row
    weight_EN: Tensor  # |W|^2
    proxy_EN: Tensor  # its share of tr(Err H Err^T), H the expert's own mean, undamped
    energy_EP: Tensor  # tr(W H W^T) of each of its P projections
    level_E: Tensor  # mean of diag H
    tokens_E: Tensor
    effective_E: Tensor
    damping_E: Tensor
    methods: tuple[Method, ...]
    guided: tuple[float, float] = (0.0, 0.0)  # tr(H_O Err H Err^T) of the judged experts, with guidance and without


def solve_site(site: Site, recipe: Recipe) -> Solved:
    """Codes and scales of one site's stack, by the recipe. docs/numerics.md."""
    solver, scheme = recipe.solver, recipe.scheme
    weight_ENK, size = site.weight_ENK, scheme.group_size
    n0 = solver.pool * weight_ENK.shape[-1]
    hessian_EKK, effective_E = moments.shrink(
        site.moments, site.pool_EKK, n0, effective=solver.effective_tokens, trace_matched=solver.trace_matched
    )
    damping = gptq.Damping(
        delta=solver.damp, kind=solver.damp_kind, floor=solver.damp_floor, retries=RETRIES[solver.damp_kind]
    )
    factor = gptq.factorize_(hessian_EKK, damping, solver.order, size)
    target_ENK = weight_ENK
    if site.moments.cross_EKK is not None and solver.alpha:
        cross_EKK = moments.shrink_to_zero(site.moments.cross_EKK, site.moments.weight_E, effective_E, n0)
        gap_ENK = _gap(site.moments, factor)
        target_ENK = gptq.retarget(weight_ENK, cross_EKK, factor, solver.alpha, gap_ENK)
        del cross_EKK, gap_ENK
    if solver.scale == "search":
        conditional = solver.scale_weights == "conditional"
        importance_EK = factor.natural_pivot() if conditional else hessian_EKK.diagonal(dim1=-2, dim2=-1)
        search = grid.ScaleSearch(low=solver.scale_low, high=solver.scale_high, steps=solver.scale_steps,
                                  signed=scheme.signed, dtype=scheme.scale_dtype)  # fmt: skip
        scale_ENG = grid.search_scales(target_ENK, importance_EK, size, search)
    else:
        scale_ENG = grid.absmax_scales(target_ENK, size, scheme.scale_dtype)
    posed = _Posed(target_ENK, scale_ENG, factor, hessian_EKK, site.rows)
    group = _find_codes(posed, recipe)
    guided = _gain(posed, group, site.judged, recipe)
    methods = [Method.DIAGONAL if failed else Method.GPTQ for failed in factor.diagonal_E.tolist()]
    del hessian_EKK, posed
    if solver.fallback_share:
        rounded_E = site.moments.count_E < solver.fallback_share * site.calibration_tokens
        group, methods = _round_few(group, weight_ENK, rounded_E, methods, scheme.scale_dtype)
    return replace(_judge(site, group, factor.delta_E, effective_E, tuple(methods)), guided=guided)


def _gap(own: Moments, factor: gptq.Factor) -> Tensor | None:
    """What a site is to make up for, as far as its inputs tell; None without a residual stream."""
    if own.gap_ENK is None or own.gap2_EN is None:
        return None
    weight_E1 = own.weight_E.where(own.weight_E > 0, 1.0)[:, None]
    return gptq.james_stein(own.gap_ENK / weight_E1[:, :, None], own.gap2_EN / weight_E1, own.count_E, factor)


@dataclass(frozen=True)
class _Posed:
    """What is minimised at a site, tr(H_O Err H Err^T) with Err = target - S Q, and the scales to begin with."""

    target_ENK: Tensor
    scale_ENG: Tensor
    factor: gptq.Factor
    hessian_EKK: Tensor  # damped
    rows: guidance.RowFactor | None

    def unguided(self, experts: int) -> _Posed:
        """Of the first experts, all rows weighing the same."""
        factor = gptq.Factor(*(getattr(self.factor, field.name)[:experts] for field in fields(gptq.Factor)))
        return _Posed(self.target_ENK[:experts], self.scale_ENG[:experts], factor, self.hessian_EKK[:experts], None)

    def cost(self, group: QuantizedGroup) -> float:
        """Of codes and scales of the first experts, in the metric of their rows."""
        assert self.rows is not None
        experts = len(group.codes_ENK)
        error_ENK = self.target_ENK[:experts] - grid.dequantize(group.codes_ENK, group.scale_ENG)
        ordered_ENK = gptq.take(error_ENK, self.rows.order_EN[:experts].expand(error_ENK.shape[:2]))
        weighed_ENK = torch.matmul(self.rows.metric_ENN[:experts], ordered_ENK)
        return float((weighed_ENK * torch.bmm(ordered_ENK, self.hessian_EKK[:experts])).sum())


def _find_codes(posed: _Posed, recipe: Recipe) -> QuantizedGroup:
    """Column by column, then refined."""
    solver, scheme = recipe.solver, recipe.scheme
    scale_ENG = posed.scale_ENG
    codes_ENK = gptq.solve_codes(posed.target_ENK, scale_ENG, posed.factor, posed.rows)
    if solver.passes:
        refit = gptq.Refit(dtype=scheme.scale_dtype, signed=scheme.signed) if solver.refine_scales else None
        codes_ENK, scale_ENG = gptq.refine(
            posed.target_ENK, codes_ENK, scale_ENG, posed.hessian_EKK, solver.passes, refit, posed.rows
        )
    return QuantizedGroup(codes_ENK, scale_ENG)


def _gain(posed: _Posed, group: QuantizedGroup, experts: int, recipe: Recipe) -> tuple[float, float]:
    """What the first experts' errors cost with guidance and without. See Solved."""
    if posed.rows is None or not experts:
        return 0.0, 0.0
    guided = QuantizedGroup(group.codes_ENK[:experts], group.scale_ENG[:experts])
    return posed.cost(guided), posed.cost(_find_codes(posed.unguided(experts), recipe))


def _round_few(
    group: QuantizedGroup, weight_ENK: Tensor, rounded_E: Tensor, methods: list[Method], scale_dtype: str
) -> tuple[QuantizedGroup, list[Method]]:
    """Round to nearest the experts that the recipe's fallback rule names."""
    size = weight_ENK.shape[-1] // group.scale_ENG.shape[-1]
    scale_ENG = grid.absmax_scales(weight_ENK, size, scale_dtype)
    codes_ENK = grid.round_to_nearest(weight_ENK, scale_ENG)
    where_E11 = rounded_E[:, None, None]
    rounded = QuantizedGroup(
        torch.where(where_E11, codes_ENK, group.codes_ENK), torch.where(where_E11, scale_ENG, group.scale_ENG)
    )
    return rounded, [Method.RTN if few else method for few, method in zip(rounded_E.tolist(), methods, strict=True)]


def _judge(
    site: Site, group: QuantizedGroup, damping_E: Tensor, effective_E: Tensor, methods: tuple[Method, ...]
) -> Solved:
    """Errors against the source weights, with each expert's own mean moments (the pool where no token came)."""
    weight_ENK, own = site.weight_ENK, site.moments
    error_ENK = weight_ENK - grid.dequantize(group.codes_ENK, group.scale_ENG)
    unseen = (own.weight_E == 0).nonzero().flatten().tolist()
    hessian_EKK, share_E = own.hessian_EKK, 1 / own.weight_E.where(own.weight_E > 0, 1.0)
    if unseen:
        hessian_EKK = hessian_EKK.clone()
        hessian_EKK[unseen] = site.pool_EKK.expand_as(hessian_EKK)[unseen]
    projection_EPNK = weight_ENK.unflatten(1, (len(site.projections), -1))
    return Solved(
        group=group,
        error_EN=error_ENK.square().sum(dim=-1),
        weight_EN=weight_ENK.square().sum(dim=-1),
        proxy_EN=metrics.proxy_rows(error_ENK, hessian_EKK) * share_E[:, None],
        energy_EP=metrics.energy(projection_EPNK, hessian_EKK) * share_E[:, None],
        level_E=hessian_EKK.diagonal(dim1=-2, dim2=-1).mean(dim=-1) * share_E,
        tokens_E=own.count_E,
        effective_E=effective_E,
        damping_E=damping_E,
        methods=methods,
    )
