"""Models whose matrices are rounded to weight formats."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from edgeprune.model.decoder import Decoder
from edgeprune.model.quantised import QuantisedWeight, as_float
from edgeprune.pruning.quantize import choose_grid

Stored = dict[str, torch.Tensor | QuantisedWeight]


def rounded(decoder: Decoder, weights: Mapping[str, torch.Tensor]) -> Stored:
    """The weights of a decoder with formats, each matrix of a format rounded to nearest."""
    stored, formats = {}, decoder.weight_formats
    for name in decoder.shapes():
        weight = weights[name].detach().float()
        form = formats.get(name)
        stored[name] = (
            weight if form is None else choose_grid(weight, torch.ones(weight.shape[1]), form).nearest(weight)
        )
    return stored


def values(stored: Stored) -> dict[str, torch.Tensor]:
    """The numbers that the weights stand for, fp32."""
    return {name: as_float(weight) for name, weight in stored.items()}
