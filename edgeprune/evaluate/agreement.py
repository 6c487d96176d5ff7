"""The agreement of a fitted model with the dense one: at the next token of a text, and in whole answers.

It knows token ids and no model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import sqrt
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from edgeprune.evaluate.perplexity import Losses, Windows

NORMAL_95 = 1.959964  # standard deviations on both sides
STEPS = (1, 2, 4, 8, 16, 32)  # tokens of an answer that are compared


@dataclass(frozen=True)
class Agreement:
    """The share of places, 0 to 1, at which two models agree, with its 95 % interval.

    The interval is that of a paired bootstrap over documents. places: how many were compared. documents: those with a
    place that both models see after the same tokens, out of `of`.
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
    """Returns the share of places in the same documents at which both models find the same next token likeliest.

    It is None where no place can be compared. The other arguments are for a fitted model with a vocabulary of its own.
    common: by document and window, how many tokens at its beginning are the same to both (see common_tokens); a later
    place is left out, and so is a document without any. kept: (new tokens,) the old id of each new one.
    """
    # Count equal tokens and compared places of each document: (documents,).
    same, places = np.zeros(len(dense.nats)), np.zeros(len(dense.nats))
    for document, (old, new) in enumerate(zip(dense.likeliest, fitted.likeliest, strict=True)):
        for window, (expected, predicted) in enumerate(zip(old, new, strict=True)):
            count = min(len(expected), len(predicted))
            if common is not None:
                count = min(count, common[document][window])
            restored = predicted[:count] if kept is None else kept[predicted[:count]]
            same[document] += (restored == expected[:count]).sum()
            places[document] += count
    # Draw documents with repetition, each draw as many as were compared.
    compared = places > 0
    if not compared.any():
        return None
    # (draws, compared documents)
    drawn = np.random.default_rng(seed).integers(compared.sum(), size=(draws, compared.sum()))
    shares = same[compared][drawn].sum(axis=1) / places[compared][drawn].sum(axis=1)  # (draws,)
    low, high = np.quantile(shares, [0.025, 0.975])
    share = same.sum() / places.sum()
    return Agreement(float(share), float(low), float(high), int(places.sum()), int(compared.sum()), len(places))


def common_tokens(dense: Windows, fitted: Windows, kept: np.ndarray) -> list[list[int]]:
    """Returns how many tokens at the beginning of each window both tokenisations share, by document and window.

    dense: old ids. fitted: the fitted model's ids. kept: (new tokens,) the old id of each new one.
    """
    return [
        [common_beginning(old, kept[new]) for old, new in zip(*windows, strict=True)]
        for windows in zip(dense, fitted, strict=True)
    ]


def common_beginning(first: np.ndarray, second: np.ndarray) -> int:
    """Returns the length of the common beginning of two sequences of ids."""
    length = min(len(first), len(second))
    differs = np.flatnonzero(first[:length] != second[:length])
    return int(differs[0]) if len(differs) else length


def identical_answers(dense: np.ndarray, fitted: np.ndarray) -> list[Identical]:
    """Returns how many answers are identical up to each length in STEPS that the answers have.

    dense, fitted: token ids (answers, tokens) of both models' greedy answers to the same prompts, at least one.
    """
    answers, length = dense.shape
    equal = np.minimum.accumulate(dense == fitted, axis=1)  # (answers, tokens): whether all tokens up to this one are
    results = []
    for tokens in (step for step in STEPS if step <= length):
        same = int(equal[:, tokens - 1].sum())
        results.append(Identical(tokens, same, answers, *wilson(same, answers)))
    return results


def wilson(successes: int, trials: int) -> tuple[float, float]:
    """Returns the 95 % score interval of a share (Wilson 1927), which holds for few trials and at 0 and 1 too."""
    share, square = successes / trials, NORMAL_95**2
    middle = (share + square / (2 * trials)) / (1 + square / trials)
    reach = NORMAL_95 / (1 + square / trials) * sqrt(share * (1 - share) / trials + square / (4 * trials**2))
    return max(0.0, middle - reach), min(1.0, middle + reach)
