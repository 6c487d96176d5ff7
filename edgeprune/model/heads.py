"""Heads of zeros, where a file's format asks for more heads than a model has left.

In each group the model's own query heads come first, and its own groups come before the new ones. It knows weights in
floats, weights of few bits, and their blocks as bytes, of which zeros are zeros too; not how many heads are needed.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import count
from typing import TYPE_CHECKING

from edgeprune.model.decoder import Attention, Decoder

if TYPE_CHECKING:
    from edgeprune.model.model import Stored
    from edgeprune.model.quantised import QuantisedWeight


@dataclass(frozen=True)
class _Heads:
    """The heads of a weight: groups and heads in each, the model's own and those of the file.

    by_input: along its inputs; otherwise along its rows.
    """

    groups: int
    heads: int
    target_groups: int
    target_heads: int
    by_input: bool

    @property
    def order(self) -> list[int]:
        """Returns the heads in the order of the file, where the model's own come first of all and zeros behind them."""
        zeros = count(self.groups * self.heads)
        return [
            group * self.heads + head if group < self.groups and head < self.heads else next(zeros)
            for group in range(self.target_groups)
            for head in range(self.target_heads)
        ]


def filled(decoder: Decoder, target: Decoder, name: str, weight: Stored) -> Stored:
    """Returns a weight, or its blocks as bytes, with the heads of the target; those that the decoder does not have are
    zeros.

    Raises InputError where the groups of a weight of few bits do not divide its new inputs, or a head's.
    """
    from edgeprune.model.quantised import QuantisedWeight

    heads = _heads_of(decoder, target, name)
    if heads is None:
        return weight
    if isinstance(weight, QuantisedWeight):
        return _in_order(weight.padded(target.shapes()[name]), heads, heads.order)
    rows = weight.t() if heads.by_input else weight  # (groups * heads * head_dim, ...)
    # (groups, heads, head_dim or bytes of a head, ...)
    shaped = rows.reshape(heads.groups, heads.heads, -1, *rows.shape[1:])
    padded = shaped.new_zeros(heads.target_groups, heads.target_heads, *shaped.shape[2:])
    padded[: heads.groups, : heads.heads] = shaped
    result = padded.flatten(0, 2)  # (target_groups * target_heads * head_dim, ...)
    if (growth := _growth(decoder, name, heads)) is not None:
        result = result.float() * growth
    return (result.t() if heads.by_input else result).contiguous()


def without_filling(decoder: Decoder, target: Decoder, name: str, weight: Stored) -> Stored:
    """Returns what `filled` was given; of a norm over all heads up to fp32's rounding."""
    from edgeprune.model.quantised import QuantisedWeight

    heads = _heads_of(decoder, target, name)
    if heads is None:
        return weight
    if isinstance(weight, QuantisedWeight):
        places = sorted(range(len(heads.order)), key=heads.order.__getitem__)
        return _in_order(weight, heads, places).narrowed(decoder.shapes()[name])
    rows = weight.t() if heads.by_input else weight
    shaped = rows.reshape(heads.target_groups, heads.target_heads, -1, *rows.shape[1:])
    own = shaped[: heads.groups, : heads.heads].flatten(0, 2)
    if (growth := _growth(decoder, name, heads)) is not None:
        own = own.float() / growth
    return (own.t() if heads.by_input else own).contiguous()


def _growth(decoder: Decoder, name: str, heads: _Heads) -> float | None:
    """Returns by what a weight is multiplied so that a norm over all heads gives what it gave before; None by nothing.

    The norm divides by the root of the number of heads, so its weight shrinks; what it reads grows by as much for the
    sake of its epsilon.
    """
    own, part = decoder.layers[int(name.split(".")[1])].attention, name.rsplit(".", 1)[-1]
    if own.qk_norm != "all" or part.split("_")[0] not in ("q", "k"):
        return None
    growth = ((heads.target_groups * heads.target_heads) / (heads.groups * heads.heads)) ** 0.5
    return 1.0 / growth if part.endswith("_norm") else growth


def _in_order(weight: QuantisedWeight, heads: _Heads, order: list[int]) -> QuantisedWeight:
    """Returns a weight of few bits with its heads in another order, along its inputs or its rows."""
    if order == sorted(order):
        return weight
    return weight.with_inputs_in(order) if heads.by_input else weight.with_rows_in(order)


def heads_differ(own: Attention, wanted: Attention) -> bool:
    """Returns whether an attention has other heads in the file."""
    pairs = [(attention.num_attention_heads, attention.num_key_value_heads) for attention in (own, wanted)]
    return pairs[0] != pairs[1]


def _heads_of(decoder: Decoder, target: Decoder, name: str) -> _Heads | None:
    """Returns how the heads of a weight stand; None where it has none, the same in the file, or is the file's own."""
    # Only the attention has heads; output biases and norms of single heads stay as they are.
    if ".attention." not in name:
        return None
    index, part = int(name.split(".")[1]), name.rsplit(".", 1)[-1]
    own, wanted = decoder.layers[index].attention, target.layers[index].attention
    matrix, is_norm = part.removesuffix("_bias").removesuffix("_norm"), part.endswith("_norm")
    if own is None or not heads_differ(own, wanted) or matrix not in ("q", "k", "v", "o", "sinks") or part == "o_bias":
        return None
    if is_norm and own.qk_norm != "all":
        return None
    # Query heads of a group, or its one key/value head.
    heads, target_heads = (attention.heads_per_group if matrix not in ("k", "v") else 1 for attention in (own, wanted))
    return _Heads(own.num_key_value_heads, heads, wanted.num_key_value_heads, target_heads, matrix == "o")
