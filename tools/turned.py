"""A model whose weights are freed of an old grid: the same function, the channels of its stream turned in pairs.

The demo's layers come from a file of few bits, so that rounding them to a grid like that file's costs nothing and
proves nothing. It does not know what the weights are rounded to.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from edgeprune.model.forward import OUTPUT, modules_of, token_logits, weight_stream
from edgeprune.model.model import Model

ANGLES = (0.35, 1.22)  # in radians: each channel gets a good share of both
TOLERANCE = 1e-4  # of the largest logit


def turned(model: Model, seed: int = 0) -> Model:
    """Returns a model of the same logits, in fp32, with an untied head.

    Random pairs of the residual stream's channels are rotated by random angles. A norm's weights are folded into the
    matrices behind it before, and given back after so that the columns of these are as long as they were. model: RMS
    norms before its modules, no biases, no experts.
    """
    decoder = model.decoder
    rotation = _rotation(decoder.hidden_size, seed)  # (c, c)
    weights = {name: model.weights[name].float() for name in decoder.shapes()}
    new = {"embedding": weights["embedding"] @ rotation}
    for index, layer in enumerate(decoder.layers):
        for kind in modules_of(decoder, index):
            prefix = f"layers.{index}."
            inputs = ("q", "k", "v") if kind == "attention" else layer.mlp.inputs
            names = [f"{prefix}{kind}.{name}" for name in inputs]
            norm, output = f"{prefix}{kind}.norm", prefix + OUTPUT[kind]
            read, new[norm] = _read(torch.cat([weights[name] for name in names]), weights[norm], rotation)
            new |= dict(zip(names, read.split([len(weights[name]) for name in names]), strict=True))
            new[output] = rotation.T @ weights[output]
    head = weights["embedding"][: decoder.vocab_size] if decoder.tie_word_embeddings else weights["head"]
    new["head"], new["norm"] = _read(head, weights["norm"], rotation)
    result = replace(decoder, tie_word_embeddings=False)
    new = {name: new[name].contiguous() for name in result.shapes()}
    return Model(f"{model.name}, turned", model.directory, result, new, f"{model.fingerprint} turned {seed}")


def check_turned(model: Model, other: Model, ids: torch.Tensor) -> None:
    """Raises ValueError where the logits of two models differ on ids (b, t) int64 by more than TOLERANCE."""
    expected, logits = (token_logits(one.decoder, weight_stream(one), ids) for one in (model, other))
    off = float((logits - expected).abs().max() / expected.abs().max())
    if not off <= TOLERANCE:
        raise ValueError(f"turning changed the logits by {off:.1e} of the largest")


def _rotation(size: int, seed: int) -> torch.Tensor:
    """Returns the rotation (size, size) fp32 of random pairs of channels; of an odd number one stays."""
    generator = torch.Generator().manual_seed(seed)
    order, pairs = torch.randperm(size, generator=generator), size // 2
    least, most = ANGLES
    angles = least + (most - least) * torch.rand(pairs, generator=generator)
    rotation = torch.eye(size)
    one, other = order[:pairs], order[pairs : 2 * pairs]
    rotation[one, one] = rotation[other, other] = angles.cos()
    rotation[one, other], rotation[other, one] = angles.sin(), -angles.sin()
    return rotation


def _read(weight: torch.Tensor, norm: torch.Tensor, rotation: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns matrices (out, c) that read the turned stream behind a norm, and the weights (c,) of that norm."""
    folded = (weight * norm) @ rotation
    scale = folded.norm(dim=0) / weight.norm(dim=0)  # (c,)
    return folded / scale, scale
