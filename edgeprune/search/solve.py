"""The widths of the least predicted loss under every limit at once: exact, for either layout, depth included.

Pure: losses, costs and limits in, widths out. Layout `uniform`: the same widths in every layer that stays; all
of them are looked at. Layout `per-layer`: the same head counts in every attention that stays, MLP widths free,
and a layer may lose its attention or its MLP: a multiple-choice knapsack, solved by HiGHS (through SciPy). The
size of the vocabulary is one more width.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from edgeprune.search.module_costs import ModuleCosts, channel_options
from edgeprune.search.widths import Sensitivities, Widths, uniform_options

GONE = Widths(0, 1, 0)
MOST_SIZES = 64  # of an MLP that the knapsack chooses among; a finer grid gains nothing that is predicted well
GAP = 1e-4  # relative, between what is found and what is proved possible: far below what a prediction is worth
ROUNDING = 1e-12  # relative: sums in another order differ by as much, and whole bytes by more
SECONDS = 20.0  # for one knapsack; what is found until then counts


@dataclass(frozen=True)
class Allocation:
    """Widths of every layer of the dense model (GONE: it goes), tokens kept, predicted loss in nats per token."""

    layers: tuple[Widths, ...]
    vocab_size: int
    loss: float

    @property
    def summary(self) -> dict[str, int]:
        """The widths in a few numbers: what stays, and how wide it is."""
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
        found, layers = self.summary, len(self.layers)
        channels = str(found["most channels"])
        if found["fewest channels"] != found["most channels"]:
            channels = f"{found['fewest channels']} to {channels}"
        return (
            f"{found['attentions']} of {layers} attentions of {found['key/value heads']} key/value heads x "
            f"{found['query heads per group']} query heads, {found['MLPs']} of {layers} MLPs of {channels} channels, "
            f"{found['tokens']} tokens"
        )


@dataclass(frozen=True)
class Problem:
    """What is chosen from: the dense widths and losses, the costs by constraint, the multiple of MLP channels, and
    the vocabularies, as predicted loss in nats per token by size."""

    dense: Widths
    sensitivities: Sensitivities
    costs: Mapping[str, ModuleCosts]
    multiple: int
    vocabularies: Mapping[int, float] = field(default_factory=lambda: {0: 0.0})

    @property
    def depth(self) -> int:
        return len(self.sensitivities.mlp)

    def estimate(self, allocation: Allocation) -> dict[str, float]:
        """Every cost of an allocation."""
        return {name: cost.total(allocation.layers, allocation.vocab_size) for name, cost in self.costs.items()}

    @property
    def everything(self) -> Allocation:
        """The dense model."""
        return Allocation((self.dense,) * self.depth, max(self.vocabularies), 0.0)

    @property
    def smallest(self) -> Allocation:
        """One layer, of one head and the fewest channels: the one that is missed most."""
        widths = Widths(1, 1, channel_options(self.dense.intermediate_size, self.multiple)[0])
        without = [widths if layer == kept else GONE for kept in range(self.depth) for layer in range(self.depth)]
        choices = [tuple(without[i : i + self.depth]) for i in range(0, len(without), self.depth)]
        layers = min(choices, key=self.sensitivities.loss)
        tokens = min(self.vocabularies)
        return Allocation(layers, tokens, self.sensitivities.loss(layers) + self.vocabularies[tokens])


def uniform(problem: Problem, limits: Mapping[str, float]) -> Allocation | None:
    """The least predicted loss in the layout `uniform`; None where nothing meets the limits.

    Every layer costs the same: of each of the widths, whichever number of layers stays, those go that are
    missed least.
    """
    found, options = problem.sensitivities, uniform_options(problem.dense, problem.multiple)
    groups, heads, channels = np.array(options).T
    losses = _attention_losses(found, groups, heads) + found.response[2] * found.mlp[:, channels]
    without = _attention_losses(found, np.array([0]), np.array([1])) + found.response[2] * found.mlp[:, :1]
    saved = -np.sort(-(without - losses), axis=0)  # (layers, options), the layer that saves most first
    left = without.sum() - np.cumsum(saved, axis=0)  # loss where the first n + 1 layers stay
    stay = np.arange(1, problem.depth + 1)[:, None]
    best: tuple[float, int, int, int] | None = None
    for tokens, more in problem.vocabularies.items():
        fits = np.ones_like(left, dtype=bool)
        for name, limit in limits.items():
            cost = problem.costs[name]
            each = cost.attention[groups, heads - 1] + cost.mlp[channels]
            peak = np.maximum(cost.attention_peak[groups, heads - 1], cost.mlp_peak[channels])
            fits &= cost.base(tokens) + stay * each + peak <= limit * (1 + ROUNDING)
        if fits.any():
            at = int(np.where(fits, left, np.inf).argmin())
            candidate = (float(left.flat[at]) + more, at // len(options) + 1, at % len(options), tokens)
            best = candidate if best is None else min(best, candidate)
    if best is None:
        return None
    loss, count, option, tokens = best
    missed = (without - losses)[:, option]
    kept = set(np.argsort(-missed, kind="stable")[:count].tolist())
    return Allocation(tuple(options[option] if layer in kept else GONE for layer in range(problem.depth)), tokens, loss)


def per_layer(problem: Problem, limits: Mapping[str, float]) -> Allocation | None:
    """The least predicted loss in the layout `per-layer`; None where nothing meets the limits.

    Head counts and vocabulary are tried in the order of what their relaxation promises, until that is no better
    than what was found. At least one attention and one MLP stay.
    """
    sizes = _sizes(problem)
    pairs = {(w.num_key_value_heads, w.heads_per_group) for w in uniform_options(problem.dense, problem.multiple)}
    tried = [_Knapsack(problem, limits, sizes, *pair, tokens) for pair in pairs for tokens in problem.vocabularies]
    bounds = sorted(((found[0], place) for place, one in enumerate(tried) if (found := one.solve(relaxed=True))))
    best: Allocation | None = None
    for bound, place in bounds:
        if best is not None and bound >= best.loss:
            break
        found = tried[place].solve(relaxed=False)
        if found is not None and (best is None or found[0] < best.loss):
            best = Allocation(found[1], tried[place].tokens, found[0])
    return best


def _sizes(problem: Problem) -> list[int]:
    sizes = channel_options(problem.dense.intermediate_size, problem.multiple)
    picks = np.unique(np.linspace(0, len(sizes) - 1, MOST_SIZES).round().astype(int))
    return [0, *(sizes[pick] for pick in picks)]


def _attention_losses(found: Sensitivities, groups: np.ndarray, heads: np.ndarray) -> np.ndarray:
    """Predicted losses (layers, options) of an attention with these groups and query heads in each."""
    whole = found.attention[:, groups, -1]
    return found.response[0] * whole + found.response[1] * (found.attention[:, groups, heads - 1] - whole)


@dataclass(frozen=True)
class _Knapsack:
    """One pair of head counts and one vocabulary. Variables: for every layer whether its attention stays, then for
    every layer and size whether its MLP has it."""

    problem: Problem
    limits: Mapping[str, float]
    sizes: list[int]
    groups: int
    heads: int
    tokens: int

    def solve(self, relaxed: bool) -> tuple[float, tuple[Widths, ...]] | None:
        """Loss and widths; None where nothing fits. relaxed: shares of a choice are allowed, the widths are none."""
        from scipy import sparse
        from scipy.optimize import Bounds, LinearConstraint, milp

        found, depth = self.problem.sensitivities, self.problem.depth
        gone = _attention_losses(found, np.array([0]), np.array([1]))[:, 0]
        kept = _attention_losses(found, np.array([self.groups]), np.array([self.heads]))[:, 0]
        losses = np.concatenate([kept - gone, (found.response[2] * found.mlp[:, self.sizes]).ravel()])
        rows, most = [], []
        for name, limit in self.limits.items():
            cost = self.problem.costs[name]
            peak = max(cost.attention_peak[self.groups, self.heads - 1], cost.mlp_peak[self.sizes].max())
            attention = np.full(depth, cost.attention[self.groups, self.heads - 1])
            row, room = np.concatenate([attention, np.tile(cost.mlp[self.sizes], depth)]), limit - peak
            room -= cost.base(self.tokens)
            scale = max(float(np.abs(row).max()), 1e-300)  # bytes and ms become numbers near 1
            rows.append(row / scale)
            most.append(room / scale)
        choices = len(self.sizes)
        one_size = sparse.hstack(
            [sparse.csr_matrix((depth, depth)), sparse.kron(sparse.eye(depth), np.ones((1, choices)))]
        )
        some_stay = np.zeros((2, len(losses)))
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
        stays, picks = result.x[:depth] > 0.5, result.x[depth:].reshape(depth, choices).argmax(axis=1)
        return loss, tuple(
            Widths(*((self.groups, self.heads) if stay else (0, 1)), self.sizes[pick])
            for stay, pick in zip(stays, picks, strict=True)
        )
