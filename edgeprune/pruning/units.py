"""The units of a block, where an engine stores the scales and minima of its groups as whole numbers of them.

To the search for steps they are the weights of a group, and the unit is its scale; an exact search then lets the
weights choose among several units and numbers. Shapes are those of steps.py.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

import torch

from edgeprune.model.quantised import half_of
from edgeprune.precision import WeightFormat
from edgeprune.pruning.steps import CUTS, Search, Steps, Weighed, by_place, fitted_starts, search_steps

NEIGHBOURS = (0, -1, 1)  # of how many units a scale is, which the weights choose from
FARTHER = (0, -1, 1, -2, 2, -3, 3, -4, 4)  # as those, in an exact search
TURNS = 3  # of the least squares of a block's units on the weights' codes


def in_units(weighed: Weighed, best: Steps, search: Search) -> Steps:
    """Returns steps (out, groups) as blocks store them, near those that lose least.

    The units of a block are those that its scales lose least with, where an error counts by the squares of the codes,
    and its minima, where it counts by the weights; an exact search tries others, by what the weights lose.
    """
    form = best.form
    together = form.block.inputs // form.group
    counts = best.codes(weighed.values).square_().mul_(weighed.importance).sum(dim=0)
    scales, minima = _unit_choices(best.scales, counts, form, search), [None]
    if best.minima is not None:
        minima = _unit_choices(-best.minima, weighed.total.expand_as(best.minima), form, search)
    found = weighed.best_of(_near(form, scales[0], minima[0]))
    if search != "exact":
        return found
    for units in scales[1:]:
        found = weighed.best_of((found, weighed.best_of(_near(form, units, minima[0]))), together)
    numbers = _numbers(found.scales, found.units)
    for units in minima[1:]:
        found = weighed.best_of((found, weighed.best_of(_near(form, (found.units, numbers), units))), together)
    for _ in range(TURNS):
        found = weighed.best_of((found, weighed.best_of(_near(form, *_refitted(weighed, found, together)))), together)
    # Each group by itself, with more numbers of these units.
    numbers = _numbers(found.scales, found.units)
    if best.minima is not None:
        minima = found.minimum_units, _numbers(-found.minima, found.minimum_units)
        return weighed.best_of(_near(form, (found.units, numbers), minima, FARTHER))
    turned = (_near(form, (found.units, sign * numbers), None, FARTHER) for sign in (1, -1)[: 1 + form.block.signed])
    return weighed.best_of(itertools.chain.from_iterable(turned))


Units = tuple[torch.Tensor, torch.Tensor]
"""The units of values (out, groups), in their shape, and how many each is, whole numbers in fp32."""


def _unit_choices(values: torch.Tensor, importance: torch.Tensor, form: WeightFormat, search: Search) -> list[Units]:
    """Returns units of values (out, groups), the best first; importance: what the squares of their errors count."""
    blocks = values.shape[1] * form.group // form.block.inputs
    weighed = Weighed(by_place(values, blocks), by_place(importance, blocks))
    choice = [search_steps(weighed, form.block, CUTS)]
    if search == "exact":
        choice += fitted_starts(weighed, form.block, CUTS)
    together = len(weighed.values)
    return [
        (steps.scales.repeat_interleave(together, dim=1), steps.codes(weighed.values).permute(1, 2, 0).flatten(1))
        for steps in choice
    ]


def _numbers(values: torch.Tensor, units: torch.Tensor) -> torch.Tensor:
    """Returns how many units values are."""
    return (values / units.where(units != 0, torch.inf)).round_()


def _near(
    form: WeightFormat, scales: Units, minima: Units | None, changes: Sequence[int] = NEIGHBOURS
) -> Iterator[Steps]:
    """Yields steps (out, groups) of so many units, and of as many more as `changes` says, with each other."""

    def of(units: torch.Tensor, numbers: torch.Tensor, least: int) -> Iterator[torch.Tensor]:
        yield from ((numbers + change).clamp_(least, form.block.most) * units for change in changes)

    if minima is None:
        yield from (Steps(form, some, units=scales[0]) for some in of(*scales, form.block.least))
        return
    for some, others in itertools.product(of(*scales, form.block.least), of(*minima, 0)):
        yield Steps(form, some, minima=-others, units=scales[0], minimum_units=minima[0])


def _refitted(weighed: Weighed, steps: Steps, together: int) -> tuple[Units, Units | None]:
    """Returns units by the least squares of the weights of each block on their codes and the numbers of units."""
    numbers = _numbers(steps.scales, steps.units)
    levels = steps.codes(weighed.values) * numbers

    def total(products: torch.Tensor) -> torch.Tensor:  # (out, groups), of each block
        return products.sum(dim=0).unflatten(1, (-1, together)).sum(dim=2).repeat_interleave(together, dim=1)

    of_products, of_squares = total(levels * weighed.weighed), total(levels.square() * weighed.importance)
    if steps.minima is None:
        return (_half_or(of_products / of_squares, steps.units), numbers), None
    minima = _numbers(-steps.minima, steps.minimum_units)
    mixed, of_minima = total(levels * weighed.importance * minima), total(minima.square() * weighed.importance)
    of_values = total(weighed.weighed * minima)
    common = of_squares * of_minima - mixed.square()
    units = (of_products * of_minima - of_values * mixed) / common
    minimum_units = (of_products * mixed - of_values * of_squares) / common
    return (_half_or(units, steps.units), numbers), (_half_or(minimum_units, steps.minimum_units), minima)


def _half_or(units: torch.Tensor, otherwise: torch.Tensor) -> torch.Tensor:
    """Returns units as they are stored; `otherwise` where they are no numbers, or have changed their sign."""
    units = half_of(units)
    return units.where(units.isfinite() & (units.sign() == otherwise.sign()), otherwise)
