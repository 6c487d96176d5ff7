"""The allocation problem and its solution: the widths of the least predicted loss under all limits at once.

Pure: losses, costs and limits in, widths out; it does not know how they were measured. The solution is exact for
either layout, and the number of layers is chosen too. Layout `uniform`: the same widths in every layer that stays;
all of these widths are tried. Layout `per-layer`: the same head counts in every attention that stays, but free MLP
widths, and a layer may lose its attention or its MLP alone. This is a multiple-choice knapsack, which HiGHS solves
(through SciPy). The size of the vocabulary is one more width in both.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from edgeprune.search.module_costs import ModuleCosts, channel_options
from edgeprune.search.widths import Sensitivities, Widths, uniform_options

GONE = Widths(0, 1, 0)
MOST_SIZES = 64  # MLP widths that the knapsack chooses among; predictions are too rough for a finer grid
GAP = 1e-4  # relative, between a solution and the proved bound: far below the error of a prediction
ROUNDING = 1e-12  # relative: sums in another order differ by this much, and whole bytes by more
SECONDS = 20.0  # for one knapsack; the best solution until then counts


@dataclass(frozen=True)
class Allocation:
    """The widths of every layer of the dense model (GONE: the layer is removed), the size of the vocabulary, and the
    predicted loss in nats per token."""

    layers: tuple[Widths, ...]
    vocab_size: int
    loss: float

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

    def __str__(self) -> str:
        summary, layers = self.summary, len(self.layers)
        channels = str(summary["most channels"])
        if summary["fewest channels"] != summary["most channels"]:
            channels = f"{summary['fewest channels']} to {channels}"
        return (
            f"{summary['attentions']} of {layers} attentions of {summary['key/value heads']} key/value heads x "
            f"{summary['query heads per group']} query heads, {summary['MLPs']} of {layers} MLPs of "
            f"{channels} channels, {summary['tokens']} tokens"
        )


@dataclass(frozen=True)
class Problem:
    """The allocation problem of a model whose layers are all alike.

    dense: the widths of its layers; sensitivities: the predicted losses of all cuts; costs: by constraint; multiple:
    of the MLP channels; vocabularies: predicted loss in nats per token by size.
    """

    dense: Widths
    sensitivities: Sensitivities
    costs: Mapping[str, ModuleCosts]
    multiple: int
    vocabularies: Mapping[int, float] = field(default_factory=lambda: {0: 0.0})

    @property
    def depth(self) -> int:
        """Returns the number of layers of the dense model."""
        return len(self.sensitivities.mlp)

    def estimate(self, allocation: Allocation) -> dict[str, float]:
        """Returns the costs of an allocation by constraint."""
        return {name: cost.total(allocation.layers, allocation.vocab_size) for name, cost in self.costs.items()}

    @property
    def everything(self) -> Allocation:
        """Returns the allocation of the dense model."""
        return Allocation((self.dense,) * self.depth, max(self.vocabularies), 0.0)

    @property
    def smallest(self) -> Allocation:
        """Returns the smallest allocation: the layer that costs most to lose, of one head and the fewest channels."""
        widths = Widths(1, 1, channel_options(self.dense.intermediate_size, self.multiple)[0])
        without = [widths if layer == kept else GONE for kept in range(self.depth) for layer in range(self.depth)]
        choices = [tuple(without[i : i + self.depth]) for i in range(0, len(without), self.depth)]
        layers = min(choices, key=self.sensitivities.loss)
        tokens = min(self.vocabularies)
        return Allocation(layers, tokens, self.sensitivities.loss(layers) + self.vocabularies[tokens])


def uniform(problem: Problem, limits: Mapping[str, float]) -> Allocation | None:
    """Returns the allocation of the least predicted loss in the layout `uniform`; None where none meets the limits.

    All layers of the same widths cost the same. So for any widths and any number of layers that stay, the layers that
    cost least to lose are removed.
    """
    sensitivities, options = problem.sensitivities, uniform_options(problem.dense, problem.multiple)
    # Compute the loss of every number of layers with each of the widths.
    groups, heads, channels = np.array(options).T  # (options,) each
    losses = (
        _attention_losses(sensitivities, groups, heads) + sensitivities.response[2] * sensitivities.mlp[:, channels]
    )  # (layers, options)
    without = (
        _attention_losses(sensitivities, np.array([0]), np.array([1]))
        + sensitivities.response[2] * sensitivities.mlp[:, :1]
    )  # (layers, 1), removed layers
    saved = -np.sort(-(without - losses), axis=0)  # (layers, options), the layer that saves most first
    left = without.sum() - np.cumsum(saved, axis=0)  # (layers, options), the loss where the first n + 1 layers stay
    stay = np.arange(1, problem.depth + 1)[:, None]  # (layers, 1)
    # Take the least loss within all limits, over the vocabularies.
    best: tuple[float, int, int, int] | None = None
    for tokens, more in problem.vocabularies.items():
        fits = np.ones_like(left, dtype=bool)
        for name, limit in limits.items():
            cost = problem.costs[name]
            layer_cost = cost.attention[groups, heads - 1] + cost.mlp[channels]
            peak = np.maximum(cost.attention_peak[groups, heads - 1], cost.mlp_peak[channels])
            fits &= cost.base(tokens) + stay * layer_cost + peak <= limit * (1 + ROUNDING)
        if fits.any():
            at = int(np.where(fits, left, np.inf).argmin())
            candidate = (float(left.flat[at]) + more, at // len(options) + 1, at % len(options), tokens)
            best = candidate if best is None else min(best, candidate)
    if best is None:
        return None
    # Name the layers that stay.
    loss, count, option, tokens = best
    missed = (without - losses)[:, option]
    kept = set(np.argsort(-missed, kind="stable")[:count].tolist())
    return Allocation(tuple(options[option] if layer in kept else GONE for layer in range(problem.depth)), tokens, loss)


def per_layer(problem: Problem, limits: Mapping[str, float]) -> Allocation | None:
    """Returns the allocation of the least predicted loss in the layout `per-layer`; None where none meets the limits.

    Every pair of head counts with every vocabulary makes one knapsack. They are solved in the order of the bounds
    that their relaxations give, until a bound is no better than the best solution. At least one attention and one
    MLP stay.
    """
    sizes = _sizes(problem)
    pairs = {(w.num_key_value_heads, w.heads_per_group) for w in uniform_options(problem.dense, problem.multiple)}
    knapsacks = [_Knapsack(problem, limits, sizes, *pair, tokens) for pair in pairs for tokens in problem.vocabularies]
    # Bound the loss of each from below.
    bounds = sorted(
        ((solution[0], index) for index, knapsack in enumerate(knapsacks) if (solution := knapsack.solve(relaxed=True)))
    )
    # Solve them in that order.
    best: Allocation | None = None
    for bound, index in bounds:
        if best is not None and bound >= best.loss:
            break
        solution = knapsacks[index].solve(relaxed=False)
        if solution is not None and (best is None or solution[0] < best.loss):
            best = Allocation(solution[1], knapsacks[index].tokens, solution[0])
    return best


def _sizes(problem: Problem) -> list[int]:
    """Returns the MLP widths of the knapsack: 0, and at most MOST_SIZES of the possible ones, evenly spread."""
    sizes = channel_options(problem.dense.intermediate_size, problem.multiple)
    picks = np.unique(np.linspace(0, len(sizes) - 1, MOST_SIZES).round().astype(int))
    return [0, *(sizes[pick] for pick in picks)]


def _attention_losses(sensitivities: Sensitivities, groups: np.ndarray, heads: np.ndarray) -> np.ndarray:
    """Returns the predicted losses (layers, options) of attentions of groups (options,) of query heads (options,)."""
    whole = sensitivities.attention[:, groups, -1]  # (layers, options), with all query heads of the groups
    return sensitivities.response[0] * whole + sensitivities.response[1] * (
        sensitivities.attention[:, groups, heads - 1] - whole
    )


@dataclass(frozen=True)
class _Knapsack:
    """The knapsack of one pair of head counts and one vocabulary.

    Its variables are, for every layer, whether its attention stays, and then, for every layer and MLP width, whether
    the layer's MLP has this width: layers * (1 + sizes) in all.
    """

    problem: Problem
    limits: Mapping[str, float]
    sizes: list[int]
    groups: int
    heads: int
    tokens: int

    def solve(self, relaxed: bool) -> tuple[float, tuple[Widths, ...]] | None:
        """Returns the least loss and its widths; None where nothing fits.

        relaxed: variables may have any value from 0 to 1; the loss is then a lower bound, and the widths are empty.
        """
        from scipy import sparse
        from scipy.optimize import Bounds, LinearConstraint, milp

        # Compute the loss that each variable adds to that of a model without attentions.
        sensitivities, depth = self.problem.sensitivities, self.problem.depth
        gone = _attention_losses(sensitivities, np.array([0]), np.array([1]))[:, 0]  # (layers,)
        kept = _attention_losses(sensitivities, np.array([self.groups]), np.array([self.heads]))[:, 0]  # (layers,)
        # (layers * (1 + sizes),)
        losses = np.concatenate([kept - gone, (sensitivities.response[2] * sensitivities.mlp[:, self.sizes]).ravel()])
        # Limit each cost, by what is left of its limit beside the base and the largest possible peak.
        rows, most = [], []
        for name, limit in self.limits.items():
            cost = self.problem.costs[name]
            peak = max(cost.attention_peak[self.groups, self.heads - 1], cost.mlp_peak[self.sizes].max())
            attention = np.full(depth, cost.attention[self.groups, self.heads - 1])
            # row: (layers * (1 + sizes),), the cost of each variable
            row, room = np.concatenate([attention, np.tile(cost.mlp[self.sizes], depth)]), limit - peak
            room -= cost.base(self.tokens)
            scale = max(float(np.abs(row).max()), 1e-300)  # bytes and ms become numbers near 1
            rows.append(row / scale)
            most.append(room / scale)
        # Give every MLP exactly one size, and keep at least one attention and one MLP.
        choices = len(self.sizes)
        # (layers, layers * (1 + sizes))
        one_size = sparse.hstack(
            [sparse.csr_matrix((depth, depth)), sparse.kron(sparse.eye(depth), np.ones((1, choices)))]
        )
        some_stay = np.zeros((2, len(losses)))  # (2, layers * (1 + sizes))
        some_stay[0, :depth] = 1
        some_stay[1, depth:] = np.tile(np.array(self.sizes) > 0, depth)
        result = milp(
            losses,
            integrality=np.full(len(losses), 0 if relaxed else 1),
            bounds=Bounds(0, 1),
            constraints=[
                LinearConstraint(np.array(rows), -np.inf, most),
                LinearConstraint(one_size, 1, 1),
                LinearConstraint(some_stay, 1, np.inf),
            ],
            options={"mip_rel_gap": GAP, "time_limit": SECONDS},
        )
        if result.x is None:
            return None
        loss = float(result.fun + gone.sum()) + self.problem.vocabularies[self.tokens]
        if relaxed:
            return loss, ()
        # Read the widths of every layer off the variables.
        stays, picks = result.x[:depth] > 0.5, result.x[depth:].reshape(depth, choices).argmax(axis=1)
        return loss, tuple(
            Widths(*((self.groups, self.heads) if stay else (0, 1)), self.sizes[pick])
            for stay, pick in zip(stays, picks, strict=True)
        )
