"""The grids that a weight of few bits may lie on: of each group of inputs a scale, and a zero or a minimum.

A grid is chosen on the weight as it is: of some for each group, the one that rounding to nearest loses least with,
where the error of each weight counts by the moment of its input. Each starts at the ends of the group, or some steps
within, and gets the least squares on the codes that it makes. Where an engine stores the scales of a block in few bits,
they are whole numbers of one unit: to the same search they are the weights of a group, and the unit is its scale. It
does not know how weights are rounded to a grid.

Shapes: out and in are the features of the weight, groups those of an output, blocks those that share units; places are
those within a group (of weights) or a block (of groups). They come first, (places, out, groups), so that what a group
has, (out, groups), meets all of its weights.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch

from edgeprune.model.levels import codes_of, nearest, nearest_e4m3
from edgeprune.model.quantised import SMALLEST_SCALE, QuantisedWeight, half_of, scale_unit_for, storable
from edgeprune.precision import ScaleBlock, WeightFormat

CUTS = (-0.5, -0.2, 0.1, 0.4, 0.9, 2.0)
"""Steps by which a grid falls short of the largest weight of a group: one that cuts it off is finer for all others.
Those of less than half a step find a weight's own grid, by the least squares. A grid without an offset has a step at
zero, and those of less than none would leave its largest code unused."""

END_CUTS = 5  # the first so many are those of both ends of a group that has an offset, each with each

LARGEST_CODES = 4
"""So many numbers at least may be a group's largest code, so that a weight on a grid stays as it is: of 4 bits all of
them, since a grid of less than half is one of twice as many codes too."""

NEIGHBOURS = (0, -1, 1)  # of how many units a scale is, which the weights choose from

LARGEST_FLOATS = {
    "e4m3": tuple(448 * (1 - 0.05 * step) for step in range(8)),
    "e2m1": (1.5, 2.0, 3.0, 4.0, 5.0, 6.0, 6.5, 7.0, 7.5, 8.0, 9.0),
}
"""What the largest weight of a group becomes where levels are floats. Those of 8 bits are as fine for large weights as
for others: nothing is gained by cutting these off."""

SMALLEST_E4M3 = 2.0**-9
GRID_WEIGHTS = 1 << 17  # whose grids are chosen at a time: they stay in the processor's cache


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
        steps = Steps(self.form, *self._parts)
        return self.with_codes(steps.codes(_by_place(weight, self.scales.shape[1])).permute(1, 2, 0).flatten(1))

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

    def by_column(self, order: torch.Tensor) -> Steps:
        """Returns the steps of every input in this order, of weights (in, out)."""
        groups = order // (len(order) // self.scales.shape[1])
        return Steps(self.form, *(None if part is None else part.T[groups] for part in self._parts))

    @property
    def _parts(self) -> tuple[torch.Tensor | None, ...]:
        return self.scales, self.zeros, self.minima


@dataclass(frozen=True)
class Steps:
    """A grid in the shape of the values that are rounded to it: value = (code - zero) * scale + minimum.

    form: whose codes these are, of weights or of the scales of a block.
    """

    form: WeightFormat | ScaleBlock
    scales: torch.Tensor
    zeros: torch.Tensor | None = None
    minima: torch.Tensor | None = None

    def codes(self, weight: torch.Tensor) -> torch.Tensor:
        """Returns the nearest codes of weights, the levels that they stand for in fp32."""
        off = weight if self.minima is None else weight - self.minima
        # A scale of no unit makes all codes alike.
        levels = off / self.scales.where(self.scales != 0, torch.inf)
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
    cuts: Sequence[float] = CUTS,
    largest: torch.Tensor | None = None,
) -> Grid:
    """Returns the grid that rounding to nearest loses least with.

    weight: (out, in) fp32; importance: (in,), the diagonal of the moments, which weighs the errors; a group without
    importance counts all its inputs alike; cuts: to start from; largest: the largest magnitude () of all of the matrix,
    where the weight is some of its rows: scales of e4m3 have one unit. Raises InputError where the groups do not divide
    the inputs.
    """
    groups = form.groups_of(weight.shape[1])
    importance = _by_place(importance.to(weight.dtype)[None], groups)  # (places, 1, groups)
    importance = torch.where(importance.sum(dim=0) > 0, importance, 1.0)
    rows = max(1, GRID_WEIGHTS // weight.shape[1])
    unit = scale_unit_for(weight.abs().max() if largest is None else largest, form) if form.e4m3_scales else None
    parts = [_best_grid(Weighed(_by_place(part, groups), importance), form, cuts, unit) for part in weight.split(rows)]
    names = ("scales", "zeros", "minima", "units", "minimum_units")
    found = {name: [getattr(part, name) for part in parts] for name in names}
    tensors = {name: torch.cat(of_parts) for name, of_parts in found.items() if of_parts[0] is not None}
    return Grid(form, **tensors, scale_unit=unit)


def _by_place(weight: torch.Tensor, groups: int) -> torch.Tensor:
    """Returns a weight (out, in) by place (places, out, groups)."""
    return weight.unflatten(1, (groups, -1)).permute(2, 0, 1).contiguous()


@dataclass(frozen=True)
class Weighed:
    """Values (places, out, groups) fp32 to be rounded, and what the square of each one's error counts, in a shape that
    meets theirs."""

    values: torch.Tensor
    importance: torch.Tensor

    def error(self, steps: Steps) -> torch.Tensor:
        """Returns the weighted error (out, groups) of rounding to nearest."""
        off = steps.values(steps.codes(self.values)).sub_(self.values)
        return off.square_().mul_(self.importance).sum(dim=0)

    def fitted(self, steps: Steps) -> Steps:
        """Returns steps with the least squares on their codes; as they were where these are all alike."""
        levels = steps.codes(self.values)
        if steps.zeros is not None:
            levels -= steps.zeros
        weighed = levels * self.importance
        of_products, of_levels = (levels * self.weighed).sum(dim=0), weighed.sum(dim=0)
        of_squares = weighed.mul_(levels).sum(dim=0)
        if steps.minima is None:
            return replace(steps, scales=torch.where(of_squares > 0, of_products / of_squares, steps.scales))
        of_values, total = self.weighed.sum(dim=0), self.total
        scales = (total * of_products - of_levels * of_values) / (total * of_squares - of_levels.square())
        minima = (of_values - scales * of_levels) / total
        if steps.form.block is not None:  # which stores minima without a sign
            scales = torch.where(minima > 0, of_products / of_squares, scales)
            minima = minima.clamp_max(0)
        is_known = scales.isfinite() & minima.isfinite() & (scales > 0)
        return replace(steps, scales=scales.where(is_known, steps.scales), minima=minima.where(is_known, steps.minima))

    @functools.cached_property
    def weighed(self) -> torch.Tensor:
        """Returns the values times their importance."""
        return self.values * self.importance

    @functools.cached_property
    def total(self) -> torch.Tensor:
        """Returns the importance of a whole group, in a shape that meets (out, groups)."""
        return self.importance.sum(dim=0)

    def best_of(self, choice: Iterable[Steps]) -> Steps:
        """Returns for each group the steps that lose least, the first of those that lose the same."""
        best, least = None, None
        for steps in choice:
            error = self.error(steps)
            if best is None:
                best, least = steps, error
                continue
            is_better = error < least
            least = torch.where(is_better, error, least)
            parts = {name: (part, getattr(best, name)) for name in PARTS if (part := getattr(steps, name)) is not None}
            best = replace(best, **{name: torch.where(is_better, *pair) for name, pair in parts.items()})
        return best


PARTS = ("scales", "zeros", "minima")  # of Steps


def _search(weighed: Weighed, form: WeightFormat | ScaleBlock, cuts: Sequence[float]) -> Steps:
    """Returns the steps (out, groups) that lose least, of those that fit to the codes of some starts.

    The scales of a block are any numbers here.
    """
    starts = _starts(weighed.values, form, cuts)
    if form.bits == 8:  # fine enough for the whole range
        return stored(next(starts))
    best = weighed.best_of(stored(weighed.fitted(start)) for start in starts)
    return weighed.best_of((best, stored(weighed.fitted(best))))


def _starts(values: torch.Tensor, form: WeightFormat | ScaleBlock, cuts: Sequence[float]) -> Iterator[Steps]:
    """Yields steps (out, groups) whose ends lie near those of the values (places, out, groups)."""
    low, high = values.amin(dim=0), values.amax(dim=0)  # (out, groups)
    if isinstance(form, WeightFormat) and form.offset is not None:
        if form.offset == "zero" or form.block is not None:
            low = low.clamp_max(0)
        if form.offset == "zero":
            high = high.clamp_min(0)
        for below, above in itertools.product(cuts[:END_CUTS], repeat=2):
            scales = (high - low) / (form.most - form.least + below + above)
            minima = low + (below - form.least) * scales
            if form.offset == "minimum":
                yield Steps(form, scales, minima=minima)
            else:
                zeros = (-minima / scales.where(scales != 0, torch.inf)).round_().clamp_(form.least, form.most)
                yield Steps(form, scales, zeros)
        return
    low, high = low.clamp_max(0), high.clamp_min(0)
    # The codes of the largest value above 0 and of that below, at least.
    below = -form.least or form.most
    codes = [(form.most, below)] if form.bits == 8 else []
    codes += [(form.most + cut, below + cut) for cut in cuts if cut > 0 or isinstance(form, ScaleBlock)]
    if isinstance(form, WeightFormat):
        first = max(form.most // 2, form.most - LARGEST_CODES) + 1
        codes += [(code, code) for code in range(first, below + 1)]
    for most, least in codes:
        yield Steps(form, torch.maximum(high / most, -low / least))
        # A negative scale gives the largest value the least code, which there is one more of.
        if _is_signed(form) and least > form.most:
            yield Steps(form, -torch.maximum(-low / most, high / least))


def _is_signed(form: WeightFormat | ScaleBlock) -> bool:
    """Returns whether scales, or the units of a block, may be negative."""
    if isinstance(form, ScaleBlock):
        return form.signed
    return form.signed_scales or (form.block is not None and form.block.signed)


def stored(steps: Steps) -> Steps:
    """Returns steps as their format stores them; scales in few bits as they are."""
    form = steps.form
    if isinstance(form, WeightFormat) and form.block is not None:
        return steps
    if isinstance(form, ScaleBlock) or form.storage == "gguf":
        halves = half_of(steps.scales)
        scales = torch.where(halves.abs() < SMALLEST_SCALE, SMALLEST_SCALE, halves)
        return replace(steps, scales=scales, minima=None if steps.minima is None else half_of(steps.minima))
    minima = None if steps.minima is None else storable(steps.minima.abs()).copysign_(steps.minima)
    return replace(steps, scales=storable(steps.scales, form.offset == "zero"), minima=minima)


def _of_floats(values: torch.Tensor, form: WeightFormat, unit: torch.Tensor | None) -> Iterator[Steps]:
    """Yields steps (out, groups) of values (places, out, groups) where levels are floats; unit: () of their scales."""
    largest = values.abs().amax(dim=0)
    for level in LARGEST_FLOATS[form.levels]:
        if unit is None:
            yield Steps(form, storable(largest / level))
        else:
            yield Steps(form, nearest_e4m3(largest / (level * unit)).clamp_min_(SMALLEST_E4M3) * unit)


def _best_grid(weighed: Weighed, form: WeightFormat, cuts: Sequence[float], unit: torch.Tensor | None) -> Grid:
    """Returns the grid of weights (places, out, groups); unit: () of scales of e4m3."""
    if form.levels != "whole":
        return Grid(form, weighed.best_of(_of_floats(weighed.values, form, unit)).scales)
    best = _search(weighed, form, cuts)
    if form.block is None:
        return Grid(form, best.scales, best.zeros, best.minima)
    # An error of a scale counts by the squares of the codes, and one of a minimum by the weights.
    counts = best.codes(weighed.values).square_().mul_(weighed.importance).sum(dim=0)
    units, numbers = _units(best.scales, counts, form)
    minimum_units, minimum_numbers = None, None
    if best.minima is not None:
        minimum_units, minimum_numbers = _units(-best.minima, weighed.total.expand_as(best.minima), form)
    best = weighed.best_of(_in_units(form, units, numbers, minimum_units, minimum_numbers))
    return Grid(form, best.scales, None, best.minima, units, minimum_units)


def _units(values: torch.Tensor, importance: torch.Tensor, form: WeightFormat) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the units (out, blocks) of values (out, groups), and how many each is, whole numbers in fp32.

    importance: (out, groups), what the squares of their errors count.
    """
    blocks = values.shape[1] * form.group // form.block.inputs
    weighed = Weighed(_by_place(values, blocks), _by_place(importance, blocks))
    steps = _search(weighed, form.block, CUTS)
    return steps.scales, steps.codes(weighed.values).permute(1, 2, 0).flatten(1)


def _in_units(
    form: WeightFormat,
    units: torch.Tensor,
    numbers: torch.Tensor,
    minimum_units: torch.Tensor | None,
    minimum_numbers: torch.Tensor | None,
) -> Iterator[Steps]:
    """Yields steps (out, groups) of about so many units."""
    block = form.block

    def of(numbers: torch.Tensor, units: torch.Tensor, least: int) -> Iterator[torch.Tensor]:
        for change in NEIGHBOURS:
            yield (
                (numbers + change).clamp_(least, block.most).unflatten(1, (units.shape[1], -1)) * units[..., None]
            ).flatten(1)

    if minimum_numbers is None:
        yield from (Steps(form, scales) for scales in of(numbers, units, block.least))
        return
    pairs = itertools.product(of(numbers, units, block.least), of(minimum_numbers, minimum_units, 0))
    yield from (Steps(form, scales, minima=-minima) for scales, minima in pairs)
