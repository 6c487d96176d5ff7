"""The levels of weight formats: the numbers that codes stand for before they are scaled.

Whole numbers are codes themselves. Floats of few bits have a sign, an exponent and a mantissa: e4m3 is float8_e4m3fn,
to 448; e2m1 has 0, 0.5, 1, 1.5, 2, 3, 4, 6 and their negatives. Their bits are the codes. All are rounded to nearest,
halves to even, and cut off beyond the largest: as ONNX and NVIDIA's kernels do.
"""

from __future__ import annotations

import torch

from edgeprune.precision import E2M1, LARGEST_LEVEL, Levels

SIGN = 8  # the bit of e2m1


def nearest(values: torch.Tensor, levels: Levels, least: float, most: float) -> torch.Tensor:
    """Returns values fp32 rounded to levels from `least` to `most`; they may be in the same memory."""
    if levels == "whole":
        return values.round_().clamp_(least, most)
    values = values.clamp_(least, most)
    if levels == "e4m3":
        return values.to(torch.float8_e4m3fn).float()
    # Steps of e2m1: 0.5 below 2, 1 below 4, then 2.
    size = values.abs()
    steps = torch.where(size < 2, 0.5, torch.where(size < 4, 1.0, 2.0))
    return values.div_(steps).round_().mul_(steps)


def nearest_e4m3(values: torch.Tensor) -> torch.Tensor:
    """Returns values fp32 rounded to e4m3; they may be in the same memory."""
    return nearest(values, "e4m3", -LARGEST_LEVEL["e4m3"], LARGEST_LEVEL["e4m3"])


def codes_of(values: torch.Tensor, levels: Levels) -> torch.Tensor:
    """Returns the codes int8 of levels in floats."""
    if levels == "whole":
        return values.to(torch.int8)
    if levels == "e4m3":
        return values.to(torch.float8_e4m3fn).view(torch.int8)
    numbers = torch.bucketize(values.abs(), torch.tensor(E2M1))
    return (numbers + SIGN * values.signbit()).to(torch.int8)


def values_of(codes: torch.Tensor, levels: Levels) -> torch.Tensor:
    """Returns the levels fp32 of codes int8."""
    if levels == "whole":
        return codes.float()
    if levels == "e4m3":
        return codes.view(torch.float8_e4m3fn).float()
    return torch.tensor([*E2M1, *(-level for level in E2M1)])[codes.int()]
