"""A matrix of few bits: its codes, the scales of its groups, and the numbers that these stand for.

It does not know how the codes were chosen, nor in what file they are packed.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import torch

from edgeprune.precision import WeightFormat

SMALLEST_SCALE = 2.0**-24  # of fp16
ACTIVATION_STEPS = 127  # from 0 to the largest code of an activation; the least code, -128, is taken too


@dataclass(frozen=True)
class QuantisedWeight:
    """The weight of a linear layer on a grid: (code - zero) * scale, with one scale for each group of an output.

    codes: (out_features, in_features) int8; scales: (out_features, groups) fp32, as `storable` returns them; zeros:
    (out_features, groups) int8, the code of 0.0, or None for a symmetric format, where it is 0; input_scale: () fp32,
    of what the layer reads, where the format rounds it: as `storable` returns it.
    """

    form: WeightFormat
    codes: torch.Tensor
    scales: torch.Tensor
    zeros: torch.Tensor | None = None
    input_scale: torch.Tensor | None = None

    @property
    def shape(self) -> torch.Size:
        return self.codes.shape

    def dequantised(self) -> torch.Tensor:
        """Returns the weight (out_features, in_features) fp32."""
        codes = self.codes.unflatten(1, (self.scales.shape[1], -1)).float()  # (out, groups, group)
        if self.zeros is not None:
            codes -= self.zeros[..., None]
        return codes.mul_(self.scales[..., None]).flatten(1)

    def rows(self, kept: torch.Tensor) -> QuantisedWeight:
        """Returns the weight of these outputs, (kept,) int64."""
        zeros = None if self.zeros is None else self.zeros[kept]
        return replace(self, codes=self.codes[kept], scales=self.scales[kept], zeros=zeros)

    def padded(self, shape: Sequence[int]) -> QuantisedWeight:
        """Returns the weight with outputs and inputs of zeros behind its own, up to this shape.

        Raises InputError where the format's groups do not divide the inputs.
        """
        pad = torch.nn.functional.pad
        rows, columns = shape[0] - self.shape[0], shape[1] - self.shape[1]
        groups = self.form.groups_of(shape[1]) - self.scales.shape[1]
        zeros = None if self.zeros is None else pad(self.zeros, (0, groups, 0, rows))
        scales = pad(self.scales, (0, groups, 0, rows), value=1.0)
        return replace(self, codes=pad(self.codes, (0, columns, 0, rows)), scales=scales, zeros=zeros)

    def narrowed(self, shape: Sequence[int]) -> QuantisedWeight:
        """Returns the first outputs and inputs, up to this shape: what `padded` was given."""
        rows, columns = shape
        groups = self.form.groups_of(columns)
        zeros = None if self.zeros is None else self.zeros[:rows, :groups].contiguous()
        codes, scales = self.codes[:rows, :columns].contiguous(), self.scales[:rows, :groups].contiguous()
        return replace(self, codes=codes, scales=scales, zeros=zeros)

    def split(self, rows: list[int]) -> list[QuantisedWeight]:
        """Returns the parts of these numbers of outputs, which share memory with the whole."""
        zeros = [None] * len(rows) if self.zeros is None else self.zeros.split(rows)
        parts = zip(self.codes.split(rows), self.scales.split(rows), zeros, strict=True)
        return [QuantisedWeight(self.form, *part, self.input_scale) for part in parts]


def joined(parts: Sequence[QuantisedWeight]) -> QuantisedWeight:
    """Returns the weight of the outputs of all parts, which have one format and read the same inputs."""
    if len(parts) == 1:
        return parts[0]
    zeros = None if parts[0].zeros is None else torch.cat([part.zeros for part in parts])
    codes, scales = (torch.cat([getattr(part, name) for part in parts]) for name in ("codes", "scales"))
    return QuantisedWeight(parts[0].form, codes, scales, zeros, parts[0].input_scale)


def rounded_inputs(inputs: torch.Tensor, scale: torch.Tensor | None) -> torch.Tensor:
    """Returns what a layer computes with of its inputs fp32: the nearest codes of 8 bits times their scale () fp32.

    scale: None where the layer's format keeps its inputs.
    """
    if scale is None:
        return inputs
    return (inputs / scale).round_().clamp_(-ACTIVATION_STEPS - 1, ACTIVATION_STEPS).mul_(scale)


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
