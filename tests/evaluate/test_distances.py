"""Distances between sets of images, against closed forms, brute force and a library of their own."""

import sys
from dataclasses import asdict
from itertools import product

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from edgeprune.errors import InputError
from edgeprune.evaluate import distances as module
from edgeprune.evaluate.distances import (
    distances,
    frechet_distance,
    frechet_floor,
    kernel_difference,
    kernel_distance,
    precision_recall,
)

pytest.importorskip("torchmetrics", reason="pip install edgeprune[images]")


def drawn(seed, images, width=5, shift=0.0):
    return np.random.default_rng(seed).normal(shift, size=(images, width))


def mean_kernel(first, second, same=False):
    pairs = [
        (x @ y / len(x) + 1) ** 3
        for (i, x), (j, y) in product(enumerate(first), enumerate(second))
        if not (same and i == j)
    ]
    return sum(pairs) / len(pairs)


def by_brute_force(reference, generated):
    return (
        mean_kernel(reference, reference, True)
        + mean_kernel(generated, generated, True)
        - 2 * mean_kernel(reference, generated)
    )


@pytest.mark.parametrize("counts", [(12, 12), (9, 31), (31, 9)])
def test_the_kernel_distance_is_the_mean_over_pairs_of_different_images(counts):
    reference, generated = drawn(0, counts[0]), drawn(1, counts[1], shift=0.5)
    value, low, high = kernel_distance(reference, generated, seed=0)
    assert value == pytest.approx(by_brute_force(reference, generated), rel=1e-12)
    assert low < value < high


def test_the_kernel_distance_is_the_librarys_where_both_sets_are_of_one_size():
    from torchmetrics.image.kid import KernelInceptionDistance

    reference, generated = drawn(0, 40), drawn(1, 40, shift=0.5)
    as_they_are = torch.nn.Identity()
    metric = KernelInceptionDistance(as_they_are, subsets=1, subset_size=40)
    metric.update(torch.from_numpy(reference), real=True)
    metric.update(torch.from_numpy(generated), real=False)
    assert kernel_distance(reference, generated, seed=0)[0] == pytest.approx(float(metric.compute()[0]), rel=1e-9)


def test_pieces_of_the_matrices_make_no_difference(monkeypatch):
    reference, generated = drawn(0, 23), drawn(1, 17, shift=0.5)
    whole = kernel_distance(reference, generated, seed=3), precision_recall(reference, generated)
    monkeypatch.setattr(module, "BLOCK_BYTES", 5 * 8 * 23)
    pieces = kernel_distance(reference, generated, seed=3), precision_recall(reference, generated)
    assert pieces[0] == pytest.approx(whole[0], rel=1e-12)
    assert pieces[1] == whole[1]


@pytest.mark.parametrize("shift", [0.0, 0.4])
def test_nineteen_of_twenty_intervals_hold_the_true_kernel_distance(shift):
    """In one dimension (x y + 1)^3 compares the first three moments, which a normal distribution has in closed form."""

    def moments(mean):
        return np.array([mean, mean**2 + 1, mean**3 + 3 * mean])

    true = np.array([3, 3, 1]) @ np.square(moments(shift) - moments(0))
    found = [
        kernel_distance(drawn(seed, 60, 1), drawn(1000 + seed, 50, 1, shift), seed, draws=200) for seed in range(100)
    ]
    assert sum(low <= true <= high for _, low, high in found) >= 90
    values = np.array([value for value, _, _ in found])
    assert abs(values.mean() - true) < 4 * values.std() / 10


def test_a_draw_that_has_an_image_twice_does_not_pair_it_with_itself():
    """Such pairs would move all draws up: an image is far nearer to itself than to any other here."""
    values = 20 * np.eye(30)
    value, low, high = kernel_distance(values[:15], values[15:], seed=0)
    assert (value, low, high) == pytest.approx((0, 0, 0), abs=1e-9)


def test_the_difference_of_two_models_is_paired():
    reference, first = drawn(0, 60), drawn(1, 50, shift=0.3)
    second = first + np.random.default_rng(2).normal(0.1, 0.01, first.shape)
    value, low, high = kernel_difference(reference, first, second, seed=0)
    one, other = (kernel_distance(reference, of, seed=0) for of in (first, second))
    assert value == pytest.approx(other[0] - one[0], rel=1e-9)
    assert 0 < low < value < high
    assert high - low < (other[2] - other[1]) / 2
    assert kernel_difference(reference, first, first, seed=0) == (0, 0, 0)


def exactly(mean, deviations, seed, images=40):
    """Features with just this sample mean and covariance diag(deviations^2)."""
    values = drawn(seed, images, len(mean))
    values -= values.mean(axis=0)
    values = np.linalg.qr(values)[0] * np.sqrt(images - 1)
    return values * deviations + mean


@settings(max_examples=30, deadline=None)
@given(*[arrays(float, 4, elements=st.floats(*of)) for of in ((-2, 2), (-2, 2), (0.1, 3), (0.1, 3))])
def test_the_frechet_distance_of_two_gaussians(first, second, one, other):
    expected = np.square(first - second).sum() + np.square(one - other).sum()
    found = frechet_distance(exactly(first, one, 0), exactly(second, other, 1, 55))
    assert found == pytest.approx(expected, abs=1e-6)


def test_the_frechet_distance_of_fewer_images_than_features():
    """The covariances have no full rank; the trace of the root is the nuclear norm of the centred sets' product."""
    reference, generated = drawn(0, 20, 64), drawn(1, 30, 64, 0.2)
    one, other = ((of - of.mean(axis=0)) / np.sqrt(len(of) - 1) for of in (reference, generated))
    means = np.square(reference.mean(axis=0) - generated.mean(axis=0)).sum()
    root = np.linalg.svd(one @ other.T, compute_uv=False).sum()
    expected = means + np.square(one).sum() + np.square(other).sum() - 2 * root
    assert frechet_distance(reference, generated) == pytest.approx(expected, rel=1e-5)


def test_the_floor_is_what_as_many_images_of_one_distribution_are_apart():
    reference = drawn(0, 800, 40)
    floor = frechet_floor(reference, 200, seed=0)
    others = [frechet_distance(reference, drawn(seed, 800, 40)) for seed in (1, 2)]
    assert frechet_floor(reference, 10**6, seed=0) == pytest.approx(2 * np.mean(others), rel=0.2)
    assert frechet_floor(reference, 50, seed=0) > 3 * floor > 1.5 * 3 * frechet_floor(reference, 10**6, seed=0) > 0


LINE = np.arange(10.0)[:, None] * [1, 0]


def test_precision_and_recall_of_images_on_a_line():
    """Ten of the reference a step apart reach three steps at the ends, two within."""
    near = np.array([[4.5, 0], [-3, 0], [12, 0], [-3.1, 0], [12.1, 0], [4, 2], [4, 2.1], [100, 0], [101, 0], [99, 0]])
    precision, recall = precision_recall(LINE, near)
    assert precision[0] == 4 / 10
    assert recall[0] == 1  # one at 4.5 reaches the fourth of its own, far beyond the line
    shares = [[share for share, _, _ in precision_recall(LINE, other)] for other in (LINE, LINE + [0, 500])]
    assert shares == [[1, 1], [0, 0]]


def test_a_model_that_draws_one_image_only_has_precision_and_no_recall():
    precision, recall = precision_recall(LINE, np.repeat(LINE[4:5], 20, axis=0))
    assert precision[0] == 1
    assert recall[0] == 1 / 10  # that image itself
    assert precision[1] < 1 == precision[2]


def share_by_brute_force(images, manifold):
    def squared(x, y):
        return sum((x - y) ** 2)

    radii = [sorted(squared(center, other) for other in manifold)[3] for center in manifold]
    inside = [
        any(squared(image, center) <= radius for center, radius in zip(manifold, radii, strict=True))
        for image in images
    ]
    return sum(inside) / len(inside)


whole_numbers = arrays(float, st.tuples(st.integers(8, 14), st.just(2)), elements=st.integers(-6, 6).map(float))


@settings(max_examples=60, deadline=None)
@given(whole_numbers, whole_numbers)
def test_precision_and_recall_are_those_of_the_definition(reference, generated):
    precision, recall = precision_recall(reference, generated)
    assert precision[0] == share_by_brute_force(generated, reference)
    assert recall[0] == share_by_brute_force(reference, generated)


def test_all_distances_at_once():
    reference, generated = drawn(0, 40), drawn(1, 30, shift=0.5)
    found = distances(reference, generated.astype(np.float32), "net 1234", seed=5)
    assert asdict(found) | {"kernel": None, "frechet": None} == {
        "images": 30,
        "reference_images": 40,
        "network": "net 1234",
        "kernel": None,
        "frechet": None,
        **dict(zip(("precision", "recall"), precision_recall(reference, generated), strict=True)),
    }
    assert found.kernel == pytest.approx(kernel_distance(reference, generated, seed=5), rel=1e-4)
    assert found.frechet[1] == frechet_floor(reference, 30, seed=5)
    assert found == distances(reference, generated.astype(np.float32), "net 1234", seed=5)


@pytest.mark.parametrize(
    ("compute", "message"),
    [
        (lambda: distances(LINE, LINE[:7], "net", 0), "7 images are too few: at least 8"),
        (lambda: kernel_distance(LINE, drawn(0, 10, 3), 0), r"features of \[2, 3\] values do not compare"),
        (lambda: kernel_difference(LINE, LINE, LINE[:9], 0), "10 and 9 images do not pair"),
    ],
)
def test_sets_that_do_not_compare(compute, message):
    with pytest.raises(InputError, match=message):
        compute()


def test_without_the_library(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchmetrics.image.fid", None)
    with pytest.raises(InputError, match="torchmetrics is not installed") as caught:
        frechet_distance(LINE, LINE)
    assert caught.value.remedy == 'Install it with: pip install "edgeprune[images]"'
