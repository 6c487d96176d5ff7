"""The allocation problem and its solution: the widths and weight formats of the least predicted loss under all limits.

Pure: losses, costs and limits in, widths and formats out; it does not know how they were measured. The solution is
exact for either layout, and the number of layers is chosen too. Layout `uniform`: the same widths in every layer that
stays; all of these widths are tried. Layout `per-layer`: the same head counts in every attention that stays, but free
MLP widths, and a layer may lose its attention or its MLP alone. In both, the format of every module is free, and so are
the size of the vocabulary and the formats of embedding and head. Each pair of head counts, in the layout `uniform`
together with an MLP width, makes one multiple-choice knapsack (knapsack.py). They are solved in the order of their
bounds, until a bound is no better than the best solution.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from edgeprune.model.decoder import Decoder
from edgeprune.search.knapsack import GAP, Knapsack, Options, Picks, bounds, can_fit
from edgeprune.search.module_costs import ModuleCosts, channel_options
from edgeprune.search.widths import Cache, Format, Sensitivities, Widths

GONE = Widths(0, 1, 0)
MOST_SIZES = 64  # MLP widths that a knapsack chooses among; predictions are too rough for a finer grid


@dataclass(frozen=True)
class Allocation:
    """The widths of every layer of the dense model (GONE: the layer is removed), the size of the vocabulary, and the
    predicted loss in nats per token.

    formats: of each layer's attention and MLP, None for floats everywhere; tables: of embedding and head; cache: of the
    KV cache.
    """

    layers: tuple[Widths, ...]
    vocab_size: int
    loss: float
    formats: tuple[tuple[Format, Format], ...] | None = None
    tables: tuple[Format, Format] = (None, None)
    cache: Cache = None

    def __post_init__(self) -> None:
        if self.formats is not None and not any(form for pair in self.formats for form in pair):
            object.__setattr__(self, "formats", None)  # one way to say it, so that equal choices are equal

    @property
    def choice(self) -> Allocation:
        """Returns the same without the prediction: equal for two allocations that make the same model."""
        return replace(self, loss=0.0)

    def decoder(self, dense: Decoder) -> Decoder:
        """Returns the target that this allocation makes of the dense model, with all of its vocabulary and a KV cache
        of floats: the scales of another are those of the fitted model."""
        target = dense.with_layer_widths(self.layers)
        return target.with_formats(self.formats or [(None, None)] * len(self.layers), *self.tables)

    @property
    def summary(self) -> dict[str, int]:
        """Returns the widths in a few numbers: how many modules stay, and how wide they are."""
        attentions = [widths for widths in self.layers if widths.num_key_value_heads]
        sizes = [widths.intermediate_size for widths in self.layers if widths.intermediate_size]
        return {
            "attentions": len(attentions),
            "key/value heads": attentions[0].num_key_value_heads if attentions else 0,
            "query heads per group": attentions[0].heads_per_group if attentions else 0,
            "MLPs": len(sizes),
            "fewest channels": min(sizes, default=0),
            "most channels": max(sizes, default=0),
            "tokens": self.vocab_size,
        }

    @property
    def format_counts(self) -> dict[str, int]:
        """Returns how many modules there are of each weight format, by its name; embedding and head count as one each
        where they are not floats."""
        formats = [self.tables[0], self.tables[1]] if any(self.tables) else []
        for widths, (attention, mlp) in zip(self.layers, self.formats or [], strict=False):
            formats += [attention] * (widths.num_key_value_heads > 0) + [mlp] * (widths.intermediate_size > 0)
        names = [form.name if form else "float" for form in formats]
        return {name: names.count(name) for name in dict.fromkeys(names)}

    def __str__(self) -> str:
        summary, layers = self.summary, len(self.layers)
        channels = str(summary["most channels"])
        if summary["fewest channels"] != summary["most channels"]:
            channels = f"{summary['fewest channels']} to {channels}"
        counts = [f"{count} modules in {name}" for name, count in self.format_counts.items()]
        counts = ", ".join([*counts, *([f"KV cache in {self.cache.name}"] if self.cache else [])])
        return (
            f"{summary['attentions']} of {layers} attention layers, {summary['key/value heads']} key/value heads each "
            f"with {summary['query heads per group']} query heads; {summary['MLPs']} of {layers} MLP layers, "
            f"{channels} channels each; vocabulary of {summary['tokens']:,} tokens{f'; {counts}' if counts else ''}"
        )


@dataclass(frozen=True)
class Problem:
    """The allocation problem of a model whose layers are all alike.

    dense: the widths of its layers; sensitivities: the predicted losses of all cuts and formats; costs: by constraint,
    with a KV cache of floats; caches: the formats that the KV cache may have, each with the costs by constraint;
    multiple: of the MLP channels; vocabularies: predicted loss in nats per token by size; formats: those that the costs
    speak of, floats first; layer_formats, table_formats: which of these the modules, and embedding and head, may have,
    by their places in the list; tied: embedding and head are one table; one_mlp_format: the MLPs of all layers
    have the same format, a symmetric one, as checkpoints of experts ask for.
    """

    dense: Widths
    sensitivities: Sensitivities
    costs: Mapping[str, ModuleCosts]
    multiple: int
    vocabularies: Mapping[int, float] = field(default_factory=lambda: {0: 0.0})
    formats: tuple[Format, ...] = (None,)
    layer_formats: tuple[int, ...] = (0,)
    table_formats: tuple[int, ...] = (0,)
    tied: bool = True
    one_mlp_format: bool = False
    caches: Mapping[Cache, Mapping[str, ModuleCosts]] = field(default_factory=dict)

    @property
    def cache_formats(self) -> tuple[Cache, ...]:
        """Returns the formats that the KV cache may have."""
        return tuple(self.caches) or (None,)

    def costs_of(self, cache: Cache) -> Mapping[str, ModuleCosts]:
        """Returns the costs by constraint with a format of the KV cache."""
        return self.caches.get(cache, self.costs)

    @property
    def depth(self) -> int:
        """Returns the number of layers of the dense model."""
        return len(self.sensitivities.mlp)

    def estimate(self, allocation: Allocation) -> dict[str, float]:
        """Returns the costs of an allocation by constraint."""
        places = {form: place for place, form in enumerate(self.formats)}
        formats = allocation.formats and [(places[one], places[other]) for one, other in allocation.formats]
        tables = places[allocation.tables[0]], places[allocation.tables[1]]
        return {
            name: cost.total(allocation.layers, allocation.vocab_size, formats, tables)
            for name, cost in self.costs_of(allocation.cache).items()
        }

    def loss(self, allocation: Allocation) -> float:
        """Returns the predicted loss of an allocation in nats per token."""
        sensitivities, layers = self.sensitivities, allocation.layers
        loss = sensitivities.loss(layers) + self.vocabularies[allocation.vocab_size]
        if allocation.formats is not None:
            loss += sensitivities.rounding_loss(layers, allocation.formats)
        attends = np.array([widths.num_key_value_heads > 0 for widths in layers])
        loss += float(sensitivities.cache_losses(allocation.cache)[attends].sum())
        return loss + self.table_loss(*allocation.tables)

    def table_loss(self, embedding: Format, head: Format) -> float:
        """Returns the predicted loss by the formats of embedding and head in nats per token."""
        loss = self.sensitivities.rounding(head).head
        return loss if self.tied else loss + self.sensitivities.rounding(embedding).embedding

    @property
    def everything(self) -> Allocation:
        """Returns the allocation of the dense model."""
        return Allocation((self.dense,) * self.depth, max(self.vocabularies), 0.0)

    @property
    def smallest(self) -> Allocation:
        """Returns the smallest allocation: the layer that costs most to lose, of the fewest heads and channels that a
        format takes, in the formats of the fewest bits, and over the KV cache that takes the least memory."""
        pairs = [
            (g, r)
            for g in range(1, self.dense.num_key_value_heads + 1)
            for r in range(1, self.dense.heads_per_group + 1)
        ]
        pairs.sort(key=lambda pair: (pair[0] * (pair[1] + 1), pair))
        sizes = channel_options(self.dense.intermediate_size, self.multiple)
        groups, heads = self._first(
            pairs, self.layer_formats, lambda pair, cost, place: cost.attention[place, pair[0], pair[1] - 1]
        )
        size = self._first(sizes, self.mlp_formats, lambda size, cost, place: cost.mlp[place, size])
        widths = Widths(groups, heads, size)
        of_layers = self._fewest_bits(self.layer_formats, lambda cost, place: cost.attention[place, groups, heads - 1])
        of_tables = self._fewest_bits(self.table_formats, lambda cost, place: cost.tables[place, place].sum())
        of_mlps = self._fewest_bits(self.mlp_formats, lambda cost, place: cost.mlp[place, size])
        formats = ((self.formats[of_layers], self.formats[of_mlps]),) * self.depth
        tables = (self.formats[of_tables],) * 2
        # Codes may take no less than floats, where they are held twice.
        cache = min(
            self.cache_formats, key=lambda form: self.costs_of(form)["memory"].attention[of_layers, groups, heads - 1]
        )
        choices = [
            Allocation(tuple(layers), min(self.vocabularies), 0.0, formats, tables, cache)
            for kept in range(self.depth)
            for layers in [[widths if layer == kept else GONE for layer in range(self.depth)]]
        ]
        return min((replace(choice, loss=self.loss(choice)) for choice in choices), key=lambda choice: choice.loss)

    @property
    def mlp_formats(self) -> tuple[int, ...]:
        """Returns the places of the formats that MLPs may have."""
        if not self.one_mlp_format:
            return self.layer_formats
        return tuple(p for p in self.layer_formats if (form := self.formats[p]) is None or form.offset is None)

    def _first(
        self, options: Sequence[Any], places: tuple[int, ...], price: Callable[[Any, ModuleCosts, int], float]
    ) -> Any:
        """Returns the first of the widths that one of the formats takes."""

        def is_taken(option: Any) -> bool:
            return any(all(np.isfinite(price(option, cost, p)) for cost in self.costs.values()) for p in places)

        return next(filter(is_taken, options), options[0])

    def _fewest_bits(self, places: tuple[int, ...], price: Callable[[ModuleCosts, int], float]) -> int:
        """Returns the format of the fewest bits that a module can have: one whose groups do not divide costs inf."""

        def bits(place: int) -> float:
            form = self.formats[place]
            return np.inf if form is None else form.weight_bits

        possible = [place for place in places if all(np.isfinite(price(cost, place)) for cost in self.costs.values())]
        return min(possible or places, key=bits)


def uniform(problem: Problem, limits: Mapping[str, float]) -> Allocation | None:
    """Returns the allocation of the least predicted loss in the layout `uniform`; None where none meets the limits."""
    return _best(problem, limits, _sizes(problem, most=None), joint=True)


def per_layer(problem: Problem, limits: Mapping[str, float]) -> Allocation | None:
    """Returns the allocation of the least predicted loss in the layout `per-layer`; None where none meets the limits.

    At least one attention and one MLP stay.
    """
    return _best(problem, limits, _sizes(problem, MOST_SIZES), joint=False)


def _best(problem: Problem, limits: Mapping[str, float], sizes: list[int], joint: bool) -> Allocation | None:
    """Returns the least of all knapsacks: over the formats of the KV cache and, where the MLPs have one format, over
    these formats."""
    of_mlps = [(place,) for place in problem.mlp_formats] if problem.one_mlp_format else [problem.mlp_formats]
    found = [
        _least(problem, limits, sizes, joint, places, cache) for cache in problem.cache_formats for places in of_mlps
    ]
    return min((one for one in found if one is not None), key=lambda one: one.loss, default=None)


def _least(
    problem: Problem,
    limits: Mapping[str, float],
    sizes: list[int],
    joint: bool,
    mlp_formats: tuple[int, ...],
    cache: Cache,
) -> Allocation | None:
    """Returns the least of all knapsacks with one format of the KV cache. joint: one for each of the sizes, where
    layers go whole; else one for all."""
    options = _options(problem, limits, sizes, mlp_formats, cache)
    # A knapsack is open until it is solved, or cannot be better than the best.
    least = bounds(options, np.zeros(len(limits)), joint)  # (pairs, sizes) or (pairs, 1)
    least = np.where(can_fit(options, joint), least, np.inf)
    is_relaxed = np.zeros(least.shape, dtype=bool)
    best: tuple[float, int, int, Picks] | None = None
    while True:
        pair, place = np.unravel_index(int(least.argmin()), least.shape)
        bound = least[pair, place]
        if bound == np.inf or (best is not None and bound >= best[0] - GAP * abs(best[0])):
            break
        knapsack = Knapsack(options, int(pair), slice(place, place + 1) if joint else slice(None), joint)
        # Its relaxation bounds it from below, and the prices of the limits bound all others.
        if not is_relaxed[pair, place]:
            is_relaxed[pair, place] = True
            relaxed = knapsack.relaxed()
            if relaxed is None:
                least[pair, place] = np.inf
            else:
                least = np.maximum(least, bounds(options, relaxed.prices, joint))
                least[pair, place] = max(least[pair, place], relaxed.loss)
            continue
        least[pair, place] = np.inf
        picks = knapsack.solve()
        if picks is not None and (best is None or picks.loss < best[0]):
            best = picks.loss, int(pair), int(place), picks
    if best is None:
        return None
    return _allocation(problem, options, best[1], sizes[best[2] :] if joint else sizes, best[3], cache)


def _options(
    problem: Problem, limits: Mapping[str, float], sizes: list[int], mlp_formats: tuple[int, ...], cache: Cache
) -> Options:
    """Returns the losses and costs of all options of the knapsacks' modules; mlp_formats: that MLPs may have; cache:
    the format of the KV cache."""
    sensitivities, dense = problem.sensitivities, problem.dense
    groups, heads = (
        array.ravel() + 1 for array in np.indices((dense.num_key_value_heads, dense.heads_per_group))
    )  # (pairs,) each
    places = list(problem.layer_formats)
    roundings = [sensitivities.rounding(problem.formats[place]) for place in places]
    # The losses of widths and formats add up; a module that is gone has only that of its width.
    kept = _attention_losses(sensitivities, groups, heads)  # (layers, pairs)
    channels = sensitivities.response[2] * sensitivities.mlp  # (layers, intermediate_size + 1)
    of_attention = np.stack([rounding.response * rounding.attention for rounding in roundings], axis=1)
    of_attention += sensitivities.cache_losses(cache)[:, None]
    of_mlp = np.stack([rounding.response * rounding.mlp for rounding in roundings], axis=1)  # (layers, formats)
    # Embedding and head: every vocabulary in every pair of formats.
    tables = [
        (tokens, embedding, head)
        for tokens in problem.vocabularies
        for head in problem.table_formats
        for embedding in ((head,) if problem.tied else problem.table_formats)
    ]
    table_losses = [
        problem.vocabularies[tokens] + problem.table_loss(problem.formats[embedding], problem.formats[head])
        for tokens, embedding, head in tables
    ]
    costs = [problem.costs_of(cache)[name] for name in limits]
    mlp_cost = np.stack([cost.mlp[places][:, sizes].T for cost in costs])  # (k, sizes, formats)
    mlp_cost[:, :, [place not in mlp_formats for place in places]] = np.inf
    return Options(
        pairs=tuple(zip(groups.tolist(), heads.tolist(), strict=True)),
        formats=tuple(places),
        tables=tuple(tables),
        attention_loss=kept[:, :, None] + of_attention[:, None, :],
        mlp_loss=channels[:, sizes][:, :, None] + of_mlp[:, None, :],
        table_loss=np.array(table_losses),
        attention_gone=_attention_losses(sensitivities, np.array([0]), np.array([1]))[:, 0],
        mlp_gone=channels[:, 0],
        attention_cost=np.stack([cost.attention[places][:, groups, heads - 1].T for cost in costs]),
        mlp_cost=mlp_cost,
        table_cost=np.array([[cost.base(tokens, (e, h)) for tokens, e, h in tables] for cost in costs]),
        attention_peak=np.stack([cost.attention_peak[groups, heads - 1] for cost in costs]),
        mlp_peak=np.stack([cost.mlp_peak[sizes] for cost in costs]),
        limits=np.array(list(limits.values()), dtype=float),
    )


def _allocation(
    problem: Problem, options: Options, pair: int, sizes: list[int], picks: Picks, cache: Cache
) -> Allocation:
    """Returns the allocation of a solution."""
    layers, formats = [], []
    for attention, mlp in zip(picks.attention, picks.mlp, strict=True):
        heads = (0, 1) if attention is None else options.pairs[pair]
        layers.append(Widths(*heads, 0 if mlp is None else sizes[mlp[0]]))
        of_attention = None if attention is None else problem.formats[options.formats[attention]]
        of_mlp = None if mlp is None else problem.formats[options.formats[mlp[1]]]
        formats.append((of_attention, of_mlp))
    tokens, embedding, head = options.tables[picks.table]
    tables = problem.formats[embedding], problem.formats[head]
    allocation = Allocation(tuple(layers), tokens, 0.0, tuple(formats), tables, cache)
    return replace(allocation, loss=problem.loss(allocation))


def _sizes(problem: Problem, most: int | None) -> list[int]:
    """Returns the MLP widths of the knapsacks: at most `most` of the possible ones, evenly spread."""
    sizes = channel_options(problem.dense.intermediate_size, problem.multiple)
    if most is None:
        return sizes
    picks = np.unique(np.linspace(0, len(sizes) - 1, most).round().astype(int))
    return [sizes[pick] for pick in picks]


def _attention_losses(sensitivities: Sensitivities, groups: np.ndarray, heads: np.ndarray) -> np.ndarray:
    """Returns the predicted losses (layers, options) of attentions of groups (options,) of query heads (options,)."""
    whole = sensitivities.attention[:, groups, -1]  # (layers, options), with all query heads of the groups
    return sensitivities.response[0] * whole + sensitivities.response[1] * (
        sensitivities.attention[:, groups, heads - 1] - whole
    )
