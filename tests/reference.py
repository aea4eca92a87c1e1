"""The numbers once more: float64, one expert at a time, one column after the other, as docs/numerics.md words them.

Naive on purpose. numpy and plain Python only; no code is shared with fourfold, and nothing of it is imported.
Matrices are of one expert: weight_NK, scale_NG, hessian_KK. Orders are lists of natural column indices.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Codes = NDArray[np.int64]

SMALLEST, LARGEST = 2.0**-17, 65280.0
SIGNIFICANT_BITS = {"bf16": 8, "fp16": 11}  # of a normal number, the hidden one counted
LEAST_STEP = {"bf16": 2.0**-133, "fp16": 2.0**-24}  # between subnormals


# ---- number formats (section 5, FORMAT.md 4)


def to_format(value: float, name: str) -> float:
    """Round to BF16 or FP16, half to even."""
    if value == 0 or not math.isfinite(value):
        return value
    _, exponent = math.frexp(value)
    step = max(2.0 ** (exponent - SIGNIFICANT_BITS[name]), LEAST_STEP[name])
    return round(value / step) * step  # Python's round is half to even


def stored(scale: float, name: str) -> float:
    """A scale as the release holds it: magnitude kept within [2^-17, 65280], rounded, sign kept."""
    magnitude = to_format(min(max(abs(scale), SMALLEST), LARGEST), name)
    return -magnitude if scale < 0 else magnitude


def to_bf16(values: NDArray[np.float32]) -> NDArray[np.float32]:
    """A whole fp32 array rounded to BF16, half to even."""
    fraction, exponent = np.frexp(values)
    rounded: NDArray[np.float32] = np.ldexp(np.rint(np.ldexp(fraction, 8)), exponent - 8).astype(np.float32)
    return rounded


# ---- moments (sections 1 to 3)


@dataclass
class Moments:
    """Sums over the tokens of one expert; gap_NK, gap2_N: of w y x^T and of w y^2, y what its outputs lack."""

    hessian_KK: Array
    weight: float
    count: int
    energy2: float
    gap_NK: Array
    gap2_N: Array


def moments(
    input_TK: NDArray[np.float32], weight_T: NDArray[np.float32], missing_TN: NDArray[np.float32] | None = None
) -> Moments:
    """Token by token. The Hessian sums xs = bf16(sqrt(w) x), formed in fp32; the gap sums x and y as they are.

    missing_TN: y of each token; without it the gap has no rows.
    """
    tokens, inputs = input_TK.shape
    missing_TN = np.zeros((tokens, 0), dtype=np.float32) if missing_TN is None else missing_TN
    outputs = missing_TN.shape[1]
    sums = Moments(np.zeros((inputs, inputs)), 0.0, 0, 0.0, np.zeros((outputs, inputs)), np.zeros(outputs))
    for x_K, weight, y_N in zip(input_TK, weight_T, missing_TN, strict=True):
        scaled_K = to_bf16(x_K * np.sqrt(weight)).astype(np.float64)
        sums.hessian_KK += np.outer(scaled_K, scaled_K)
        sums.weight += float(weight)
        sums.count += 1
        sums.energy2 += float(scaled_K @ scaled_K) ** 2
        sums.gap_NK += float(weight) * np.outer(y_N.astype(np.float64), x_K.astype(np.float64))
        sums.gap2_N += float(weight) * y_N.astype(np.float64) ** 2
    return sums


def token_importance(hidden_TD: Array, power: float) -> list[float]:
    """(median |x| / |x|)^power, at most 4; the median of an even number is the lower one of the middle two."""
    lengths = [math.sqrt(float(x_D @ x_D)) for x_D in hidden_TD]
    median = sorted(lengths)[(len(lengths) - 1) // 2]
    return [min((median / length) ** power, 4.0) for length in lengths]


def effective_tokens(own: Moments) -> float:
    if own.energy2 == 0:
        return 0.0
    return float(np.trace(own.hessian_KK)) ** 2 / own.energy2


def shrink(own: Moments, pool_KK: Array, n0: float, *, effective: bool, trace_matched: bool) -> tuple[Array, float]:
    """(m H/weight + n0 tau pool) / (m + n0), and m."""
    if own.count == 0:
        return pool_KK, 0.0
    mean_KK = own.hessian_KK / own.weight
    m = effective_tokens(own) if effective else float(own.count)
    tau = float(np.trace(mean_KK) / np.trace(pool_KK)) if trace_matched else 1.0
    return (m * mean_KK + n0 * tau * pool_KK) / (m + n0), m


def shrink_gap(own: Moments, m: float, n0: float) -> Array:
    """Y: the mean of w y x^T times m / (m + n0)."""
    return own.gap_NK / own.weight * m / (m + n0) if own.count else own.gap_NK


def damp(hessian_KK: Array, delta: float, kind: str, floor: float) -> Array:
    """H with its diagonal damped; the median of an even number of values is the lower one of the middle two."""
    diagonal = [float(hessian_KK[j, j]) for j in range(len(hessian_KK))]
    mean = sum(diagonal) / len(diagonal)
    level = sorted(diagonal)[(len(diagonal) - 1) // 2] or mean or 1.0
    damped_KK = hessian_KK.copy()
    for j, value in enumerate(diagonal):
        damped_KK[j, j] += delta * mean if kind == "mean" else delta * value + floor * level
    return damped_KK


# ---- order, factor, codes (sections 4 and 6)


def order_columns(diagonal: Sequence[float], kind: str, group_size: int) -> list[int]:
    """Natural index of each processed column; equal columns and groups keep their order."""
    columns = range(len(diagonal))
    if kind == "natural":
        return list(columns)
    if kind == "activation":
        return sorted(columns, key=lambda j: -diagonal[j])
    groups = [list(columns)[first : first + group_size] for first in columns[::group_size]]
    groups = [sorted(group, key=lambda j: -diagonal[j]) for group in groups]
    groups.sort(key=lambda group: -diagonal[group[0]])
    return [j for group in groups for j in group]


def unit_factor(hessian_KK: Array) -> tuple[Array, Array]:
    """M, D with H = M diag(D) M^T and M unit upper triangular, by elimination from the last column: no Cholesky."""
    left_KK, inputs = hessian_KK.copy(), len(hessian_KK)
    unit_KK, pivot_K = np.eye(inputs), np.zeros(inputs)
    for j in reversed(range(inputs)):
        pivot_K[j] = left_KK[j, j]
        unit_KK[:j, j] = left_KK[:j, j] / pivot_K[j]
        left_KK[:j, :j] -= pivot_K[j] * np.outer(unit_KK[:j, j], unit_KK[:j, j])
    return unit_KK, pivot_K


def code_of(value_N: Array, scale_N: Array | float) -> Array:
    """Half to even, kept within [-8, 7]."""
    code_N: Array = np.clip(np.rint(value_N / scale_N), -8, 7)
    return code_N


def gptq(weight_NK: Array, scale_NG: Array, hessian_KK: Array, order: Sequence[int]) -> tuple[Codes, float]:
    """GPTQ as published: U from inv(H), every later column updated at once. Returns codes and its own loss.

    The loss is the sum of ((w - s q) / U_jj)^2 over the updated weights, which GPTQ logs.
    """
    group_size = weight_NK.shape[1] // scale_NG.shape[1]
    left_NK = weight_NK[:, order].copy()
    upper_KK = np.linalg.cholesky(np.linalg.inv(hessian_KK[np.ix_(order, order)])).T
    codes_NK, loss = np.zeros(weight_NK.shape, dtype=np.int64), 0.0
    for place, column in enumerate(order):
        scale_N = scale_NG[:, column // group_size]
        code_N = code_of(left_NK[:, place], scale_N)
        error_N = (left_NK[:, place] - scale_N * code_N) / upper_KK[place, place]
        left_NK[:, place + 1 :] -= np.outer(error_N, upper_KK[place, place + 1 :])
        codes_NK[:, column] = code_N
        loss += float(error_N @ error_N)
    return codes_NK, loss


def ldlq(weight_NK: Array, scale_NG: Array, hessian_KK: Array, order: Sequence[int]) -> tuple[Codes, Array]:
    """LDLQ (QuIP): t_j = w_j + sum_{i<j} Err_i M_ij, rounded. Returns codes and t - s q, in processing order."""
    group_size = weight_NK.shape[1] // scale_NG.shape[1]
    unit_KK, _ = unit_factor(hessian_KK[np.ix_(order, order)])
    codes_NK = np.zeros(weight_NK.shape, dtype=np.int64)
    error_NK, step_NK = np.zeros(weight_NK.shape), np.zeros(weight_NK.shape)
    for place, column in enumerate(order):
        scale_N = scale_NG[:, column // group_size]
        wanted_N = weight_NK[:, column] + error_NK[:, :place] @ unit_KK[:place, place]
        code_N = code_of(wanted_N, scale_N)
        error_NK[:, place] = weight_NK[:, column] - scale_N * code_N
        step_NK[:, place] = wanted_N - scale_N * code_N
        codes_NK[:, column] = code_N
    return codes_NK, step_NK


def in_block(target_NB: Array, weight_NB: Array, feedback_BB: Array, scale_NB: Array) -> tuple[Codes, Array]:
    """Section 6's kernel, one column and one later column at a time."""
    target_NB, codes_NB, error_NB = target_NB.copy(), np.zeros(target_NB.shape, dtype=np.int64), weight_NB.copy()
    for j in range(target_NB.shape[1]):
        codes_NB[:, j] = code_of(target_NB[:, j], scale_NB[:, j])
        error_NB[:, j] = weight_NB[:, j] - scale_NB[:, j] * codes_NB[:, j]
        for k in range(j + 1, target_NB.shape[1]):
            target_NB[:, k] += error_NB[:, j] * feedback_BB[j, k]
    return codes_NB, error_NB


# ---- scales (section 5)


@dataclass
class Search:
    low: float
    high: float
    steps: int
    signed: bool
    dtype: str

    def factors(self) -> Iterable[float]:
        """Candidates in the order in which ties are settled: the positive sign of each factor first."""
        width = (self.high - self.low) / (self.steps - 1) if self.steps > 1 else 0.0
        signs = (1.0, -1.0) if self.signed else (1.0,)
        return (sign * (self.low + width * step) for step, sign in itertools.product(range(self.steps), signs))


def scale_cost(weight_B: Array, scale: float, importance_B: Array) -> float:
    error_B: Array = weight_B - scale * code_of(weight_B, scale)
    return float(importance_B @ error_B**2)


def search_group(weight_B: Array, importance_B: Array, search: Search) -> float:
    """Try every candidate, keep the first of the cheapest. The candidate is formed in fp32, as weights are fp32."""
    base = np.float32(np.abs(weight_B).max() / 8)
    candidates = [stored(float(base * np.float32(factor)), search.dtype) for factor in search.factors()]
    costs = [scale_cost(weight_B, scale, importance_B) for scale in candidates]
    return candidates[costs.index(min(costs))]


def search_scales(weight_NK: Array, importance_K: Array, group_size: int, search: Search) -> Array:
    def group_scale(row: int, first: int) -> float:
        place = slice(first, first + group_size)
        return search_group(weight_NK[row, place], importance_K[place], search)

    outputs, inputs = weight_NK.shape
    return np.array([[group_scale(row, first) for first in range(0, inputs, group_size)] for row in range(outputs)])


def absmax_scales(weight_NK: Array, group_size: int, dtype: str) -> Array:
    largest_NG = np.abs(weight_NK.reshape(len(weight_NK), -1, group_size)).max(axis=2)
    return np.array([[stored(float(np.float32(value * (2 / 15))), dtype) for value in row] for row in largest_NG])


def spread(scale_NG: Array, inputs: int) -> Array:
    """The scale of each weight, by g_idx = k // group size."""
    group_size = inputs // scale_NG.shape[1]
    return scale_NG[:, [k // group_size for k in range(inputs)]]


def round_to_nearest(weight_NK: Array, scale_NG: Array) -> Codes:
    return code_of(weight_NK, spread(scale_NG, weight_NK.shape[1])).astype(np.int64)


def dequantize(codes_NK: Codes, scale_NG: Array) -> Array:
    return codes_NK * spread(scale_NG, codes_NK.shape[1])


# ---- refinement (section 7), the target of down (section 8)


def coordinate_descent(
    target_NK: Array, codes_NK: Codes, scale_NG: Array, hessian_KK: Array, passes: int, dtype: str
) -> tuple[Codes, Array]:
    """One coordinate at a time, each set to the exact minimiser of Err H Err^T with all others where they are.

    Per group first the scale of each row (dtype "" leaves it), then its codes from left to right.
    """
    codes_NK, scale_NG, group_size = codes_NK.copy(), scale_NG.copy(), target_NK.shape[1] // scale_NG.shape[1]
    for _, group in itertools.product(range(passes), range(scale_NG.shape[1])):
        columns = range(group * group_size, (group + 1) * group_size)
        if dtype:
            _descend_scales(target_NK, codes_NK, scale_NG, hessian_KK, group, dtype)
        for j in columns:
            error_NK = target_NK - dequantize(codes_NK, scale_NG)
            others_N = error_NK @ hessian_KK[:, j] - error_NK[:, j] * hessian_KK[j, j]
            codes_NK[:, j] = code_of(target_NK[:, j] + others_N / hessian_KK[j, j], scale_NG[:, group])
    return codes_NK, scale_NG


def _descend_scales(
    target_NK: Array, codes_NK: Codes, scale_NG: Array, hessian_KK: Array, group: int, dtype: str
) -> None:
    group_size = target_NK.shape[1] // scale_NG.shape[1]
    for row in range(len(target_NK)):
        direction_K = np.zeros(target_NK.shape[1])
        block = slice(group * group_size, (group + 1) * group_size)
        direction_K[block] = codes_NK[row, block]
        curvature = direction_K @ hessian_KK @ direction_K
        if curvature <= 0:
            continue
        error_K = target_NK[row] - dequantize(codes_NK[row : row + 1], scale_NG[row : row + 1])[0]
        now = scale_NG[row, group]
        best = now + (error_K @ hessian_KK @ direction_K) / curvature
        scale_NG[row, group] = stored(float(best), dtype)


def retarget(weight_NK: Array, gap_NK: Array, hessian_KK: Array) -> Array:
    """W + Y H'^-1, with the inverse as it is written."""
    moved_NK: Array = weight_NK + gap_NK @ np.linalg.inv(hessian_KK)
    return moved_NK


def degrees_of_freedom(own: Moments, m: float, n0: float, hessian_KK: Array) -> float:
    """tr(H'^-1 m / (m + n0) H): what ridge regression on the expert's own tokens can use of its inputs."""
    return float(np.trace(np.linalg.inv(hessian_KK) @ own.hessian_KK) / own.weight * m / (m + n0))


def james_stein(gap_NK: Array, energy_N: Array, count: int, share: float, freedom: float, hessian_KK: Array) -> Array:
    """Y, row by row times 1 - (what the map explains by chance) / (what it explains), not below nothing."""
    rows = []
    for gap_K, energy in zip(gap_NK, energy_N, strict=True):
        explained = float(gap_K @ np.linalg.inv(hessian_KK) @ gap_K)
        kept = 0.0
        if 0 < explained < energy:
            kept = max(1 - (energy - explained) * share * freedom / (count - freedom) / explained, 0.0)
        rows.append(gap_K * kept)
    return np.stack(rows)


def residual_target(weight_NK: Array, own: Moments, m: float, n0: float, hessian_KK: Array) -> Array:
    """W + Y H'^-1, Y as far as it is not chance. hessian_KK: H', shrunk with m and n0, and damped."""
    if own.count == 0:
        return weight_NK
    freedom = degrees_of_freedom(own, m, n0, hessian_KK)
    gap_NK, energy_N = shrink_gap(own, m, n0), own.gap2_N / own.weight
    return retarget(weight_NK, james_stein(gap_NK, energy_N, own.count, m / (m + n0), freedom, hessian_KK), hessian_KK)


def proxy(error_NK: Array, hessian_KK: Array) -> float:
    """tr(Err H Err^T)."""
    return float(np.trace(error_NK @ hessian_KK @ error_NK.T))


# ---- the metric of the rows (section 13)


def row_metric(metric_NN: Array, odamp: float) -> Array:
    """Scaled to a mean diagonal of 1, then damped."""
    return damp(metric_NN / (np.trace(metric_NN) / len(metric_NN)), odamp, "diagonal", 1e-4)


def two_sided_proxy(error_NK: Array, hessian_KK: Array, metric_NN: Array) -> float:
    """tr(H_O Err H Err^T)."""
    return float(np.trace(metric_NN @ error_NK @ hessian_KK @ error_NK.T))


def two_sided_term(error_NK: Array, unit_NN: Array, unit_KK: Array, row: int, column: int) -> float:
    """(M_O^T Err M) at one place: what is to be made small there. Later rows and columns have no part in it."""
    return float(unit_NN[: row + 1, row] @ error_NK[: row + 1, : column + 1] @ unit_KK[: column + 1, column])


def two_sided_ldlq(
    weight_NK: Array, scale_NG: Array, hessian_KK: Array, metric_NN: Array, order: Sequence[int], rows: Sequence[int]
) -> Codes:
    """Row after row, column after column: the code that leaves the least of its place's term, by its definition."""
    unit_KK, _ = unit_factor(hessian_KK[np.ix_(order, order)])
    unit_NN, _ = unit_factor(metric_NN[np.ix_(rows, rows)])
    weight_NK = weight_NK[np.ix_(rows, order)]
    scale_NK = spread(scale_NG, weight_NK.shape[1])[np.ix_(rows, order)]
    codes_NK, error_NK = np.zeros(weight_NK.shape, dtype=np.int64), np.zeros(weight_NK.shape)
    for row, column in np.ndindex(*weight_NK.shape):
        error_NK[row, column] = weight_NK[row, column]  # of a code of 0
        wanted = two_sided_term(error_NK, unit_NN, unit_KK, row, column)
        code = min(max(round(wanted / scale_NK[row, column]), -8), 7)
        error_NK[row, column] -= code * scale_NK[row, column]
        codes_NK[row, column] = code
    natural_NK = np.empty_like(codes_NK)
    natural_NK[np.ix_(rows, order)] = codes_NK
    return natural_NK


@dataclass
class TwoSided:
    """A problem and its state, in natural order."""

    target_NK: Array
    codes_NK: Codes
    scale_NG: Array
    hessian_KK: Array
    metric_NN: Array

    def error_NK(self) -> Array:
        return self.target_NK - dequantize(self.codes_NK, self.scale_NG)

    def slope(self, direction_NK: Array) -> tuple[float, float]:
        """<direction, Err> and <direction, direction> under the two metrics."""
        moved_NK = self.metric_NN @ direction_NK @ self.hessian_KK
        return float((moved_NK * self.error_NK()).sum()), float((moved_NK * direction_NK).sum())


def two_sided_descent(problem: TwoSided, rows: Sequence[int], passes: int, dtype: str) -> None:
    """One coordinate at a time to the minimum of tr(H_O Err H Err^T), in place.

    Group after group, in each row after row: the row's scale (dtype "" leaves it), then its codes from left to right.
    """
    outputs, inputs = problem.target_NK.shape
    size = inputs // problem.scale_NG.shape[1]
    for _, group, row in itertools.product(range(passes), range(problem.scale_NG.shape[1]), rows):
        columns = range(group * size, (group + 1) * size)
        if dtype:
            direction_NK = np.zeros((outputs, inputs))
            direction_NK[row, columns] = problem.codes_NK[row, columns]
            along, curvature = problem.slope(direction_NK)
            now = problem.scale_NG[row, group]
            best = now + along / curvature if curvature > 0 else now
            rounded = stored(float(best), dtype)
            if abs(rounded - best) < abs(now - best):
                problem.scale_NG[row, group] = rounded
        for column in columns:
            direction_NK = np.zeros((outputs, inputs))
            direction_NK[row, column] = 1
            along, curvature = problem.slope(direction_NK)
            scale = problem.scale_NG[row, group]
            wanted = problem.codes_NK[row, column] + along / curvature / scale
            problem.codes_NK[row, column] = min(max(round(wanted), -8), 7)


# ---- storage (FORMAT.md 1 to 3)


def unpack_word(word: int) -> list[int]:
    """Eight codes of an int32, lowest nibble first; the nibble of code q is q + 8."""
    unsigned = word % 2**32
    return [(unsigned >> (4 * place)) % 16 - 8 for place in range(8)]


def pack_word(codes: Sequence[int]) -> int:
    """The int32 of eight codes; a word whose top nibble is 8 or more is negative."""
    unsigned = sum((code + 8) << (4 * place) for place, code in enumerate(codes))
    return unsigned - 2**32 if unsigned >= 2**31 else unsigned


def unpack_compressed_tensors(weight_packed: Sequence[Sequence[int]]) -> list[list[int]]:
    """weight_packed [N, K/8] to codes [N][K]."""
    return [[code for word in row for code in unpack_word(word)] for row in weight_packed]


def unpack_gptq(qweight: Sequence[Sequence[int]]) -> list[list[int]]:
    """qweight [K/8, N] to codes [N][K]."""
    return unpack_compressed_tensors(list(zip(*qweight, strict=True)))


# ---- metrics (section 10)


@dataclass
class TokenStatistics:
    nll_source_T: Array
    nll_release_T: Array
    kl_T: Array
    entropy_T: Array
    agree_T: NDArray[np.bool_]
    five_T: Array


def token_statistics(
    source_TD: Array, release_TD: Array, head_VD: Array, next_T: Sequence[int], release_head_VD: Array | None = None
) -> TokenStatistics:
    """Both distributions over the full vocabulary, position by position, by their definitions."""
    other_VD = head_VD if release_head_VD is None else release_head_VD
    rows = []
    for source_D, release_D, token in zip(source_TD, release_TD, next_T, strict=True):
        p_V, q_V = log_softmax(head_VD @ source_D), log_softmax(other_VD @ release_D)
        kl, entropy = float(np.exp(p_V) @ (p_V - q_V)), float(-np.exp(p_V) @ p_V)
        likeliest = set(np.argsort(-p_V)[:5].tolist()) & set(np.argsort(-q_V)[:5].tolist())
        rows.append((-p_V[token], -q_V[token], kl, entropy, p_V.argmax() == q_V.argmax(), len(likeliest) / 5))
    return TokenStatistics(*(np.array(column) for column in zip(*rows, strict=True)))


def log_softmax(logits_V: Array) -> Array:
    shifted_V = logits_V - logits_V.max()
    result_V: Array = shifted_V - math.log(np.exp(shifted_V).sum())
    return result_V


def quantile(values: Iterable[float], share: float) -> float:
    """Between the two values next to the place share * (n - 1), linearly."""
    ascending = sorted(values)
    place = share * (len(ascending) - 1)
    low = ascending[math.floor(place)]
    return low + (place - math.floor(place)) * (ascending[math.ceil(place)] - low)
