"""The features that stay: whole groups of heads, and the best of each."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from edgeprune.model.decoder import Attention, Mlp
from edgeprune.pruning.select import kept_features, select_heads, top_units


def test_selection_takes_whole_groups_and_then_the_best_heads_of_each():
    scores = {6: torch.tensor([1.0, 9.0, 5.0]), 2: torch.tensor([3.0, 1.0, 2.0, 7.0, 8.0, 9.0, 4.0, 6.0, 5.0])}
    kept_groups, kept_heads = select_heads(lambda unit, keep: scores[unit], Attention(9, 3, 2), 2, 2)
    assert kept_groups.tolist() == [1, 2]
    assert kept_heads.tolist() == [4, 5, 7, 8]


def test_equal_scores_keep_the_first_units():
    assert top_units(torch.zeros(5), 3).tolist() == [0, 1, 2]


@given(scores=st.lists(st.integers(0, 5), min_size=1, max_size=12), data=st.data())
def test_the_largest_scores_are_kept_in_order(scores, data):
    count = data.draw(st.integers(1, len(scores)))
    kept = top_units(torch.tensor(scores, dtype=torch.float32), count).tolist()
    assert kept == sorted(sorted(range(len(scores)), key=lambda unit: (-scores[unit], unit))[:count])


def test_rows_of_every_weight_follow_the_kept_heads():
    """Of 2 groups with 2 heads of 3 features the second group and its first head stay."""
    dense = Attention(4, 2, 3, input_bias=True, qk_norm="all")
    scores = {6: torch.tensor([1.0, 2.0]), 3: torch.tensor([9.0, 1.0, 5.0, 4.0])}
    features, rows = kept_features(dense, replace(dense, num_attention_heads=1, num_key_value_heads=1), by(scores))
    assert features.tolist() == [6, 7, 8]
    queries = {"attention.q", "attention.q_bias", "attention.q_norm"}
    assert {name for name, kept in rows.items() if kept.tolist() == [6, 7, 8]} == queries
    assert {name for name, kept in rows.items() if kept.tolist() == [3, 4, 5]} == {
        f"attention.{part}" for part in ("k", "v", "k_bias", "v_bias", "k_norm")
    }
    by_head = replace(dense, qk_norm="head")  # one norm for all heads, which is not cut
    _, rows = kept_features(by_head, replace(by_head, num_attention_heads=1, num_key_value_heads=1), by(scores))
    assert not [name for name in rows if name.endswith("norm")]


@pytest.mark.parametrize(
    ("gated", "names"), [(True, {"gate", "gate_bias", "up", "up_bias"}), (False, {"up", "up_bias"})]
)
def test_channels_are_rows_of_all_inputs_of_an_mlp(gated, names):
    channels, rows = kept_features(
        Mlp(4, gated=gated), Mlp(2, gated=gated), by({1: torch.tensor([3.0, 9.0, 1.0, 4.0])})
    )
    assert channels.tolist() == [1, 3]
    assert rows.keys() == {f"mlp.{name}" for name in names}
    assert all(kept.tolist() == [1, 3] for kept in rows.values())


def test_what_is_not_cut_is_not_ranked():
    for module in (Attention(6, 2, 4), Mlp(5)):
        features, _ = kept_features(module, module, lambda unit, keep: pytest.fail("ranked"))
        assert features.tolist() == list(range(24 if isinstance(module, Attention) else 5))


def by(scores: dict[int, torch.Tensor]):
    """A rank by the number of a unit's features."""
    return lambda unit, keep: scores[unit]
