"""The generation of picture codes from an exported graph, step by step, with guidance. It knows ids, no pixels.

Guided logits are u + (c - u) * cfg, where c are the logits of the class and u those of no class; both streams run in
one batch. The order is that of LlamaGen: guidance, temperature, top-k, top-p, one draw.
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
    """The settings of the sampling.

    cfg: the scale of the guidance, 1 for none. temperature 0: always the likeliest code. top_k 0, top_p 1: all codes.
    """

    cfg: float = 1.0
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0

    @property
    def streams(self) -> int:
        """The sequences in the batch for each picture."""
        return 2 if self.cfg > 1 else 1


def random_points(seed: int, first: int, count: int, tokens: int) -> np.ndarray:
    """Returns points (count, tokens) in [0, 1) for the pictures first, first + 1, ..., the same in any batch."""
    return np.stack([np.random.default_rng([seed, first + row]).random(tokens) for row in range(count)])


def draw_pictures(
    runner: StepRunner, openings: Sequence[int], null: int, sampling: Sampling, points: np.ndarray
) -> Iterator[np.ndarray]:
    """Yields the codes (pictures,) int64 of every step, in the order of points (pictures, tokens) in [0, 1).

    openings: the token that each picture begins with. null: the token of no class; guidance does not change pictures
    that begin with it. The runner holds sampling.streams sequences for each picture. Raises EngineError where its
    cache is too short, NumericalError where logits are not finite, with or without guidance.
    """
    # Begin with the class of each picture and, for guidance, with no class after them: (streams * pictures,).
    count, tokens = points.shape
    if runner.capacity < tokens:
        raise EngineError(
            f"a picture has {tokens} tokens, the cache holds {runner.capacity}", "Export the model again."
        )
    guided = sampling.streams == 2
    ids = np.array([*openings, *([null] * count if guided else ())], np.int64)
    runner.reset()
    for step in range(tokens):
        logits = runner.run(ids[:, None]).astype(np.float64)  # (streams * pictures, vocabulary)
        if not np.isfinite(logits).all():
            raise NumericalError(
                f"the logits of code {step + 1} are not finite", "Use an fp32 graph, or check the model's weights."
            )
        # Mix the two streams, draw once for each picture, and continue both streams with the same code.
        if guided:
            with_class, without = logits[:count], logits[count:]
            with np.errstate(over="ignore", invalid="ignore"):
                logits = without + (with_class - without) * sampling.cfg  # (pictures, vocabulary)
            if not np.isfinite(logits).all():
                raise NumericalError(f"guidance by {sampling.cfg:g} is beyond floating point", "Try --cfg 1.75.")
        drawn = choose(logits, sampling.temperature, sampling.top_p, points[:, step], sampling.top_k)
        yield drawn
        ids = np.tile(drawn, sampling.streams)
