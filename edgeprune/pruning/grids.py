"""The grids that a weight of few bits may lie on: of each group of inputs a scale, and a zero or a minimum.

A grid is chosen on the weight as it is: of some for each group, the one that rounding to nearest loses least with,
where the error of each weight counts by the moment of its input. Where an engine stores scales in few bits, those of a
block are whole numbers of one unit, chosen once more under that bound. It does not know how weights are rounded to it.

Shapes: out and in are the features of the weight, groups those of an output, blocks those that share units.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch

from edgeprune.model.levels import codes_of, nearest, nearest_e4m3
from edgeprune.model.quantised import SMALLEST_SCALE, QuantisedWeight, half_of, scale_unit_for, storable
from edgeprune.precision import WeightFormat

SHRINKS = tuple(1 - 0.05 * step for step in range(8))
"""Shares of a group's range that its grid spans: one that cuts off the largest weights is finer for all others."""

GRID_WEIGHTS = 1 << 17  # whose grids are chosen at a time: they stay in the processor's cache
SMALLEST_E4M3 = 2.0**-9
EXACT_BITS = 4  # of which all whole numbers are tried as the largest code, so that a weight on a grid stays as it is


@dataclass(frozen=True)
class Grid:
    """The scales (out, groups) fp32 of a format, and what it has beside them: as QuantisedWeight has it, zeros fp32."""

    form: WeightFormat
    scales: torch.Tensor
    zeros: torch.Tensor | None = None
    minima: torch.Tensor | None = None
    units: torch.Tensor | None = None
    minimum_units: torch.Tensor | None = None
    scale_unit: torch.Tensor | None = None

    def nearest(self, weight: torch.Tensor) -> QuantisedWeight:
        """Returns a weight (out, in) rounded to nearest."""
        return self.with_codes(self.by_group().codes(weight.unflatten(1, (self.scales.shape[1], -1))).flatten(1))

    def with_codes(self, codes: torch.Tensor) -> QuantisedWeight:
        """Returns the weight of codes (out, in), as Steps has them."""
        zeros = None if self.zeros is None else self.zeros.to(torch.int8)
        return QuantisedWeight(
            self.form,
            codes_of(codes, self.form.levels),
            self.scales,
            zeros,
            minima=self.minima,
            units=self.units,
            minimum_units=self.minimum_units,
            scale_unit=self.scale_unit,
        )

    def by_group(self) -> Steps:
        """Returns the steps of weights (out, groups, group)."""
        return Steps(self.form, *(None if part is None else part[..., None] for part in self._parts))

    def by_column(self, order: torch.Tensor) -> Steps:
        """Returns the steps of every input in this order, of weights (in, out)."""
        groups = order // (len(order) // self.scales.shape[1])
        return Steps(self.form, *(None if part is None else part.T[groups] for part in self._parts))

    @property
    def _parts(self) -> tuple[torch.Tensor | None, ...]:
        return self.scales, self.zeros, self.minima


@dataclass(frozen=True)
class Steps:
    """A grid in the shape of the weights that are rounded to it: value = (code - zero) * scale + minimum."""

    form: WeightFormat
    scales: torch.Tensor
    zeros: torch.Tensor | None
    minima: torch.Tensor | None

    def codes(self, weight: torch.Tensor) -> torch.Tensor:
        """Returns the nearest codes of weights, the levels that they stand for in fp32."""
        off = weight if self.minima is None else weight - self.minima
        # A scale of no unit makes all codes alike.
        scales = self.scales if self.form.block is None else torch.where(self.scales == 0, torch.inf, self.scales)
        levels = off / scales
        if self.zeros is not None:
            levels.round_().add_(self.zeros)
        return nearest(levels, self.form.levels, self.form.least, self.form.most)

    def values(self, codes: torch.Tensor) -> torch.Tensor:
        """Returns what codes fp32 stand for, in their memory."""
        if self.zeros is not None:
            codes -= self.zeros
        codes *= self.scales
        return codes if self.minima is None else codes.add_(self.minima)

    def row(self, index: int) -> Steps:
        """Returns the steps of the weights at one place of the first axis."""
        parts = (self.scales, self.zeros, self.minima)
        return Steps(self.form, *(None if part is None else part[index] for part in parts))


def choose_grid(
    weight: torch.Tensor,
    importance: torch.Tensor,
    form: WeightFormat,
    shrinks: Sequence[float] = SHRINKS,
    largest: torch.Tensor | None = None,
) -> Grid:
    """Returns the grid that rounding to nearest loses least with.

    weight: (out, in) fp32; importance: (in,), the diagonal of the moments, which weighs the errors; a group without
    importance counts all its inputs alike; shrinks: to choose from; largest: the largest magnitude () of all of the
    matrix, where the weight is some of its rows: scales of e4m3 have one unit. Raises InputError where the groups do
    not divide the inputs.
    """
    groups = form.groups_of(weight.shape[1])
    importance = importance.to(weight.dtype).unflatten(0, (groups, -1))  # (groups, group)
    importance = torch.where(importance.sum(dim=1, keepdim=True) > 0, importance, 1.0)
    rows = max(1, GRID_WEIGHTS // weight.shape[1])
    unit = scale_unit_for(weight.abs().max() if largest is None else largest, form) if form.e4m3_scales else None
    parts = [
        _best_grid(part.unflatten(1, (groups, -1)), importance, form, shrinks, unit) for part in weight.split(rows)
    ]
    names = ("scales", "zeros", "minima", "units", "minimum_units")
    found = {name: [getattr(part, name) for part in parts] for name in names}
    tensors = {name: torch.cat(of_parts) for name, of_parts in found.items() if of_parts[0] is not None}
    return Grid(form, **tensors, scale_unit=unit)


def _best_grid(
    grouped: torch.Tensor,
    importance: torch.Tensor,
    form: WeightFormat,
    shrinks: Sequence[float],
    unit: torch.Tensor | None,
) -> Grid:
    """Returns the grid of weights (out, groups, group); importance: (groups, group); unit: () of scales of e4m3."""
    best = _best_of(_grids(form, grouped, importance, shrinks, unit), grouped, importance)
    return best if form.block is None else _in_units(best, grouped, importance)


def _best_of(grids: Iterator[Grid], grouped: torch.Tensor, importance: torch.Tensor) -> Grid:
    """Returns for each group the one of all grids that loses least."""
    best, least_error = next(grids), None
    least_error = _error(best, grouped, importance)
    for grid in grids:
        error = _error(grid, grouped, importance)
        is_better = error < least_error
        least_error = torch.where(is_better, error, least_error)
        chosen = {
            name: torch.where(is_better, getattr(grid, name), part)
            for name in ("scales", "zeros", "minima")
            if (part := getattr(best, name)) is not None
        }
        best = replace(best, **chosen)
    return best


def _error(grid: Grid, grouped: torch.Tensor, importance: torch.Tensor) -> torch.Tensor:
    """Returns the weighted error (out, groups) of rounding to nearest."""
    steps = grid.by_group()
    off = steps.values(steps.codes(grouped)).sub_(grouped)
    return off.square_().mul_(importance).sum(dim=2)


def _grids(
    form: WeightFormat,
    grouped: torch.Tensor,
    importance: torch.Tensor,
    shrinks: Sequence[float],
    unit: torch.Tensor | None,
) -> Iterator[Grid]:
    """Yields the grids to choose from of weights (out, groups, group), with scales of any bits in blocks."""
    low, high = grouped.amin(dim=2), grouped.amax(dim=2)  # (out, groups)
    if form.offset == "minimum":
        yield from _with_minimum(form, grouped, importance, low, high, shrinks)
        return
    low, high = low.clamp_max_(0), high.clamp_min_(0)
    if form.offset == "zero":
        for shrink in shrinks:
            scales = storable((high - low) * (shrink / (form.most - form.least)), is_asymmetric=True)
            zeros = (form.least - low * shrink / scales).round_().clamp_(form.least, form.most)
            yield Grid(form, scales, zeros)
        return
    exact = range(1, 1 - form.least) if form.bits == EXACT_BITS else (form.most,)
    codes = tuple(dict.fromkeys((*exact, *(form.most / shrink for shrink in shrinks))))
    largest = torch.maximum(-low, high)
    # Floats of 8 bits are as fine for the largest weights as for others: nothing is to be gained by cutting these off.
    if form.levels == "e4m3":
        codes = tuple(form.most * shrink for shrink in shrinks)
    # A negative scale gives the largest weight the least code, which there is one more of.
    is_signed = form.signed_scales or (form.block is not None and form.block.signed)
    if is_signed:
        largest = torch.where(-low > high, low, high)
        codes += tuple(form.least / shrink for shrink in shrinks)
    for code in codes:
        yield Grid(form, _stored(form, largest / code, unit))


def _with_minimum(
    form: WeightFormat,
    grouped: torch.Tensor,
    importance: torch.Tensor,
    low: torch.Tensor,
    high: torch.Tensor,
    shrinks: Sequence[float],
) -> Iterator[Grid]:
    """Yields grids whose ends are some shares of a group's range, each with the least squares on its codes.

    The minimum of a block is stored without its sign: it is 0 at most.
    """
    highest = torch.inf if form.block is None else 0.0
    weights = importance.expand_as(grouped)
    total = weights.sum(dim=2)
    for shrink in shrinks:
        cut = (high - low) * ((1 - shrink) / 2)
        first = (low + cut).clamp_max(highest)
        scales = (high - cut - first) / (form.most - form.least)
        grid = Grid(form, _stored(form, scales), minima=_stored_minima(form, first - form.least * scales))
        yield grid
        # Least squares for scale and minimum: weighted sums of codes and weights.
        codes = grid.by_group().codes(grouped)
        weighed = codes * weights
        of_codes, of_squares, of_weights = (
            weighed.sum(dim=2),
            (weighed * codes).sum(dim=2),
            (grouped * weights).sum(dim=2),
        )
        of_products = weighed.mul_(grouped).sum(dim=2)
        spread = total * of_squares - of_codes.square()
        scales = (total * of_products - of_codes * of_weights) / spread
        minima = (of_weights - scales * of_codes) / total
        through_zero = of_products / of_squares
        scales = torch.where(minima > highest, through_zero, scales)
        minima = minima.clamp_max_(highest)
        is_known = scales.isfinite() & minima.isfinite() & (scales > 0)
        scales, minima = torch.where(is_known, scales, grid.scales), torch.where(is_known, minima, grid.minima)
        yield Grid(form, _stored(form, scales), minima=_stored_minima(form, minima))


def _stored(form: WeightFormat, scales: torch.Tensor, unit: torch.Tensor | None = None) -> torch.Tensor:
    """Returns scales as the format stores them; those of blocks as they are. unit: () of scales of e4m3."""
    if unit is not None:
        return nearest_e4m3(scales / unit).clamp_min_(SMALLEST_E4M3) * unit
    if form.block is not None:
        return scales
    if form.storage != "gguf":
        return storable(scales)
    halves = half_of(scales)
    return torch.where(halves.abs() < SMALLEST_SCALE, SMALLEST_SCALE, halves)


def _stored_minima(form: WeightFormat, minima: torch.Tensor) -> torch.Tensor:
    """Returns minima as the format stores them; those of blocks as they are."""
    if form.block is not None:
        return minima
    if form.storage == "gguf":
        return half_of(minima)
    return storable(minima.abs()).copysign_(minima)


def _in_units(grid: Grid, grouped: torch.Tensor, importance: torch.Tensor) -> Grid:
    """Returns a grid whose scales and minima are whole numbers of the units of their blocks.

    The units give the largest of a block the most steps; each scale, and with it each minimum, is then the best of
    those next to it.
    """
    block = grid.form.block
    of_block = block.inputs // grid.form.group  # groups
    units, steps = _units(grid.scales, of_block, block.least, block.most)
    minimum_units, minimum_steps = None, None
    if grid.minima is not None:
        minimum_units, minimum_steps = _units(-grid.minima, of_block, 0, block.most)

    def grids() -> Iterator[Grid]:
        for change in (0, -1, 1):
            scales = _of_units((steps + change).clamp(block.least, block.most), units)
            if minimum_steps is None:
                yield Grid(grid.form, scales)
                continue
            for minimum_change in (0, -1, 1):
                minima = -_of_units((minimum_steps + minimum_change).clamp(0, block.most), minimum_units)
                yield Grid(grid.form, scales, minima=minima)

    best = _best_of(grids(), grouped, importance)
    return replace(best, units=units, minimum_units=minimum_units)


def _units(values: torch.Tensor, of_block: int, least: int, most: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the units (out, blocks) fp32, numbers of fp16, of values (out, groups), and how many each is, whole
    numbers in fp32."""
    blocks = values.unflatten(1, (-1, of_block))  # (out, blocks, groups of one)
    places = blocks.abs().argmax(dim=2, keepdim=True)
    # With signs, the largest has the least number, of which there is one more.
    units = half_of(blocks.gather(2, places).squeeze(2) / (least or most))
    divisors = torch.where(units == 0, torch.inf, units)
    return units, (blocks / divisors[..., None]).round_().clamp_(least, most).flatten(1)


def _of_units(steps: torch.Tensor, units: torch.Tensor) -> torch.Tensor:
    """Returns so many units (out, groups)."""
    return (steps.unflatten(1, (units.shape[1], -1)) * units[..., None]).flatten(1)
