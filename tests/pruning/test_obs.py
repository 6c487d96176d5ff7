import itertools

import pytest
import torch

from edgeprune.pruning.linear import cholesky
from edgeprune.pruning.moments import gram
from edgeprune.pruning.obs import greedy_order, saliencies


def problem(seed: int, units: int, unit: int, out: int = 4) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    features = units * unit
    inputs = torch.randn(200, features, generator=generator) @ torch.randn(features, features, generator=generator)
    return torch.randn(features, out, generator=generator, dtype=torch.float64), gram(inputs)


def refitted_error(weight: torch.Tensor, moments: torch.Tensor, removed: list[int]) -> float:
    """1/2 ||X W - X_S W_S'||^2 with the best W_S', from the Schur complement."""
    kept = [j for j in range(len(weight)) if j not in removed]
    schur = moments[removed][:, removed]
    if kept:
        schur = schur - moments[removed][:, kept] @ torch.linalg.solve(
            moments[kept][:, kept], moments[kept][:, removed]
        )
    return float((weight[removed].T @ schur @ weight[removed]).trace()) / 2


def features(units: list[int], unit: int) -> list[int]:
    return [j * unit + k for j in units for k in range(unit)]


@pytest.mark.parametrize("unit", [1, 3])
@pytest.mark.parametrize("seed", range(4))
def test_greedy_removal_is_brute_force_obs(seed, unit):
    """In each round every unit that is left is tried, and the least error after a whole refit is taken."""
    units = 6
    weight, moments = problem(seed, units, unit)
    removed: list[int] = []
    for _ in range(units - 2):
        errors = {
            j: refitted_error(weight, moments, features([*removed, j], unit)) for j in range(units) if j not in removed
        }
        removed.append(min(errors, key=errors.get))
    inverse = torch.cholesky_inverse(cholesky(moments, 0.0))
    scores = greedy_order(weight.clone(), inverse, unit, 2, batch=1)
    assert scores.argsort()[: units - 2].tolist() == removed
    assert (scores[removed] < 0).all()
    assert (scores >= 0).sum() == 2


@pytest.mark.parametrize("unit", [1, 2])
def test_saliencies_are_the_rise_of_the_error_when_a_unit_goes_alone(unit):
    weight, moments = problem(9, 5, unit)
    found = saliencies(weight, torch.linalg.inv(moments), unit)
    expected = [refitted_error(weight, moments, features([j], unit)) for j in range(5)]
    assert found.tolist() == pytest.approx(expected, rel=1e-6)


def test_a_batch_removes_the_least_salient_units_together():
    weight, moments = problem(2, 8, 1)
    inverse = torch.linalg.inv(moments)
    first = saliencies(weight, inverse, 1).argsort()[:3].tolist()
    scores = greedy_order(weight.clone(), inverse.clone(), 1, 2, batch=3)
    assert scores.argsort()[:3].tolist() == first
    left = [j for j in range(8) if j not in first]
    errors = {pair: refitted_error(weight, moments, [*first, pair[0]]) for pair in itertools.permutations(left, 1)}
    assert int(scores.argsort()[3]) == min(errors, key=errors.get)[0]
