"""Which widths to keep in which layer: what every possible cut costs, and the best ones within limits.

Pure: numbers in, numbers out; of the model it sees the description. Layout `uniform`: the same widths
in every layer that stays. Layout `per-layer`: the same head counts in every attention that stays, MLP
widths free, and a layer may lose its attention or its MLP.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from edgeprune.model.decoder import Decoder


class Widths(NamedTuple):
    """The widths of one layer. No key/value heads: no attention; no intermediate size: no MLP."""

    num_key_value_heads: int
    heads_per_group: int
    intermediate_size: int


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

    def uniform_loss(self, widths: Widths) -> float:
        """Predicted rise of the loss in nats per token when every layer is cut to these widths."""
        return float(self.response @ self.uniform_errors(widths))


def dense_widths(decoder: Decoder) -> Widths:
    """The widths of a model whose layers are all alike."""
    return Widths(*decoder.layer_widths[0])


def layer_parameters(decoder: Decoder, widths: Widths) -> int:
    """Parameters in the matrices of one layer of the decoder with these widths."""
    groups, heads, channels = widths
    attention = 2 * groups * (heads + 1) * decoder.layers[0].attention.head_dim
    return decoder.hidden_size * (attention + 3 * channels)


Cost = Callable[[Widths], int]  # of one layer, additive over its attention and its MLP


def uniform_options(dense: Widths, multiple: int) -> list[Widths]:
    """All widths of the uniform layout, the dense one included: `multiple` is that of the MLP channels."""
    return [
        Widths(groups, heads, size)
        for groups in range(1, dense.num_key_value_heads + 1)
        for heads in range(1, dense.heads_per_group + 1)
        for size in channel_options(dense.intermediate_size, multiple)
    ]


def channel_options(size: int, multiple: int) -> list[int]:
    return sorted({*range(multiple, size, multiple), size})


def best_within(
    options: Sequence[Widths], error: Callable[[Widths], float], fits: Callable[[Widths], bool]
) -> Widths | None:
    """The option of the least error among those that fit; None where none does."""
    return min(filter(fits, options), key=error, default=None)


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


def uniform(
    sensitivities: Sensitivities, dense: Widths, cost: Cost, capacity: int, multiple: int, least: int = 0
) -> list[Widths] | None:
    """The least predicted loss in the layout `uniform`, whole layers among the choices; exact.

    For each of the widths, as many layers stay as fit; which of them go is a choice of the smallest
    differences, because every layer costs the same. None where nothing fits between `least` and capacity.
    """
    layers = len(sensitivities.mlp)
    gone = Widths(0, 1, 0)
    without = np.array([sensitivities.response @ sensitivities.errors(layer, gone) for layer in range(layers)])
    best: tuple[float, list[Widths]] | None = None
    for widths in uniform_options(dense, multiple):
        stay = min(layers, capacity // cost(widths))
        if stay == 0 or stay * cost(widths) < least:
            continue
        saved = without - [sensitivities.response @ sensitivities.errors(layer, widths) for layer in range(layers)]
        kept = set(np.argsort(-saved, kind="stable")[:stay].tolist())
        chosen = [widths if layer in kept else gone for layer in range(layers)]
        loss = float(without.sum() - saved[list(kept)].sum())
        if best is None or loss < best[0]:
            best = loss, chosen
    return best and best[1]


def per_layer(
    sensitivities: Sensitivities, dense: Widths, cost: Cost, capacity: int, multiple: int
) -> list[Widths] | None:
    """The least predicted loss in the layout `per-layer`: one exact knapsack for each pair of head counts."""
    layers = len(sensitivities.mlp)
    sizes = [0, *channel_options(dense.intermediate_size, multiple)]
    mlp_losses = sensitivities.response[2] * sensitivities.mlp[:, sizes]
    mlp_costs = [cost(Widths(0, 1, size)) for size in sizes]
    best: tuple[float, list[Widths]] | None = None
    for groups, heads in {(w.num_key_value_heads, w.heads_per_group) for w in uniform_options(dense, multiple)}:
        choices = [Widths(0, 1, 0), Widths(groups, heads, 0)]
        losses = [
            np.array([sensitivities.response[:2] @ sensitivities.errors(layer, widths)[:2] for widths in choices])
            for layer in range(layers)
        ]
        costs = [[cost(widths) for widths in choices]] * layers + [mlp_costs] * layers
        found = knapsack([*losses, *mlp_losses], costs, capacity)
        if found is not None and (best is None or found[0] < best[0]):
            attention, mlp = found[1][:layers], found[1][layers:]
            chosen = [choices[a]._replace(intermediate_size=sizes[m]) for a, m in zip(attention, mlp, strict=True)]
            best = found[0], chosen
    return best and best[1]


def knapsack(
    losses: Sequence[np.ndarray], costs: Sequence[Sequence[int]], capacity: int
) -> tuple[float, list[int]] | None:
    """Multiple-choice knapsack: one option of each class, least summed loss, summed cost at most capacity.

    Exact, by a dynamic programme over the cost in units of the greatest common divisor. losses[i] and
    costs[i] belong to the options of class i. Returns the loss and the options; None where nothing fits.
    """
    unit = math.gcd(*(cost for options in costs for cost in options)) or 1
    room = capacity // unit
    if room < 0:
        return None
    table = np.zeros(room + 1)
    picks = []
    for loss, cost in zip(losses, costs, strict=True):
        new, pick = np.full(room + 1, np.inf), np.zeros(room + 1, dtype=np.int32)
        for option, (value, units) in enumerate(zip(loss, (c // unit for c in cost), strict=True)):
            if units <= room:
                reached = table[: room + 1 - units] + value
                better = reached < new[units:]
                new[units:][better] = reached[better]
                pick[units:][better] = option
        table = new
        picks.append(pick)
    if not np.isfinite(table[room]):
        return None
    chosen, left = [], room
    for pick, cost in zip(reversed(picks), reversed(costs), strict=True):
        option = int(pick[left])
        chosen.append(option)
        left -= cost[option] // unit
    return float(table[room]), chosen[::-1]


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
