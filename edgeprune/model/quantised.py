"""A matrix of few bits: its codes, the scales of its groups, and the numbers that these stand for.

It does not know how the codes were chosen, nor in what file they are packed.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from edgeprune.errors import InputError
from edgeprune.model.levels import codes_of, nearest, nearest_e4m3, values_of
from edgeprune.precision import LARGEST_LEVEL, WeightFormat

SMALLEST_SCALE = 2.0**-24  # of fp16
LARGEST_HALF = 65504.0
ACTIVATION_STEPS = 127  # from 0 to the largest code of an activation in whole numbers; the least, -128, is taken too
SMALLEST_UNIT = 2.0**-14  # of which every number of e4m3 is one of fp16


@dataclass(frozen=True)
class QuantisedWeight:
    """The weight of a linear layer on a grid: (code - zero) * scale + minimum, with these for each group of an output.

    codes: (out_features, in_features) int8, which levels.py makes floats of where they are no whole numbers; scales:
    (out_features, groups) fp32, as the format stores them; zeros: (out_features, groups) int8, the code of 0.0, and
    minima: (out_features, groups) fp32, what the code 0 stands for; None where the format has none, which is 0. units:
    (out_features, blocks) fp32, numbers of fp16, and minimum_units, of the same shape: of which scales and minima, less
    their sign, are whole numbers, where the format has blocks.
    input_scale: () fp32, of what the layer reads, where the format rounds it: as `storable` returns it, or a power of
    two where levels are floats. scale_unit: () fp32, a power of two, of which the scales are numbers of e4m3, where the
    format has them so.
    """

    form: WeightFormat
    codes: torch.Tensor
    scales: torch.Tensor
    zeros: torch.Tensor | None = None
    input_scale: torch.Tensor | None = None
    minima: torch.Tensor | None = None
    units: torch.Tensor | None = None
    minimum_units: torch.Tensor | None = None
    scale_unit: torch.Tensor | None = None

    @property
    def shape(self) -> torch.Size:
        return self.codes.shape

    @property
    def parts(self) -> dict[str, torch.Tensor]:
        """Returns the tensors (out_features, ...) that the weight is made of, by their names."""
        return {name: part for name in PARTS if (part := getattr(self, name)) is not None}

    @property
    def scale_codes(self) -> torch.Tensor:
        """Returns the bits (out_features, groups) int8 of the numbers of e4m3 that the scales are of their unit."""
        return codes_of(self.scales / self.scale_unit, "e4m3")

    def dequantised(self) -> torch.Tensor:
        """Returns the weight (out_features, in_features) fp32."""
        codes = values_of(self.codes, self.form.levels).unflatten(1, (self.scales.shape[1], -1))  # (out, groups, group)
        if self.zeros is not None:
            codes -= self.zeros[..., None]
        codes *= self.scales[..., None]
        if self.minima is not None:
            codes += self.minima[..., None]
        return codes.flatten(1)

    def rows(self, kept: torch.Tensor) -> QuantisedWeight:
        """Returns the weight of these outputs, (kept,) int64."""
        return replace(self, **{name: part[kept] for name, part in self.parts.items()})

    def padded(self, shape: Sequence[int]) -> QuantisedWeight:
        """Returns the weight with outputs and inputs of zeros behind its own, up to this shape.

        Raises InputError where the format's groups do not divide the inputs.
        """
        rows, columns = shape
        padded = {}
        for name, part in self.parts.items():
            width, fill = self._width(name, columns), 1.0 if name == "scales" else 0
            padded[name] = torch.nn.functional.pad(part, (0, width - part.shape[1], 0, rows - len(part)), value=fill)
        return replace(self, **padded)

    def narrowed(self, shape: Sequence[int]) -> QuantisedWeight:
        """Returns the first outputs and inputs, up to this shape: what `padded` was given."""
        rows, columns = shape
        parts = self.parts.items()
        return replace(self, **{name: part[:rows, : self._width(name, columns)].contiguous() for name, part in parts})

    def _width(self, name: str, columns: int) -> int:
        """Returns the columns that a part has for so many inputs. Raises InputError where groups do not divide them."""
        groups = self.form.groups_of(columns)
        if name == "codes":
            return columns
        return columns // self.form.block.inputs if name in ("units", "minimum_units") else groups

    def with_rows_in(self, order: Sequence[int]) -> QuantisedWeight:
        """Returns the weight whose outputs, in blocks of one size, stand in this order of blocks."""
        return self.rows(torch.arange(self.shape[0]).view(len(order), -1)[list(order)].flatten())

    def with_inputs_in(self, order: Sequence[int]) -> QuantisedWeight:
        """Returns the weight whose inputs, in blocks of one size, stand in this order of blocks.

        Raises InputError where a block is no whole number of the format's groups.
        """
        parts = {}
        for name, part in self.parts.items():
            if part.shape[1] == 1:  # one scale for all inputs
                continue
            if part.shape[1] % len(order):
                raise InputError(
                    f"{self.form.name} has groups across the heads of {self.shape[1] // len(order)}, and the "
                    "checkpoint's format needs heads of zeros between them",
                    "Leave the checkpoint out with --no-checkpoint, or choose other --weights.",
                )
            parts[name] = part.unflatten(1, (len(order), -1))[:, list(order)].flatten(1)
        return replace(self, **parts)

    def split(self, rows: list[int]) -> list[QuantisedWeight]:
        """Returns the parts of these numbers of outputs, which share memory with the whole."""
        by_name = {name: part.split(rows) for name, part in self.parts.items()}
        return [replace(self, **{name: parts[i] for name, parts in by_name.items()}) for i in range(len(rows))]


PARTS = ("codes", "scales", "zeros", "minima", "units", "minimum_units")  # that have a row for each output


def joined(parts: Sequence[QuantisedWeight]) -> QuantisedWeight:
    """Returns the weight of the outputs of all parts, which have one format and read the same inputs.

    Raises ValueError for scales of e4m3 that are of different units.
    """
    if len(parts) == 1:
        return parts[0]
    if len({float(part.scale_unit) for part in parts if part.scale_unit is not None}) > 1:
        raise ValueError("the parts of a matrix have scales of different units")
    return replace(parts[0], **{name: torch.cat([getattr(part, name) for part in parts]) for name in parts[0].parts})


def of_one_scale(form: WeightFormat, codes: torch.Tensor, scale: float) -> QuantisedWeight:
    """Returns a weight of which all groups are alike: what engines are timed with.

    codes: (out_features, in_features) int8; scale: a power of two. The code in the middle stands for 0, or next to it.
    """
    outputs, inputs = codes.shape
    scales = torch.full((outputs, form.groups_of(inputs)), scale)
    zeros = torch.zeros(scales.shape, dtype=torch.int8) if form.offset == "zero" else None
    middle = scale * 2 ** (form.bits - 1) if form.unsigned else 0.0
    minima = torch.full_like(scales, -middle or scale) if form.offset == "minimum" else None
    input_scale = torch.tensor(2.0**-5) if form.activation_bits else None
    units, minimum_units = None, None
    if form.block is not None:
        units = torch.full((outputs, inputs // form.block.inputs), scale)
        minimum_units = None if minima is None else torch.full_like(units, middle)
    unit = torch.tensor(scale) if form.e4m3_scales else None
    return QuantisedWeight(form, codes, scales, zeros, input_scale, minima, units, minimum_units, unit)


def rounded_inputs(inputs: torch.Tensor, scale: torch.Tensor | None, form: WeightFormat | None = None) -> torch.Tensor:
    """Returns what a layer in a format computes with of its inputs (..., in_features) fp32: levels times their scale.

    scale: () fp32, or the unit of the scales of each token's groups, which are the best that the group's largest number
    has, in e4m3; None where the layer's format keeps its inputs.
    """
    if scale is None:
        return inputs
    exact = inputs.detach()
    if form.e4m3_scales:
        groups = exact.unflatten(-1, (-1, form.group))
        scales = nearest_e4m3(groups.abs().amax(dim=-1, keepdim=True) / (form.most * scale)) * scale
        groups = groups / torch.where(scales == 0, torch.inf, scales)
        rounded = (nearest(groups, form.levels, form.least, form.most) * scales).flatten(-2)
    else:
        least, most = (-ACTIVATION_STEPS - 1, ACTIVATION_STEPS) if form.levels == "whole" else (form.least, form.most)
        rounded = nearest(exact / scale, form.levels, least, most) * scale
    return StraightThrough.apply(inputs, rounded) if inputs.requires_grad else rounded


class StraightThrough(torch.autograd.Function):
    """Gives rounded values, whose gradient is that of the exact ones."""

    @staticmethod
    def forward(ctx: Any, exact: torch.Tensor, rounded: torch.Tensor) -> torch.Tensor:
        return rounded.view_as(rounded)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        return gradient, None


def scale_unit_for(largest: torch.Tensor, form: WeightFormat) -> torch.Tensor:
    """Returns the unit () of scales of e4m3, the largest of which makes the format's largest level this magnitude."""
    return unit_above(largest / (form.most * LARGEST_LEVEL["e4m3"]))


def unit_above(value: torch.Tensor) -> torch.Tensor:
    """Returns the least power of two, SMALLEST_UNIT at least, that is not below a value () fp32."""
    return torch.exp2(value.double().clamp_min(SMALLEST_UNIT).log2().ceil()).float()


def as_float(weight: torch.Tensor | QuantisedWeight) -> torch.Tensor:
    """Returns a weight in fp32, whatever it is stored in."""
    return weight.dequantised() if isinstance(weight, QuantisedWeight) else weight.float()


def input_scale_of(name: str) -> str:
    """Returns the name under which values_by_name has the scale of a layer's inputs; name: of its weight."""
    return f"{name}.input_scale"


def values_by_name(weights: Iterable[tuple[str, torch.Tensor | QuantisedWeight]]) -> dict[str, torch.Tensor]:
    """Returns weights in fp32 by name, and the scales () of the inputs of those that round them, by input_scale_of."""
    values = {}
    for name, weight in weights:
        values[name] = as_float(weight)
        if isinstance(weight, QuantisedWeight) and weight.input_scale is not None:
            values[input_scale_of(name)] = weight.input_scale
    return values


def half_of(values: torch.Tensor) -> torch.Tensor:
    """Returns values fp32 rounded to numbers of fp16, which stay within its range."""
    return values.clamp(-LARGEST_HALF, LARGEST_HALF).half().float()


def storable(scales: torch.Tensor, is_asymmetric: bool = False) -> torch.Tensor:
    """Returns scales fp32 rounded to eight significant bits, which fp32, fp16 and bf16 hold alike, and above 0.

    Every file and every graph then stands for the same weight, whatever the type of its scales. A file may hold the
    value of an asymmetric group's least code in place of its zero, in fp16, of which 11 bits are significant: fifteen
    times a scale of seven bits at most.
    """
    bits = 7 if is_asymmetric else 8
    # fp16 again has fewer bits where its numbers are tiny.
    return _rounded(_rounded(scales, bits).half().float(), bits).clamp_min_(SMALLEST_SCALE)


def _rounded(values: torch.Tensor, bits: int) -> torch.Tensor:
    """Returns values fp32 rounded to nearest with so many significant bits (Dekker 1971: the sum drops the others)."""
    above = values * (2.0 ** (24 - bits) + 1)
    return above - (above - values)
