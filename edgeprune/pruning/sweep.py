"""The scale of a group of weights that rounding to nearest loses least with, exactly; the best beside minima on a line.

As the scale falls, the levels of the weights grow one by one: the weight x takes level k at the scale |x| / (k - 1/2).
Between two such scales no level changes, and the least squares of the weights on their levels q, with importances h,
leave sum h x^2 - (sum h x q)^2 / sum h q^2: both sums grow by one term at each change. So the best of all scales is
found by one sort and two running sums; at the scale that it gives, the nearest levels lose no more.

With a minimum the levels change with two numbers. Along a line of them, one of both fixed, the same holds, of the
variances and the covariance in place of the sums of squares and products: one sort and three running sums.
"""

from __future__ import annotations

import numpy as np
import torch


def best_scales(
    values: torch.Tensor, importance: torch.Tensor, below: torch.Tensor, above: torch.Tensor
) -> torch.Tensor:
    """Returns the scales (out, groups) that lose least; zeros where no weight gets a level but zero.

    values: (places, out, groups) fp32; importance: in a shape that meets theirs; below, above: (out, groups), the
    levels that there are on each side of zero, whole numbers. Memory: a few times values times the levels.
    """
    sizes = values.abs()
    levels = _levels(int(torch.maximum(below.max(), above.max())), values)
    exists = (levels <= torch.where(values > 0, above, below)).float()  # (levels, places, out, groups)
    # What does not exist comes last, and changes nothing.
    products, squares = _running(
        exists * sizes / (levels - 0.5), (sizes * importance * exists, (2 * levels - 1) * importance * exists)
    )
    best = (products.square() / squares).nan_to_num_(nan=0.0).argmax(dim=2, keepdim=True)
    return (products.gather(2, best) / squares.gather(2, best)).squeeze(2).nan_to_num_(nan=0.0)


def fits_of_scales(
    values: torch.Tensor, importance: torch.Tensor, pivot: torch.Tensor, below: int, above: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the scales and minima (out, groups) that lose least, of the least squares on the codes at all scales.

    values: (places, out, groups) fp32; importance: in a shape that meets theirs; pivot: (out, groups), a value whose
    code stays, with so many codes below and above it. A minimum is the value of the least code. Scales are zeros where
    the codes never go with the values.
    """
    off = values - pivot
    levels = _levels(max(below, above), values)
    exists = levels <= torch.where(off > 0, above, below)
    return _best_fits(values, importance, off.abs() / (levels - 0.5) * exists, off.sign() * exists, levels, below)


def fits_of_minima(
    values: torch.Tensor, importance: torch.Tensor, scales: torch.Tensor, most: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns what fits_of_scales does, of codes 0 to most at all minima with the scales (out, groups)."""
    levels = _levels(most, values)
    line = values - (levels - 0.5) * scales
    return _best_fits(values, importance, line, torch.ones(()), levels, 0)


def _best_fits(
    values: torch.Tensor,
    importance: torch.Tensor,
    line: torch.Tensor,
    signs: torch.Tensor,
    levels: torch.Tensor,
    first: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the scales and minima of the best codes along a line (levels, places, out, groups), from above.

    first: the code of all values at the start, of which each goes up or down by its sign at its places on the line.
    """
    total, of_values = importance.sum(dim=0), (values * importance).sum(dim=0)
    weights = (signs * importance).expand_as(line)
    changes = weights, (2 * levels - 1) * weights.abs(), weights * (values - of_values / total)
    of_levels, squares, covariances = _running(line, changes)
    variances = squares - of_levels.square() / total[..., None]
    gains = torch.where((covariances > 0) & (variances > 0), covariances.square() / variances, 0.0)
    best = gains.argmax(dim=2, keepdim=True)
    of_levels, variances, covariances = (
        part.gather(2, best).squeeze(2) for part in (of_levels, variances, covariances)
    )
    scales = (covariances / variances).nan_to_num_(nan=0.0, posinf=0.0, neginf=0.0).clamp_min_(0.0)
    return scales, (of_values - scales * of_levels) / total - first * scales


def _levels(most: int, values: torch.Tensor) -> torch.Tensor:
    """Returns the levels 1 to most in the shape (most, 1, 1, 1)."""
    return torch.arange(1, most + 1, dtype=values.dtype)[:, None, None, None]


def _running(line: torch.Tensor, changes: tuple[torch.Tensor, ...]) -> list[torch.Tensor]:
    """Returns running sums (out, groups, levels * places) of changes (levels, places, out, groups), by falling line."""

    def by_group(part: torch.Tensor) -> torch.Tensor:
        return part.expand_as(line).flatten(0, 1).movedim(0, 2).contiguous()

    # numpy sorts several at once.
    order = torch.from_numpy(np.argsort(by_group(-line).numpy(), axis=2))
    return [by_group(part).gather(2, order).cumsum(dim=2) for part in changes]
