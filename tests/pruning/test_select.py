"""The features that stay: whole groups of heads, and the best of each."""

import torch

from edgeprune.model.decoder import Attention
from edgeprune.pruning.select import select_heads, top_units


def test_selection_takes_whole_groups_and_then_the_best_heads_of_each():
    scores = {6: torch.tensor([1.0, 9.0, 5.0]), 2: torch.tensor([3.0, 1.0, 2.0, 7.0, 8.0, 9.0, 4.0, 6.0, 5.0])}
    kept_groups, kept_heads = select_heads(lambda unit, keep: scores[unit], Attention(9, 3, 2), 2, 2)
    assert kept_groups.tolist() == [1, 2]
    assert kept_heads.tolist() == [4, 5, 7, 8]


def test_equal_scores_keep_the_first_units():
    assert top_units(torch.zeros(5), 3).tolist() == [0, 1, 2]
