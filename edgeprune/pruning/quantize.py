"""The rounding of a linear layer's weight to a grid of few bits, so that its output changes least.

Pure: arrays in, arrays out; it does not know which module the layer belongs to. With the moments G = X^T X of the
layer's inputs, the error of a rounded weight Q is sum_t ||x_t (W - Q)^T||^2 = tr((W - Q) G (W - Q)^T).

Rounding to nearest takes every weight by itself. GPTQ (Frantar et al. 2023, arXiv 2210.17323) rounds one input's
weights after the other, and lets the inputs that are left make up for each: with U the upper Cholesky factor of G^-1,
U^T U = G^-1, the rounding of column i changes all columns j > i by W_j -= (w_i - q_i) / U_ii * U_ij. Inputs of large
moments go first. The grid is chosen before, on the weight as it was: of some scales for each group, the one that
rounding to nearest loses least with, where the error of each weight counts by the moment of its input.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from edgeprune.model.quantised import QuantisedWeight, joined, storable
from edgeprune.precision import WeightFormat
from edgeprune.pruning.linear import cholesky

SHRINKS = tuple(1 - 0.05 * step for step in range(8))
"""Shares of a group's range that its grid spans: one that cuts off the largest weights is finer for all others."""

DAMPING = 1e-2  # added to the moments as a share of their mean diagonal: few samples determine few directions
BLOCK = 128  # columns whose changes of all later columns are gathered into one product
ROWS = 4096  # outputs that are rounded at a time
GRID_WEIGHTS = 1 << 17  # whose grids are chosen at a time: they stay in the processor's cache
PROBED_OUTPUTS = 64  # on which GPTQ is compared with rounding, and the error is taken, at most

Rounding = Literal["gptq", "nearest"]


@dataclass(frozen=True)
class Quantisation:
    """A rounded weight and how good it is.

    rounding: `nearest` where GPTQ was not better on held-out samples; error: tr((W - Q) G (W - Q)^T) / tr(W G W^T) of
    some outputs on all samples, nan where there are none.
    """

    weight: QuantisedWeight
    rounding: Rounding
    error: float


@dataclass(frozen=True)
class Grid:
    """The scales (out_features, groups) fp32 and the zeros (out_features, groups) fp32, whole numbers, of a format."""

    form: WeightFormat
    scales: torch.Tensor
    zeros: torch.Tensor

    def nearest(self, weight: torch.Tensor) -> QuantisedWeight:
        """Returns a weight (out_features, in_features) rounded to nearest."""
        codes = _codes(self.form, _grouped(weight, self.scales), self.scales[..., None], self.zeros[..., None])
        return self.with_codes(codes.flatten(1))

    def with_codes(self, codes: torch.Tensor) -> QuantisedWeight:
        """Returns the weight of codes (out_features, in_features), whole numbers of any type."""
        zeros = self.zeros.to(torch.int8) if self.form.asymmetric else None
        return QuantisedWeight(self.form, codes.to(torch.int8), self.scales, zeros)

    def columns(self, order: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns the scale and the zero of every input in this order, (in_features, out_features) each."""
        groups = order // (len(order) // self.scales.shape[1])
        return self.scales.T[groups], self.zeros.T[groups]


def choose_grid(
    weight: torch.Tensor, importance: torch.Tensor, form: WeightFormat, shrinks: Sequence[float] = SHRINKS
) -> Grid:
    """Returns the grid that rounding to nearest loses least with.

    weight: (out_features, in_features) fp32; importance: (in_features,), the diagonal of the moments, which weighs the
    errors; a group without importance counts all its inputs alike; shrinks: to choose from. Raises InputError where the
    groups do not divide the inputs.
    """
    groups = form.groups_of(weight.shape[1])
    importance = importance.to(weight.dtype).unflatten(0, (groups, -1))  # (groups, group)
    importance = torch.where(importance.sum(dim=1, keepdim=True) > 0, importance, 1.0)
    rows = max(1, GRID_WEIGHTS // weight.shape[1])
    parts = [_best_grid(part.unflatten(1, (groups, -1)), importance, form, shrinks) for part in weight.split(rows)]
    return Grid(form, torch.cat([part.scales for part in parts]), torch.cat([part.zeros for part in parts]))


def _best_grid(grouped: torch.Tensor, importance: torch.Tensor, form: WeightFormat, shrinks: Sequence[float]) -> Grid:
    """Returns the grid of weights (out_features, groups, group); importance: (groups, group)."""
    low, high = grouped.amin(dim=2).clamp_max_(0), grouped.amax(dim=2).clamp_min_(0)  # (out, groups)
    least_error = torch.full_like(low, torch.inf)
    best = Grid(form, torch.empty_like(low), torch.empty_like(low))
    for scales, zeros in _grids(form, low, high, shrinks):
        codes = _codes(form, grouped, scales[..., None], zeros[..., None])
        off = codes.sub_(zeros[..., None]).mul_(scales[..., None]).sub_(grouped)
        error = off.square_().mul_(importance).sum(dim=2)  # (out, groups)
        is_better = error < least_error
        least_error[is_better] = error[is_better]
        best.scales[is_better], best.zeros[is_better] = scales[is_better], zeros[is_better]
    return best


def _grids(
    form: WeightFormat, low: torch.Tensor, high: torch.Tensor, shrinks: Sequence[float]
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yields the scales and zeros (out_features, groups) to choose from, of groups whose weights lie between low <= 0
    and high >= 0, (out_features, groups) each."""
    if form.asymmetric:
        for shrink in shrinks:
            scales = storable((high - low) * (shrink / (form.most - form.least)), is_asymmetric=True)
            yield scales, (form.least - low * shrink / scales).round_().clamp_(form.least, form.most)
        return
    largest, zeros = torch.maximum(-low, high), torch.zeros_like(low)
    # The code that the largest weight would have without a bound. Of 4 bits all whole numbers are among them, so that a
    # weight that lies on a grid stays as it is.
    exact = range(1, 1 - form.least) if form.bits == 4 else (form.most,)
    for code in dict.fromkeys((*exact, *(form.most / shrink for shrink in shrinks))):
        yield storable(largest / code), zeros


def _grouped(weight: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    return weight.unflatten(1, (scales.shape[1], -1))


def _codes(form: WeightFormat, weight: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor) -> torch.Tensor:
    """Returns the nearest codes of weights, whole numbers in fp32."""
    return (weight / scales).round_().add_(zeros).clamp_(form.least, form.most)


def gptq(weight: torch.Tensor, moments: torch.Tensor, grid: Grid, less: torch.Tensor | None = None) -> QuantisedWeight:
    """Returns a weight rounded by GPTQ to a grid.

    weight: (out_features, in_features) fp32; moments: (in_features, in_features) fp64 of the layer's inputs; less: of
    the same shape, those of inputs among them that do not count. Raises NumericalError where the moments are not
    finite.
    """
    return grid.with_codes(_gptq(weight, *_changes(moments, less), grid))


def _changes(moments: torch.Tensor, less: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns U_ij / U_ii (in_features, in_features) fp32 of the upper factor U of the inverse moments, and the order
    of its rows."""
    diagonal = moments.diagonal() if less is None else moments.diagonal() - less.diagonal()
    order = torch.argsort(diagonal, descending=True, stable=True)
    # With the order reversed, the inverse of the lower factor of G gives U without the inverse of G itself:
    # P G P = L L^T with P the reversal makes G^-1 = (P L^-1 P)^T (P L^-1 P), and P L^-1 P is upper. The damping keeps L
    # well-conditioned, so that its inverse needs no fp64.
    lower = cholesky(moments, DAMPING, less, order.flip(0)).float()
    inverse = torch.eye(len(lower))
    torch.linalg.solve_triangular(lower, inverse, upper=False, out=inverse)
    del lower
    upper = inverse.flip(0, 1)
    return upper.div_(upper.diagonal().clone()[:, None]), order


def gptq_squares(moments: torch.Tensor, inputs: torch.Tensor) -> torch.Tensor:
    """Returns the sums of squares (in_features,) fp64 that an error of 1 in the weight of each input leaves of the
    output, once those that GPTQ rounds later have made up for it.

    moments: (in_features, in_features) fp64, that GPTQ is run on; inputs: (n, in_features) fp32, that are summed over.
    With them in order x U^T / diag U holds these outputs: on the moments themselves they are 1 / U_ii^2. Raises
    NumericalError where the moments are not finite.
    """
    order = torch.argsort(moments.diagonal(), descending=True, stable=True).flip(0)
    lower = cholesky(moments, DAMPING, order=order).float()
    outputs = torch.linalg.solve_triangular(lower, inputs.T[order], upper=False)  # U x, reversed
    squares = outputs.square_().sum(dim=1, dtype=torch.float64).mul_(lower.diagonal().square())
    return torch.empty_like(squares).index_copy_(0, order, squares)


def _gptq(weight: torch.Tensor, changes: torch.Tensor, order: torch.Tensor, grid: Grid) -> torch.Tensor:
    """Returns the codes (out_features, in_features) fp32; changes, order: as _changes returns them."""
    form = grid.form
    scales, zeros = grid.columns(order)  # (in, out)
    left = weight.T[order].contiguous()  # (in, out), the weights as the roundings so far have changed them
    codes = torch.empty_like(left)
    for start in range(0, len(left), BLOCK):
        end = min(start + BLOCK, len(left))
        errors = torch.empty_like(left[start:end])  # (block, out)
        for i in range(start, end):
            code = _codes(form, left[i], scales[i], zeros[i])
            codes[i] = code
            off = torch.sub(left[i], code.sub_(zeros[i]).mul_(scales[i]), out=errors[i - start])
            left[i + 1 : end].addr_(changes[i, i + 1 : end], off, alpha=-1)
        left[end:].addmm_(changes[start:end, end:].T, errors, alpha=-1)
    return torch.empty_like(weight).index_copy_(1, order, codes.T)


def quantise(
    weight: torch.Tensor, moments: torch.Tensor, held_out: torch.Tensor | None, form: WeightFormat
) -> Quantisation:
    """Returns a weight rounded by GPTQ, or to nearest where GPTQ was not better on held-out samples.

    weight: (out_features, in_features), any floating type; moments: (in_features, in_features) fp64 of all samples,
    zeros where there are none; held_out: those of the held-out samples, fp32, which choose; None: GPTQ is not tried.
    Some outputs are rounded at a time, so that a table of any size takes little memory beside its codes. Raises
    InputError where the groups do not divide the inputs, and NumericalError where the moments are not finite.
    """
    rounding: Rounding = "nearest"
    if held_out is not None and _is_gptq_better(weight, moments, held_out, form):
        rounding, changes = "gptq", _changes(moments)
    parts = []
    for rows in weight.split(ROWS):
        rows = rows.float()
        grid = choose_grid(rows, moments.diagonal(), form)
        rounded = grid.nearest(rows) if rounding == "nearest" else grid.with_codes(_gptq(rows, *changes, grid))
        parts.append(rounded)
    result, some = joined(parts), probed_outputs(weight)
    error = relative_error(weight[some].float(), result.rows(some).dequantised(), moments)
    return Quantisation(result, rounding, error)


def _is_gptq_better(weight: torch.Tensor, moments: torch.Tensor, held_out: torch.Tensor, form: WeightFormat) -> bool:
    """Returns whether GPTQ on the other samples leaves a smaller error on the held-out ones; on some outputs."""
    rows = weight[probed_outputs(weight)].float()
    grid = choose_grid(rows, moments.diagonal(), form)
    tried = (gptq(rows, moments, grid, held_out), grid.nearest(rows))
    by_gptq, by_nearest = (_energy(rows - rounded.dequantised(), held_out.float()) for rounded in tried)
    return by_gptq < by_nearest


def probed_outputs(weight: torch.Tensor) -> torch.Tensor:
    """Returns the places of at most PROBED_OUTPUTS outputs, spread over all of a weight (out_features, in_features)."""
    return torch.arange(0, len(weight), -(-len(weight) // PROBED_OUTPUTS))


def relative_error(weight: torch.Tensor, rounded: torch.Tensor, moments: torch.Tensor) -> float:
    """Returns tr((W - Q) G (W - Q)^T) / tr(W G W^T) of weights (out_features, in_features); nan where W gives 0."""
    moments = moments.float()
    whole = _energy(weight, moments)
    return _energy(weight - rounded, moments) / whole if whole else math.nan


def _energy(weight: torch.Tensor, moments: torch.Tensor) -> float:
    """Returns tr(W G W^T); fp32, because the error of a sum of squares is a few units of its last place."""
    return float((weight @ moments).mul_(weight).sum(dtype=torch.float64))
