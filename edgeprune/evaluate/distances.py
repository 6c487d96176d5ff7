"""Distances of a model's images to reference images, by the features of features.py.

All functions take features (images, d) and know nothing of the images. The kernel distance is the one to decide by: it
is unbiased, so it holds for a few hundred images, where the Frechet distance is mostly bias.
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
BLOCK_BYTES = 1 << 27  # of a block of a matrix over all pairs of images

Interval = tuple[float, float, float]  # value, low, high: 95 %


@dataclass(frozen=True)
class Distances:
    """Distances of a model's images to reference images.

    network: whose features they are; figures of two networks do not compare. kernel: unbiased squared MMD, with the
    interval of a bootstrap over the images of both sides. frechet: the distance, and its floor, which is the distance
    of two random parts of the reference (see frechet_floor). precision: the share of images within the reference,
    recall: that of the reference within the images, both with Wilson's interval.
    """

    images: int
    reference_images: int
    network: str
    kernel: Interval
    frechet: tuple[float, float]
    precision: Interval
    recall: Interval


def distances(reference: np.ndarray, generated: np.ndarray, network: str, seed: int) -> Distances:
    """Returns all distances of features (images, d). Raises InputError where there are fewer than FEWEST_IMAGES."""
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
    """Returns the unbiased squared MMD with the kernel (x.y / d + 1)^3 (Binkowski et al. 2018), and its interval.

    It is near 0, possibly below, where both are drawn from the same distribution. The interval is that of a bootstrap
    over the images of both sides.
    """
    reference, generated = _checked(reference, generated)
    old, new = _weights(len(reference), len(generated), seed=seed, draws=draws)  # (1 + draws, images) each
    return _interval(
        _within(reference, old) + _within(generated, new) - 2 * _kernel_means(reference, generated, old, new)
    )


def kernel_difference(
    reference: np.ndarray, first: np.ndarray, second: np.ndarray, seed: int, draws: int = DRAWS
) -> Interval:
    """Returns the kernel distance of `second` to the reference less that of `first`; above 0, `second` is farther.

    Row i of both comes from the same seed and class, so a draw takes both rows or neither, and the same reference.
    """
    reference, first, second = _checked(reference, first, second)
    if len(first) != len(second):
        raise InputError(
            f"{len(first)} and {len(second)} images do not pair", "Draw as many of each, with equal seeds."
        )
    old, new = _weights(len(reference), len(first), seed=seed, draws=draws)  # (1 + draws, images) each
    inside = _within(second, new) - _within(first, new)  # (1 + draws,)
    return _interval(
        inside - 2 * (_kernel_means(reference, second, old, new) - _kernel_means(reference, first, old, new))
    )


def frechet_distance(reference: np.ndarray, generated: np.ndarray) -> float:
    """Returns the Frechet distance of the sample means and covariances (Heusel et al. 2017).

    It is |m_1 - m_2|^2 + tr(C_1 + C_2 - 2 (C_1 C_2)^(1/2)).
    """
    import torch

    try:
        from torchmetrics.image.fid import FrechetInceptionDistance
    except ImportError:
        raise InputError("torchmetrics is not installed", 'Install it with: pip install "edgeprune[images]"') from None
    reference, generated = _checked(reference, generated, fewest=2)
    unchanged = torch.nn.Identity()
    unchanged.num_features = reference.shape[1]
    metric = FrechetInceptionDistance(unchanged)
    metric.update(torch.from_numpy(reference), real=True)
    metric.update(torch.from_numpy(generated), real=False)
    return max(0.0, float(metric.compute()))


def frechet_floor(reference: np.ndarray, images: int, seed: int) -> float:
    """Returns how far apart so many images of one distribution are, by the Frechet distance.

    It is that of two random, disjoint parts of the reference, each of at most `images` and at most half of it.
    """
    count = min(images, len(reference) // 2)
    order = np.random.default_rng(seed).permutation(len(reference))
    return frechet_distance(reference[order[:count]], reference[order[count : 2 * count]])


def precision_recall(reference: np.ndarray, generated: np.ndarray) -> tuple[Interval, Interval]:
    """Returns the share of generated images within the reference's manifold, and of the reference within theirs.

    An image is within a manifold where it lies in a ball around one of its images that reaches to the third nearest of
    the same set (Kynkaanniemi et al. 2019).
    """
    reference, generated = _checked(reference, generated)
    return _covered(generated, reference), _covered(reference, generated)


def _covered(images: np.ndarray, manifold: np.ndarray) -> Interval:
    """Returns the share of images in a ball of the manifold, with the interval for this manifold."""
    # (manifold images,); an image is its own nearest, so its third nearest stands at NEIGHBOURS.
    squared_radii = np.concatenate(
        [np.partition(square, NEIGHBOURS, axis=1)[:, NEIGHBOURS] for _, square in _squares(manifold, manifold)]
    )
    # An image counts once, however many balls hold it.
    inside = sum(int((square <= squared_radii).any(axis=1).sum()) for _, square in _squares(images, manifold))
    return inside / len(images), *wilson(inside, len(images))


def _squares(first: np.ndarray, second: np.ndarray) -> Iterator[tuple[slice, np.ndarray]]:
    """Yields squared distances (rows of first, all of second) by blocks of rows.

    The distance of an image to itself is its smallest.
    """
    lengths = np.square(second).sum(axis=1)
    for rows in _pieces(first, second):
        block = first[rows]
        yield rows, np.maximum(np.square(block).sum(axis=1)[:, None] + lengths - 2 * block @ second.T, 0.0)


def _within(features: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Returns the mean kernel of pairs of different images of one set, (draws,)."""
    return _kernel_means(features, features, weights, weights, same=True)


def _kernel_means(
    first: np.ndarray, second: np.ndarray, weights: np.ndarray, others: np.ndarray, same: bool = False
) -> np.ndarray:
    """Returns the mean kernel of pairs of images, one of each set, for every draw: (draws,).

    weights, others: (draws, images), how often a draw has each image of the first and of the second set. same: both are
    one set; no image is paired with itself, also where a draw has it twice, or the draws would lose what makes the
    estimate unbiased.
    """
    totals = np.zeros(len(weights))
    for rows in _pieces(first, second):
        kernel = (first[rows] @ second.T / first.shape[1] + 1) ** 3  # (rows, images of second)
        if same:
            kernel[np.arange(len(kernel)), np.arange(len(first))[rows]] = 0.0
        # (draws, rows) @ (rows, images of second) -> (draws, images of second) -> (draws,)
        totals += np.einsum("dn,dn->d", weights[:, rows] @ kernel, others)
    pairs = weights.sum(axis=1) * others.sum(axis=1)  # (draws,)
    return totals / (pairs - np.square(weights).sum(axis=1) if same else pairs)


def _pieces(first: np.ndarray, second: np.ndarray) -> Iterator[slice]:
    """Returns blocks of rows of the first set, each of BLOCK_BYTES of pairs with the second."""
    rows = max(1, BLOCK_BYTES // second.itemsize // len(second))
    return (slice(start, start + rows) for start in range(0, len(first), rows))


def _weights(*counts: int, seed: int, draws: int) -> list[np.ndarray]:
    """Returns for sets of so many images how often each image is in each draw, (1 + draws, images) for each set.

    The first row has every image once.
    """
    random = np.random.default_rng(seed)
    return [
        np.vstack([np.ones(count), random.multinomial(count, np.full(count, 1 / count), draws)]) for count in counts
    ]


def _interval(values: np.ndarray) -> Interval:
    """Returns the estimate, which stands first in values (1 + draws,), and the middle 95 % of its draws."""
    low, high = np.quantile(values[1:], [0.025, 0.975])
    return float(values[0]), float(low), float(high)


def _checked(*sets: np.ndarray, fewest: int = FEWEST_IMAGES) -> list[np.ndarray]:
    """Returns the sets in fp64, for fp32 has too few digits for the difference of means of a third power.

    Raises InputError for sets that do not compare or are too small.
    """
    if len(widths := {features.shape[1] for features in sets}) > 1:
        raise InputError(f"features of {sorted(widths)} values do not compare", "Take both from one network.")
    if (count := min(map(len, sets))) < fewest:
        raise InputError(f"{count} images are too few: at least {fewest} are needed", "Give or draw more images.")
    return [features.astype(np.float64) for features in sets]
