"""LlamaGen's class-conditional GPT as one small module with the original's names: what parity is measured on.

Written from the paper and the layout of its checkpoints: interleaved complex rotary, half of a head's channels by row
and half by column, and a table of zeros for the class. It shares no code with edgeprune.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import nn


@dataclass(frozen=True)
class Sizes:
    """heads, groups, channels: of each layer, 0 where it has no such module. classes: rows of their table."""

    dim: int
    head_dim: int
    layers: tuple[tuple[int, int, int], ...]
    vocabulary: int
    classes: int
    side: int


@dataclass(frozen=True)
class Output:
    logits: torch.Tensor


class RmsNorm(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5) * self.weight


class Attention(nn.Module):
    def __init__(self, dim: int, heads: int, groups: int, head_dim: int) -> None:
        super().__init__()
        self.heads, self.groups, self.head_dim = heads, groups, head_dim
        self.wqkv = nn.Linear(dim, (heads + 2 * groups) * head_dim, bias=False)
        self.wo = nn.Linear(heads * head_dim, dim, bias=False)

    def forward(self, x: torch.Tensor, turns: torch.Tensor, allowed: torch.Tensor) -> torch.Tensor:
        """turns: (b, t, head_dim / 2) complex; allowed: (b, t, t)."""
        b, t, _ = x.shape
        sizes = [self.heads * self.head_dim, self.groups * self.head_dim, self.groups * self.head_dim]
        q, k, v = (part.view(b, t, -1, self.head_dim) for part in self.wqkv(x).split(sizes, dim=-1))
        q, k = (_turned(part, turns) for part in (q, k))
        k, v = (part.repeat_interleave(self.heads // self.groups, dim=2) for part in (k, v))
        scores = torch.einsum("bqhd,bkhd->bhqk", q, k) / self.head_dim**0.5
        shares = scores.masked_fill(~allowed[:, None], -torch.inf).softmax(-1)
        return self.wo(torch.einsum("bhqk,bkhd->bqhd", shares, v).reshape(b, t, -1))


def _turned(x: torch.Tensor, turns: torch.Tensor) -> torch.Tensor:
    pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous())
    return torch.view_as_real(pairs * turns[:, :, None]).flatten(-2)


class FeedForward(nn.Module):
    def __init__(self, dim: int, channels: int) -> None:
        super().__init__()
        self.w1, self.w3 = (nn.Linear(dim, channels, bias=False) for _ in range(2))
        self.w2 = nn.Linear(channels, dim, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


class Block(nn.Module):
    def __init__(self, dim: int, head_dim: int, heads: int, groups: int, channels: int) -> None:
        super().__init__()
        if groups:
            self.attention_norm, self.attention = RmsNorm(dim), Attention(dim, heads, groups, head_dim)
        if channels:
            self.ffn_norm, self.feed_forward = RmsNorm(dim), FeedForward(dim, channels)

    def forward(self, x: torch.Tensor, turns: torch.Tensor, allowed: torch.Tensor) -> torch.Tensor:
        if hasattr(self, "attention"):
            x = x + self.attention(self.attention_norm(x), turns, allowed)
        return x + self.feed_forward(self.ffn_norm(x)) if hasattr(self, "feed_forward") else x


class LlamaGen(nn.Module):
    """Token ids from the vocabulary's size on are classes."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.sizes = sizes
        self.cls_embedding = nn.Module()
        self.cls_embedding.embedding_table = nn.Embedding(sizes.classes, sizes.dim)
        self.tok_embeddings = nn.Embedding(sizes.vocabulary, sizes.dim)
        self.layers = nn.ModuleList(Block(sizes.dim, sizes.head_dim, *widths) for widths in sizes.layers)
        self.norm = RmsNorm(sizes.dim)
        self.output = nn.Linear(sizes.dim, sizes.vocabulary, bias=False)

    def table(self) -> torch.Tensor:
        """(1 + side * side, head_dim / 2) complex: what each position turns by."""
        side, quarter = self.sizes.side, self.sizes.head_dim // 4
        frequencies = torch.tensor([10000.0 ** (-4 * j / self.sizes.head_dim) for j in range(quarter)])
        angles = torch.outer(torch.arange(side).float(), frequencies)
        by_row, by_column = angles[:, None].expand(-1, side, -1), angles[None].expand(side, -1, -1)
        both = torch.cat([by_row, by_column], dim=-1).flatten(0, 1)
        return torch.cat([torch.zeros(1, 2 * quarter), torch.polar(torch.ones_like(both), both)])

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        use_cache: bool = False,
    ) -> Output:
        b, t = input_ids.shape
        code = input_ids.clamp(max=self.sizes.vocabulary - 1)
        label = (input_ids - self.sizes.vocabulary).clamp(min=0)
        is_class = (input_ids >= self.sizes.vocabulary)[..., None]
        x = torch.where(is_class, self.cls_embedding.embedding_table(label), self.tok_embeddings(code))
        positions = torch.arange(t).expand(b, -1) if position_ids is None else position_ids
        allowed = torch.ones(t, t, dtype=torch.bool).tril().expand(b, -1, -1)
        if attention_mask is not None:
            allowed = allowed & (attention_mask[:, None] > 0) | torch.eye(t, dtype=torch.bool)
        turns = self.table()[positions]
        for layer in self.layers:
            x = layer(x, turns, allowed)
        return Output(self.output(self.norm(x)))


def random_llamagen(
    dim: int = 64,
    heads: int = 4,
    groups: int | None = None,
    channels: int = 96,
    layers: int = 3,
    vocabulary: int = 257,
    classes: int = 11,
    side: int = 8,
    seed: int = 0,
) -> LlamaGen:
    """Norms are random too, so that none may be forgotten."""
    widths = ((heads, groups or heads, channels),) * layers
    torch.manual_seed(seed)
    model = LlamaGen(Sizes(dim, dim // heads, widths, vocabulary, classes, side)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(1.0, 0.3) if parameter.dim() == 1 else parameter.normal_(0.0, 0.2)
    return model


def configuration(sizes: Sizes, has_null: bool = True) -> dict[str, object]:
    heads, groups, channels = sizes.layers[0]
    return {
        "model_type": "llamagen",
        "architectures": ["LlamaGenForCausalImage"],
        "hidden_size": sizes.dim,
        "num_hidden_layers": len(sizes.layers),
        "num_attention_heads": heads,
        "num_key_value_heads": groups,
        "head_dim": sizes.head_dim,
        "intermediate_size": channels,
        "vocab_size": sizes.vocabulary,
        "num_classes": sizes.classes - has_null,
        "has_null_class": has_null,
        "image_side": sizes.side,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
    }


def save_directory(model: LlamaGen, folder: Path) -> None:
    """As a checkpoint directory of edgeprune's."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(configuration(model.sizes)))
    save_file(model.state_dict(), folder / "model.safetensors")


def load_directory(folder: Path, layers: Sequence[tuple[int, int, int]]) -> LlamaGen:
    """Of a saved one with these heads, groups and channels of its layers; raises where a name or shape is off."""
    config = json.loads((folder / "config.json").read_text())
    classes = config["num_classes"] + config["has_null_class"]
    model = LlamaGen(
        Sizes(
            config["hidden_size"],
            config["head_dim"],
            tuple(layers),
            config["vocab_size"],
            classes,
            config["image_side"],
        )
    )
    model.load_state_dict(load_file(folder / "model.safetensors"))
    return model.eval()
