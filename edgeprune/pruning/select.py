"""From scores to the features that stay, and the rows of the projections before them.

Pure: shapes of one layer and scores in, indices out.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from edgeprune.model.decoder import Attention, Mlp

Rank = Callable[[int, int], torch.Tensor]  # features of a unit, units to keep -> scores of all units


def top_units(scores: torch.Tensor, count: int) -> torch.Tensor:
    """Sorted indices of the `count` largest scores; of equal ones the first."""
    return torch.sort(scores, descending=True, stable=True).indices[:count].sort().values


def features_of(units: torch.Tensor, unit: int) -> torch.Tensor:
    """Indices of all features of the given units of `unit` adjacent features each."""
    return (units[:, None] * unit + torch.arange(unit)).flatten()


def select_heads(rank: Rank, dense: Attention, groups: int, heads_per_group: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Whole key/value groups first, then the same number of query heads in every kept group.

    Returns the kept groups and the kept query heads, sorted; query head j of the result reads group
    j // heads_per_group of the result.
    """
    kept_groups = torch.arange(dense.num_key_value_heads)
    if groups < dense.num_key_value_heads:
        kept_groups = top_units(rank(dense.heads_per_group * dense.head_dim, groups), groups)
    within = torch.arange(dense.heads_per_group).expand(dense.num_key_value_heads, -1)
    if heads_per_group < dense.heads_per_group:
        scores = rank(dense.head_dim, dense.num_key_value_heads * heads_per_group)
        within = torch.stack([top_units(row, heads_per_group) for row in scores.view_as(within)])
    heads = kept_groups[:, None] * dense.heads_per_group + within[kept_groups]
    return kept_groups, heads.flatten()


def kept_features(
    dense: Attention | Mlp, target: Attention | Mlp, rank: Rank
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Kept input features of the output projection; and by name the kept rows of all weights before it that go
    with them, whether a model has them or not."""
    if isinstance(dense, Mlp):
        size = target.intermediate_size
        every = torch.arange(dense.intermediate_size)
        channels = every if size == dense.intermediate_size else top_units(rank(1, size), size)
        names = [f"mlp.{name}{end}" for name in dense.inputs for end in ("", "_bias")]
        return channels, dict.fromkeys(names, channels)
    groups, heads = select_heads(rank, dense, target.num_key_value_heads, target.heads_per_group)
    queries, keys = features_of(heads, dense.head_dim), features_of(groups, dense.head_dim)
    rows = {f"attention.{part}{end}": queries if part == "q" else keys for part in "qkv" for end in ("", "_bias")}
    if dense.qk_norm == "all":
        rows |= {"attention.q_norm": queries, "attention.k_norm": keys}
    return queries, rows
