"""Weights of few bits in the blocks of a GGUF file, each value as it is: 32 inputs with a scale, as ggml computes them.

Q8_0 is code * d; Q4_0 is (code - 8) * d; Q4_1 is code * d + m, with d and m in fp16. A block has its group's scale, so
that larger groups repeat it. It knows neither names nor architectures.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from edgeprune.errors import NumericalError
from edgeprune.model.quantised import QuantisedWeight
from edgeprune.precision import WeightFormat

if TYPE_CHECKING:
    import torch
    from gguf import GGMLQuantizationType

BLOCK = 32  # inputs; in ggml's QK8_0, QK4_0 and QK4_1


def block_type(form: WeightFormat) -> GGMLQuantizationType:
    """Returns the type of the blocks that hold a format."""
    from gguf import GGMLQuantizationType

    if form.bits == 8:
        return GGMLQuantizationType.Q8_0
    return GGMLQuantizationType.Q4_1 if form.offset else GGMLQuantizationType.Q4_0


def packed(name: str, weight: QuantisedWeight) -> torch.Tensor:
    """Returns the blocks of a weight, (out_features, bytes of a row) uint8, one block of an output after the other.

    in_features is a multiple of BLOCK, and so are the groups. Zero bytes stand for zeros in every type. Raises
    NumericalError for a scale that fp16 cannot hold.
    """
    import torch

    # One scale for each block.
    outputs, inputs = weight.shape
    repeats = inputs // BLOCK // weight.scales.shape[1]
    scales = weight.scales.repeat_interleave(repeats, dim=1)  # (out, blocks)
    header = [_half(name, scales)]
    codes = weight.codes.unflatten(1, (-1, BLOCK))  # (out, blocks, 32)
    if weight.form.bits == 8:
        content = codes.view(torch.uint8)
    else:
        # Codes from 0 on; the first half of a block stands in the low bits, the second in the high ones.
        low, high = (codes - weight.form.least).to(torch.uint8).chunk(2, dim=2)  # (out, blocks, 16) each
        content = low | high << 4
    if weight.zeros is not None:
        zeros = weight.zeros.repeat_interleave(repeats, dim=1)
        header.append(_half(name, (weight.form.least - zeros.float()) * scales))
    return torch.cat([*header, content], dim=2).flatten(1)  # (out, blocks, bytes) -> (out, bytes of a row)


def _half(name: str, values: torch.Tensor) -> torch.Tensor:
    """Returns numbers of fp16 as bytes, (out, blocks) -> (out, blocks, 2) uint8. Raises NumericalError for others."""
    import torch

    stored = values.half()
    if not torch.equal(stored.float(), values):
        raise NumericalError(f"scales of {name} are no numbers of fp16", "Export this model with --weights float.")
    return stored[..., None].view(torch.uint8)
