"""How far a model's images are from a reference, by the features that a network sees in both; see features.py.

All take features (images, d) and know nothing of the images. The kernel distance is the one to decide by: it is
unbiased, so it holds for a few hundred images, where the Frechet distance is mostly bias.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from edgeprune.errors import InputError
from edgeprune.evaluate.agreement import wilson

NEIGHBOURS = 3  # Kynkaanniemi et al. 2019, section 3
FEWEST_IMAGES = 8
DRAWS = 1000
BLOCK_BYTES = 1 << 27  # of a piece of a matrix over all pairs of images

Interval = tuple[float, float, float]  # value, low, high: 95 %


@dataclass(frozen=True)
class Distances:
    """Of a model's images to reference images. network: whose features they are; no two networks' figures compare.

    kernel: unbiased squared MMD, with a bootstrap's interval over images of both sides. frechet: the distance, and
    its floor: that of two random parts of the reference (see frechet_floor). precision: the share of images within
    the reference, recall: that of the reference within the images, both with Wilson's interval.
    """

    images: int
    reference_images: int
    network: str
    kernel: Interval
    frechet: tuple[float, float]
    precision: Interval
    recall: Interval


def distances(reference: np.ndarray, generated: np.ndarray, network: str, seed: int) -> Distances:
    """All of them, of features (images, d). Raises InputError where there are fewer than FEWEST_IMAGES."""
    precision, recall = precision_recall(reference, generated)
    return Distances(
        images=len(generated),
        reference_images=len(reference),
        network=network,
        kernel=kernel_distance(reference, generated, seed),
        frechet=(frechet_distance(reference, generated), frechet_floor(reference, len(generated), seed)),
        precision=precision,
        recall=recall,
    )


def kernel_distance(reference: np.ndarray, generated: np.ndarray, seed: int, draws: int = DRAWS) -> Interval:
    """Unbiased squared MMD with the kernel (x.y / d + 1)^3 (Binkowski et al. 2018); near 0, also below, where both
    are drawn from the same distribution. Interval: a bootstrap over the images of both."""
    reference, generated = _checked(reference, generated)
    old, new = _weights(len(reference), len(generated), seed=seed, draws=draws)
    return _interval(
        _within(reference, old) + _within(generated, new) - 2 * _kernel_means(reference, generated, old, new)
    )


def kernel_difference(
    reference: np.ndarray, first: np.ndarray, second: np.ndarray, seed: int, draws: int = DRAWS
) -> Interval:
    """Kernel distance of `second` to the reference less that of `first`: above 0, `second` is farther.

    Row i of both comes from the same seed and class: a draw takes both or neither, and the same reference.
    """
    reference, first, second = _checked(reference, first, second)
    if len(first) != len(second):
        raise InputError(f"{len(first)} and {len(second)} images do not pair", "Draw as many of each, of equal seeds.")
    old, new = _weights(len(reference), len(first), seed=seed, draws=draws)
    inside = _within(second, new) - _within(first, new)
    return _interval(
        inside - 2 * (_kernel_means(reference, second, old, new) - _kernel_means(reference, first, old, new))
    )


def frechet_distance(reference: np.ndarray, generated: np.ndarray) -> float:
    """|m_1 - m_2|^2 + tr(C_1 + C_2 - 2 (C_1 C_2)^(1/2)) of the sample means and covariances (Heusel et al. 2017)."""
    import torch

    try:
        from torchmetrics.image.fid import FrechetInceptionDistance
    except ImportError:
        raise InputError("torchmetrics is not installed", 'Install it with: pip install "edgeprune[images]"') from None
    reference, generated = _checked(reference, generated, fewest=2)
    as_they_are = torch.nn.Identity()
    as_they_are.num_features = reference.shape[1]
    metric = FrechetInceptionDistance(as_they_are)
    metric.update(torch.from_numpy(reference), real=True)
    metric.update(torch.from_numpy(generated), real=False)
    return max(0.0, float(metric.compute()))


def frechet_floor(reference: np.ndarray, images: int, seed: int) -> float:
    """Frechet distance of two random, disjoint parts of the reference, each of at most `images` and at most half of
    it: how far apart so many images of one distribution are."""
    count = min(images, len(reference) // 2)
    order = np.random.default_rng(seed).permutation(len(reference))
    return frechet_distance(reference[order[:count]], reference[order[count : 2 * count]])


def precision_recall(reference: np.ndarray, generated: np.ndarray) -> tuple[Interval, Interval]:
    """Shares of the generated images within the reference's manifold, and of the reference within theirs
    (Kynkaanniemi et al. 2019): within a ball around an image that reaches to its third nearest of the same set."""
    reference, generated = _checked(reference, generated)
    return _covered(generated, reference), _covered(reference, generated)


def _covered(images: np.ndarray, manifold: np.ndarray) -> Interval:
    """Share of images in a ball of the manifold's, with the interval for this manifold."""
    squared_radii = np.concatenate(
        [np.partition(square, NEIGHBOURS, axis=1)[:, NEIGHBOURS] for _, square in _squares(manifold, manifold)]
    )
    inside = sum(int((square <= squared_radii).any(axis=1).sum()) for _, square in _squares(images, manifold))
    return inside / len(images), *wilson(inside, len(images))


def _squares(first: np.ndarray, second: np.ndarray) -> Iterator[tuple[slice, np.ndarray]]:
    """Squared distances (rows of first, all of second), by pieces of rows; an image's to itself is its smallest."""
    lengths = np.square(second).sum(axis=1)
    for rows in _pieces(first, second):
        piece = first[rows]
        yield rows, np.maximum(np.square(piece).sum(axis=1)[:, None] + lengths - 2 * piece @ second.T, 0.0)


def _within(features: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Mean kernel of pairs of different images of one set, by draw."""
    return _kernel_means(features, features, weights, weights, same=True)


def _kernel_means(
    first: np.ndarray, second: np.ndarray, weights: np.ndarray, others: np.ndarray, same: bool = False
) -> np.ndarray:
    """Mean kernel of pairs of both sets, by draw (draws,): weights, others count how often a draw has each image.

    same: of one set; no image pairs with itself, also where a draw has it twice: what makes the estimate unbiased
    would be lost in the draws.
    """
    totals = np.zeros(len(weights))
    for rows in _pieces(first, second):
        kernel = (first[rows] @ second.T / first.shape[1] + 1) ** 3
        if same:
            kernel[np.arange(len(kernel)), np.arange(len(first))[rows]] = 0.0
        totals += np.einsum("dn,dn->d", weights[:, rows] @ kernel, others)
    pairs = weights.sum(axis=1) * others.sum(axis=1)
    return totals / (pairs - np.square(weights).sum(axis=1) if same else pairs)


def _pieces(first: np.ndarray, second: np.ndarray) -> Iterator[slice]:
    rows = max(1, BLOCK_BYTES // second.itemsize // len(second))
    return (slice(start, start + rows) for start in range(0, len(first), rows))


def _weights(*counts: int, seed: int, draws: int) -> list[np.ndarray]:
    """How often each image of a set is in each draw (1 + draws, images), for sets of so many; the first has all."""
    random = np.random.default_rng(seed)
    return [
        np.vstack([np.ones(count), random.multinomial(count, np.full(count, 1 / count), draws)]) for count in counts
    ]


def _interval(values: np.ndarray) -> Interval:
    """The estimate, which stands first, and the middle 95 % of its draws."""
    low, high = np.quantile(values[1:], [0.025, 0.975])
    return float(values[0]), float(low), float(high)


def _checked(*sets: np.ndarray, fewest: int = FEWEST_IMAGES) -> list[np.ndarray]:
    """In fp64: the third power of a kernel leaves fp32 too few digits for the difference of means."""
    if len(widths := {features.shape[1] for features in sets}) > 1:
        raise InputError(f"features of {sorted(widths)} values do not compare", "Take both from one network.")
    if (count := min(map(len, sets))) < fewest:
        raise InputError(f"{count} images are too few: at least {fewest} are needed", "Give or draw more images.")
    return [features.astype(np.float64) for features in sets]
