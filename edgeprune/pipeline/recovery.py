"""The recovery of a candidate: its rows of text, and the state of its training in the journal's folder.

How a model is trained is in pruning/recover.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from edgeprune.model.model import Model
from edgeprune.pipeline.results import Samples
from edgeprune.pipeline.setup import Setup
from edgeprune.progress import Progress, Silent
from edgeprune.pruning.effort import Effort

if TYPE_CHECKING:
    import torch

PIECE = 4  # the share of a row that is the user's, of rows that continue it: one in so many tokens
FIRST_SEED = 1 << 20  # from the run's own, of the rows that are drawn: other ones than the samples'


def recovered_weights(
    setup: Setup, samples: Samples, graph: Path, model: Model, effort: Effort, folder: Path, progress: Progress
) -> tuple[Iterator[tuple[str, Any]], dict[str, Any]]:
    """Returns the weights of a pruned model after its recovery, in the order of its decoder's shapes, and what was done
    as pruning.recover.Recovered has it.

    graph: the dense model's, which draws rows of its own; folder: of the training's state.
    """
    import torch

    from edgeprune.model.tokens.vocabulary import read_vocabulary
    from edgeprune.pruning.recover import Rows, recover, rows_of

    length = setup.recovery_tokens

    is_own = setup.samples.calibration is None

    def draw(first: int, count: int) -> torch.Tensor:
        seed = setup.request.seed + FIRST_SEED + first

        def own(count: int) -> np.ndarray:
            whole = length if setup.kind.writes_text else setup.length  # of a picture the last code is never fed
            ids = setup.kind.draw_samples(graph, setup.model, count, whole, seed, Silent(), samples.calibration)
            return ids[:, :length]

        if is_own or not setup.kind.writes_text:
            return torch.from_numpy(np.ascontiguousarray(own(count)))
        return torch.from_numpy(with_continued(own, graph, samples.calibration, count, length, seed))

    users = None if is_own else rows_of(torch.from_numpy(samples.calibration), length)
    vocabulary = read_vocabulary(model.directory)
    progress.stage(f"recover: {effort}")
    weights, done = recover(
        setup.model,
        model,
        Rows(users, draw, length, setup.request.seed),
        effort,
        folder,
        model.weights["norm"].dtype,
        None if vocabulary is None else torch.from_numpy(vocabulary.kept),
        setup.recovery_rank,
        lambda step, steps: progress.track("recover", step, steps),
    )
    return weights, asdict(done)


def with_continued(
    own: Callable[[int], np.ndarray], graph: Path, users: np.ndarray, count: int, length: int, seed: int
) -> np.ndarray:
    """Returns rows (count, length) int64 of the dense model: every second one continues a piece of the user's text.

    own: draws so many rows of its own; graph: its graph, which continues; users: (any, tokens) int64.
    """
    from edgeprune.generate.text import continued

    generator, tokens = np.random.default_rng(seed), min(users.shape[1], length // PIECE)
    places = generator.integers(len(users), size=count // 2)
    begins = generator.integers(users.shape[1] - tokens + 1, size=count // 2)
    pieces = np.stack([users[place, begin : begin + tokens] for place, begin in zip(places, begins, strict=True)])
    rows = np.empty((count, length), np.int64)
    rows[::2] = own(count - count // 2)
    rows[1::2] = continued(graph, pieces, length, seed, Silent())
    return rows
