"""Speculative decoding: a small draft guesses the next tokens, and the target reads them in one step.

Whoever draws tokens sees logits of the target alone, so that a guess that is not drawn costs time and changes nothing:
not the distribution, and not the draw either, since the draft guesses at the random points at which the tokens will be
drawn. (Leviathan et al. 2023 accept and reject so that the distribution stays; here the draws themselves do.) What
changes is the rounding of the target's step, which differs with the number of tokens that it reads.

This file also runs on the device: Python 3.10 and numpy. It knows token ids, no text.
"""

from __future__ import annotations

from collections import deque

import numpy as np

from edgeprune.errors import InputError
from edgeprune.ondevice.onnxruntime import GraphRunner
from edgeprune.ondevice.sampling import Drawing, draw

POINTS = 64  # random points that are drawn at once
MOST_GUESSES = 16  # at a time


class SpeculativeRunner:
    """A target of one sequence with a draft, with the interface of reference.StepRunner.

    target: on a graph with the logits of all positions; draft: on any graph of the same tokens; count: tokens that are
    guessed at a time. guessed and accepted: tokens so far. Raises InputError for vocabularies of different sizes.
    """

    batch = 1

    def __init__(self, target: GraphRunner, draft: GraphRunner, count: int) -> None:
        if target.vocab_size != draft.vocab_size:
            raise InputError(
                f"the draft has {draft.vocab_size} tokens, its target {target.vocab_size}",
                "Make a draft of this model: edgeprune draft BUNDLE.",
            )
        self.target, self.draft, self.count = target, draft, count
        self.capacity, self.vocab_size = min(target.capacity, draft.capacity), target.vocab_size
        self.guessed = self.accepted = 0
        self.begin(Drawing(), 0)
        self.reset()

    def another(self) -> SpeculativeRunner:
        """Returns a runner of the same sessions with empty caches of its own."""
        return SpeculativeRunner(self.target.another(), self.draft.another(), self.count)

    @property
    def buffers(self) -> list[np.ndarray]:
        """Returns both caches, as GraphRunner.buffers."""
        return [*self.target.buffers, *self.draft.buffers]

    def begin(self, drawing: Drawing, prompt: int) -> None:
        """Takes the way in which tokens will be drawn behind a prompt of so many tokens."""
        self._drawing, self._prompt, self._drawn = drawing, prompt, 0
        self._random, self._points = np.random.default_rng(drawing.seed), np.empty(0)

    def reset(self, past: int = 0) -> None:
        """Continues as if `past` tokens were in both caches, whatever these hold."""
        self.target.reset(past)
        self.draft.reset(past)
        self.past = past
        self._unread: list[int] = []  # tokens of the answer that the draft has not read
        self._ahead: deque[tuple[int, np.ndarray]] = deque()  # guesses, and the target's logits behind each

    def run(self, ids: np.ndarray, mask: np.ndarray | None = None) -> np.ndarray:
        """Returns the target's logits (1, vocabulary) behind ids (1, tokens) int64; no row is padded.

        Raises EngineError where the cache is full or ONNX Runtime refuses the step.
        """
        tokens = ids[0].tolist()
        if self.past < self._prompt:
            self.draft.run(ids)
            self.past += len(tokens)
            return self.target.logits(ids)[:, -1]
        self._drawn += 1
        (token,) = tokens
        if self._ahead and self._ahead[0][0] == token:
            _, logits = self._ahead.popleft()
            self.accepted += 1
            if self.draft.past <= self.past:  # the last guess, which the draft has not read
                self._unread.append(token)
            self.past += 1
            return logits[None]
        # Both go back to what was drawn, and the draft guesses on.
        self._ahead.clear()
        self.target.reset(self.past)
        self.draft.reset(min(self.draft.past, self.past))
        self._unread.append(token)
        guesses = self._guess(min(self.count, self.capacity - self.past - 1))
        logits = self.target.logits(np.array([[token, *guesses]], np.int64))[0]  # (1 + guesses, vocabulary)
        self.past += 1
        self._ahead.extend(zip(guesses, logits[1:], strict=True))
        return logits[:1]

    def _guess(self, count: int) -> list[int]:
        """Returns the draft's next tokens, each at the point at which the target's will be drawn."""
        guesses: list[int] = []
        while len(guesses) < count:
            logits = self.draft.run(np.array([self._unread], np.int64))
            guesses.append(draw(logits[0], self._drawing, self._point(self._drawn + len(guesses))))
            self._unread = guesses[-1:]
        self.guessed += len(guesses)
        self._unread = [] if guesses else self._unread
        return guesses

    def _point(self, number: int) -> float:
        """Returns the point at which the answer's token of that number is drawn."""
        while len(self._points) <= number:
            self._points = np.append(self._points, self._random.random(POINTS))
        return float(self._points[number])
