"""Coverage: the sketch is what its formula says, and the choice is the best one at every step."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from edgeprune.pruning import coverage
from edgeprune.pruning.coverage import Herd, distance, sketches
from edgeprune.pruning.probes import visit_inputs
from tests.support.tiny import as_model, llama


@pytest.fixture(scope="module")
def model():
    return as_model(llama(num_hidden_layers=4))


@pytest.fixture(scope="module")
def documents():
    generator = np.random.default_rng(0)
    return [generator.integers(101, size=length) for length in (20, 50, 33, 64, 8, 41)]


def test_a_distance_is_that_of_the_whitened_moments(model, documents, monkeypatch):
    monkeypatch.setattr(coverage, "WHITENING", 0.0)
    monkeypatch.setattr(coverage, "DIRECTIONS", 12)
    features, tokens = sketches(model, documents, seed=3), np.array([len(ids) for ids in documents])
    subset = [1, 4, 5]
    rows = {}
    visit_inputs(model, documents, lambda probe, w, number, x: rows.setdefault(probe, []).append(x.double()))
    generator, distances = torch.Generator().manual_seed(3), []
    for inputs in rows.values():
        directions = torch.randn(inputs[0].shape[1], 12, generator=generator).double()
        whole, own = (torch.cat([inputs[n] for n in ns]) @ directions for ns in (range(6), subset))
        whole, own = whole.T @ whole / len(whole), own.T @ own / len(own)
        values, vectors = torch.linalg.eigh(whole)
        root = vectors @ torch.diag(values**-0.5) @ vectors.T
        distances.append(float((root @ own @ root - torch.eye(12)).square().sum()) / 12)
    assert distance(features, tokens, subset) == pytest.approx(np.mean(distances) ** 0.5, rel=1e-2)
    assert distance(features, tokens, range(6)) == pytest.approx(0, abs=1e-4)


def test_every_step_is_the_best_one():
    generator = np.random.default_rng(1)
    features, tokens = generator.standard_normal((12, 30)).astype(np.float32), generator.integers(5, 40, size=12)
    features -= np.average(features, axis=0, weights=tokens)
    herd, chosen = Herd(features, tokens), []
    while len(chosen) < 12:
        left = np.array([n for n in range(12) if n not in chosen and (n % 3 or len(chosen) > 5)])
        best = min(left, key=lambda n: distance(features, tokens, [*chosen, n]))
        chosen.append(herd(left))
        assert chosen[-1] == best


def test_a_mixture_is_covered_better_than_at_random(model):
    """Documents of two alphabets, nine in ten of the first: a covering subset has the share of both."""
    generator = np.random.default_rng(2)
    documents = [generator.integers(*((0, 50) if n % 5 else (50, 101)), size=48) for n in range(60)]
    features, tokens, left, chosen = sketches(model, documents, 0), np.full(60, 48), np.arange(60), []
    herd = Herd(features, tokens)
    while len(chosen) < 10:
        chosen.append(herd(left))
        left = left[left != chosen[-1]]
    draws = [distance(features, tokens, generator.permutation(60)[:10]) for _ in range(50)]
    assert distance(features, tokens, chosen) < min(draws)
    assert sum(n % 5 == 0 for n in chosen) in (1, 2, 3)
