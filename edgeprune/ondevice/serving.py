"""The service of one model to many requests: a queue, slots with a KV cache each, and the steps of the engine.

This file also runs on the device: Python 3.10 and numpy. It knows token ids, no text and no protocol.

One thread runs the engine, in rounds: each takes every answer one token further and reads a part of one prompt. So a
long prompt holds up the answers of others by one part at a time. Where the engine takes several sequences at once, a
step is always of all slots, those that are free or reading included: products round differently for another number of
rows, but not for other rows. Parts of prompts begin at multiples of PART. So a greedy answer is the one that its
request would get from the same service alone, to the last bit. For the same reason only whole parts of prompts are used
again by a request that begins alike.
"""

from __future__ import annotations

import functools
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from edgeprune.errors import EdgepruneError, NumericalError
from edgeprune.ondevice.reference import StepRunner
from edgeprune.ondevice.sampling import Drawing, draw

PART = 64  # tokens of a prompt that are read at a time
STOPPED, FULL = "stop", "length"  # why an answer ended: an end token or what the client waits for; as long as asked for
LOGGER = logging.getLogger(__name__)


@dataclass(frozen=True)
class Token:
    """A drawn token: its id and, where a job asks for them, its log probability and those of the likeliest ones."""

    id: int
    logprob: float = 0.0
    likeliest: tuple[tuple[int, float], ...] = ()


@dataclass(eq=False)
class Job:
    """A request to the model.

    prompt: token ids, at least one; most: new tokens; ends: ids that end the answer; likeliest: of how many tokens log
    probabilities are asked for, None: of none, not the drawn one's either. on_token is called in the engine's thread
    with each token, and returns whether the answer goes on; on_end once, with STOPPED, FULL or an error, unless the job
    was cancelled. Setting `cancelled` ends the job at the next round.
    """

    prompt: Sequence[int]
    most: int
    drawing: Drawing
    ends: frozenset[int]
    on_token: Callable[[Token], bool]
    on_end: Callable[[str | Exception], None]
    likeliest: int | None = None
    cancelled: bool = False
    reused: int = 0  # tokens of the prompt that a slot held already
    drawn: int = 0
    submitted: float = field(default_factory=time.monotonic)
    last: float = 0.0  # the time of the last token


class Busy(Exception):
    """All slots are taken and the queue is full; seconds: when it is worth to ask again."""

    def __init__(self, seconds: int) -> None:
        super().__init__(seconds)
        self.seconds = seconds


@dataclass
class Counts:
    """The work of the service so far, in requests, tokens and seconds."""

    ended: int = 0
    failed: int = 0
    cancelled: int = 0
    refused: int = 0
    prompt_tokens: int = 0
    reused_tokens: int = 0
    new_tokens: int = 0
    first_token_seconds: float = 0.0  # from the request to its first token, of all that had one
    first_tokens: int = 0
    token_seconds: float = 0.0  # between tokens of one answer
    later_tokens: int = 0


class Batched(Protocol):
    """A runner of several sequences, each with a past of its own."""

    batch: int

    def row(self, place: int) -> StepRunner:
        """Returns a runner of one of them."""

    def advance(self, tokens: np.ndarray, pasts: np.ndarray) -> np.ndarray:
        """Returns the logits (batch, vocabulary) behind one token of each sequence. tokens, pasts: (batch,) int64."""


@dataclass(frozen=True)
class Runners:
    """The engine of a service: a runner for each slot, and the one whose sequences these are where a step takes all of
    them further; None: each takes a step of its own."""

    each: Sequence[StepRunner]
    together: Batched | None = None

    @classmethod
    def of_rows(cls, together: Batched) -> Runners:
        """Returns those of a runner's sequences."""
        return cls([together.row(place) for place in range(together.batch)], together)

    def close(self) -> None:
        """Frees what an engine holds on a GPU."""
        for runner in (*self.each, self.together):
            if hasattr(runner, "close"):
                runner.close()


class Slot:
    """A place for one request at a time: a runner with its KV cache.

    held: the tokens at the beginning of the cache that came as whole parts of a prompt.
    """

    def __init__(self, runner: StepRunner) -> None:
        self.runner, self.held = runner, []
        self.job: Job | None = None
        self.past, self.token = 0, 0
        self.random: np.random.Generator | None = None

    @property
    def is_reading(self) -> bool:
        """Returns whether a part of the prompt is left to read."""
        return self.job is not None and self.past < len(self.job.prompt)

    def begin(self, job: Job, reused: int) -> None:
        """Takes a job whose first tokens the cache holds."""
        self.job, self.past, job.reused = job, reused, reused
        self.held = list(job.prompt[:reused])
        self.random = np.random.default_rng(job.drawing.seed)
        self.runner.reset(reused)
        if hasattr(self.runner, "begin"):  # a draft guesses what will be drawn
            self.runner.begin(job.drawing, len(job.prompt))

    def read(self) -> np.ndarray | None:
        """Reads the next part of the prompt; returns the logits (vocabulary,) behind its last one, else None."""
        end = min(len(self.job.prompt), (self.past // PART + 1) * PART)
        logits = self._run(self.job.prompt[self.past : end])
        if end % PART == 0:
            self.held = list(self.job.prompt[:end])
        return logits if end == len(self.job.prompt) else None

    def step(self) -> np.ndarray:
        """Runs the last drawn token; returns the logits (vocabulary,) behind it."""
        return self._run([self.token])

    def idle(self) -> int:
        """Returns where a step of all slots may write a token that nobody reads: behind what is worth keeping."""
        if self.job is not None:
            return self.past
        if len(self.held) == self.runner.capacity:
            self.held = self.held[:-PART]
        return len(self.held)

    def _run(self, ids: Sequence[int]) -> np.ndarray:
        logits = self.runner.run(np.array([ids], np.int64))[0]
        self.past += len(ids)
        return logits

    def take_from(self, other: Slot, tokens: int) -> None:
        """Copies the first tokens of another slot's cache, which holds them as whole parts."""
        for own, theirs in zip(self.runner.buffers, other.runner.buffers, strict=True):
            own[:, :, :tokens] = theirs[:, :, :tokens]


def common(held: Sequence[int], prompt: Sequence[int]) -> int:
    """Returns how many tokens at the beginning of a prompt can be used again: whole parts, not the last token."""
    most, same = min(len(held), len(prompt) - 1), 0
    while same < most and held[same] == prompt[same]:
        same += 1
    return same // PART * PART


class Service:
    """The engine's thread, the slots and the queue. `with` or `close` ends it.

    open_runners: opens the engine; it is called in the engine's thread, to which CUDA binds an engine. Raises what it
    raises.
    """

    def __init__(self, open_runners: Callable[[], Runners], most_waiting: int) -> None:
        self.slots: list[Slot] = []
        self._together: Batched | None = None
        self.most_waiting, self.counts = most_waiting, Counts()
        self._open_runners = open_runners
        self._waiting: deque[Job] = deque()
        self._changed = threading.Condition()
        self._closed, self._error = False, None
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()
        with self._changed:
            while not self.slots and self._error is None:
                self._changed.wait()
        if self._error is not None:
            raise self._error
        self.capacity, self.vocab_size = self.slots[0].runner.capacity, self.slots[0].runner.vocab_size

    def __enter__(self) -> Service:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def waiting(self) -> int:
        """Returns how many jobs wait for a slot."""
        return len(self._waiting)

    @property
    def guesses(self) -> tuple[int, int] | None:
        """Returns how many tokens drafts guessed, and how many of these were drawn; None: there is no draft."""
        drafted = [slot.runner for slot in self.slots if hasattr(slot.runner, "guessed")]
        return (sum(one.guessed for one in drafted), sum(one.accepted for one in drafted)) if drafted else None

    @property
    def active(self) -> int:
        """Returns how many slots have a job."""
        return sum(slot.job is not None for slot in self.slots)

    def submit(self, job: Job) -> None:
        """Queues a job. Raises Busy where no more may wait."""
        with self._changed:
            free = len(self.slots) - self.active
            if len(self._waiting) >= self.most_waiting + free:
                self.counts.refused += 1
                raise Busy(self._seconds_to_wait())
            self._waiting.append(job)
            self._changed.notify()

    def close(self) -> None:
        """Ends the thread behind the step that it is in; jobs that were not answered get no call."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join()

    def _seconds_to_wait(self) -> int:
        """Returns about how long a slot takes to become free: as long as answers took so far, shared by the slots."""
        counts = self.counts
        done = max(1, counts.ended)
        seconds = (counts.first_token_seconds + counts.token_seconds) / done / len(self.slots)
        return max(1, min(60, round(seconds)))

    def _run(self) -> None:
        """Opens the runners, serves, and closes them."""
        try:
            runners = self._open_runners()
            self._together = runners.together
            slots, error = [Slot(runner) for runner in runners.each], None
        except Exception as found:
            slots, error = [], found
        with self._changed:
            self.slots, self._error = slots, error
            self._changed.notify_all()
        if error is None:
            try:
                self._serve()
            finally:
                runners.close()

    def _serve(self) -> None:
        """Runs rounds for as long as there is work, and waits for more."""
        while True:
            with self._changed:
                while not self._closed and not self._waiting and not self.active:
                    self._changed.wait()
                if self._closed:
                    return
                self._admit()
            answering = [slot for slot in self.slots if slot.job is not None and not slot.is_reading]
            if answering and self._together is not None:
                self._step_together(answering)
            else:
                for slot in answering:
                    self._advance(slot, slot.step)
            reading = [slot for slot in self.slots if slot.is_reading]
            if reading:
                first = min(reading, key=lambda slot: slot.job.submitted)
                self._advance(first, first.read)

    def _admit(self) -> None:
        """Gives waiting jobs to free slots, each to the one that holds most of its beginning."""
        for slot in self.slots:
            if slot.job is not None and slot.job.cancelled:
                self.counts.cancelled += 1
                slot.job = None
        while self._waiting and (free := [slot for slot in self.slots if slot.job is None]):
            job = self._waiting.popleft()
            if job.cancelled:
                self.counts.cancelled += 1
                continue
            best = max(self.slots, key=lambda slot: common(slot.held, job.prompt))
            reused = common(best.held, job.prompt)
            slot = best if best in free else min(free, key=lambda one: len(one.held))
            if slot is not best and reused and hasattr(slot.runner, "buffers"):
                slot.take_from(best, reused)
            elif slot is not best:
                reused = common(slot.held, job.prompt)
            slot.begin(job, reused)
            self.counts.prompt_tokens += len(job.prompt)
            self.counts.reused_tokens += reused

    def _step_together(self, answering: Sequence[Slot]) -> None:
        """Runs the last tokens of these slots in one step of all, and draws those behind them."""
        tokens = np.array([slot.token if slot in answering else 0 for slot in self.slots], np.int64)
        pasts = np.array([slot.idle() for slot in self.slots], np.int64)
        logits: np.ndarray | Exception
        try:
            logits = self._together.advance(tokens, pasts)  # (slots, vocabulary)
        except Exception as error:
            logits = error
        for place, slot in enumerate(self.slots):
            if slot in answering:
                self._advance(slot, functools.partial(_behind, slot, logits, place))

    def _advance(self, slot: Slot, run: Callable[[], np.ndarray | None]) -> None:
        """Runs a step of a slot and draws the token behind it; an error ends the job, not the service."""
        try:
            logits = run()
            if logits is not None:
                self._draw(slot, logits)
        except Exception as error:
            if not isinstance(error, EdgepruneError):
                LOGGER.exception("a request failed")
            slot.held = []
            self._end(slot, error)

    def _draw(self, slot: Slot, logits: np.ndarray) -> None:
        """Draws the next token of an answer, and ends the answer where it is complete."""
        if not np.isfinite(logits).all():
            raise NumericalError("the logits are not finite", "Check the model's weights with `edgeprune run`.")
        job, now = slot.job, time.monotonic()
        drawn = draw(logits, job.drawing, slot.random.random())
        counts = self.counts
        if job.drawn:
            counts.later_tokens += 1
            counts.token_seconds += now - job.last
        else:
            counts.first_tokens += 1
            counts.first_token_seconds += now - job.submitted
        job.last = now
        job.drawn += 1
        counts.new_tokens += 1
        slot.token = drawn
        if drawn in job.ends or not job.on_token(_token(logits, drawn, job.likeliest)):
            self._end(slot, STOPPED)
        elif job.drawn == job.most:
            self._end(slot, FULL)

    def _end(self, slot: Slot, how: str | Exception) -> None:
        """Frees a slot, and tells its client."""
        job, slot.job = slot.job, None
        if isinstance(how, Exception):
            self.counts.failed += 1
        else:
            self.counts.ended += 1
        job.on_end(how)


def _behind(slot: Slot, logits: np.ndarray | Exception, place: int) -> np.ndarray:
    """Returns a slot's logits (vocabulary,) of a step of all. Raises the error of the step."""
    if isinstance(logits, Exception):
        raise logits
    slot.past += 1
    return logits[place]


def _token(logits: np.ndarray, drawn: int, likeliest: int | None) -> Token:
    """Returns a token with the log probabilities of logits (vocabulary,) that are asked for."""
    if likeliest is None:
        return Token(drawn)
    logits = logits.astype(np.float64) - logits.max()
    logprobs = logits - np.log(np.exp(logits).sum())
    best = np.argsort(-logprobs, kind="stable")[:likeliest]
    return Token(drawn, float(logprobs[drawn]), tuple((int(one), float(logprobs[one])) for one in best))
