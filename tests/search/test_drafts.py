"""The choice of a draft, against simulation and closed forms."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgeprune.search.drafts import accepted_runs, best_plan

MATCHES = st.lists(st.booleans(), max_size=60)


@given(MATCHES, st.integers(1, 8))
def test_every_token_is_a_guess_that_was_accepted_or_the_targets_own(matches, count):
    rounds, accepted = accepted_runs(matches, count)
    assert rounds * 1 <= len(matches) <= accepted + rounds <= rounds * (count + 1)
    assert accepted <= sum(matches)


@given(MATCHES, st.integers(1, 8))
def test_more_guesses_never_make_more_rounds(matches, count):
    assert accepted_runs(matches, count + 1)[0] <= accepted_runs(matches, count)[0]


@pytest.mark.parametrize(
    ("matches", "count", "expected"),
    [
        ("", 3, (0, 0)),
        ("0000", 3, (4, 0)),
        ("1111", 3, (1, 3)),
        ("11111111", 3, (2, 6)),
        ("1101", 3, (2, 3)),
        ("0111", 2, (2, 2)),
    ],
)
def test_rounds_by_hand(matches, count, expected):
    assert accepted_runs([one == "1" for one in matches], count) == expected


@pytest.mark.parametrize("rate", [0.5, 0.8])
def test_tokens_of_a_round_are_leviathans(rate):
    """(1 - rate^(count + 1)) / (1 - rate), where each guess is right with the same chance."""
    answers = np.random.default_rng(0).random((50, 4000)) < rate
    plan = best_plan(list(answers), 0.1, {1: 1.0, 4: 1.0})
    assert plan.count == 3
    assert plan.tokens_per_round == pytest.approx((1 - rate**4) / (1 - rate), rel=0.01)
    assert plan.speed == pytest.approx(plan.tokens_per_round / 1.3)


def test_the_best_number_is_where_a_guess_costs_what_it_brings():
    """A draft that is always right should guess as much as it may, one that is never right as little."""
    steps = {1: 1.0, 2: 1.05, 5: 1.2, 9: 1.4}
    assert best_plan([np.ones(900, bool)], 0.05, steps).count == 8
    never = best_plan([np.zeros(900, bool)], 0.05, steps)
    assert (never.count, never.tokens_per_round) == (1, 1.0)
    assert never.speed == pytest.approx(1 / 1.1)
