"""The attention of the Decoder's forward pass in torch, on whole sequences.

Notation as in `forward`: b samples, t tokens, h query heads, k key/value heads, d head_dim, c hidden_size.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from edgeprune.model.decoder import Attention, Decoder, Rotary
from edgeprune.precision import CacheFormat

LayerWeights = dict[str, torch.Tensor]


class Tables:
    """Tables that depend on the positions 0..t-1 alone: cos and sin of rotary embeddings, and masks of windows.

    rotary: for each rotary embedding cos and sin, (t, rotated dimensions) fp32 each, whose two halves are alike.
    masks: for each window (t, t) bool, or None, as `_mask` returns it.
    """

    def __init__(self, decoder: Decoder, length: int) -> None:
        self.rotary = {rotary: _rotary_table(rotary, length) for rotary in decoder.rotaries}
        self.masks = {window: _mask(window, length) for window in decoder.windows}


def _rotary_table(rotary: Rotary, length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns cos and sin (t, 2 * pairs) fp32 of positions 0..t-1."""
    frequencies = torch.tensor(rotary.inverse_frequencies, dtype=torch.float32)
    positions, grid = torch.arange(length, dtype=torch.float32), rotary.grid
    # Angles by the position; on a grid by the row and the column of the cell, half of the pairs each.
    if grid is None:
        angles = torch.outer(positions, frequencies)  # (t, pairs)
    else:
        cells = (positions - grid.prefix).clamp_min(0)  # (t,)
        row_frequencies, column_frequencies = frequencies.chunk(2)
        angles = torch.cat(
            [
                torch.outer(cells.div(grid.side, rounding_mode="floor"), row_frequencies),
                torch.outer(cells % grid.side, column_frequencies),
            ],
            dim=-1,
        )
    # Pair m rotates the dimensions m and m + pairs.
    angles = torch.cat([angles, angles], dim=-1)  # (t, 2 * pairs)
    cos, sin = angles.cos() * rotary.scaling, angles.sin() * rotary.scaling
    # The prefix has no place in the picture.
    if grid is not None:
        cos[: grid.prefix] = sin[: grid.prefix] = 0.0
    return cos, sin


def _mask(window: int | None, length: int) -> torch.Tensor | None:
    """Returns which keys each query sees, (t, t) bool; None where it sees all before it, as without a window."""
    if window is None or window >= length:
        return None
    distance = torch.arange(length)[:, None] - torch.arange(length)  # (queries t, keys t)
    return (distance >= 0) & (distance < window)


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Returns x (b, heads, t, d) rotated by the angles of cos and sin (t, rotated).

    The pairs are (m, m + rotated / 2); the dimensions behind the rotated ones stay as they are.
    """
    rotated = cos.shape[-1]
    if rotated < x.shape[-1]:
        return torch.cat([rotate(x[..., :rotated], cos, sin), x[..., rotated:]], dim=-1)
    first_half, second_half = x.chunk(2, dim=-1)  # (b, heads, t, rotated / 2) each
    return x * cos + torch.cat([-second_half, first_half], dim=-1) * sin


def attention_heads(
    x: torch.Tensor, weights: LayerWeights, attention: Attention, tables: Tables, eps: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Returns the queries (b, h, t, d), keys (b, k, t, d) and values (b, k, t, d) of normed states x (b, t, c).

    Queries and keys are normed and rotated where the attention asks for it, keys and values rounded as the KV cache
    holds them. eps: of their norm.
    """
    b, t, _ = x.shape

    def heads(name: str) -> torch.Tensor:
        """Returns a projection of x by its heads (b, heads, t, d), normed where it is to be."""
        # (b, t, heads * d)
        projected = F.linear(x, weights[f"attention.{name}"], weights.get(f"attention.{name}_bias"))
        if attention.qk_norm == "all" and name != "v":
            projected = F.rms_norm(projected, projected.shape[-1:], weights[f"attention.{name}_norm"], eps)
        split = projected.view(b, t, -1, attention.head_dim).transpose(1, 2)  # (b, heads, t, d)
        if attention.qk_norm == "head" and name != "v":
            split = F.rms_norm(split, split.shape[-1:], weights[f"attention.{name}_norm"], eps)
        return split

    # Project, and norm queries and keys.
    query, key = heads("q"), heads("k")
    # Rotate queries and keys by their positions.
    if attention.rotary is not None:
        cos, sin = tables.rotary[attention.rotary]
        query, key = rotate(query, cos, sin), rotate(key, cos, sin)
    if attention.qk_norm == "turned":
        query, key = (
            F.rms_norm(states, states.shape[-1:], weights[f"attention.{name}_norm"], eps)
            for name, states in (("q", query), ("k", key))
        )
    value = heads("v")
    if (form := attention.cache_format) is not None:
        key = through_cache(key, weights["attention.key_scale"], form)
        value = through_cache(value, weights["attention.value_scale"], form)
    return query, key, value


def through_cache(states: torch.Tensor, scale: torch.Tensor, form: CacheFormat) -> torch.Tensor:
    """Returns keys or values (b, k, t, d) as a KV cache gives them back: each the nearest code times its scale.

    scale: (1, k, 1, d).
    """
    codes = states.div(scale).clamp_(form.least, form.most)
    codes = codes.round_() if form.name == "int8" else codes.to(getattr(torch, form.torch_dtype)).float()
    return codes.mul_(scale)


def attention_context(
    x: torch.Tensor, weights: LayerWeights, attention: Attention, tables: Tables, eps: float
) -> torch.Tensor:
    """Returns the input (b, t, h * d) of the output projection for normed states x (b, t, c); causal."""
    heads, mask = attention_heads(x, weights, attention, tables, eps), tables.masks[attention.window]
    return attend(*heads, attention, mask, weights.get("attention.sinks"))


def attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention: Attention,
    mask: torch.Tensor | None,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """Returns the context (b, t, h * d): for each query the mean of the values, weighted by the softmax of its scores.

    query: (b, h, t, d); key, value: (b, k, t, d), as from `attention_heads`. mask: (t, t) bool, or None for plain
    causal attention. sinks: (h,), the attention's weight of this name, if it has one.
    """
    if sinks is not None:
        query, key, value, mask = _with_sinks(query, key, value, mask, sinks / attention.score_scale)
    context = _attended(query, key, value, attention, mask)[..., : attention.head_dim]  # (b, h, t, d)
    return context.transpose(1, 2).reshape(len(context), -1, attention.query_size)


def _with_sinks(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None, scores: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Returns queries (b, h, t, d + 1), keys and values (b, k, 1 + t, d + 1) and mask (t, 1 + t) with the sinks as the
    first key, whose value is zero.

    scores: (h,), of every query with that key, before their scale; the last channel carries them.
    """
    b, h, t, _ = query.shape
    query = torch.cat([query, scores.view(1, h, 1, 1).expand(b, h, t, 1)], dim=-1)
    key, value = (F.pad(states, (0, 1, 1, 0)) for states in (key, value))
    key[:, :, 0, -1] = 1.0
    if mask is None:
        mask = torch.ones(t, t, dtype=torch.bool).tril()
    return query, key, value, F.pad(mask, (1, 0), value=True)


def _attended(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attention: Attention, mask: torch.Tensor | None
) -> torch.Tensor:
    """Returns the context (b, h, t, d) of queries (b, h, t, d), keys and values (b, k, t, d)."""
    shared = attention.heads_per_group > 1
    # Without a softcap torch's fused kernel does all.
    if attention.softcap is None:
        return F.scaled_dot_product_attention(
            query, key, value, mask, is_causal=mask is None, scale=attention.score_scale, enable_gqa=shared
        )
    # With a softcap the scores are computed here, for which every query head needs its own keys and values.
    if shared:
        # (b, h, t, d)
        key, value = (heads.repeat_interleave(attention.heads_per_group, dim=1) for heads in (key, value))
    # (b, h, queries t, keys t)
    scores = attention.softcap * torch.tanh(query @ key.mT * (attention.score_scale / attention.softcap))
    if mask is None:
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool).tril()
    return scores.masked_fill(~mask, -torch.inf).softmax(dim=-1) @ value
