import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from edgeprune.pruning import compensate as compensate_module
from edgeprune.pruning.compensate import DAMPINGS, Compensation, compensate, least_squares_update
from edgeprune.pruning.moments import held_out_rows, moments_of


def case(seed: int, tokens: int = 60, features: int = 10, out: int = 4) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(features, features, generator=generator, dtype=torch.float64)
    inputs = torch.randn(tokens, features, generator=generator, dtype=torch.float64) @ mixing
    return torch.randn(out, features, generator=generator, dtype=torch.float64), inputs


def solve(
    weight: torch.Tensor, inputs: torch.Tensor, kept: torch.Tensor, teacher: torch.Tensor | None = None
) -> Compensation:
    """Compensation of a projection (out, features) on inputs (samples, tokens, features)."""
    weight, inputs = weight.float(), inputs.float()
    removed = [j for j in range(weight.shape[1]) if j not in kept.tolist()]
    small, lost = inputs[..., kept], inputs[..., removed] @ weight[:, removed].T
    teacher = inputs @ weight.T if teacher is None else teacher.clone()
    return compensate(weight[:, kept], moments_of(small), small, lost, teacher)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10**6), kept_count=st.integers(1, 9), damping=st.sampled_from([1e-6, 1e-2, 1.0]))
def test_the_update_solves_the_constrained_problem(seed, kept_count, damping):
    """Against the KKT system of min ||X (W' - W)^T||^2 + g ||W' - W||^2 subject to W'_P = 0.

    The update of the paper with damping on all of G: dW = -(G + gI)^-1 M (M^T (G + gI)^-1 M)^-1 M^T W.
    """
    weight, inputs = case(seed)
    moments = inputs.T @ inputs
    order = torch.randperm(10, generator=torch.Generator().manual_seed(seed))
    kept, removed = order[:kept_count].sort().values, order[kept_count:].sort().values
    damped = moments + damping * moments[kept][:, kept].diagonal().mean() * torch.eye(10)
    constraint = torch.eye(10, dtype=torch.float64)[removed]  # (removed, 10)
    system = torch.cat(
        [
            torch.cat([damped, constraint.T], dim=1),
            torch.cat([constraint, torch.zeros(len(removed), len(removed), dtype=torch.float64)], dim=1),
        ]
    )
    right = torch.cat([torch.zeros(10, len(weight), dtype=torch.float64), -weight.T[removed]])
    change = torch.linalg.solve(system, right)[:10].T
    cross = moments[kept][:, removed] @ weight.T[removed]  # X_S^T (X W^T - X_S W_S^T)
    ours = least_squares_update(moments[kept][:, kept], cross, damping).T
    assert torch.allclose(ours, change[:, kept], rtol=1e-6, atol=1e-8)


def test_without_damping_it_is_the_least_squares_optimum_for_any_target():
    weight, inputs = case(7, tokens=500)
    kept = torch.tensor([0, 2, 5, 6, 9])
    small, target = inputs[:, kept], torch.randn(500, 4, generator=torch.Generator().manual_seed(0)).double()
    optimum = torch.linalg.lstsq(small, target).solution.T
    update = least_squares_update(small.T @ small, small.T @ (target - small @ weight[:, kept].T), 1e-12)
    assert torch.allclose(weight[:, kept] + update.T, optimum, rtol=1e-6)


def test_nothing_pruned_changes_nothing():
    weight, inputs = case(1)
    result = solve(weight, inputs[None], torch.arange(10))
    assert torch.equal(result.weight, weight.float())
    assert result.damping is None
    assert result.error_before == result.error_after == 0


def test_damping_and_blend_are_the_best_on_the_held_out_samples_by_brute_force():
    """Of a fine grid over both; the solve on the other samples, the error on the held-out ones."""
    generator = torch.Generator().manual_seed(4)
    weight, inputs = case(4, tokens=8 * 12)
    inputs = inputs.view(8, 12, 10)
    own = inputs @ weight.T
    teacher = own + 0.5 * torch.randn(own.shape, generator=generator).double() + inputs[..., :4]
    kept = torch.arange(0, 10, 2)
    held = held_out_rows(8, 12)
    x, targets = (
        inputs[..., kept].flatten(0, 1),
        [(t.flatten(0, 1) - inputs[..., kept].flatten(0, 1) @ weight[:, kept].T) for t in (own, teacher)],
    )
    errors = {}
    for damping in DAMPINGS:
        fit = x[~held]
        own_update, teacher_update = (least_squares_update(fit.T @ fit, fit.T @ t[~held], damping) for t in targets)
        for step in range(1001):
            update = torch.lerp(own_update, teacher_update, step / 1000)
            errors[damping, step / 1000] = float((targets[1][held] - x[held] @ update).square().sum())
    result = solve(weight, inputs, kept, teacher.float())
    best = min(errors, key=errors.get)
    assert result.damping == best[0]
    assert result.blend == pytest.approx(best[1], abs=2e-3)
    energy = float(teacher.flatten(0, 1)[held].square().sum())
    assert result.error_after == pytest.approx(errors[best] / energy, rel=1e-3)
    assert result.error_before == pytest.approx(float(targets[1][held].square().sum()) / energy, rel=1e-4)
    whole = torch.lerp(*(least_squares_update(x.T @ x, x.T @ t, best[0]) for t in targets), result.blend)
    assert torch.allclose(result.weight.double(), weight[:, kept] + whole.T, rtol=1e-3, atol=1e-4)


def test_the_teacher_makes_up_for_what_was_lost_before():
    """What a linear map of the kept inputs can say about the drift, the update takes over."""
    weight, inputs = case(5, tokens=400)
    drift = torch.randn(4, 10, generator=torch.Generator().manual_seed(1)).double()
    inputs = inputs.view(8, 50, 10)
    result = solve(weight, inputs, torch.arange(10), (inputs @ (weight + drift).T).float())
    assert result.blend == pytest.approx(1.0, abs=1e-3)
    assert torch.allclose(result.weight.double(), weight + drift, rtol=1e-2, atol=1e-2)
    assert result.error_after < 1e-4 * result.error_before


def test_the_update_does_not_depend_on_how_many_outputs_are_solved_for_at_a_time(monkeypatch):
    weight, inputs = case(6, tokens=80, out=7)
    whole = solve(weight, inputs.view(8, 10, 10), torch.arange(6))
    monkeypatch.setattr(compensate_module, "SOLVED_OUTPUTS", 3)
    parts = solve(weight, inputs.view(8, 10, 10), torch.arange(6))
    assert whole.damping == parts.damping
    assert torch.allclose(whole.weight, parts.weight, rtol=1e-5, atol=1e-6)


def test_it_falls_back_where_no_update_helps():
    """Held-out samples whose correlations are the opposite of the fitted ones."""
    fit = torch.tensor([[1.0, 1.0], [2.0, 2.0], [-1.0, -1.0], [3.0, 3.0]])
    inputs = torch.stack([fit, fit, fit, fit * torch.tensor([1.0, -1.0])])
    result = solve(torch.tensor([[1.0, 1.0]]), inputs, torch.tensor([0]))
    assert result.damping is None
    assert torch.equal(result.weight, torch.tensor([[1.0]]))
    assert result.error_after == result.error_before > 0


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10**6), tokens=st.integers(2, 12), scale=st.sampled_from([1e-6, 1.0, 1e6]))
def test_tiny_rank_deficient_and_huge_moments_survive(seed, tokens, scale):
    weight, inputs = case(seed, tokens=tokens)
    inputs[:, 3] = 0
    result = solve(weight, (scale * inputs)[None], torch.tensor([1, 3, 8]))
    assert torch.isfinite(result.weight).all()
    assert result.error_after <= result.error_before
