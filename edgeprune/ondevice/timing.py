"""The timing of functions on a busy machine: warm-up, interleaved blocks, percentiles, intervals.

This file also runs on the device: Python 3.10, standard library and numpy. It knows no runtime.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from math import sqrt
from statistics import NormalDist
from typing import Any

import numpy as np

from edgeprune.ondevice.durations import timing

MIN_BLOCKS = 6
LONG_BLOCKS = 5  # a run of so many blocks' time is long: filling the caches anew is nothing in it
GROWTH = 1.5  # of the rounds between two checks of the precision: stopping at any lucky round would cover less
CONFIDENCE = 0.95
DRAWS = 1000  # of the bootstrap


@dataclass(frozen=True)
class Interval:
    """A median with the bounds of its 95 % confidence interval."""

    value: float
    low: float
    high: float

    @property
    def relative_half_width(self) -> float:
        """Half the width of the interval, as a share of the median."""
        return (self.high - self.low) / 2 / self.value


@dataclass(frozen=True)
class Timings:
    """The milliseconds of every run by name: (blocks, runs in a block); block k of all names ran at the same time."""

    blocks: dict[str, np.ndarray]

    def percentiles(self, name: str) -> dict[str, float]:
        """Returns p50, p90, p99 and the median absolute deviation of all runs, in ms."""
        runs = self.blocks[name].ravel()
        p50, p90, p99 = np.percentile(runs, [50, 90, 99])
        return {"p50": float(p50), "p90": float(p90), "p99": float(p99), "mad": float(np.median(np.abs(runs - p50)))}

    def median(self, name: str, seed: int = 0) -> Interval:
        """Returns the median of all runs in ms, with its interval by a bootstrap over whole blocks."""
        blocks = self.blocks[name]  # (blocks, runs)
        # (draws, blocks): the blocks of each draw, with repetition.
        picks = np.random.default_rng(seed).integers(len(blocks), size=(DRAWS, len(blocks)))
        medians = np.median(blocks[picks].reshape(DRAWS, -1), axis=1)
        return _interval(float(np.median(blocks)), medians, len(blocks))

    def ratio(self, name: str, reference: str, seed: int = 0) -> Interval:
        """Returns the median over blocks of the ratio of two medians within a block, in which common drift cancels."""
        # (blocks,)
        logs = np.log(np.median(self.blocks[name], axis=1)) - np.log(np.median(self.blocks[reference], axis=1))
        picks = np.random.default_rng(seed).integers(len(logs), size=(DRAWS, len(logs)))
        return _interval(float(np.exp(np.median(logs))), np.exp(np.median(logs[picks], axis=1)), len(logs))


def _interval(value: float, draws: np.ndarray, blocks: int) -> Interval:
    """Returns a median with the interval that its bootstrap draws (draws,) give, which contains the median."""
    tail = _tail(blocks)
    low, high = np.percentile(draws, [100 * tail, 100 * (1 - tail)])
    return Interval(value, min(value, float(low)), max(value, float(high)))


def _tail(blocks: int) -> float:
    """Returns the share of the draws outside each bound: the percentile interval, expanded for few blocks.

    It is Phi(-sqrt(n / (n - 1)) t) with Student's t of n - 1 degrees of freedom (Hesterberg 2015, "What
    Teachers Should Know About the Bootstrap"), t by its expansion around the normal quantile
    (Abramowitz and Stegun 26.7.5). Without it eight blocks cover 91 % instead of 95 %.
    """
    freedom, normal = blocks - 1, NormalDist()
    z = normal.inv_cdf((1 + CONFIDENCE) / 2)
    t = z + (z**3 + z) / (4 * freedom) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * freedom**2)
    return normal.cdf(-sqrt(blocks / freedom) * t)


def interleave(
    runs: Mapping[str, Callable[[], float]],
    seconds: float,
    precision: float = 0.01,
    block_ms: float | None = None,
    min_runs: int = 0,
    clock: Callable[[], float] = time.perf_counter,
) -> Timings:
    """Times all runs in turn, a block of each, after a warm-up; the order is reversed every round (ABBA).

    A run returns its own milliseconds, by whichever clock suits it; `clock` limits the whole. Where several take
    turns, each block begins with one run that does not count, unless it is long: the weights of the others are in the
    caches, and their threads still spin.

    The timing ends when the interval of every ratio to the first name (or, of one name alone, of its median) has a
    relative half width below `precision`, which is checked after MIN_BLOCKS rounds and at growing distances from
    then on; or after `seconds` and MIN_BLOCKS rounds; but never before `min_runs` runs of each.
    """
    block_ms = timing().block_ms if block_ms is None else block_ms
    usual = {name: _warm_up(run) for name, run in runs.items()}  # ms
    counts = {name: max(1, round(block_ms / ms)) for name, ms in usual.items()}
    settling = [name for name, ms in usual.items() if len(runs) > 1 and ms < LONG_BLOCKS * block_ms]
    blocks: dict[str, list[list[float]]] = {name: [] for name in runs}
    names = list(runs)
    begin, next_check = clock(), float(MIN_BLOCKS)
    while True:
        # One round: a block of each.
        for name in names:
            if name in settling:
                runs[name]()
            blocks[name].append([runs[name]() for _ in range(counts[name])])
        names.reverse()
        # Check the precision when its turn has come, or when the time is over.
        rounds = len(blocks[names[0]])
        late = clock() - begin >= seconds
        few = rounds < MIN_BLOCKS or rounds * min(counts.values()) < min_runs
        if few or not (late or rounds >= next_check):
            continue
        next_check = GROWTH * rounds
        timings = Timings({name: np.array(times) for name, times in blocks.items()})
        if late or _is_precise(timings, list(runs), precision):
            return timings


def _is_precise(timings: Timings, names: list[str], precision: float) -> bool:
    """Returns whether every ratio to the first name, or the median of one name alone, is precise enough."""
    if len(names) == 1:
        return timings.median(names[0]).relative_half_width < precision
    return all(timings.ratio(name, names[0]).relative_half_width < precision for name in names[1:])


def _warm_up(run: Callable[[], float]) -> float:
    """Runs for at least the time of a warm-up; returns the median of the runs' ms."""
    times: list[float] = []
    while sum(times) < 1e3 * timing().warm_up_seconds or len(times) < 2:
        times.append(run())
    return float(np.median(times))


def stopwatch(run: Callable[[], None], clock: Callable[[], float] = time.perf_counter) -> Callable[[], float]:
    """Returns a run that returns its own milliseconds by the clock."""

    def timed() -> float:
        start = clock()
        run()
        return 1e3 * (clock() - start)

    return timed


def described(timings: Timings, names: list[str]) -> dict[str, Any]:
    """Returns timings as JSON: percentiles and median of each name, and of all but the first the ratio to it."""
    result: dict[str, Any] = {
        name: {"percentiles": timings.percentiles(name), "median": asdict(timings.median(name))} for name in names
    }
    for name in names[1:]:
        result[name]["ratio"] = asdict(timings.ratio(name, names[0]))
    return result
