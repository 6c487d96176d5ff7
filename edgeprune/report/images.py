"""The part of report.json about an image generator: pictures of both models side by side, and how far they are off.

It draws and compares nothing itself. `pictures_part` takes results.Quality.pictures, in the form that a journal holds:

    images      int: drawn from each model
    at_once     int: pictures in a batch of the workload, half of the batch where they are guided
    cfg         float: the guidance with which they were drawn; 1: none
    temperature float
    reference   str: what the distances are to: "the dense model's other samples", or a folder's name
    dense       dict or None: asdict(evaluate.distances.Distances) of the dense model to the reference
    fitted      dict or None: the same of the fitted model
    missing     str: why there are no distances, and how to get them; "" where there are
    difference  [value, low, high] or None: evaluate.distances.kernel_difference(reference, dense, fitted)
    dense_grid  str: evaluate.grids.data_uri of some of the dense model's pictures
    fitted_grid str: of the fitted model's, from the same seeds and classes, in the same order
    classes     list of int: classes of the grid's pictures, row by row; empty where there are none
    side        int: pixels of one picture, each side
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any

from pydantic import Field, model_validator

from edgeprune.report.base import Strict

Grid = Annotated[str, Field(pattern=r"^data:image/(png|jpeg);base64,[A-Za-z0-9+/]+=*$")]


class Interval(Strict):
    """A value with its 95 % interval over images."""

    value: float
    low: float
    high: float


class Frechet(Strict):
    """A Frechet distance with the value that sampling alone gives."""

    value: float
    floor: float = Field(description="of two random parts of the reference: what sampling alone gives")


class Distances(Strict):
    """The distances of a model's pictures from the reference, by the features of a network."""

    images: int
    reference_images: int
    network: str = Field(description="whose features they are: figures of different networks do not compare")
    kernel: Interval = Field(description="unbiased squared MMD of the polynomial kernel, as in KID; 0: no distance")
    frechet: Frechet = Field(description="as in FID; biased: the fewer images, the larger")
    precision: Interval = Field(description="share of pictures that lie within the reference (k = 3): fidelity")
    recall: Interval = Field(description="share of the reference that lies within the pictures: diversity")


class Pictures(Strict):
    """Pictures of the dense and the fitted model from the same seeds and classes."""

    images: int = Field(description="number of images drawn from each model")
    at_once: int = Field(ge=1, description="pictures in a batch of the workload; a guided one takes two sequences")
    cfg: float = Field(description="guidance with which they were drawn; 1: none")
    temperature: float
    reference: str = Field(description="pictures that the distances are to")
    dense: Distances | None
    fitted: Distances | None
    missing: str = Field(description="why there are no distances, and how to get them")
    difference: Interval | None = Field(
        description="kernel distance of the fitted model less the dense model's, paired by seed"
    )
    dense_grid: Grid = Field(description="some of the dense model's pictures, as an image's data URI")
    fitted_grid: Grid = Field(description="the fitted model's, in the same order")
    classes: list[int] = Field(description="of the grid's pictures, row by row; empty: no classes")
    side: int = Field(description="pixels of one picture, each side")

    @model_validator(mode="after")
    def _both_or_none(self) -> Pictures:
        """Raises ValueError for the distances of one model without the other's."""
        if (self.dense is None) != (self.fitted is None):
            raise ValueError("only one of the two models has distances")
        return self


def pictures_part(pictures: Mapping[str, Any]) -> Pictures:
    """Returns the report's form of an evaluation's pictures; see the module for their shape."""
    sides = {name: pictures[name] and _distances(pictures[name]) for name in ("dense", "fitted")}
    return Pictures(**{**pictures, **sides, "difference": pictures["difference"] and _interval(pictures["difference"])})


def _distances(distances: Mapping[str, Any]) -> Distances:
    """Returns the report's form of evaluate.distances.Distances as a dict."""
    intervals = {name: _interval(distances[name]) for name in ("kernel", "precision", "recall")}
    value, floor = distances["frechet"]
    return Distances(**{**distances, **intervals, "frechet": Frechet(value=value, floor=floor)})


def _interval(bounds: Sequence[float]) -> Interval:
    value, low, high = bounds
    return Interval(value=value, low=low, high=high)
