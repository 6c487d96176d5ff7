import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgeprune.pruning.allocate import Widths, uniform_options
from edgeprune.search import MAX_CANDIDATES, CostModel, Costs, search, smaller_rungs

DENSE = Widths(3, 3, 1536)
OPTIONS = uniform_options(DENSE, 32)


def size(widths: Widths) -> float:
    """Weights of a layer, in a model of hidden size 576."""
    groups, heads, channels = widths
    return 576 * 64 * 2 * (groups * heads + groups) + 3 * 576 * channels


def error(widths: Widths) -> float:
    return 3.0 * (1 - widths[0] * widths[1] / 9) + (1 - widths[2] / 1536)


def run(true_cost, limit, noise=0.0, seed=0, margin=0.015):
    generator = np.random.default_rng(seed)

    def obtain(index, widths, predicted):
        value = true_cost(widths) * (1 + noise * generator.standard_normal())
        return Costs({"decode": value}, "met" if value * (1 + 1.96 * noise) <= limit else "missed")

    return search(
        OPTIONS,
        error,
        lambda widths: {"decode": size(widths)},
        (DENSE, {"decode": true_cost(DENSE)}),
        {"decode": limit},
        {"decode": margin},
        obtain,
    )


@settings(max_examples=40, deadline=None)
@given(overhead=st.floats(0, 0.4), share=st.floats(0.6, 0.95), bend=st.floats(0.8, 1.2))
def test_it_ends_close_below_a_limit_when_the_estimate_is_wrong(overhead, share, bend):
    """The true cost has an overhead and a bend that the estimator knows nothing of."""

    def true_cost(widths: Widths) -> float:
        return overhead + (1 - overhead) * (size(widths) / size(DENSE)) ** bend

    smallest = min(map(true_cost, OPTIONS))
    outcome = run(true_cost, share)
    chosen = outcome.trials[outcome.chosen].obtained
    assert len(outcome.trials) <= MAX_CANDIDATES
    if smallest <= share * 0.985:
        assert chosen.status == "met"
        assert outcome.ending in ("close", "neighbour")
        assert chosen.values["decode"] > 0.93 * share
    elif smallest > share:
        assert outcome.ending == "out_of_reach"


@pytest.mark.parametrize("seed", range(8))
def test_it_meets_the_limit_under_noise(seed):
    outcome = run(lambda widths: 0.1 + 0.9 * size(widths) / size(DENSE), 0.7, noise=0.004, seed=seed)
    assert outcome.trials[outcome.chosen].obtained.status == "met"


def test_an_exact_estimate_needs_one_candidate_and_finds_the_best():
    limit = 0.8 * size(DENSE)
    outcome = run(size, limit, margin=0.0)
    best = min((w for w in OPTIONS if size(w) <= limit), key=error)
    assert [trial.widths for trial in outcome.trials] == [best]


def test_out_of_reach_gives_the_candidate_nearest_to_the_budget():
    outcome = run(size, 0.5 * min(map(size, OPTIONS)))
    assert outcome.ending == "out_of_reach"
    assert outcome.trials[outcome.chosen].widths == min(OPTIONS, key=size)


def test_the_cost_model_passes_through_what_was_obtained():
    model = CostModel(10.0, 20.0)
    assert model.predict(5.0) == 10.0
    model.correct(5.0, 12.0)
    assert model.predict(5.0) == 12.0
    assert model.predict(7.5) == pytest.approx(16.0)
    assert model.predict(2.5) == pytest.approx(8.0)


def test_the_cost_model_does_not_follow_noise_downhill():
    model = CostModel(10.0, 20.0)
    model.correct(9.9, 20.5)
    assert model.predict(5.0) < 20.0


def test_further_rungs_take_less_each_and_end_with_the_grid() -> None:
    options = [Widths(3, 3, channels) for channels in range(64, 1024, 64)]

    def estimate(widths: Widths) -> dict[str, float]:
        return {"memory": 1000.0 + widths.intermediate_size}

    chosen = (Widths(3, 3, 832), {"memory": 2 * (1000.0 + 832)})  # the device needs twice the estimate
    found = smaller_rungs(options, lambda widths: -widths.intermediate_size, estimate, chosen, ["memory"], 3)
    # Of 832 - 64 prunable channels 15, 30 and 45 % go, rounded down to the grid.
    assert [widths.intermediate_size for widths in found] == [704, 576, 448]
    only = options[:1]
    assert smaller_rungs(only, lambda widths: 0.0, estimate, (only[0], estimate(only[0])), ["memory"], 3) == []
