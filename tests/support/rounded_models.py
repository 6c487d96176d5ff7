"""Models whose weights are rounded to few bits, with their codes at hand."""

from __future__ import annotations

from collections import ChainMap
from dataclasses import replace
from pathlib import Path

import torch

from edgeprune.model.decoder import Decoder
from edgeprune.model.load import load_model
from edgeprune.model.model import Model
from edgeprune.model.save import save_checkpoint
from edgeprune.pruning.grids import choose_grid


def rounded(dense: Model, target: Decoder, folder: Path) -> Model:
    """The dense model with the weights that have a format in the target rounded to it; the checkpoint in the folder has
    their values in the dense model's dtype, fp32 holds them."""
    codes = {}
    for name, form in target.weight_formats.items():
        weight = dense.weights[name].float()
        codes[name] = choose_grid(weight, torch.ones(weight.shape[1]), form).nearest(weight)
    values = ChainMap({name: weight.dequantised() for name, weight in codes.items()}, dense.weights)
    save_checkpoint(dense.decoder, ((name, values[name]) for name in target.shapes()), dense, folder)
    model = load_model(str(folder))
    formats = [tuple(module and module.weight_format for module in (a.attention, a.mlp)) for a in target.layers]
    decoder = model.decoder.with_formats(formats, target.embedding_format, target.head_format)
    return replace(model, decoder=decoder, weights=ChainMap(values, model.weights), quantised=codes)


def as_floats(model: Model) -> Model:
    """The same model, whose weights are the values of their codes."""
    return replace(model, decoder=model.decoder.with_format(None), quantised={})
