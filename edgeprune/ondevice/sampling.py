"""The generation of tokens from an exported graph, step by step, greedy or sampled. It knows ids, no text."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from edgeprune.errors import InputError, NumericalError
from edgeprune.ondevice.reference import StepRunner

CANDIDATES = (512, 8192)  # tokens with more than a part in so many of the share that top_p may drop are sorted first


@dataclass(frozen=True)
class Drawing:
    """A way to draw tokens, as of `choose`, and its seed."""

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int = 0


def check_sampling(temperature: float, top_k: int, top_p: float) -> None:
    """Raises InputError for a sampling that is none."""
    if not 0 <= temperature < float("inf"):
        raise InputError(
            f"--temperature {temperature:g} is no finite number from 0", "Try 0.7; 0 is always the likeliest."
        )
    if top_k < 0:
        raise InputError(f"--top-k {top_k} is less than 0", "0 draws from all; try 40.")
    if not 0 <= top_p <= 1:
        raise InputError(f"--top-p {top_p:g} is not 0 to 1", "1 draws from all; try 0.9.")


def generate(
    runner: StepRunner,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    end_ids: Collection[int] = (),
    top_k: int = 0,
) -> Iterator[np.ndarray]:
    """Yields the new token ids (batch,) int64 of every step; prompts of different lengths are padded on the left.

    Temperature 0 takes the likeliest token. A row that drew one of end_ids repeats it from then on. The generation
    ends when all rows have drawn one, or after max_new_tokens. The last token needs no place in the cache. Raises
    InputError where prompt and output exceed the runner's cache, NumericalError where logits are not finite.
    """
    # Check that prompt and output have room.
    longest = max(map(len, prompts))
    if min(map(len, prompts)) == 0:
        raise InputError("the prompt is empty", "Give at least one token.")
    room = runner.capacity + 1 - longest
    if max_new_tokens > room:
        raise InputError(
            f"the prompt of {longest} tokens and {max_new_tokens} new ones exceed the context of {runner.capacity}",
            f"Try --max-new-tokens {room}." if room > 0 else f"Shorten the prompt by {1 - room} tokens at least.",
        )
    # Pad the prompts on the left.
    generator = np.random.default_rng(seed)
    ids = np.zeros((len(prompts), longest), np.int64)  # (batch, longest)
    mask = np.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, longest - len(prompt) :] = prompt
        mask[row, longest - len(prompt) :] = 1
    # Draw a token for every row, and run it in the next step.
    ended = np.zeros(len(prompts), dtype=bool)
    runner.reset()
    if hasattr(runner, "begin"):  # a draft guesses what will be drawn
        runner.begin(Drawing(temperature, top_p, top_k, seed), longest)
    tokens = np.zeros(len(prompts), np.int64)
    for step in range(max_new_tokens):
        logits = runner.run(ids if step == 0 else tokens[:, None], mask)  # (batch, vocabulary)
        if not np.isfinite(logits).all():
            raise NumericalError(
                f"the logits of step {step + 1} are not finite", "Use an fp32 graph, or check the model's weights."
            )
        drawn = choose(logits.astype(np.float64), temperature, top_p, generator.random(len(logits)), top_k)
        tokens = np.where(ended, tokens, drawn)
        yield tokens
        ended |= np.isin(tokens, list(end_ids))
        if ended.all():
            return
        # (batch, longest + step + 1)
        mask = np.concatenate([mask, np.ones((len(prompts), 1), np.int64)], axis=1)


def draw(logits: np.ndarray, drawing: Drawing, point: float) -> int:
    """Returns the token that is drawn from logits (vocabulary,) at a point in [0, 1)."""
    wide = logits.astype(np.float64)[None]
    return int(choose(wide, drawing.temperature, drawing.top_p, np.array([point]), drawing.top_k)[0])


def choose(logits: np.ndarray, temperature: float, top_p: float, points: np.ndarray, top_k: int = 0) -> np.ndarray:
    """Returns token ids (batch,) from logits (batch, vocabulary) fp64, drawn at points (batch,) in [0, 1).

    top_k, unless 0, drops logits below the k-th; top_p then keeps the likeliest tokens up to that share of the
    probability, including the one that crosses it.
    """
    if temperature == 0:
        return logits.argmax(axis=1)
    # Drop the logits below the k-th, then turn the others into probabilities.
    if 0 < top_k < logits.shape[1]:
        least = np.partition(logits, -top_k, axis=1)[:, -top_k]  # (batch,): the k-th largest logit
        logits = np.where(logits < least[:, None], -np.inf, logits)
    # (batch, vocabulary)
    with np.errstate(over="ignore"):  # at a tiny temperature minus infinity is right
        probabilities = np.exp((logits - logits.max(axis=1, keepdims=True)) / temperature)
    probabilities /= probabilities.sum(axis=1, keepdims=True)
    # All tokens are kept: draw for the whole batch at once. Otherwise each row sorts its own.
    if top_p >= 1:
        cumulative = probabilities.cumsum(axis=1)
        totals = cumulative[:, -1:]
        passed = (cumulative <= points[:, None] * totals).sum(axis=1)  # (batch,): tokens below the point
        return np.minimum(passed, (cumulative < totals).sum(axis=1))  # never after the last token that has a share
    return np.array([_draw(row, top_p, point) for row, point in zip(probabilities, points, strict=True)])


def _draw(probabilities: np.ndarray, top_p: float, point: float) -> int:
    """Draws one token from probabilities (vocabulary,) at a point in [0, 1), among those that top_p keeps.

    Some hundreds hold a share of top_p mostly, and some thousands nearly always, so only they are sorted.
    """
    for candidates in CANDIDATES:
        kept = np.flatnonzero(probabilities > (1 - top_p) / candidates)
        if probabilities[kept].sum() > top_p:
            break
    else:
        kept = np.arange(len(probabilities))
    # Likeliest first; of equal ones the lower id first.
    kept = kept[np.lexsort((kept, -probabilities[kept]))]
    weights = probabilities[kept]
    count = max(1, int(np.searchsorted(weights.cumsum(), top_p)) + 1)
    kept, weights = kept[:count], weights[:count]
    # The point is a share of what is kept.
    cumulative = weights.cumsum()
    return int(kept[min(int(np.searchsorted(cumulative, point * cumulative[-1], side="right")), len(kept) - 1)])
