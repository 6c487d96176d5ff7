"""What every possible cut of a model would cost on given samples: measured once, then kept in the cache."""

from __future__ import annotations

import hashlib
import os
from typing import TYPE_CHECKING

import numpy as np

from edgeprune.cache import cache_folder
from edgeprune.model.model import Model
from edgeprune.progress import Progress

if TYPE_CHECKING:
    from edgeprune.search.widths import Sensitivities

VERSION = 5  # of what is kept; another number measures again


def sensitivities_of(model: Model, ids: np.ndarray, method: str, seed: int, progress: Progress) -> Sensitivities:
    """Sensitivities with their measured response, for a method's score and samples (samples, length) int64."""
    import torch

    from edgeprune.search.widths import Sensitivities
    from edgeprune.pruning.methods import method_named
    from edgeprune.search.sensitivity import measure_response, measure_sensitivities

    how = method_named(method)
    named = f"{VERSION} {model.fingerprint} {how.score.__name__} {how.recovery.value} {seed}"
    key = hashlib.sha256(named.encode() + ids.tobytes()).hexdigest()
    path = cache_folder() / "sensitivities" / f"{key}.npz"
    if not path.is_file():
        samples = torch.from_numpy(ids)
        advance = progress.stage("measure sensitivities", 3 * len(model.decoder.layers))
        found = measure_sensitivities(model, samples, how.score, seed, advance)
        advance = progress.stage("probe the loss", 4)
        found = measure_response(model, samples, found, how, seed, advance)
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f"{key}.{os.getpid()}.npz")
        np.savez(temporary, attention=found.attention, mlp=found.mlp, response=found.response)
        temporary.replace(path)
    with np.load(path) as arrays:
        return Sensitivities(arrays["attention"], arrays["mlp"], arrays["response"])
