"""Heads of zeros for checkpoints whose configuration cannot describe the number of heads that are left.

It does not know how many are needed: see configuration.loadable.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

from edgeprune.model.decoder import Decoder
from edgeprune.model.heads import filled

if TYPE_CHECKING:
    from edgeprune.model.model import Stored


def padded_heads(
    decoder: Decoder, target: Decoder, weights: Iterable[tuple[str, Stored]]
) -> Iterator[tuple[str, Stored]]:
    """Yields the decoder's weights with heads of zeros beside its own, up to the target's number of heads.

    The function stays the same: values of zero and output columns of zero leave the output as it is. Raises InputError
    where the groups of a weight of few bits do not divide its new inputs.
    """
    for name, weight in weights:
        weight = filled(decoder, target, name, weight)
        yield name, weight
        del weight  # freed before the next one is made
