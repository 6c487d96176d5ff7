"""The networks that tools/train_image_model.py trains: LlamaGen's GPT and codec, small, under LlamaGen's own
tensor names, and a classifier. They know nothing of edgeprune: their checkpoints are a stranger's.

Shapes: b batch, n tokens of an image in raster order, d width, h heads, e head size, c channels.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

ROPE_BASE = 10000
FFN_MULTIPLE = 256


@dataclass(frozen=True)
class GptShape:
    """The sizes of the GPT. side: tokens on a side of the image."""

    vocab_size: int = 512
    num_classes: int = 10
    side: int = 7
    dim: int = 256
    n_layer: int = 6
    n_head: int = 8

    @property
    def ffn(self) -> int:
        """Returns the width of the feed-forward layers, LlamaGen's 8/3 of the model's rounded up."""
        return -(-(8 * self.dim // 3) // FFN_MULTIPLE) * FFN_MULTIPLE


@dataclass(frozen=True)
class CodecShape:
    """The sizes of the codec. base: channels of the first level, a multiple of 32, the groups of every norm."""

    vocab_size: int = 512
    code_size: int = 8
    base: int = 32
    multipliers: tuple[int, ...] = (1, 1, 2)
    latent: int = 64

    @property
    def downsample(self) -> int:
        """Returns the pixels on a side of one token."""
        return 2 ** (len(self.multipliers) - 1)


class RMSNorm(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-5)).type_as(x) * self.weight


def rotary_table(shape: GptShape) -> Tensor:
    """Returns cos and sin, (1 + n, e / 2, 2): the first half of the pairs turns by the row, the rest by the column.

    The class's position has cos = sin = 0: its key and query are zero.
    """
    quarter = shape.dim // shape.n_head // 4
    omega = ROPE_BASE ** (-torch.arange(quarter) / quarter)
    row, column = torch.meshgrid(torch.arange(shape.side), torch.arange(shape.side), indexing="ij")
    angles = torch.cat([place.flatten()[:, None] * omega for place in (row, column)], dim=-1)
    table = torch.stack([angles.cos(), angles.sin()], dim=-1)
    return torch.cat([torch.zeros_like(table[:1]), table])


def rotate(x: Tensor, table: Tensor) -> Tensor:
    """Returns x with its pairs (2m, 2m + 1) turned. x: (b, n, h, e); table: (n, e / 2, 2)."""
    a, b = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = table[:, None].unbind(-1)
    return torch.stack([a * cos - b * sin, b * cos + a * sin], dim=-1).flatten(-2).type_as(x)


class Attention(nn.Module):
    def __init__(self, shape: GptShape) -> None:
        super().__init__()
        self.heads = shape.n_head
        self.wqkv = nn.Linear(shape.dim, 3 * shape.dim, bias=False)
        self.wo = nn.Linear(shape.dim, shape.dim, bias=False)

    def forward(self, x: Tensor, table: Tensor) -> Tensor:
        q, k, v = (part.unflatten(-1, (self.heads, -1)) for part in self.wqkv(x).chunk(3, dim=-1))  # (b, n, h, e)
        q, k, v = (part.transpose(1, 2) for part in (rotate(q, table), rotate(k, table), v))  # (b, h, n, e)
        later = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(1)  # (n, n)
        # In its parts: over so few positions, the fused kernel's backward pass is several times slower.
        scores = (q @ k.transpose(2, 3)).float() / math.sqrt(q.shape[-1])  # (b, h, n, n)
        weights = scores.masked_fill(later, -math.inf).softmax(dim=-1).type_as(v)
        return self.wo((weights @ v).transpose(1, 2).flatten(2))


class FeedForward(nn.Module):
    def __init__(self, shape: GptShape) -> None:
        super().__init__()
        self.w1 = nn.Linear(shape.dim, shape.ffn, bias=False)
        self.w3 = nn.Linear(shape.dim, shape.ffn, bias=False)
        self.w2 = nn.Linear(shape.ffn, shape.dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


class Block(nn.Module):
    def __init__(self, shape: GptShape) -> None:
        super().__init__()
        self.attention, self.feed_forward = Attention(shape), FeedForward(shape)
        self.attention_norm, self.ffn_norm = RMSNorm(shape.dim), RMSNorm(shape.dim)

    def forward(self, x: Tensor, table: Tensor) -> Tensor:
        x = x + self.attention(self.attention_norm(x), table)
        return x + self.feed_forward(self.ffn_norm(x))


class ClassEmbedding(nn.Module):
    def __init__(self, shape: GptShape) -> None:
        super().__init__()
        self.embedding_table = nn.Embedding(shape.num_classes + 1, shape.dim)


class Gpt(nn.Module):
    """A class-conditional LlamaGen, without its dropout; class num_classes is the null class."""

    def __init__(self, shape: GptShape) -> None:
        super().__init__()
        self.shape = shape
        self.cls_embedding = ClassEmbedding(shape)
        self.tok_embeddings = nn.Embedding(shape.vocab_size, shape.dim)
        self.layers = nn.ModuleList(Block(shape) for _ in range(shape.n_layer))
        self.norm = RMSNorm(shape.dim)
        self.output = nn.Linear(shape.dim, shape.vocab_size, bias=False)
        self.register_buffer("table", rotary_table(shape), persistent=False)
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)
        nn.init.zeros_(self.output.weight)

    def forward(self, classes: Tensor, codes: Tensor) -> Tensor:
        """Returns the logits (b, n + 1, vocab_size) of codes 0..n after a class (b,) and codes (b, n), both int64."""
        x = torch.cat([self.cls_embedding.embedding_table(classes)[:, None], self.tok_embeddings(codes)], dim=1)
        # (b, n + 1, d)
        for layer in self.layers:
            x = layer(x, self.table[: x.shape[1]])
        return self.output(self.norm(x))


def swish(x: Tensor) -> Tensor:
    return F.silu(x)


def group_norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(32, channels, eps=1e-6)


class ResidualBlock(nn.Module):
    def __init__(self, channels: int, out: int) -> None:
        super().__init__()
        self.norm1, self.conv1 = group_norm(channels), nn.Conv2d(channels, out, 3, padding=1)
        self.norm2, self.conv2 = group_norm(out), nn.Conv2d(out, out, 3, padding=1)
        if channels != out:
            self.nin_shortcut = nn.Conv2d(channels, out, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv2(swish(self.norm2(self.conv1(swish(self.norm1(x))))))
        return y + (self.nin_shortcut(x) if hasattr(self, "nin_shortcut") else x)


class AttentionBlock(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = group_norm(channels)
        self.q, self.k, self.v, self.proj_out = (nn.Conv2d(channels, channels, 1) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)  # (b, c, height, width)
        q, k, v = (part(y).flatten(2).transpose(1, 2) for part in (self.q, self.k, self.v))  # (b, height * width, c)
        weights = ((q @ k.transpose(1, 2)) / math.sqrt(x.shape[1])).softmax(dim=-1)
        return x + self.proj_out((weights @ v).transpose(1, 2).unflatten(2, x.shape[2:]))


class Downsample(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        # F.interpolate is not used: compiled in bf16 for a CPU, its gradient is zero (torch 2.13)
        return self.conv(x.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3))


class Level(nn.Module):
    """Residual blocks at one size, each followed by attention where the image is smallest."""

    def __init__(self, channels: int, out: int, blocks: int, attention: bool) -> None:
        super().__init__()
        self.res = nn.ModuleList(ResidualBlock(channels if i == 0 else out, out) for i in range(blocks))
        self.attn = nn.ModuleList(AttentionBlock(out) for _ in range(blocks if attention else 0))

    def forward(self, x: Tensor) -> Tensor:
        for i, block in enumerate(self.res):
            x = block(x)
            x = self.attn[i](x) if len(self.attn) else x
        return x


class Half(nn.Module):
    """The parts that encoder and decoder share."""

    def middle(self, channels: int) -> nn.ModuleList:
        """Returns the blocks at the smallest size."""
        blocks = ResidualBlock(channels, channels), AttentionBlock(channels), ResidualBlock(channels, channels)
        return nn.ModuleList(blocks)

    def out(self, x: Tensor) -> Tensor:
        """Returns the output of the last norm and convolution."""
        return self.conv_out(swish(self.norm_out(x)))


class Encoder(Half):
    def __init__(self, shape: CodecShape) -> None:
        super().__init__()
        widths = [shape.base * m for m in (1, *shape.multipliers)]
        last = len(shape.multipliers) - 1
        self.conv_in = nn.Conv2d(3, shape.base, 3, padding=1)
        self.conv_blocks = nn.ModuleList(Level(widths[i], widths[i + 1], 2, i == last) for i in range(last + 1))
        for level, width in list(zip(self.conv_blocks, widths[1:], strict=True))[:-1]:
            level.downsample = Downsample(width)
        self.mid = self.middle(widths[-1])
        self.norm_out, self.conv_out = group_norm(widths[-1]), nn.Conv2d(widths[-1], shape.latent, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)
        for level in self.conv_blocks:
            x = level(x)
            x = level.downsample(x) if hasattr(level, "downsample") else x
        for part in self.mid:
            x = part(x)
        return self.out(x)


class Decoder(Half):
    def __init__(self, shape: CodecShape) -> None:
        super().__init__()
        widths = [shape.base * m for m in reversed(shape.multipliers)]
        last = len(widths) - 1
        self.conv_in = nn.Conv2d(shape.latent, widths[0], 3, padding=1)
        self.mid = self.middle(widths[0])
        pairs = zip([widths[0], *widths], widths, strict=False)
        self.conv_blocks = nn.ModuleList(Level(*pair, 3, i == 0) for i, pair in enumerate(pairs))
        for level, width in zip(self.conv_blocks[:last], widths, strict=False):
            level.upsample = Upsample(width)
        self.norm_out, self.conv_out = group_norm(widths[-1]), nn.Conv2d(widths[-1], 3, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)
        for part in self.mid:
            x = part(x)
        for level in self.conv_blocks:
            x = level(x)
            x = level.upsample(x) if hasattr(level, "upsample") else x
        return self.out(x)


class Codec(nn.Module):
    """A codec of VQ-16's structure: images in [-1, 1] to codes of a codebook of directions, and back."""

    def __init__(self, shape: CodecShape) -> None:
        super().__init__()
        self.shape = shape
        self.encoder, self.decoder = Encoder(shape), Decoder(shape)
        self.quant_conv = nn.Conv2d(shape.latent, shape.code_size, 1)
        self.post_quant_conv = nn.Conv2d(shape.code_size, shape.latent, 1)
        self.quantize = nn.Module()
        self.quantize.embedding = nn.Embedding(shape.vocab_size, shape.code_size)

    @property
    def codebook(self) -> Tensor:
        """Returns the codebook (vocab_size, code_size), rows of length 1."""
        return F.normalize(self.quantize.embedding.weight.float(), dim=-1, eps=1e-12)

    def directions(self, images: Tensor) -> Tensor:
        """Returns the directions (b, code_size, side, side) fp32 of images (b, 3, height, width), of length 1 along the
        channels."""
        return F.normalize(self.quant_conv(self.encoder(images)).float(), dim=1, eps=1e-12)

    def nearest(self, directions: Tensor) -> Tensor:
        """Returns the codes (b, side, side) int64 of the largest cosine. directions: (b, code_size, side, side)."""
        return torch.einsum("bchw,kc->bhwk", directions.detach(), self.codebook.detach()).argmax(dim=-1)

    def look_up(self, codes: Tensor) -> Tensor:
        """Returns the directions (b, code_size, side, side) fp32 of codes (b, side, side) int64."""
        return F.embedding(codes, self.codebook).permute(0, 3, 1, 2)

    def pictures(self, directions: Tensor) -> Tensor:
        """Returns the pixels (b, 3, height, width) of directions (b, code_size, side, side)."""
        return self.decoder(self.post_quant_conv(directions))


class Classifier(nn.Module):
    """A small convolutional network: (b, 3, 28, 28) in [-1, 1] to (b, classes) logits."""

    def __init__(self, classes: int = 10, width: int = 32) -> None:
        super().__init__()
        widths = [3, width, 2 * width, 4 * width]
        layers: list[nn.Module] = []
        for before, after in zip(widths, widths[1:], strict=False):
            layers += [nn.Conv2d(before, after, 3, padding=1), nn.BatchNorm2d(after), nn.ReLU(), nn.MaxPool2d(2)]
        self.features = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.output = nn.Linear(widths[-1], classes)

    def forward(self, images: Tensor) -> Tensor:
        return self.output(F.dropout(self.features(images), 0.2, self.training))
