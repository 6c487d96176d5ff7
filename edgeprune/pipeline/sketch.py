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

if TYPE_CHECKING:
    from edgeprune.pipeline.stages import Run

SKETCH_FILE = "moments.npz"
SAMPLES = 32  # of the calibration data, at most


@dataclass(frozen=True)
class Sketch:
    """moments: as evaluate.drift.sketches returns them for the dense model; length: tokens of a sample."""

    moments: np.ndarray
    length: int


def sketch_file(run: Run) -> Path | None:
    """Returns the file of a run's sketch: the folder stage `moments`. None for an image generator.

    The dense model reads the samples. The fitted one was solved on them, and reads them otherwise than new text of the
    same kind.
    """
    setup = run.setup
    if not setup.kind.writes_text:
        return None
    from edgeprune.evaluate.drift import sketches

    def fill(folder: Path) -> None:
        ids = run.samples.calibration[:SAMPLES]
        advance = run.progress.stage("sketch the calibration data", len(setup.model.decoder.layers))
        np.savez(folder / SKETCH_FILE, moments=sketches(setup.model, ids, advance), length=ids.shape[1])

    return run.journal.folder_stage("moments", fill, run.parts.samples) / SKETCH_FILE


def read_sketch(path: Path) -> Sketch:
    """Returns the sketch of a file. Raises InputError where it is none."""
    try:
        with np.load(path, allow_pickle=False) as stored:
            return Sketch(stored["moments"], int(stored["length"]))
    except (OSError, ValueError, KeyError, zipfile.BadZipFile):
        raise InputError(f"{path} cannot be read", "Give the calibration data itself: --since PATH.") from None
