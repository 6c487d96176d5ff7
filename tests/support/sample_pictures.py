"""A report of an image generator made up for tests: LlamaGen's shapes, invented figures, real images."""

from __future__ import annotations

from typing import Any

import numpy as np
from PIL import Image

from edgeprune.evaluate.grids import data_uri
from edgeprune.report.images import pictures_part
from tests.support.sample_reports import estimated, measured_content

REFERENCE = "the dense model's other samples"


def noise(height: int = 56, width: int = 112, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def distances(kernel: float, frechet: float, precision: float, recall: float) -> dict[str, Any]:
    """As asdict of evaluate.distances.Distances comes back from a journal."""
    return {
        "images": 500,
        "reference_images": 600,
        "network": "EfficientNet-lite0 57934424",
        "kernel": [kernel, kernel - 0.002, kernel + 0.003],
        "frechet": [frechet, 11.234],
        "precision": [precision, precision - 0.04, precision + 0.03],
        "recall": [recall, recall - 0.05, recall + 0.05],
    }


def found(**changes: Any) -> dict[str, Any]:
    """What results.Quality.pictures holds; the fitted model's pictures are somewhat farther off."""
    return {
        "images": 500,
        "at_once": 4,
        "cfg": 1.75,
        "temperature": 1.0,
        "reference": REFERENCE,
        "dense": distances(0.0001, 11.5, 0.81, 0.79),
        "fitted": distances(0.0123, 14.75, 0.74, 0.66),
        "missing": "",
        "difference": [0.0122, 0.0101, 0.0151],
        "dense_grid": data_uri(noise()),
        "fitted_grid": data_uri(noise(seed=1)),
        "classes": [207, 360, 387, 974, 88, 979, 417, 279],
        "side": 28,
        **changes,
    }


def pictures_content(**changes: Any) -> dict[str, Any]:
    """changes: of what was found of the pictures."""
    content = measured_content()
    for seconds, noticed in zip((0.6432, 0.4321), content["experience"].values(), strict=True):
        noticed |= {
            "reading_speed": None,
            "sequences": estimated(21, "sequences"),
            "seconds_per_image": estimated(seconds, "s"),
        }
    none = dict.fromkeys(("answers", "prompt", "dense_sample", "fitted_sample"))
    return content | {
        "deploy": [
            {"title": "Try it on this machine", "command": "edgeprune run bundle --class 207 --output grid.png"}
        ],
        "workload": {"batch": 8, "prompt": 1, "context": 256},
        "quality": content["quality"] | none | {"pictures": pictures_part(found(**changes))},
    }
