"""A weight that is trained through what it is stored in, so that what is judged is what is deployed."""

from __future__ import annotations

import math
from dataclasses import replace

import torch

from edgeprune.model.levels import values_of
from edgeprune.model.quantised import QuantisedWeight, StraightThrough, as_float
from edgeprune.pruning.grids import Grid
from edgeprune.pruning.steps import Steps, stored

Stored = torch.Tensor | QuantisedWeight


class Trained:
    """A weight on its way.

    start: as it is stored; dtype: that the file rounds a float to; factors: None, or of a matrix (out_features, r) and
    (r, in_features) fp32, whose product is added to it: they are trained in its place (LoRA, Hu et al. 2021, arXiv
    2106.09685). grid: where it began, None of a float; gains: (out_features, groups) fp32, what is trained of the
    grid's scales where these are floats: the logarithms of how much larger they have become.
    """

    def __init__(
        self, start: Stored, dtype: torch.dtype, factors: tuple[torch.Tensor, torch.Tensor] | None = None
    ) -> None:
        self.dtype, self.grid, self.gains = dtype, None, None
        self._start, self._factors = start, factors
        if factors is None:
            self._start = as_float(start).clone().requires_grad_()
        if isinstance(start, QuantisedWeight):
            self.grid = replace(start, **{name: differentiable(part) for name, part in start.parts.items()})
            if start.form.block is None and not start.form.e4m3_scales:
                self.gains = torch.zeros_like(self.grid.scales).requires_grad_()

    @property
    def numbers(self) -> list[torch.Tensor]:
        """Returns what is trained."""
        numbers = [self._start] if self._factors is None else list(self._factors)
        return numbers if self.gains is None else [*numbers, self.gains]

    @property
    def value(self) -> torch.Tensor:
        """Returns the weight fp32 before it is rounded."""
        if self._factors is None:
            return self._start
        up, down = self._factors
        return differentiable(as_float(self._start)) + up @ down

    def deployed(self) -> torch.Tensor:
        """Returns the weight fp32 as it is stored now, whose gradient reaches what is trained.

        Rounding passes gradients on as they are (Bengio et al. 2013, arXiv 1308.3432), but none beyond the ends of a
        group, which makes that of a scale the one of LSQ (Esser et al. 2020, arXiv 1902.08153).
        """
        if self.grid is None:
            value = self.value
            if self.dtype == torch.float32:
                return value
            return StraightThrough.apply(value, value.detach().to(self.dtype).float())
        steps, form = self._steps(), self.grid.form
        zeros, minima = (0.0 if part is None else part[..., None] for part in (steps.zeros, steps.minima))
        scales = steps.scales[..., None]  # (out, groups, 1)
        value = self.value
        values = value.unflatten(1, (scales.shape[1], -1))  # (out, groups, group)
        exact = (values - minima) / scales.where(scales != 0, 1.0)
        within = exact.clamp(min=form.least - zeros, max=form.most - zeros)
        with torch.no_grad():
            codes = self._stored_on(steps, value).codes
            levels = values_of(codes, form.levels).unflatten(1, (scales.shape[1], -1)) - zeros
        return (StraightThrough.apply(within, levels) * scales + minima).flatten(1)

    @torch.no_grad()
    def as_stored(self) -> Stored:
        """Returns the weight as it is stored."""
        if self.grid is None:
            return self.value.detach().to(self.dtype)
        return self._stored_on(self._steps(), self.value)

    def _stored_on(self, steps: Steps, value: torch.Tensor) -> QuantisedWeight:
        """Returns the weight rounded to nearest on these steps."""
        grid = self.grid
        units = grid.units, grid.minimum_units, grid.scale_unit
        rounded = Grid(grid.form, steps.scales.detach(), steps.zeros, steps.minima, *units).nearest(value.detach())
        return replace(rounded, input_scale=grid.input_scale)

    def _steps(self) -> Steps:
        """Returns the steps (out, groups) of the grid now, whose scales have gradients where they are trained."""
        grid = self.grid
        steps = Steps(grid.form, grid.scales, None if grid.zeros is None else grid.zeros.float(), grid.minima)
        if self.gains is None:
            return steps
        scales = grid.scales * self.gains.exp()
        with torch.no_grad():
            rounded = stored(replace(steps, scales=scales.detach())).scales
        # As long as nothing has moved, they are those of the closed form to the last bit.
        return replace(steps, scales=StraightThrough.apply(scales, rounded.where(self.gains != 0, grid.scales)))


def differentiable(tensor: torch.Tensor) -> torch.Tensor:
    """Returns a tensor that a computation with gradients may use: a copy of one that was made in inference mode."""
    return tensor.clone() if tensor.is_inference() else tensor


def low_rank(shape: tuple[int, ...], rank: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Returns the factors of a matrix that change nothing yet; None of a weight that is no matrix, or has no more
    numbers than they would."""
    if len(shape) != 2 or rank * sum(shape) >= math.prod(shape):
        return None
    down = torch.randn(rank, shape[1], generator=generator) / math.sqrt(shape[1])
    return torch.zeros(shape[0], rank, requires_grad=True), down.requires_grad_()
