"""The search for the steps of a grid: of each group of values the scale, and the zero or the minimum.

Each of some starts lies at the ends of a group, or some steps within, and gets the least squares on the codes that it
makes; the one that rounding to nearest loses least with is taken. From it on an exact search finds the best scale there
is (sweep.py), or goes along lines of scales and of minima, which takes five to a hundred times as long and gains a few
hundredths. The same search serves weights and the scales of a block, whose scale is their unit.

Shapes: out and in are the features of the weight, groups those of an output, blocks those that share units; places are
those within a group (of weights) or a block (of groups). They come first, (places, out, groups), so that what a group
has, (out, groups), meets all of its weights.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch

from edgeprune.model.levels import nearest
from edgeprune.model.quantised import SMALLEST_SCALE, half_of, storable
from edgeprune.precision import ScaleBlock, WeightFormat
from edgeprune.pruning.sweep import best_scales, fits_of_minima, fits_of_scales

Search = Literal["exact", "starts", "ends"]
"""How a grid is searched for: `ends` from GPTQ_CUTS, `starts` from CUTS, `exact` from the best of these on."""

CUTS = (-0.5, -0.2, 0.1, 0.4, 0.9, 2.0)
"""Steps by which a grid falls short of the largest weight of a group: one that cuts it off is finer for all others.
Those of less than half a step find a weight's own grid, by the least squares. A grid without an offset has a step at
zero, and those of less than none would leave its largest code unused."""

END_CUTS = 5  # the first so many are those of both ends of a group that has an offset, each with each

LARGEST_CODES = 4
"""So many numbers at least may be a group's largest code, so that a weight on a grid stays as it is: of 4 bits all of
them, since a grid of less than half is one of twice as many codes too."""

GPTQ_CUTS = (-0.2, 0.5)
"""As CUTS, for GPTQ, which moves weights beyond the ends of their group, so that its grids cut less off; and a finer
search of them gains nothing."""

FEW_BITS = 3
"""Grids of at most so few bits are searched from more starts: a sweep of few codes is cheap, and misses more."""

PIVOTS, FEW_PIVOTS = (0, 1), (0, 1, 0.5)  # codes, as shares of the largest, beside whose values scales are swept
PIVOT_CHANGES, FEW_PIVOT_CHANGES = (0, 0.5, -0.5), (0, 0.5, -0.5, 0.25, -0.25)  # of these codes
ZERO_CHANGES = (1, -1, 2, -2)  # of the best start's zero, that an exact search tries; in few bits it tries all
EXACT_BITS = 5  # at most: of finer grids the best start loses less than a hundredth more than the best there is


@dataclass(frozen=True)
class Steps:
    """A grid in the shape of the values that are rounded to it: value = (code - zero) * scale + minimum.

    form: whose codes these are, of weights or of the scales of a block; units, minimum_units: that the scales and
    minima of a block are whole numbers of, in their shape.
    """

    form: WeightFormat | ScaleBlock
    scales: torch.Tensor
    zeros: torch.Tensor | None = None
    minima: torch.Tensor | None = None
    units: torch.Tensor | None = None
    minimum_units: torch.Tensor | None = None

    @property
    def divisors(self) -> torch.Tensor:
        """Returns what weights are divided by for their codes: a scale of no unit makes all codes alike."""
        return self.scales.where(self.scales != 0, torch.inf)

    def codes(
        self, weight: torch.Tensor, divisors: torch.Tensor | None = None, out: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Returns the nearest codes of weights, the levels that they stand for in fp32.

        divisors: where they are known; out: memory for the levels before they are rounded.
        """
        off = weight if self.minima is None else weight - self.minima
        levels = torch.div(off, self.divisors if divisors is None else divisors, out=out)
        if self.zeros is not None:
            levels.round_().add_(self.zeros)
        return nearest(levels, self.form.levels, self.form.least, self.form.most)

    def values(self, codes: torch.Tensor) -> torch.Tensor:
        """Returns what codes fp32 stand for, in their memory."""
        if self.zeros is not None:
            codes -= self.zeros
        codes *= self.scales
        return codes if self.minima is None else codes.add_(self.minima)

    def rows(self) -> Iterator[tuple[Steps, torch.Tensor]]:
        """Yields the steps of the weights at each place of the first axis, and their divisors."""
        parts = (self.scales, self.zeros, self.minima)
        columns = (itertools.repeat(None) if part is None else part.unbind() for part in parts)
        for divisors, *row in zip(self.divisors.unbind(), *columns, strict=False):
            yield Steps(self.form, *row), divisors


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
        of_products = (levels * self.weighed).sum(dim=0)
        of_levels = None if steps.minima is None else weighed.sum(dim=0)
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

    def swept(self, steps: Steps) -> Steps:
        """Returns steps without minima with the scales that lose least beside their zeros."""
        form, zeros = steps.form, 0.0 if steps.zeros is None else steps.zeros
        ends = [torch.full_like(steps.scales, 0.0) + side for side in (zeros - form.least, form.most - zeros)]
        return replace(steps, scales=best_scales(self.values, self.importance, *ends))

    def scales_swept(self, steps: Steps, code: float) -> Steps:
        """Returns steps with the scales and minima that lose least, of the codes at all scales beside the value that
        the steps have at a code, the least of which is 0 here."""
        form = steps.form
        most, below = form.most - form.least, round(code)
        below = min(max(below, 0), most)
        pivot = steps.minima + (form.least + code) * steps.scales
        return self._with_fits(steps, *fits_of_scales(self.values, self.importance, pivot, below, most - below))

    def minima_swept(self, steps: Steps) -> Steps:
        """Returns steps with the scales and minima that lose least, of the codes at all minima with the scales."""
        form = steps.form
        return self._with_fits(
            steps, *fits_of_minima(self.values, self.importance, steps.scales, form.most - form.least)
        )

    def _with_fits(self, steps: Steps, scales: torch.Tensor, minima: torch.Tensor) -> Steps:
        """Returns steps with scales and minima of the least code, where a scale was found."""
        is_known, least = scales > 0, steps.form.least
        scales = torch.where(is_known, scales, steps.scales)
        minima = torch.where(is_known, minima - least * scales, steps.minima)
        if steps.form.block is None:
            return replace(steps, scales=scales, minima=minima)
        return self.fitted(replace(steps, scales=scales, minima=minima.clamp_max(0)))  # stored without a sign

    def best_of(self, choice: Iterable[Steps], together: int = 1) -> Steps:
        """Returns for each group the steps that lose least, the first of those that lose the same.

        together: so many groups after each other get those that all of them lose least with.
        """
        kept = None
        for steps in choice:
            kept = self.better(kept, steps, together)
        return kept[0]

    def better(
        self, kept: tuple[Steps, torch.Tensor] | None, steps: Steps, together: int = 1
    ) -> tuple[Steps, torch.Tensor]:
        """Returns for each group the steps that lose less, and what they lose, of those kept so far and others."""
        error = self.error(steps)
        if together > 1:
            error = error.unflatten(1, (-1, together)).sum(dim=2).repeat_interleave(together, dim=1)
        if kept is None:
            return steps, error
        best, least = kept
        is_better = error < least
        parts = {name: (part, getattr(best, name)) for name in PARTS if (part := getattr(steps, name)) is not None}
        best = replace(best, **{name: torch.where(is_better, *pair) for name, pair in parts.items()})
        return best, torch.where(is_better, error, least)


PARTS = ("scales", "zeros", "minima", "units", "minimum_units")  # of Steps


def search_steps(weighed: Weighed, form: WeightFormat | ScaleBlock, cuts: Sequence[float]) -> Steps:
    """Returns the steps (out, groups) that lose least, of those that fit to the codes of some starts.

    The scales of a block are any numbers here.
    """
    if form.bits == 8:  # fine enough for the whole range
        return stored(next(_starts(weighed.values, form, cuts)))
    kept = functools.reduce(weighed.better, fitted_starts(weighed, form, cuts), None)
    return weighed.better(kept, stored(weighed.fitted(kept[0])))[0]


def fitted_starts(weighed: Weighed, form: WeightFormat | ScaleBlock, cuts: Sequence[float]) -> Iterator[Steps]:
    """Yields the steps (out, groups) that fit to the codes of some starts."""
    return (stored(weighed.fitted(start)) for start in _starts(weighed.values, form, cuts))


def exact(weighed: Weighed, best: Steps) -> Steps:
    """Returns the steps (out, groups) that lose least: with the zeros near those of `best`, or from its values on."""
    form = best.form
    if form.bits > EXACT_BITS:
        return best
    if best.minima is not None:
        is_few, most = form.bits <= FEW_BITS, form.most - form.least
        pivots, changes = (FEW_PIVOTS, FEW_PIVOT_CHANGES) if is_few else (PIVOTS, PIVOT_CHANGES)
        for share, change in itertools.product(pivots, changes):
            best = weighed.best_of((best, stored(weighed.scales_swept(best, share * most + change))))
            best = weighed.best_of((best, stored(weighed.minima_swept(best))))
        return best
    choice = [best, stored(weighed.swept(best))]
    if best.zeros is not None:
        if form.bits <= FEW_BITS:
            tried = (torch.full_like(best.zeros, zero) for zero in range(form.least, form.most + 1))
        else:
            tried = ((best.zeros + change).clamp_(form.least, form.most) for change in ZERO_CHANGES)
        choice += [stored(weighed.swept(replace(best, zeros=zeros))) for zeros in tried]
    if _is_signed(form):
        turned = Weighed(-weighed.values, weighed.importance).swept(best)
        choice.append(stored(replace(turned, scales=-turned.scales)))
    return weighed.best_of(choice)


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


def by_place(weight: torch.Tensor, groups: int) -> torch.Tensor:
    """Returns a weight (out, in) by place (places, out, groups)."""
    return weight.unflatten(1, (groups, -1)).permute(2, 0, 1).contiguous()
