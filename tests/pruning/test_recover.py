"""Recovery by distillation, on a tiny random Llama."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from edgeprune.errors import NumericalError
from edgeprune.model.forward import token_logits, weight_stream
from edgeprune.model.model import Model
from edgeprune.model.quantised import QuantisedWeight, as_float
from edgeprune.precision import WEIGHT_FORMATS
from edgeprune.pruning import recover as recovery
from edgeprune.pruning.effort import Effort
from edgeprune.pruning.methods import METHODS
from edgeprune.pruning.prune import prune, result_of
from edgeprune.pruning.recover import HELD_OUT, Rows, recover, rows_of
from edgeprune.pruning.trained import Trained
from tests.support.tiny import as_model, llama

LENGTH = 33


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """A tiny model bears a larger rate: a few steps are enough."""
    monkeypatch.setattr(recovery, "RATE", 1e-3)
    monkeypatch.setattr(recovery, "WARM_UP", 4)


def drawn(first: int, count: int) -> torch.Tensor:
    return torch.randint(0, 101, (count, LENGTH), generator=torch.Generator().manual_seed(first))


def rows(users: torch.Tensor | None = None, seed: int = 0) -> Rows:
    return Rows(users, drawn, LENGTH, seed)


def dense_model() -> Model:
    model = as_model(llama(hidden_size=64, num_attention_heads=8, intermediate_size=128, initializer_range=0.15))
    return replace(model, weights={name: weight.detach().clone() for name, weight in model.weights.items()})


def small(dense: Model, form: str | None = None, channels: int = 64) -> Model:
    """The model pruned and rounded in closed form, in memory."""
    target = dense.decoder.with_widths(2, 4, channels)
    target = target if form is None else target.with_format(WEIGHT_FORMATS[form])
    method, samples = METHODS["default"], torch.randint(0, 101, (8, 24), generator=torch.Generator().manual_seed(9))
    stored = {
        name: weight.clone() if isinstance(weight, torch.Tensor) else weight
        for name, weight in prune(dense, target, samples, method, 0)
    }
    quantised = {name: weight for name, weight in stored.items() if isinstance(weight, QuantisedWeight)}
    floats = {name: as_float(weight) for name, weight in stored.items()}
    return replace(dense, decoder=result_of(target, method), weights=floats, quantised=quantised)


def with_weights(model: Model, stored: dict) -> Model:
    quantised = {name: weight for name, weight in stored.items() if isinstance(weight, QuantisedWeight)}
    return replace(model, weights={name: as_float(weight) for name, weight in stored.items()}, quantised=quantised)


def divergence(dense: Model, model: Model, ids: torch.Tensor, kept: torch.Tensor | None = None) -> float:
    """KL(dense || model) of all predictions but the first, of the whole logits as an evaluation computes them."""
    expected, logits = (token_logits(one.decoder, weight_stream(one), ids)[:, 1:] for one in (dense, model))
    expected = expected if kept is None else expected[..., kept]
    shares = expected.double().log_softmax(-1)
    return (
        float(F.kl_div(logits.double().log_softmax(-1), shares, log_target=True, reduction="sum"))
        / shares[..., 0].numel()
    )


def run(dense, model, folder, steps=24, users=None, **options):
    folder.mkdir(exist_ok=True)
    weights, done = recover(dense, model, rows(users), Effort(steps), folder, torch.float32, **options)
    return dict(weights), done


def test_divergence_falls_on_rows_that_nothing_has_seen(tmp_path):
    dense = dense_model()
    model = small(dense)
    weights, done = run(dense, model, tmp_path / "a", users=drawn(5, 6))
    assert list(weights) == list(model.decoder.shapes())
    assert (done.steps, done.taken, done.rows) == (24, 24, 48)
    held_out, unseen = drawn(0, HELD_OUT), drawn(10**6, 8)
    recovered = with_weights(model, weights)
    assert done.before == pytest.approx(divergence(dense, model, held_out), rel=1e-4)
    assert done.after == pytest.approx(divergence(dense, recovered, held_out), rel=1e-4)
    assert divergence(dense, recovered, unseen) < 0.98 * divergence(dense, model, unseen)
    assert weights["embedding"] is model.weights["embedding"]


def test_states_that_are_held_and_states_that_are_computed_again_give_the_same_weights(tmp_path, monkeypatch):
    dense = dense_model()
    model = small(dense)
    held, _ = run(dense, model, tmp_path / "held", steps=4)
    monkeypatch.setattr(recovery, "holds_states", lambda decoder, rank: False)
    again, _ = run(dense, model, tmp_path / "again", steps=4)
    for name, weight in held.items():
        torch.testing.assert_close(weight, again[name], rtol=1e-5, atol=1e-6)


FORMATS = ("int8", "w8a8", "fp8", "nvfp4", "int4-32", "int4-32-asymmetric", "int4-offset", "q4_0", "q5_1", "q8_0")


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMATS)
def test_what_is_judged_is_what_is_stored_on_its_grid(form, tmp_path):
    """The training starts at the closed form's numbers to the last bit, and ends at numbers of the same grid."""
    dense = dense_model()
    model = small(dense, form)
    for stored in model.quantised.values():
        trained = Trained(stored, torch.float32)
        assert torch.equal(trained.deployed(), stored.dequantised())
        assert all(torch.equal(part, stored.parts[name]) for name, part in trained.as_stored().parts.items())
    weights, done = run(dense, model, tmp_path / "a", steps=10)
    assert done.before == pytest.approx(divergence(dense, model, drawn(0, HELD_OUT)), rel=1e-4)
    assert done.taken and done.after < done.before
    recovered = with_weights(model, weights)
    assert done.after == pytest.approx(divergence(dense, recovered, drawn(0, HELD_OUT)), rel=1e-4)
    assert recovered.quantised.keys() == model.quantised.keys()
    changed = [
        not torch.equal(part, weights[name].parts[of])
        for name, one in model.quantised.items()
        for of, part in one.parts.items()
    ]
    assert any(changed)


@pytest.mark.slow
@pytest.mark.parametrize("form", [None, "int4-32", "q8_0"])
def test_matrices_are_changed_by_products_of_a_rank_where_that_is_asked_for(form, tmp_path):
    """It starts at the closed form's numbers, and what it adds to a matrix of floats has that rank."""
    dense = dense_model()
    model = small(dense, form)
    weights, done = run(dense, model, tmp_path / "a", users=drawn(5, 6), rank=4)
    assert done.rank == 4
    assert done.before == pytest.approx(divergence(dense, model, drawn(0, HELD_OUT)), rel=1e-4)
    assert done.taken and done.after < done.before
    recovered = with_weights(model, weights)
    assert done.after == pytest.approx(divergence(dense, recovered, drawn(0, HELD_OUT)), rel=1e-4)
    if form is None:
        change = weights["layers.1.mlp.down"] - model.weights["layers.1.mlp.down"]
        assert torch.linalg.matrix_rank(change.double(), rtol=1e-4) == 4
        assert not torch.equal(weights["layers.1.mlp.norm"], model.weights["layers.1.mlp.norm"])


def test_a_grid_of_blocks_keeps_its_scales(tmp_path):
    weight = torch.randn(8, 256, generator=torch.Generator().manual_seed(0))
    from edgeprune.pruning.grids import choose_grid

    stored = choose_grid(weight, torch.ones(256), WEIGHT_FORMATS["q4_k"]).nearest(weight)
    trained = Trained(stored, torch.float32)
    assert torch.equal(trained.deployed(), stored.dequantised())
    assert len(trained.numbers) == 1
    with torch.no_grad():
        trained.value.add_(0.3)
    assert torch.equal(trained.deployed(), trained.as_stored().dequantised())
    assert torch.equal(trained.as_stored().units, stored.units)


def test_gradients_of_a_grid_are_those_of_lsq():
    """By the published formula: of a weight 1 within the ends and 0 beyond, of a scale the rounded level less the exact
    one within, and the end beyond (Esser et al. 2020, eq. 3)."""
    form = WEIGHT_FORMATS["int4-32"]
    weight = torch.randn(3, 32, generator=torch.Generator().manual_seed(1))
    scales = torch.tensor([[0.25], [0.125], [0.5]])
    codes = (weight / scales).round().clamp(form.least, form.most)
    trained = Trained(QuantisedWeight(form, codes.to(torch.int8), scales), torch.float32)
    with torch.no_grad():
        trained.value.copy_(weight)
    of_outputs = torch.randn(3, 32, generator=torch.Generator().manual_seed(2))
    trained.deployed().backward(of_outputs)
    exact = weight / scales
    within = (exact >= form.least) & (exact <= form.most)
    assert not within.all()
    assert torch.equal(trained.value.grad, of_outputs * within)
    by_scale = torch.where(within, codes - exact, codes)
    expected = (of_outputs * by_scale).sum(1, keepdim=True) * scales  # of the logarithm of the scale
    assert torch.allclose(trained.gains.grad, expected, atol=1e-6)


def test_the_same_seed_gives_the_same_weights_however_often_the_run_is_ended(tmp_path, monkeypatch):
    monkeypatch.setattr(recovery, "SAVE_SECONDS", 0.0)
    dense = dense_model()
    model, users = small(dense), drawn(5, 3)
    whole, done = run(dense, model, tmp_path / "a", steps=12, users=users)

    class Ended(Exception):
        pass

    for place in (5, 9):

        def end(step: int, steps: int, place: int = place) -> None:
            if step == place:
                raise Ended

        with pytest.raises(Ended):
            run(dense, model, tmp_path / "b", steps=12, users=users, on_step=end)
    again, done_again = run(dense, model, tmp_path / "b", steps=12, users=users)
    assert all(torch.equal(whole[name], again[name]) for name in whole)
    assert (done.before, done.after, done.taken) == (done_again.before, done_again.after, done_again.taken)
    other, _ = run(dense, model, tmp_path / "c", steps=12, users=drawn(6, 3))
    assert not torch.equal(other["layers.0.mlp.down"], whole["layers.0.mlp.down"])


def test_weights_that_no_training_betters_are_given_back(tmp_path, monkeypatch):
    dense = dense_model()
    model = small(dense)
    monkeypatch.setattr(recovery, "RATE", 10.0)
    weights, done = run(dense, model, tmp_path / "a", steps=4)
    assert done.taken == 0 and done.after == done.before
    assert all(weights[name] is model.weights[name] for name in weights)


def test_the_best_weights_on_the_way_are_taken(tmp_path, monkeypatch):
    """A rate that ruins the model later: what was best before is what is given."""
    dense = dense_model()
    model = small(dense)
    monkeypatch.setattr(recovery, "CHECK_EVERY", 3)
    monkeypatch.setattr(recovery, "rate_at", lambda step, steps: 1.0 if step < 6 else 1e3)
    weights, done = run(dense, model, tmp_path / "a", steps=12)
    assert 0 < done.taken < done.steps == 12
    assert done.after == pytest.approx(divergence(dense, with_weights(model, weights), drawn(0, HELD_OUT)), rel=1e-4)
    assert done.after < done.before


def test_minutes_fix_the_number_of_steps_after_some(tmp_path):
    dense, steps = dense_model(), []
    (tmp_path / "a").mkdir()
    effort = Effort(minutes=0.02)
    _, done = recover(
        dense, small(dense), rows(), effort, tmp_path / "a", torch.float32, on_step=lambda *at: steps.append(at)
    )
    assert [at for at, _ in steps] == list(range(1, done.steps + 1))
    in_all = [of for _, of in steps]
    assert in_all[: recovery.TIMED - 1] == [0] * (recovery.TIMED - 1)
    assert set(in_all[recovery.TIMED - 1 :]) == {done.steps}
    assert done.steps > recovery.TIMED


def test_floats_are_rounded_to_the_dtype_of_their_file(tmp_path):
    dense = dense_model()
    model = small(dense)
    halves = {name: weight.bfloat16() for name, weight in model.weights.items()}
    (tmp_path / "a").mkdir()
    stream, done = recover(dense, replace(model, weights=halves), rows(), Effort(10), tmp_path / "a", torch.bfloat16)
    weights = dict(stream)
    assert {weight.dtype for weight in weights.values()} == {torch.bfloat16}
    recovered = with_weights(model, weights)
    assert done.after == pytest.approx(divergence(dense, recovered, drawn(0, HELD_OUT)), rel=1e-4)


def test_a_smaller_vocabulary_is_compared_on_its_own_tokens(tmp_path):
    dense = dense_model()
    model, kept = small(dense), torch.arange(0, 101, 2)
    weights = {**model.weights, "embedding": model.weights["embedding"][kept]}
    reduced = replace(model, decoder=model.decoder.with_vocabulary(len(kept)), weights=weights)
    stored, done = run(dense, reduced, tmp_path / "a", steps=10, kept=kept)
    assert done.after < done.before
    assert stored["embedding"].shape == (len(kept), 64)
    # The same numbers with a whole vocabulary, of which the others are left out.
    whole = with_weights(model, {**stored, "embedding": model.weights["embedding"]})
    ids = drawn(0, HELD_OUT)
    expected, logits = (token_logits(one.decoder, weight_stream(one), ids)[:, 1:][..., kept] for one in (dense, whole))
    shares = expected.double().log_softmax(-1)
    loss = F.kl_div(logits.double().log_softmax(-1), shares, log_target=True, reduction="sum") / shares[..., 0].numel()
    assert done.after == pytest.approx(float(loss), rel=1e-4)


def test_a_distribution_that_is_not_finite_is_refused(tmp_path):
    dense = dense_model()
    model = small(dense)
    model.weights["norm"].fill_(torch.nan)
    with pytest.raises(NumericalError, match="not finite"):
        run(dense, model, tmp_path / "a")


def test_rows_are_cut_from_samples_whole():
    samples = torch.arange(2 * 10).view(2, 10)
    assert rows_of(samples, 4).tolist() == [[0, 1, 2, 3], [4, 5, 6, 7], [10, 11, 12, 13], [14, 15, 16, 17]]


def test_each_round_takes_every_row_of_the_user_once():
    given = rows(torch.zeros(5, LENGTH, dtype=torch.int64))
    places = [int(given.users_of(step)) for step in range(10)]
    assert sorted(places[:5]) == sorted(places[5:]) == [0, 1, 2, 3, 4]
    assert places[:5] != places[5:]
