"""The sketch of the calibration data's moments, which a bundle holds so that new texts can be compared with it.

It holds sums over the tokens of each sample, projected to few dimensions, and no text.
"""

from __future__ import annotations

import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from edgeprune.errors import InputError
from edgeprune.pipeline.results import Candidate, keeps_checkpoint

if TYPE_CHECKING:
    from edgeprune.pipeline.stages import Run

SKETCH_FILE = "moments.npz"
SAMPLES = 32  # of the calibration data, at most
FITTED, DENSE = "fitted", "dense"  # models that may have read the samples


@dataclass(frozen=True)
class Sketch:
    """moments: as evaluate.drift.sketches returns them. reader: which model read the samples, the fitted one unless the
    bundle has no checkpoint of it; length: tokens of each."""

    moments: np.ndarray
    reader: str
    length: int


def sketch_file(run: Run, index: int, chosen: Candidate) -> Path | None:
    """Returns the file of a rung's sketch: the folder stage `moments-{index}`. None for an image generator."""
    setup = run.setup
    if not setup.kind.writes_text:
        return None
    from edgeprune.evaluate.drift import sketches
    from edgeprune.model.tokens.vocabulary import read_vocabulary

    def fill(folder: Path) -> None:
        model, ids = setup.model, run.samples.calibration[:SAMPLES]
        has_checkpoint = keeps_checkpoint(setup, chosen)
        if has_checkpoint:
            model, vocabulary = chosen.model, read_vocabulary(chosen.model.directory)
            ids = ids if vocabulary is None else vocabulary.reduce(ids)
        advance = run.progress.stage("sketch the calibration data", len(model.decoder.layers))
        moments = sketches(model, ids, advance)
        np.savez(folder / SKETCH_FILE, moments=moments, fitted=has_checkpoint, length=ids.shape[1])

    return run.journal.folder_stage(f"moments-{index}", fill) / SKETCH_FILE


def read_sketch(path: Path) -> Sketch:
    """Returns the sketch of a file. Raises InputError where it is none."""
    try:
        with np.load(path, allow_pickle=False) as stored:
            moments, fitted, length = (stored[name] for name in ("moments", "fitted", "length"))
    except (OSError, ValueError, KeyError, zipfile.BadZipFile):
        raise InputError(f"{path} cannot be read", "Give the calibration data itself: --since PATH.") from None
    return Sketch(moments, FITTED if fitted else DENSE, int(length))
