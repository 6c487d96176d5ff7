"""The rounding of a linear layer's weight to a grid of few bits, so that its output changes least.

Pure: arrays in, arrays out; it does not know which module the layer belongs to. With the moments G = X^T X of the
layer's inputs, the error of a rounded weight Q is sum_t ||x_t (W - Q)^T||^2 = tr((W - Q) G (W - Q)^T).

Rounding to nearest takes every weight by itself. GPTQ (Frantar et al. 2023, arXiv 2210.17323) rounds one input's
weights after the other, and lets the inputs that are left make up for each: with U the upper Cholesky factor of G^-1,
U^T U = G^-1, the rounding of column i changes all columns j > i by W_j -= (w_i - q_i) / U_ii * U_ij. Inputs of large
moments go first. The grid is chosen before, on the weight as it was (grids.py).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch

from edgeprune.model.quantised import QuantisedWeight, joined
from edgeprune.precision import WeightFormat
from edgeprune.pruning.grids import Grid, Search, choose_grid
from edgeprune.pruning.linear import cholesky

DAMPING = 0.1  # added to the moments as a share of their mean diagonal: samples say little about other kinds of text
BLOCK = 128  # columns whose changes of all later columns are gathered into one product
ROWS = 4096  # outputs that are rounded at a time
PROBED_OUTPUTS = 64  # on which GPTQ is compared with rounding, and the error is taken, at most
EXACT_WEIGHTS = 1 << 16  # of a matrix, at most, whose grid is searched for exactly: a second or two

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
    steps = grid.by_column(order).rows()
    left = weight.T[order].contiguous()  # (in, out), the weights as the roundings so far have changed them
    codes = torch.empty_like(left)
    for start in range(0, len(left), BLOCK):
        end = min(start + BLOCK, len(left))
        block, of_block = left[start:end], changes[start:end]
        errors = torch.empty_like(block)
        # Most of the time goes into calls on few numbers: a block is taken apart into rows once.
        rows = (part.unbind() for part in (block, codes[start:end], errors, of_block[:, start:end]))
        for i, (row, code, error, changed) in enumerate(zip(*rows, strict=True), 1):
            step, divisors = next(steps)
            code.copy_(step.codes(row, divisors, out=code))
            torch.sub(row, step.values(code.clone()), out=error)
            block[i:].addr_(changed[i:], error, alpha=-1)
        left[end:].addmm_(of_block[:, end:].T, errors, alpha=-1)
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
    search: Search = "ends" if rounding == "gptq" else "exact" if weight.numel() <= EXACT_WEIGHTS else "starts"
    parts, largest = [], torch.maximum(weight.max(), -weight.min()).float()
    for rows in weight.split(ROWS):
        rows = rows.float()
        grid = choose_grid(rows, moments.diagonal(), form, search, largest)
        parts.append(grid.nearest(rows) if rounding == "nearest" else grid.with_codes(_gptq(rows, *changes, grid)))
    result, some = joined(parts), probed_outputs(weight)
    error = relative_error(weight[some].float(), result.rows(some).dequantised(), moments)
    return Quantisation(result, rounding, error)


def _is_gptq_better(weight: torch.Tensor, moments: torch.Tensor, held_out: torch.Tensor, form: WeightFormat) -> bool:
    """Returns whether GPTQ on the other samples leaves a smaller error on the held-out ones; on some outputs."""
    rows = weight[probed_outputs(weight)].float()
    ends, starts = (choose_grid(rows, moments.diagonal(), form, search) for search in ("ends", "starts"))
    tried = gptq(rows, moments, ends, held_out), starts.nearest(rows)
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
