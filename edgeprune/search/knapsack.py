"""The multiple-choice knapsack of one pair of head counts: which modules stay, in which width and format.

Plain arrays; it does not know what the losses and costs are of. HiGHS solves a knapsack as a mixed-integer problem
(through SciPy). Its linear relaxation bounds the loss from below and prices the limits. With prices y >= 0 of the
limits each knapsack's loss is at least that of the best free choice under the loss + y . cost, less y . limit (the
Lagrangian bound), which is a few additions: so one relaxation bounds all knapsacks.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np

GAP = 2e-3  # relative, between a solution and the proved bound: far below the error of a prediction
SECONDS = 20.0  # for one knapsack; the best solution until then counts
ROUNDING = 1e-12  # relative: sums in another order differ by this much, and whole bytes by more
SLACK = 4e-6  # relative, of a limit; the solver keeps limits within about 1e-6


@dataclass(frozen=True)
class Options:
    """The losses and costs of everything that can be chosen, for k limits.

    pairs: of head counts; formats: of modules, as places in the problem's list; tables: sizes of the vocabulary with
    the formats of embedding and head. attention_loss: (layers, pairs, formats); mlp_loss: (layers, sizes, formats);
    table_loss: (tables,); attention_gone, mlp_gone: (layers,), the losses without the module; attention_cost: (k,
    pairs, formats); mlp_cost: (k, sizes, formats); table_cost: (k, tables); inf where an option does not exist;
    attention_peak: (k, pairs); mlp_peak: (k, sizes); limits: (k,).
    """

    pairs: tuple[tuple[int, int], ...]
    formats: tuple[int, ...]
    tables: tuple[tuple[int, int, int], ...]
    attention_loss: np.ndarray
    mlp_loss: np.ndarray
    table_loss: np.ndarray
    attention_gone: np.ndarray
    mlp_gone: np.ndarray
    attention_cost: np.ndarray
    mlp_cost: np.ndarray
    table_cost: np.ndarray
    attention_peak: np.ndarray
    mlp_peak: np.ndarray
    limits: np.ndarray

    def rooms(self, joint: bool) -> np.ndarray:
        """Returns what the limits leave beside the largest possible peak, (k, pairs, sizes); without joint (k, pairs,
        1)."""
        mlp_peak = self.mlp_peak if joint else self.mlp_peak.max(axis=1, keepdims=True)
        peaks = np.maximum(self.attention_peak[:, :, None], mlp_peak[:, None, :])
        return self.limits[:, None, None] - peaks


class Picks(NamedTuple):
    """A solution: for each layer the format of its attention, and size and format of its MLP, None where it is gone;
    and the place of the tables."""

    loss: float
    attention: list[int | None]
    mlp: list[tuple[int, int] | None]
    table: int


class Relaxed(NamedTuple):
    """A relaxation: a lower bound of the loss, and the prices (k,) of the limits in loss for each unit of cost."""

    loss: float
    prices: np.ndarray


def _priced(losses: np.ndarray, costs: np.ndarray, prices: np.ndarray) -> np.ndarray:
    """Returns losses (..., options) + prices (k,) . costs (k, options), inf where an option does not exist."""
    exists = np.isfinite(costs).all(axis=0)
    priced = np.tensordot(prices, np.where(exists, costs, 0.0), axes=1)
    return np.where(exists, losses + priced, np.inf)


def bounds(options: Options, prices: np.ndarray, joint: bool) -> np.ndarray:
    """Returns lower bounds of the losses of all knapsacks, (pairs, sizes) where layers go whole, else (pairs, 1).

    prices: (k,), at least 0.
    """
    # The best free choice of every module.
    attention = _priced(options.attention_loss, options.attention_cost, prices).min(axis=2)  # (layers, pairs)
    mlp = _priced(options.mlp_loss, options.mlp_cost, prices).min(axis=2)  # (layers, sizes)
    tables = _priced(options.table_loss, options.table_cost, prices).min()
    if joint:
        gone = options.attention_gone + options.mlp_gone  # (layers,)
        layers = np.minimum(gone[:, None, None], attention[:, :, None] + mlp[:, None, :]).sum(axis=0)
    else:
        of_mlp = np.minimum(options.mlp_gone, mlp.min(axis=1)).sum()
        layers = np.minimum(options.attention_gone[:, None], attention).sum(axis=0)[:, None] + of_mlp
    return layers + tables - np.tensordot(prices, options.rooms(joint) * (1 + ROUNDING), axes=1)


def can_fit(options: Options, joint: bool) -> np.ndarray:
    """Returns where the cheapest choice of all keeps each limit by itself, as the bounds are shaped."""
    depth = len(options.attention_gone)
    # (k, pairs, 1) and (k, 1, sizes), the cheapest format of each
    attention = options.attention_cost.min(axis=2)[:, :, None]
    mlp = options.mlp_cost.min(axis=2)[:, None, :]
    if not joint:
        mlp = mlp.min(axis=2, keepdims=True)
    cheapest = _cheapest(attention + mlp, depth) if joint else _cheapest(attention, depth) + _cheapest(mlp, depth)
    left = options.rooms(joint) - options.table_cost.min(axis=1)[:, None, None]
    return (cheapest <= left + SLACK * np.abs(options.limits)[:, None, None]).all(axis=0)


def _cheapest(cost: np.ndarray, depth: int) -> np.ndarray:
    """Returns the least cost of 1 to `depth` modules."""
    return np.where(cost < 0, depth * cost, cost)


@contextmanager
def _output_to_errors() -> Iterator[None]:
    """Sends what HiGHS prints, whatever it is asked, to standard error: standard output is the command's own."""
    try:
        kept = os.dup(1)
        os.dup2(2, 1)
    except OSError:  # one of them is closed
        yield
        return
    try:
        yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)


@dataclass(frozen=True)
class Knapsack:
    """One knapsack: a pair of head counts, and a slice of the MLP's sizes.

    joint: a layer stays or goes whole, otherwise its attention and its MLP alone; at least one of each stays. The
    variables are, for every layer, its attention in each format, then for every layer its MLP in each size and format,
    then the tables: each is 1 where this is chosen, and what is gone is where none is. The last variable is always 1
    and has the loss of a model without modules, which the solver's relative gap then knows.
    """

    options: Options
    pair: int
    sizes: slice
    joint: bool

    @cached_property
    def _attention(self) -> list[int]:
        """Returns the formats that the attention can have."""
        return np.flatnonzero(np.isfinite(self.options.attention_cost[:, self.pair]).all(axis=0)).tolist()

    @cached_property
    def _mlp(self) -> list[tuple[int, int]]:
        """Returns the sizes and formats that the MLP can have."""
        exists = np.isfinite(self.options.mlp_cost[:, self.sizes]).all(axis=0)  # (sizes, formats)
        return [(int(size), int(form)) for size, form in np.argwhere(exists)]

    @cached_property
    def _tables(self) -> list[int]:
        return np.flatnonzero(np.isfinite(self.options.table_cost).all(axis=0)).tolist()

    @cached_property
    def _depth(self) -> int:
        return len(self.options.attention_gone)

    @cached_property
    def _losses(self) -> np.ndarray:
        """Returns what each variable adds to the loss of a model without modules."""
        options = self.options
        attention = options.attention_loss[:, self.pair, self._attention] - options.attention_gone[:, None]
        sizes, formats = np.array(self._mlp).T
        mlp = options.mlp_loss[:, self.sizes][:, sizes, formats] - options.mlp_gone[:, None]
        gone = [float(options.attention_gone.sum() + options.mlp_gone.sum())]
        return np.concatenate([attention.ravel(), mlp.ravel(), options.table_loss[self._tables], gone])

    @cached_property
    def _costs(self) -> tuple[np.ndarray, np.ndarray]:
        """Returns the costs (k, variables), and what the limits leave for them (k,)."""
        options, depth = self.options, self._depth
        sizes, formats = np.array(self._mlp).T
        attention = options.attention_cost[:, self.pair, self._attention]  # (k, formats)
        mlp = options.mlp_cost[:, self.sizes][:, sizes, formats]  # (k, sizes and formats)
        nothing = np.zeros((len(attention), 1))
        rows = [np.tile(attention, depth), np.tile(mlp, depth), options.table_cost[:, self._tables], nothing]
        rooms = options.rooms(self.joint)[:, self.pair, self.sizes if self.joint else slice(None)][:, 0]
        return np.concatenate(rows, axis=1), rooms

    @cached_property
    def _structure(self) -> tuple[Any, np.ndarray, Any, np.ndarray]:
        """Returns the constraints beside the limits, rows x <= most and rows x = exactly."""
        from scipy import sparse

        depth, attention, mlp, tables = self._depth, len(self._attention), len(self._mlp), len(self._tables)
        stays = sparse.kron(sparse.eye(depth), np.ones((1, attention)))  # (layers, attention's variables)
        has_mlp = sparse.kron(sparse.eye(depth), np.ones((1, mlp)))
        one_table = np.concatenate([np.zeros(depth * (attention + mlp)), np.ones(tables), [0.0]])[None]
        # Each module is chosen once at most, and some stay.
        at_most_one = sparse.block_diag([stays, has_mlp, sparse.csr_matrix((0, tables + 1))])
        some_stay = np.zeros((2, depth * (attention + mlp) + tables + 1))
        some_stay[0, : depth * attention] = some_stay[1, depth * attention : depth * (attention + mlp)] = -1
        most = np.concatenate([np.ones(2 * depth), [-1.0, -1.0]])
        rows = sparse.vstack([at_most_one, some_stay]).tocsr()
        # The tables are chosen once, and the modules of a layer go together where they are joint.
        equal, exactly = sparse.csr_matrix(one_table), np.ones(1)
        if self.joint:
            together = sparse.hstack([stays, -has_mlp, sparse.csr_matrix((depth, tables + 1))])
            equal, exactly = sparse.vstack([equal, together]).tocsr(), np.concatenate([exactly, np.zeros(depth)])
        return rows, most, equal, exactly

    @cached_property
    def _least(self) -> np.ndarray:
        """Returns the lower bounds of the variables."""
        return np.concatenate([np.zeros(len(self._losses) - 1), [1.0]])

    def _exists(self) -> bool:
        return bool(self._attention and self._mlp and self._tables)

    def relaxed(self) -> Relaxed | None:
        """Returns the relaxation, where variables may have any value from 0 to 1; None where even that fits nothing."""
        from scipy import sparse
        from scipy.optimize import linprog

        if not self._exists():
            return None
        costs, rooms = self._costs
        scale = np.maximum(np.abs(costs).max(axis=1), np.maximum(np.abs(rooms), 1e-300))  # bytes and ms become shares
        rows, most, equal, exactly = self._structure
        result = linprog(
            self._losses,
            A_ub=sparse.vstack([sparse.csr_matrix(costs / scale[:, None]), rows]),
            b_ub=np.concatenate([(rooms + SLACK * np.abs(rooms)) / scale, most]),
            A_eq=equal,
            b_eq=exactly,
            bounds=np.stack([self._least, np.ones(len(self._least))], axis=1),
            method="highs",
        )
        if result.x is None:
            return None
        prices = np.maximum(0.0, -result.ineqlin.marginals[: len(scale)]) / scale
        return Relaxed(float(result.fun), prices)

    def solve(self) -> Picks | None:
        """Returns the choice of the least loss; None where nothing fits."""
        costs, rooms = self._costs
        for slack in (0.0, SLACK):
            chosen = self._solved(costs, rooms - slack * np.abs(rooms))
            if chosen is None:
                return None
            if (costs @ chosen <= rooms + ROUNDING * np.abs(self.options.limits)).all():
                return self._picks(chosen)
        return None

    def _solved(self, costs: np.ndarray, rooms: np.ndarray) -> np.ndarray | None:
        """Returns the variables of the least loss, 0 or 1 each."""
        from scipy.optimize import Bounds, LinearConstraint, milp

        scale = np.maximum(np.abs(costs).max(axis=1), np.maximum(np.abs(rooms), 1e-300))
        rows, most, equal, exactly = self._structure
        with _output_to_errors():
            result = milp(
                self._losses,
                integrality=np.ones(len(self._losses)),
                bounds=Bounds(self._least, 1),
                constraints=[
                    LinearConstraint(costs / scale[:, None], -np.inf, (rooms + ROUNDING * np.abs(rooms)) / scale),
                    LinearConstraint(rows, -np.inf, most),
                    LinearConstraint(equal, exactly, exactly),
                ],
                options={"mip_rel_gap": GAP, "time_limit": SECONDS, "presolve": False},
            )
        return None if result.x is None else result.x.round()

    def _picks(self, chosen: np.ndarray) -> Picks:
        depth, attention, mlp = self._depth, len(self._attention), len(self._mlp)
        of_attention = chosen[: depth * attention].reshape(depth, attention)
        of_mlp = chosen[depth * attention : depth * (attention + mlp)].reshape(depth, mlp)
        return Picks(
            float(self._losses @ chosen),
            [self._attention[int(row.argmax())] if row.any() else None for row in of_attention],
            [self._mlp[int(row.argmax())] if row.any() else None for row in of_mlp],
            self._tables[int(chosen[depth * (attention + mlp) : -1].argmax())],
        )
