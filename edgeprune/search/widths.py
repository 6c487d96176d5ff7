"""Widths and what every cut of them costs; the baselines' ways to choose them. The best choice is optimize.py's.

Pure: numbers in, numbers out; of the model it sees the description.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from edgeprune.model.decoder import Decoder
from edgeprune.search.module_costs import ModuleCosts, Widths, additive, channel_options


@dataclass(frozen=True)
class Sensitivities:
    """Loss in nats per token that each cut of one module is predicted to cost after compensation.

    attention: (layers, num_key_value_heads + 1, heads_per_group) fp64, at [l, g, r - 1] for g kept
    groups of r query heads; mlp: (layers, intermediate_size + 1) fp64, at [l, k] for k kept channels.
    response: measured over predicted loss, for removed groups, removed query heads and removed channels.
    """

    attention: np.ndarray
    mlp: np.ndarray
    response: np.ndarray = field(default_factory=lambda: np.ones(3))

    def errors(self, layer: int, widths: Widths) -> np.ndarray:
        """Predicted losses (3,) of the removed groups, query heads and channels of a layer, before the response."""
        groups = self.attention[layer, widths.num_key_value_heads, -1]
        both = self.attention[layer, widths.num_key_value_heads, widths.heads_per_group - 1]
        return np.array([groups, both - groups, self.mlp[layer, widths.intermediate_size]])

    def loss(self, widths: Sequence[Widths]) -> float:
        """Predicted rise of the loss in nats per token with these widths, one for each layer."""
        return float(sum(self.response @ self.errors(layer, width) for layer, width in enumerate(widths)))

    def uniform_errors(self, widths: Widths) -> np.ndarray:
        return np.sum([self.errors(layer, widths) for layer in range(len(self.mlp))], axis=0)


def dense_widths(decoder: Decoder) -> Widths:
    """The widths of a model whose layers are all alike."""
    return Widths(*decoder.layer_widths[0])


def parameter_costs(decoder: Decoder) -> ModuleCosts:
    """Parameters in the matrices of every attention and MLP."""
    full = dense_widths(decoder)
    attention = [
        [layer_parameters(decoder, Widths(g, r, 0)) for r in range(1, full.heads_per_group + 1)]
        for g in range(full.num_key_value_heads + 1)
    ]
    mlp = [layer_parameters(decoder, Widths(0, 1, size)) for size in range(full.intermediate_size + 1)]
    return additive(np.array(attention, dtype=float), np.array(mlp, dtype=float))


def layer_parameters(decoder: Decoder, widths: Widths) -> int:
    """Parameters in the matrices of one layer of the decoder with these widths."""
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
    """All widths of the uniform layout, the dense one included: `multiple` is that of the MLP channels."""
    return [
        Widths(groups, heads, size)
        for groups in range(1, dense.num_key_value_heads + 1)
        for heads in range(1, dense.heads_per_group + 1)
        for size in channel_options(dense.intermediate_size, multiple)
    ]


def even(dense: Widths, layers: int, cost: Cost, capacity: int, multiple: int, least: int) -> list[Widths] | None:
    """No allocation at all: the uniform widths that take the most equal shares from heads and channels.

    None where nothing fits between `least` and capacity.
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
    """FLAP's allocation: one cut over the standardised scores of all groups and channels, by summed cost.

    groups[l] and channels[l] are the scores of a layer's key/value groups and channels. One of each
    stays in every layer.
    """
    group_cost = cost(Widths(1, dense.heads_per_group, 0))
    channel_cost = cost(Widths(0, 1, 1))
    units = [(value, group_cost, layer, 0) for layer, row in enumerate(groups) for value in np.sort(row)[:-1]]
    units += [(value, channel_cost, layer, 1) for layer, row in enumerate(channels) for value in np.sort(row)[:-1]]
    kept = [[1, 1] for _ in groups]
    used = len(groups) * (group_cost + channel_cost)
    for _, price, layer, kind in sorted(units, key=lambda unit: -unit[0]):
        if used + price > capacity:
            break
        used += price
        kept[layer][kind] += 1
    return [Widths(g, dense.heads_per_group, c) for g, c in kept]
