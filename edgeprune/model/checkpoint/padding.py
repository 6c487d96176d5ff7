"""Heads of zeros for checkpoints whose configuration cannot say the number of heads that are left."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

from edgeprune.model.decoder import Decoder

if TYPE_CHECKING:
    import torch


def without_padding(weight: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    """A weight of `padded_heads` as it was; the weight itself where nothing was added."""
    if tuple(weight.shape) == shape:
        return weight
    return weight[tuple(map(slice, shape))].contiguous()


def padded_heads(
    decoder: Decoder, target: Decoder, weights: Iterable[tuple[str, torch.Tensor]]
) -> Iterator[tuple[str, torch.Tensor]]:
    """The decoder's weights with heads of zeros behind its own, up to the target's: the same function.

    Values of zero and output columns of zero leave the output as it is.
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
