"""The choice of the features that stay, by their scores, and of the rows of the projections before them.

Pure: shapes of one layer and scores in, indices out; it does not know the weights.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from edgeprune.model.decoder import Attention, Mlp

Rank = Callable[[int, int], torch.Tensor]  # features of a unit, units to keep -> scores of all units


def top_units(scores: torch.Tensor, count: int) -> torch.Tensor:
    """Returns the indices (count,) of the largest scores (units,), sorted; of equal scores those of the first units."""
    return torch.sort(scores, descending=True, stable=True).indices[:count].sort().values


def features_of(units: torch.Tensor, unit: int) -> torch.Tensor:
    """Returns the indices (n * unit,) of all features of units (n,) that have `unit` adjacent features each."""
    return (units[:, None] * unit + torch.arange(unit)).flatten()


def select_heads(rank: Rank, dense: Attention, groups: int, heads_per_group: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the kept key/value groups (groups,) and the kept query heads (groups * heads_per_group,), both sorted.

    Whole groups are selected first, then the same number of query heads in every kept group. Query head j of the
    result reads group j // heads_per_group of the result.
    """
    # (groups,)
    kept_groups = torch.arange(dense.num_key_value_heads)
    if groups < dense.num_key_value_heads:
        kept_groups = top_units(rank(dense.heads_per_group * dense.head_dim, groups), groups)
    # The kept heads within each group of the dense model: (num_key_value_heads, heads_per_group).
    within = torch.arange(dense.heads_per_group).expand(dense.num_key_value_heads, -1)
    if heads_per_group < dense.heads_per_group:
        scores = rank(dense.head_dim, dense.num_key_value_heads * heads_per_group)
        within = torch.stack([top_units(row, heads_per_group) for row in scores.view_as(within)])
    # (groups, heads_per_group), numbered over all groups
    heads = kept_groups[:, None] * dense.heads_per_group + within[kept_groups]
    return kept_groups, heads.flatten()


def kept_features(
    dense: Attention | Mlp, target: Attention | Mlp, rank: Rank
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Returns the kept input features of the output projection, and the kept rows of the weights before it by name.

    The rows are those of all weights that produce the kept features, whether a model has such a weight or not.
    """
    if isinstance(dense, Mlp):
        size = target.intermediate_size
        all_channels = torch.arange(dense.intermediate_size)
        channels = all_channels if size == dense.intermediate_size else top_units(rank(1, size), size)
        names = [f"mlp.{name}{end}" for name in dense.inputs for end in ("", "_bias")]
        return channels, dict.fromkeys(names, channels)
    groups, heads = select_heads(rank, dense, target.num_key_value_heads, target.heads_per_group)
    queries, keys = features_of(heads, dense.head_dim), features_of(groups, dense.head_dim)
    rows = {f"attention.{part}{end}": queries if part == "q" else keys for part in "qkv" for end in ("", "_bias")}
    rows["attention.sinks"] = heads
    if dense.qk_norm == "all":
        rows |= {"attention.q_norm": queries, "attention.k_norm": keys}
    return queries, rows
