"""Heads of zeros for checkpoints whose configuration cannot describe the number of heads that are left.

It does not know how many are needed: see configuration.loadable.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

from edgeprune.model.decoder import Decoder

if TYPE_CHECKING:
    import torch


def without_padding(weight: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    """Returns a weight of `padded_heads` as it was: its first rows and columns, up to this shape."""
    if tuple(weight.shape) == shape:
        return weight
    return weight[tuple(map(slice, shape))].contiguous()


def padded_heads(
    decoder: Decoder, target: Decoder, weights: Iterable[tuple[str, torch.Tensor]]
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yields the decoder's weights with heads of zeros behind its own, up to the target's number of heads.

    The function stays the same: values of zero and output columns of zero leave the output as it is.
    """
    if decoder == target:
        yield from weights
        return
    shapes = target.shapes()
    for name, weight in weights:
        if ".attention." in name and shapes[name] != tuple(weight.shape):
            padded = weight.new_zeros(shapes[name])
            padded[tuple(slice(size) for size in weight.shape)] = weight
            weight = padded
        yield name, weight
