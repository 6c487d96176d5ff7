"""The learning curve: errors as brute force finds them, at every number of samples, and when these are enough."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from edgeprune.pruning import learning_curve as module
from edgeprune.pruning.learning_curve import CurvePoint, enough, held_out_error, learning_curve
from edgeprune.pruning.probes import visit_inputs
from tests.support.tiny import as_model, llama


def inputs(seed: int, rows: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(9, 9, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    return torch.randn(rows, 9, generator=generator, dtype=torch.float64) @ mixing


@pytest.mark.parametrize("unit", [1, 3])
def test_an_error_is_that_of_the_outputs_of_the_best_ridge_regression(unit):
    weight = torch.randn(5, 9, generator=torch.Generator().manual_seed(4))
    own, held_out = inputs(0, 40), inputs(1, 200)
    error = held_out_error(weight, own.T @ own, held_out.T @ held_out, unit)
    wide, outputs = weight.double(), own @ weight.double().T
    expected = held_out @ wide.T
    found = []
    for keep in _subsets(9 // unit, round(9 / unit * 0.7), unit):
        for damping in module.DAMPINGS[::2]:
            x = own[:, keep]
            ridge = damping * (x.T @ x).diagonal().mean() * torch.eye(len(keep), dtype=torch.float64)
            update = torch.linalg.solve(x.T @ x + ridge, x.T @ (outputs - x @ wide[:, keep].T))
            predicted = held_out[:, keep] @ (wide[:, keep].T + update)
            found.append(float((predicted - expected).square().sum() / expected.square().sum()))
    assert min(abs(error - one) for one in found) < 1e-9  # of one subset; which, the score decides
    assert error < np.median(found)


def _subsets(units: int, kept: int, unit: int):
    from itertools import combinations

    for chosen in combinations(range(units), kept):
        yield [n * unit + offset for n in chosen for offset in range(unit)]


def test_a_curve_has_the_errors_of_its_documents_alone():
    model, generator = as_model(llama(num_hidden_layers=4)), np.random.default_rng(0)
    documents = [generator.integers(101, size=length) for length in (30, 9, 25, 60, 64, 7)]
    held_out = [generator.integers(101, size=50) for _ in range(3)]
    curve = learning_curve(model, held_out, documents, 16)
    assert [(point.samples, point.tokens) for point in curve] == [(2, 39), (4, 64), (8, 188)]
    for point, count in zip(curve, (2, 3, 5), strict=True):
        rows = {}
        visit_inputs(
            model,
            [*held_out, *documents[:count]],
            lambda probe, weight, number, x: rows.setdefault(probe, (weight, []))[1].append(x.double()),  # noqa: B023
        )
        errors = []
        for probe, (weight, parts) in rows.items():
            held, own = torch.cat(parts[:3]), torch.cat(parts[3:])
            errors.append(held_out_error(weight, own.T @ own, held.T @ held, probe.unit))
        assert point.error == pytest.approx(np.mean(errors), rel=1e-3)


def test_one_long_document_may_be_several_samples():
    model, generator = as_model(llama(num_hidden_layers=4)), np.random.default_rng(0)
    held_out, document = (generator.integers(101, size=60) for _ in range(2))
    first, second = learning_curve(model, [held_out], [document], 15)
    assert (first.samples, second.samples, first.error) == (2, 4, second.error)
    assert learning_curve(model, [held_out], [document], 31) == []


@pytest.mark.parametrize(
    ("errors", "expected"),
    [((0.5, 0.3, 0.29, 0.28), 4), ((0.5, 0.49), 2), ((0.5, 0.3, 0.2), None), ((0.5,), None), ((), None)],
)
def test_enough_is_where_twice_as_many_help_little(errors, expected):
    assert enough([CurvePoint(2 << n, 0, error) for n, error in enumerate(errors)]) == expected
