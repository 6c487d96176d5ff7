"""Weights of few bits in the blocks of a GGUF file, each value as it is, packed and read back.

The layouts are ggml's (ggml-common.h): blocks of 32 inputs with a scale d and perhaps a minimum m in fp16; and of 256
with units in fp16, of which the scales of their groups are whole numbers of 6 or 8 bits. A format of compressed-tensors
is packed as the type of ggml that holds it: its larger groups repeat their scale. It knows neither names nor
architectures.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from edgeprune.errors import NumericalError
from edgeprune.precision import WEIGHT_FORMATS, WeightFormat

if TYPE_CHECKING:
    import torch
    from gguf import GGMLQuantizationType

    from edgeprune.model.quantised import QuantisedWeight

BLOCK = 32  # inputs; of the types without units


@dataclass(frozen=True)
class Plane:
    """Some bits of all codes of a block, several codes in a byte: the code of input i is in byte i mod `width`, and
    codes `width` apart follow each other from the lowest bits up, until bytes are full.

    first: the lowest of the bits; bits: how many.
    """

    first: int
    bits: int
    width: int

    def shape(self, inputs: int) -> tuple[int, int, int]:
        """Returns how the codes of a block stand: (runs of bytes, codes of a byte, bytes of a run)."""
        places = 8 // self.bits
        return inputs // (places * self.width), places, self.width


NIBBLES, FIFTH_BITS = Plane(0, 4, 32), Plane(4, 1, 32)
SMALL_NIBBLES, SMALL_FIFTH_BITS = Plane(0, 4, 16), Plane(4, 1, 1)
LAYOUTS: dict[str, tuple[str | Plane, ...]] = {
    "q4_0": ("scales", SMALL_NIBBLES),
    "q4_1": ("scales", "minima", SMALL_NIBBLES),
    "q5_0": ("scales", SMALL_FIFTH_BITS, SMALL_NIBBLES),
    "q5_1": ("scales", "minima", SMALL_FIFTH_BITS, SMALL_NIBBLES),
    "q8_0": ("scales", Plane(0, 8, 32)),
    "q3_k": (Plane(2, 1, 32), Plane(0, 2, 32), "steps", "units"),
    "q4_k": ("units", "minimum_units", "steps", NIBBLES),
    "q5_k": ("units", "minimum_units", "steps", FIFTH_BITS, NIBBLES),
    "q6_k": (Plane(0, 4, 64), Plane(4, 2, 32), "steps", "units"),
}
"""What a block consists of, by the name of its format: numbers of fp16, the steps of its scales, and planes."""
STEP_BYTES = {"q3_k": 12, "q4_k": 12, "q5_k": 12, "q6_k": 16}


def format_of_blocks(form: WeightFormat) -> WeightFormat:
    """Returns the format of ggml that holds a format: itself, or the one with the same codes."""
    if form.storage == "gguf":
        return form
    return WEIGHT_FORMATS["q8_0" if form.bits == 8 else "q4_1" if form.offset else "q4_0"]


def block_type(form: WeightFormat) -> GGMLQuantizationType:
    """Returns the type of the blocks that hold a format."""
    from gguf import GGMLQuantizationType

    return GGMLQuantizationType[format_of_blocks(form).name.upper()]


def packed(name: str, weight: QuantisedWeight) -> torch.Tensor:
    """Returns the blocks of a weight, (out_features, bytes of a row) uint8, one block of an output after the other.

    in_features is a multiple of a block, and so are the groups. Zero bytes stand for zeros in every type. Raises
    NumericalError for a number that fp16 cannot hold.
    """
    import torch

    weight = _in_blocks(weight)
    form = weight.form
    codes = weight.codes.unflatten(1, (-1, form.multiple)).to(torch.uint8)  # (out, blocks, inputs)
    codes += _middle(form)
    parts = []
    for part in LAYOUTS[form.name]:
        if isinstance(part, Plane):
            parts.append(_in_bytes(codes, part))
        elif part == "steps":
            parts.append(_packed_steps(weight))
        else:
            parts.append(_half(name, getattr(weight, part)))
    return torch.cat(parts, dim=2).flatten(1)  # (out, blocks, bytes) -> (out, bytes of a row)


def unpacked(form: WeightFormat, blocks: torch.Tensor) -> QuantisedWeight:
    """Returns the weight that blocks stand for. form: one of ggml's; blocks: (out_features, bytes of a row) uint8."""
    import torch

    from edgeprune.model.quantised import QuantisedWeight

    # Take the block apart.
    sizes = [_bytes_of(form, part) for part in LAYOUTS[form.name]]
    pieces = dict(zip(LAYOUTS[form.name], blocks.unflatten(1, (-1, sum(sizes))).split(sizes, dim=2), strict=True))
    halves = {
        name: piece.contiguous().view(torch.float16).squeeze(2).float()  # (out, blocks)
        for name, piece in pieces.items()
        if isinstance(name, str) and name != "steps"
    }
    codes = sum(_from_bytes(piece, plane, form.multiple) for plane, piece in pieces.items() if isinstance(plane, Plane))
    codes = (codes - _middle(form)).view(torch.int8).flatten(1)  # (out, in)
    if form.block is None:
        return QuantisedWeight(form, codes, **halves)
    # Scales and minima are whole numbers of the units.
    steps, minimum_steps = _unpacked_steps(form, pieces["steps"])
    scales = (steps * halves["units"][..., None]).flatten(1)
    minima = None if minimum_steps is None else -(minimum_steps * halves["minimum_units"][..., None]).flatten(1)
    return QuantisedWeight(form, codes, scales, minima=minima, **halves)


def _in_blocks(weight: QuantisedWeight) -> QuantisedWeight:
    """Returns the weight in a format of ggml that has its codes; each group of larger ones repeats its scale."""
    import torch

    form = format_of_blocks(weight.form)
    if form == weight.form:
        return weight
    repeats = weight.shape[1] // BLOCK // weight.scales.shape[1]
    scales = weight.scales.repeat_interleave(repeats, dim=1)  # (out, blocks)
    if weight.zeros is None:
        return replace(weight, form=form, scales=scales, input_scale=None)
    zeros = weight.zeros.repeat_interleave(repeats, dim=1)
    minima = (weight.form.least - zeros.float()) * scales
    codes = (weight.codes.short() - weight.form.least).to(torch.int8)
    return replace(weight, form=form, codes=codes, scales=scales, zeros=None, minima=minima)


def _middle(form: WeightFormat) -> int:
    """Returns what is added to codes so that they are from 0 on; nothing to those of 8 bits, which have their sign."""
    return 0 if form.unsigned or form.bits == 8 else 2 ** (form.bits - 1)


def _in_bytes(codes: torch.Tensor, plane: Plane) -> torch.Tensor:
    """Returns a plane of codes (out, blocks, inputs) uint8 as (out, blocks, bytes) uint8."""
    import torch

    bits = codes >> plane.first & 2**plane.bits - 1
    places = bits.unflatten(2, plane.shape(codes.shape[2])).unbind(3)  # (out, blocks, runs, bytes of a run) each
    packed_bits = torch.zeros_like(places[0])
    for index, place in enumerate(places):
        packed_bits |= place << (index * plane.bits)
    return packed_bits.flatten(2)


def _from_bytes(piece: torch.Tensor, plane: Plane, inputs: int) -> torch.Tensor:
    """Returns what a plane's bytes (out, blocks, bytes) uint8 add to the codes (out, blocks, inputs) uint8."""
    import torch

    runs, places, width = plane.shape(inputs)
    values = piece.unflatten(2, (runs, width))
    bits = [(values >> (index * plane.bits) & 2**plane.bits - 1) << plane.first for index in range(places)]
    return torch.stack(bits, dim=3).flatten(2)


def _bytes_of(form: WeightFormat, part: str | Plane) -> int:
    """Returns the bytes that a part of a block has."""
    if isinstance(part, Plane):
        return form.multiple * part.bits // 8
    return STEP_BYTES[form.name] if part == "steps" else 2


def _packed_steps(weight: QuantisedWeight) -> torch.Tensor:
    """Returns how many units the scales of each block are, and the minima, as (out, blocks, bytes) uint8."""
    import torch

    form = weight.form
    steps = _steps(weight.scales, weight.units)  # (out, blocks, groups of one)
    if form.block.bits == 8:
        return steps.view(torch.uint8)
    if form.block.signed:
        # 16 numbers of 6 bits: their low 4 bits in 8 bytes, the high 2 in 4.
        low, high = steps + 32 & 15, steps + 32 >> 4
        high = high.unflatten(2, (4, 4))  # bits of a byte two apart, bytes
        rest = high[:, :, 0] | high[:, :, 1] << 2 | high[:, :, 2] << 4 | high[:, :, 3] << 6
        return torch.cat([low[..., :8] | low[..., 8:] << 4, rest], dim=2).view(torch.uint8)
    # 8 scales and 8 minima: the first four of each whole, with the high bits of the last four above them.
    minima = _steps(-weight.minima, weight.minimum_units)
    first = [numbers[..., :4] | numbers[..., 4:] >> 4 << 6 for numbers in (steps, minima)]
    return torch.cat([*first, steps[..., 4:] & 15 | (minima[..., 4:] & 15) << 4], dim=2).view(torch.uint8)


def _unpacked_steps(form: WeightFormat, piece: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Returns how many units the scales, and the minima, of each block are: (out, blocks, groups of one) fp32."""
    import torch

    if form.block.bits == 8:
        return piece.contiguous().view(torch.int8).float(), None
    if form.block.signed:
        low, rest = piece.split([8, 4], dim=2)
        low = torch.cat([low & 15, low >> 4], dim=2)
        high = torch.cat([rest >> shift & 3 for shift in (0, 2, 4, 6)], dim=2)
        return (low | high << 4).float() - 32, None
    scales, minima, both = piece.split([4, 4, 4], dim=2)
    steps = torch.cat([scales & 63, both & 15 | scales >> 6 << 4], dim=2)
    minimum_steps = torch.cat([minima & 63, both >> 4 | minima >> 6 << 4], dim=2)
    return steps.float(), minimum_steps.float()


def _steps(values: torch.Tensor, units: torch.Tensor) -> torch.Tensor:
    """Returns the whole numbers (out, blocks, groups of one) int8 that values (out, groups) are of units (out, blocks).

    A unit of 0 makes all values 0.
    """
    import torch

    of_block = values.unflatten(1, (units.shape[1], -1))
    divisors = torch.where(units == 0, torch.inf, units)[..., None]
    return (of_block / divisors).round_().to(torch.int8)


def _half(name: str, values: torch.Tensor) -> torch.Tensor:
    """Returns numbers of fp16 as bytes, (out, blocks) -> (out, blocks, 2) uint8. Raises NumericalError for others."""
    import torch

    stored = values.half()
    if not torch.equal(stored.float(), values):
        raise NumericalError(f"scales of {name} are no numbers of fp16", "Export this model with --weights float.")
    return stored[..., None].view(torch.uint8)
