"""Small image generators, and their logits in closed form: no cache, no table, rotations as complex numbers."""

from __future__ import annotations

import numpy as np
import torch

from edgeprune.model.decoder import Attention, Decoder, Grid, Layer, Mlp, Picture, Rotary
from tests.support.graph_models import Sample

SIDE, CODES, CLASSES = 4, 50, 7


def llamagen(heads: int = 6, groups: int = 2, head_dim: int = 16, turned: int | None = None) -> Decoder:
    """2 layers, hidden 48, 4 x 4 tokens of 50 codes, 7 classes and none; a shorter or longer way each axis."""
    quarter = (turned or head_dim) // 4
    waves = tuple(100.0 ** (-m / quarter) for m in range(quarter))
    attention = Attention(heads, groups, head_dim, Rotary(waves * 2, grid=Grid(1, SIDE)))
    layers = (Layer(attention, Mlp(64)),) * 2
    picture = Picture(SIDE, CLASSES)
    return Decoder("llamagen", 48, CODES, SIDE**2 + 1, 1e-5, False, layers, picture=picture)


def imagegpt() -> Decoder:
    """A start token instead of classes, learned positions, biases, and one more vocabulary row than logits."""
    mlp = Mlp(96, "gelu_quick", gated=False, input_bias=True, output_bias=True)
    layers = (Layer(Attention(3, 3, 16, input_bias=True, output_bias=True), mlp),) * 2
    picture = Picture(SIDE, 0)
    return Decoder("imagegpt", 48, CODES, SIDE**2, 1e-5, False, layers, learned_positions=True, picture=picture)


def random_weights(decoder: Decoder) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    draw = {name: torch.randn(shape, generator=generator) for name, shape in decoder.shapes().items()}
    return {name: 1 + 0.2 * value if "norm" in name else 0.2 * value for name, value in draw.items()}


def drawn(decoder: Decoder, batch: int = 2) -> Sample:
    """What is fed to draw `batch` pictures: class or start, then all codes but the last."""
    tokens, generator = decoder.picture.tokens, np.random.default_rng(4)
    ids = generator.integers(0, decoder.vocab_size, (batch, tokens))
    ids[:, 0] = decoder.vocab_size + np.arange(batch) % decoder.picture.inputs
    return Sample(ids, np.ones_like(ids), np.broadcast_to(np.arange(tokens), ids.shape).copy())


def closed_form(decoder: Decoder, weights: dict[str, torch.Tensor], batch: Sample) -> np.ndarray:
    """(b, s, vocabulary) fp64: every position sees itself and what is before it and real."""
    w = {name: value.double().numpy() for name, value in weights.items()}
    x = w["embedding"][batch.ids]
    if decoder.learned_positions:
        x = x + w["positions"][batch.positions]

    def normed(name: str) -> np.ndarray:
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + decoder.norm_eps) * w[name]

    def linear(name: str, y: np.ndarray) -> np.ndarray:
        return y @ w[name].T + w.get(f"{name}_bias", 0.0)

    for index, layer in enumerate(decoder.layers):
        at = f"layers.{index}.attention."
        x = x + linear(at + "o", _attended(layer.attention, at, linear, normed(at + "norm"), batch))
        at, y = f"layers.{index}.mlp.", normed(f"layers.{index}.mlp.norm")
        inner = linear(at + ("gate" if layer.mlp.gated else "up"), y)
        inner = inner / (1 + np.exp(-inner * (1.702 if layer.mlp.activation == "gelu_quick" else 1.0)))
        x = x + linear(at + "down", inner * linear(at + "up", y) if layer.mlp.gated else inner)
    return normed("norm") @ w["head"].T


def _attended(attention: Attention, at: str, linear: object, y: np.ndarray, batch: Sample) -> np.ndarray:
    b, s, _ = y.shape
    q, k, v = (linear(at + part, y).reshape(b, s, -1, attention.head_dim) for part in "qkv")
    if attention.rotary is not None:
        q, k = _rotated(q, attention.rotary, batch.positions), _rotated(k, attention.rotary, batch.positions)
    k, v = (value.repeat(attention.heads_per_group, axis=2) for value in (k, v))
    scores = np.einsum("bqhd,bkhd->bhqk", q, k) * attention.head_dim**-0.5
    seen = np.tril(np.ones((s, s), bool)) & (batch.mask > 0)[:, None, None]
    scores = np.where(seen, scores, -1e9)
    shares = np.exp(scores - scores.max(-1, keepdims=True))
    shares /= shares.sum(-1, keepdims=True)
    return np.einsum("bhqk,bkhd->bqhd", shares, v).reshape(b, s, -1)


def _rotated(x: np.ndarray, rotary: Rotary, positions: np.ndarray) -> np.ndarray:
    """Rotate-half: dimensions m and m + pairs are one complex number, times e^(i angle), or 0 in the prefix."""
    pairs, grid = len(rotary.inverse_frequencies), rotary.grid
    rows, columns = np.divmod(positions - grid.prefix, grid.side)
    half = np.array(rotary.inverse_frequencies[: pairs // 2])
    turns = np.exp(1j * np.concatenate([rows[..., None] * half, columns[..., None] * half], axis=-1))
    turns = turns * (positions >= grid.prefix)[..., None]
    z = (x[..., :pairs] + 1j * x[..., pairs : 2 * pairs]) * turns[:, :, None]
    return np.concatenate([z.real, z.imag, x[..., 2 * pairs :]], axis=-1)
