"""LlamaGen's VQ model as modules with the names of its checkpoints, for tests: small, trainable, and independent of
the package, which reads what this writes."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F


def norm(channels: int) -> nn.Module:
    return nn.GroupNorm(32, channels, eps=1e-6)


class Residual(nn.Module):
    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.norm1, self.conv1 = norm(inputs), nn.Conv2d(inputs, outputs, 3, padding=1)
        self.norm2, self.conv2 = norm(outputs), nn.Conv2d(outputs, outputs, 3, padding=1)
        if inputs != outputs:
            self.nin_shortcut = nn.Conv2d(inputs, outputs, 1)

    def forward(self, x):
        y = self.norm1(x)
        y = self.conv1(y * torch.sigmoid(y))
        y = self.norm2(y)
        y = self.conv2(y * torch.sigmoid(y))
        return (self.nin_shortcut(x) if hasattr(self, "nin_shortcut") else x) + y


class Attention(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = norm(channels)
        for name in ("q", "k", "v", "proj_out"):
            setattr(self, name, nn.Conv2d(channels, channels, 1))

    def forward(self, x):
        y = self.norm(x)
        q, k, v = self.q(y), self.k(y), self.v(y)
        scores = torch.einsum("bchw,bcij->bhwij", q, k) * x.shape[1] ** -0.5
        shares = scores.flatten(3).softmax(3).view_as(scores)
        return x + self.proj_out(torch.einsum("bhwij,bcij->bchw", shares, v))


class Resample(nn.Module):
    def __init__(self, channels: int, down: bool) -> None:
        super().__init__()
        self.down = down
        self.conv = nn.Conv2d(channels, channels, 3, stride=2 if down else 1, padding=0 if down else 1)

    def forward(self, x):
        if self.down:
            return self.conv(nn.ZeroPad2d((0, 1, 0, 1))(x))
        return self.conv(x.repeat_interleave(2, 2).repeat_interleave(2, 3))


def level(inputs: int, width: int, blocks: int, attends: bool) -> nn.Module:
    block = nn.Module()
    block.res = nn.ModuleList(Residual(width if index else inputs, width) for index in range(blocks))
    block.attn = nn.ModuleList(Attention(width) for _ in range(blocks if attends else 0))
    return block


def through(block: nn.Module, x):
    for index, residual in enumerate(block.res):
        x = residual(x)
        if len(block.attn):
            x = block.attn[index](x)
    for name in ("downsample", "upsample"):
        if hasattr(block, name):
            x = getattr(block, name)(x)
    return x


class Part(nn.Module):
    """What encoder and decoder share: conv_in, levels and middle in their order, norm_out, conv_out."""

    def finish(self, inputs: int, outputs: int) -> None:
        self.norm_out, self.conv_out = norm(inputs), nn.Conv2d(inputs, outputs, 3, padding=1)

    def middle(self, width: int) -> None:
        self.mid = nn.ModuleList([Residual(width, width), Attention(width), Residual(width, width)])

    def out(self, x):
        x = self.norm_out(x)
        return self.conv_out(x * torch.sigmoid(x))


class Encoder(Part):
    def __init__(self, base: int, multipliers: tuple[int, ...], blocks: int, latent: int) -> None:
        super().__init__()
        self.conv_in = nn.Conv2d(3, base, 3, padding=1)
        self.conv_blocks, width = nn.ModuleList(), base
        for index, multiplier in enumerate(multipliers):
            last = index == len(multipliers) - 1
            self.conv_blocks.append(level(width, base * multiplier, blocks, last))
            width = base * multiplier
            if not last:
                self.conv_blocks[-1].downsample = Resample(width, down=True)
        self.middle(width)
        self.finish(width, latent)

    def forward(self, x):
        x = self.conv_in(x)
        for block in self.conv_blocks:
            x = through(block, x)
        return self.out(nn.Sequential(*self.mid)(x))


class Decoder(Part):
    def __init__(self, base: int, multipliers: tuple[int, ...], blocks: int, latent: int) -> None:
        super().__init__()
        width = base * multipliers[-1]
        self.conv_in = nn.Conv2d(latent, width, 3, padding=1)
        self.middle(width)
        self.conv_blocks = nn.ModuleList()
        for index in reversed(range(len(multipliers))):
            self.conv_blocks.append(level(width, base * multipliers[index], blocks + 1, index == len(multipliers) - 1))
            width = base * multipliers[index]
            if index:
                self.conv_blocks[-1].upsample = Resample(width, down=False)
        self.finish(width, 3)

    def forward(self, x):
        x = nn.Sequential(*self.mid)(self.conv_in(x))
        for block in self.conv_blocks:
            x = through(block, x)
        return self.out(x)


class Quantizer(nn.Module):
    """`nearest` rows of the codebook on the unit sphere; forward passes gradients straight through."""

    def __init__(self, codes: int, size: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(codes, size)
        self.register_buffer("codebook_used", torch.zeros(65536))

    def rows(self, codes):
        return F.normalize(self.embedding.weight, dim=1)[codes]

    def nearest(self, unit):
        """unit (b, size, h, w) of length 1 -> codes (b, h, w)."""
        return torch.einsum("bchw,nc->bhwn", unit, F.normalize(self.embedding.weight, dim=1)).argmax(3)

    def forward(self, x):
        """x (b, size, h, w) -> quantised x, codes (b, h, w), and the loss of codebook and commitment."""
        unit = F.normalize(x, dim=1)
        codes = self.nearest(unit)
        rows = self.rows(codes).permute(0, 3, 1, 2)
        loss = F.mse_loss(rows, unit.detach()) + 0.25 * F.mse_loss(unit, rows.detach())
        return unit + (rows - unit).detach(), codes, loss


class VqModel(nn.Module):
    """VQ-16 by default; `state_dict` is what LlamaGen stores under `model`."""

    def __init__(
        self,
        base: int = 128,
        multipliers: tuple[int, ...] = (1, 1, 2, 2, 4),
        codes: int = 16384,
        size: int = 8,
        latent: int = 256,
        blocks: int = 2,
    ) -> None:
        super().__init__()
        self.encoder, self.decoder = (part(base, multipliers, blocks, latent) for part in (Encoder, Decoder))
        self.quantize = Quantizer(codes, size)
        self.quant_conv, self.post_quant_conv = nn.Conv2d(latent, size, 1), nn.Conv2d(size, latent, 1)

    def forward(self, images):
        """images (b, 3, h, w) -> images again and the loss of the quantiser, for training."""
        quantised, _, loss = self.quantize(self.quant_conv(self.encoder(images)))
        return self.decoder(self.post_quant_conv(quantised)), loss

    @torch.no_grad()
    def encode(self, images):
        """(b, 3, h, w) in [-1, 1] -> codes (b, n)."""
        return self.quantize(self.quant_conv(self.encoder(images)))[1].flatten(1)

    @torch.no_grad()
    def decode(self, codes):
        """codes (b, n) -> (b, 3, h, w)."""
        side = round(codes.shape[1] ** 0.5)
        rows = self.quantize.rows(codes).view(len(codes), side, side, -1)
        return self.decoder(self.post_quant_conv(rows.permute(0, 3, 1, 2)))


def small_vq(seed: int = 0, **sizes) -> VqModel:
    """A million parameters, downsample 4, 64 codes whose rows are not of length 1; norms are not trivial."""
    torch.manual_seed(seed)
    model = VqModel(**({"base": 32, "multipliers": (1, 1, 2), "codes": 64, "size": 8, "latent": 32} | sizes)).eval()
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            if "norm" in name:
                tensor.add_(0.3 * torch.randn_like(tensor))
        model.quantize.embedding.weight.mul_(3)
    return model
