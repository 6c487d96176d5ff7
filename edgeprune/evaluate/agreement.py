"""How often a fitted model says what the dense one says: at the next token of a text, and in whole answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import sqrt
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from edgeprune.evaluate.perplexity import Losses, Windows

NORMAL_95 = 1.959964  # standard deviations to both sides
STEPS = (1, 2, 4, 8, 16, 32)


@dataclass(frozen=True)
class Agreement:
    """Share of places (0 to 1) with the 95 % interval of a paired bootstrap over documents.

    documents: those with a place that both models see behind the same tokens, `of` so many.
    """

    share: float
    low: float
    high: float
    places: int
    documents: int
    of: int


@dataclass(frozen=True)
class Identical:
    """Answers whose first `tokens` are the dense model's: `same` of `answers`, with Wilson's 95 % interval."""

    tokens: int
    same: int
    answers: int
    low: float
    high: float

    @property
    def share(self) -> float:
        return self.same / self.answers


def agreement(
    dense: Losses,
    fitted: Losses,
    seed: int,
    common: Sequence[Sequence[int]] | None = None,
    kept: np.ndarray | None = None,
    draws: int = 2000,
) -> Agreement | None:
    """At how many places of the same documents the likeliest next token is the same; None where none can be compared.

    For a fitted model with a vocabulary of its own: common, by document and window, counts the tokens at its
    beginning that are the same to both (see common_tokens): a later place is left out, and so is a document
    without any. kept: (new tokens,) the old id of each new one.
    """
    same, places = np.zeros(len(dense.nats)), np.zeros(len(dense.nats))
    for document, (old, new) in enumerate(zip(dense.likeliest, fitted.likeliest, strict=True)):
        for window, (expected, found) in enumerate(zip(old, new, strict=True)):
            count = min(len(expected), len(found))
            if common is not None:
                count = min(count, common[document][window])
            restored = found[:count] if kept is None else kept[found[:count]]
            same[document] += (restored == expected[:count]).sum()
            places[document] += count
    compared = places > 0
    if not compared.any():
        return None
    picks = np.random.default_rng(seed).integers(compared.sum(), size=(draws, compared.sum()))
    shares = same[compared][picks].sum(axis=1) / places[compared][picks].sum(axis=1)
    low, high = np.quantile(shares, [0.025, 0.975])
    share = same.sum() / places.sum()
    return Agreement(float(share), float(low), float(high), int(places.sum()), int(compared.sum()), len(places))


def common_tokens(dense: Windows, fitted: Windows, kept: np.ndarray) -> list[list[int]]:
    """How many tokens at the beginning of each window are the same in the fitted model's own ids and in old ones."""
    return [
        [_common(old, kept[new]) for old, new in zip(*windows, strict=True)]
        for windows in zip(dense, fitted, strict=True)
    ]


def _common(first: np.ndarray, second: np.ndarray) -> int:
    length = min(len(first), len(second))
    differs = np.flatnonzero(first[:length] != second[:length])
    return int(differs[0]) if len(differs) else length


def identical_answers(dense: np.ndarray, fitted: np.ndarray) -> list[Identical]:
    """dense, fitted: token ids (answers, tokens) of both models' greedy answers to the same prompts, at least one.

    Of STEPS, those that the answers are long enough for.
    """
    answers, length = dense.shape
    equal = np.minimum.accumulate(dense == fitted, axis=1)
    found = []
    for tokens in (step for step in STEPS if step <= length):
        same = int(equal[:, tokens - 1].sum())
        found.append(Identical(tokens, same, answers, *wilson(same, answers)))
    return found


def wilson(successes: int, trials: int) -> tuple[float, float]:
    """The 95 % score interval of a share (Wilson 1927): it holds for few trials and at 0 and 1 too."""
    share, square = successes / trials, NORMAL_95**2
    middle = (share + square / (2 * trials)) / (1 + square / trials)
    reach = NORMAL_95 / (1 + square / trials) * sqrt(share * (1 - share) / trials + square / (4 * trials**2))
    return max(0.0, middle - reach), min(1.0, middle + reach)
