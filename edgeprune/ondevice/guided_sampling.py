"""Codes of pictures from an exported graph, step by step, with guidance. It knows ids, no pixels.

Guided logits are u + (c - u) * cfg, of the class c and of no class u; both streams run in one batch. Order as in
LlamaGen: guidance, temperature, top-k, top-p, one draw.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from edgeprune.errors import EngineError, NumericalError
from edgeprune.ondevice.reference import StepRunner
from edgeprune.ondevice.sampling import choose


@dataclass(frozen=True)
class Sampling:
    """cfg: scale of the guidance, 1 for none. temperature 0: always the likeliest code. top_k 0, top_p 1: all codes."""

    cfg: float = 1.0
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0

    @property
    def streams(self) -> int:
        """Sequences of the batch for each picture."""
        return 2 if self.cfg > 1 else 1


def random_points(seed: int, first: int, count: int, tokens: int) -> np.ndarray:
    """(count, tokens) in [0, 1): the draws of pictures first, first + 1, ...; each has its own in any batch."""
    return np.stack([np.random.default_rng([seed, first + row]).random(tokens) for row in range(count)])


def draw_pictures(
    runner: StepRunner, openings: Sequence[int], null: int, sampling: Sampling, points: np.ndarray
) -> Iterator[np.ndarray]:
    """Codes (pictures,) int64 of every step, in the order of points (pictures, tokens) in [0, 1).

    openings: the token that each picture begins with; null: that of no class, whose own pictures guidance leaves as
    they are. The runner holds sampling.streams sequences of a picture. Raises EngineError where its cache is too
    short, NumericalError where logits are not finite.
    """
    count, tokens = points.shape
    if runner.capacity < tokens:
        raise EngineError(
            f"a picture has {tokens} tokens, the cache holds {runner.capacity}", "Export the model again."
        )
    guided = sampling.streams == 2
    ids = np.array([*openings, *([null] * count if guided else ())], np.int64)
    runner.reset()
    for step in range(tokens):
        logits = runner.run(ids[:, None]).astype(np.float64)
        if not np.isfinite(logits).all():
            raise NumericalError(
                f"the logits of code {step + 1} are not finite", "Use an fp32 graph, or check the model's weights."
            )
        if guided:
            with_class, without = logits[:count], logits[count:]
            logits = without + (with_class - without) * sampling.cfg
        drawn = choose(logits, sampling.temperature, sampling.top_p, points[:, step], sampling.top_k)
        yield drawn
        ids = np.tile(drawn, sampling.streams)
