"""Widths, the predicted loss of every cut and weight format, and the ways in which baselines choose widths.

Pure: numbers in, numbers out; it knows the description of a model and not its weights. The best widths are chosen in
solve.py.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from edgeprune.model.decoder import Decoder
from edgeprune.precision import CacheFormat, WeightFormat
from edgeprune.search.module_costs import ModuleCosts, Widths, additive, channel_options

Format = WeightFormat | None  # None: floats
Cache = CacheFormat | None  # None: floats


@dataclass(frozen=True)
class RoundingLosses:
    """The loss in nats per token that one weight format is predicted to cost.

    attention, mlp: (layers,) fp64, of each module at its full width; embedding, head: of these tables, of which a tied
    one has its loss in `head`; response: the ratio of measured to predicted loss of the modules.
    """

    attention: np.ndarray
    mlp: np.ndarray
    embedding: float
    head: float
    response: float = 1.0


@dataclass(frozen=True)
class CacheLosses:
    """The loss in nats per token that one format of the KV cache is predicted to cost.

    attention: (layers,) fp64, of the keys and values of each layer at their full width; response: the ratio of measured
    to predicted loss.
    """

    attention: np.ndarray
    response: float = 1.0

    @property
    def by_layer(self) -> np.ndarray:
        """Returns the corrected losses (layers,)."""
        return self.response * self.attention


@dataclass(frozen=True)
class Sensitivities:
    """The loss in nats per token that each cut of one module, and each weight format, is predicted to cost.

    attention: (layers, num_key_value_heads + 1, heads_per_group) fp64, at [l, g, r - 1] for g kept groups of r query
    heads; mlp: (layers, intermediate_size + 1) fp64, at [l, k] for k kept channels; both after compensation; response:
    (3,), the ratio of measured to predicted loss, for removed groups, removed query heads and removed channels;
    roundings: by the name of a weight format; caches: by that of a format of the KV cache. Losses of widths and formats
    add up.
    """

    attention: np.ndarray
    mlp: np.ndarray
    response: np.ndarray = field(default_factory=lambda: np.ones(3))
    roundings: Mapping[str, RoundingLosses] = field(default_factory=dict)
    caches: Mapping[str, CacheLosses] = field(default_factory=dict)

    def rounding(self, form: Format) -> RoundingLosses:
        """Returns the losses of a weight format; zeros for floats."""
        if form is None:
            nothing = np.zeros(len(self.mlp))
            return RoundingLosses(nothing, nothing, 0.0, 0.0)
        return self.roundings[form.name]

    def cache_losses(self, form: Cache) -> np.ndarray:
        """Returns the losses (layers,) of a format of the KV cache; zeros for floats."""
        return np.zeros(len(self.mlp)) if form is None else self.caches[form.name].by_layer

    def errors(self, layer: int, widths: Widths) -> np.ndarray:
        """Returns the predicted losses (3,) of a layer's removed groups, query heads and channels, without response."""
        groups = self.attention[layer, widths.num_key_value_heads, -1]
        groups_and_heads = self.attention[layer, widths.num_key_value_heads, widths.heads_per_group - 1]
        return np.array([groups, groups_and_heads - groups, self.mlp[layer, widths.intermediate_size]])

    def loss(self, widths: Sequence[Widths]) -> float:
        """Returns the predicted rise of the loss in nats per token with these widths, one for each layer."""
        return float(sum(self.response @ self.errors(layer, width) for layer, width in enumerate(widths)))

    def rounding_loss(self, layers: Sequence[Widths], formats: Sequence[tuple[Format, Format]]) -> float:
        """Returns the predicted rise of the loss by the formats of the modules that stay, one pair for each layer."""
        total = 0.0
        for index, (widths, (attention, mlp)) in enumerate(zip(layers, formats, strict=True)):
            of_attention, of_mlp = self.rounding(attention), self.rounding(mlp)
            total += of_attention.response * of_attention.attention[index] * (widths.num_key_value_heads > 0)
            total += of_mlp.response * of_mlp.mlp[index] * (widths.intermediate_size > 0)
        return float(total)

    def uniform_errors(self, widths: Widths) -> np.ndarray:
        """Returns the sums (3,) of `errors` over all layers with the same widths."""
        return np.sum([self.errors(layer, widths) for layer in range(len(self.mlp))], axis=0)


def dense_widths(decoder: Decoder) -> Widths:
    """Returns the widths of a model whose layers are all alike."""
    return Widths(*decoder.layer_widths[0])


def parameter_costs(decoder: Decoder) -> ModuleCosts:
    """Returns the number of parameters in the matrices of an attention and of an MLP, by their widths."""
    full = dense_widths(decoder)
    attention = [
        [layer_parameters(decoder, Widths(g, r, 0)) for r in range(1, full.heads_per_group + 1)]
        for g in range(full.num_key_value_heads + 1)
    ]
    mlp = [layer_parameters(decoder, Widths(0, 1, size)) for size in range(full.intermediate_size + 1)]
    return additive(np.array([attention], dtype=float), np.array([mlp], dtype=float))


def layer_parameters(decoder: Decoder, widths: Widths) -> int:
    """Returns the number of parameters in the matrices of one layer of the decoder with these widths."""
    groups, heads, channels = widths
    layer = decoder.layers[0]
    attention = 2 * groups * (heads + 1) * layer.attention.head_dim
    channels *= len(layer.mlp.inputs) + 1
    router = 0
    if (experts := layer.mlp.experts) is not None:
        channels, router = channels * experts.num_experts, experts.num_experts * (channels > 0)
    return decoder.hidden_size * (attention + channels + router)


Cost = Callable[[Widths], int]  # of one layer, additive over its attention and its MLP


def uniform_options(dense: Widths, multiple: int) -> list[Widths]:
    """Returns all widths of the uniform layout, the dense ones included; multiple: of the MLP channels."""
    return [
        Widths(groups, heads, size)
        for groups in range(1, dense.num_key_value_heads + 1)
        for heads in range(1, dense.heads_per_group + 1)
        for size in channel_options(dense.intermediate_size, multiple)
    ]


def even(dense: Widths, layers: int, cost: Cost, capacity: int, multiple: int, least: int) -> list[Widths] | None:
    """Returns the uniform widths that keep the most equal shares of heads and channels: the baseline of no allocation.

    cost: of one layer; capacity, least: the limits of the summed cost. Returns None where no widths cost between
    `least` and `capacity`.
    """
    options = [w for w in uniform_options(dense, multiple) if least <= layers * cost(w) <= capacity]

    def inequality(widths: Widths) -> float:
        heads = (
            widths.num_key_value_heads * widths.heads_per_group / (dense.num_key_value_heads * dense.heads_per_group)
        )
        return abs(heads - widths.intermediate_size / dense.intermediate_size)

    best = min(options, key=inequality, default=None)
    return best and [best] * layers


def standardised_cut(
    groups: Sequence[np.ndarray], channels: Sequence[np.ndarray], dense: Widths, cost: Cost, capacity: int
) -> list[Widths]:
    """Returns FLAP's allocation: one cut over the standardised scores of all groups and channels of a model.

    groups, channels: the scores (num_key_value_heads,) and (intermediate_size,) of each layer; cost: of one layer;
    capacity: the limit of the summed cost. One group and one channel stay in every layer.
    """
    # List every unit but the best of each module: score, cost, layer, and 0 for a group or 1 for a channel.
    group_cost = cost(Widths(1, dense.heads_per_group, 0))
    channel_cost = cost(Widths(0, 1, 1))
    units = [(value, group_cost, layer, 0) for layer, row in enumerate(groups) for value in np.sort(row)[:-1]]
    units += [(value, channel_cost, layer, 1) for layer, row in enumerate(channels) for value in np.sort(row)[:-1]]
    # Take the units by falling score, until one does not fit any more.
    kept = [[1, 1] for _ in groups]
    used = len(groups) * (group_cost + channel_cost)
    for _, price, layer, kind in sorted(units, key=lambda unit: -unit[0]):
        if used + price > capacity:
            break
        used += price
        kept[layer][kind] += 1
    return [Widths(g, dense.heads_per_group, c) for g, c in kept]
