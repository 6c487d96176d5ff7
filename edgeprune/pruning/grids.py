"""The grids that a weight of few bits may lie on: of each group of inputs a scale, and a zero or a minimum.

A grid is chosen on the weight as it is: of some for each group, the one that rounding to nearest loses least with,
where the error of each weight counts by the moment of its input (steps.py). Where an engine stores the scales of a
block in few bits, they are whole numbers of one unit (units.py). It does not know how weights are rounded to a grid.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from edgeprune.model.levels import codes_of, nearest_e4m3
from edgeprune.model.quantised import QuantisedWeight, scale_unit_for, storable
from edgeprune.precision import WeightFormat
from edgeprune.pruning.steps import CUTS, GPTQ_CUTS, Search, Steps, Weighed, by_place, exact, search_steps
from edgeprune.pruning.units import in_units

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
        return self.with_codes(steps.codes(by_place(weight, self.scales.shape[1])).permute(1, 2, 0).flatten(1))

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


def choose_grid(
    weight: torch.Tensor,
    importance: torch.Tensor,
    form: WeightFormat,
    search: Search = "exact",
    largest: torch.Tensor | None = None,
) -> Grid:
    """Returns the grid that rounding to nearest loses least with, of those that the search tries.

    weight: (out, in) fp32; importance: (in,), the diagonal of the moments, which weighs the errors; a group without
    importance counts all its inputs alike; largest: the largest magnitude () of all of the matrix, where the weight is
    some of its rows: scales of e4m3 have one unit. Raises InputError where the groups do not divide the inputs.
    """
    groups = form.groups_of(weight.shape[1])
    importance = by_place(importance.to(weight.dtype)[None], groups)  # (places, 1, groups)
    importance = torch.where(importance.sum(dim=0) > 0, importance, 1.0)
    rows = max(1, GRID_WEIGHTS // weight.shape[1])
    unit = scale_unit_for(weight.abs().max() if largest is None else largest, form) if form.e4m3_scales else None
    parts = [_best_grid(Weighed(by_place(part, groups), importance), form, search, unit) for part in weight.split(rows)]
    names = ("scales", "zeros", "minima", "units", "minimum_units")
    found = {name: [getattr(part, name) for part in parts] for name in names}
    tensors = {name: torch.cat(of_parts) for name, of_parts in found.items() if of_parts[0] is not None}
    return Grid(form, **tensors, scale_unit=unit)


def _of_floats(values: torch.Tensor, form: WeightFormat, unit: torch.Tensor | None) -> Iterator[Steps]:
    """Yields steps (out, groups) of values (places, out, groups) where levels are floats; unit: () of their scales."""
    largest = values.abs().amax(dim=0)
    for level in LARGEST_FLOATS[form.levels]:
        if unit is None:
            yield Steps(form, storable(largest / level))
        else:
            yield Steps(form, nearest_e4m3(largest / (level * unit)).clamp_min_(SMALLEST_E4M3) * unit)


def _best_grid(weighed: Weighed, form: WeightFormat, search: Search, unit: torch.Tensor | None) -> Grid:
    """Returns the grid of weights (places, out, groups); unit: () of scales of e4m3."""
    if form.levels != "whole":
        return Grid(form, weighed.best_of(_of_floats(weighed.values, form, unit)).scales)
    best = search_steps(weighed, form, GPTQ_CUTS if search == "ends" else CUTS)
    if search == "exact":
        best = exact(weighed, best)
    if form.block is None:
        return Grid(form, best.scales, best.zeros, best.minima)
    best = in_units(weighed, best, search)
    together = form.block.inputs // form.group
    units, minimum_units = (None if part is None else part[:, ::together] for part in (best.units, best.minimum_units))
    return Grid(form, best.scales, None, best.minima, units, minimum_units)
