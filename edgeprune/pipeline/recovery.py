"""The recovery of a candidate: its rows of text, and the state of its training in the journal's folder.

How a model is trained is in pruning/recover.py.
"""

from __future__ import annotations

from collections.abc import Iterator
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

    def draw(first: int, count: int) -> torch.Tensor:
        seed = setup.request.seed + FIRST_SEED + first
        whole = length if setup.kind.writes_text else setup.length  # of a picture the last code is never fed
        ids = setup.kind.draw_samples(graph, setup.model, count, whole, seed, Silent(), samples.calibration)
        return torch.from_numpy(np.ascontiguousarray(ids[:, :length]))

    is_own = setup.samples.calibration is None
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
