"""Heads of zeros for checkpoints whose configuration cannot describe the number of heads that are left.

It does not know how many are needed: see configuration.loadable.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

from edgeprune.model.decoder import Decoder

if TYPE_CHECKING:
    import torch

    from edgeprune.model.model import Stored


def without_padding(weight: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    """Returns a weight of `padded_heads` as it was: its first rows and columns, up to this shape."""
    if tuple(weight.shape) == shape:
        return weight
    return weight[tuple(map(slice, shape))].contiguous()


def padded_heads(
    decoder: Decoder, target: Decoder, weights: Iterable[tuple[str, Stored]]
) -> Iterator[tuple[str, Stored]]:
    """Yields the decoder's weights with heads of zeros behind its own, up to the target's number of heads.

    The function stays the same: values of zero and output columns of zero leave the output as it is. Raises InputError
    where the groups of a weight of few bits do not divide its new inputs.
    """
    from edgeprune.model.quantised import QuantisedWeight

    if decoder == target:
        yield from weights
        return
    shapes = target.shapes()
    for name, weight in weights:
        if ".attention." not in name or shapes[name] == tuple(weight.shape):
            pass
        elif isinstance(weight, QuantisedWeight):
            weight = weight.padded(shapes[name])
        else:
            padded = weight.new_zeros(shapes[name])
            padded[tuple(slice(size) for size in weight.shape)] = weight
            weight = padded
        yield name, weight
        del weight  # freed before the next one is made
