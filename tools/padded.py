"""A model whose rows are filled up with zeros, so that blocks of 256 divide them: the same function.

For measurements of ggml's K types on a model whose own rows they do not divide.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace

import torch
import torch.nn.functional as F

from edgeprune.model.decoder import Decoder
from edgeprune.model.forward import WeightStream
from edgeprune.model.model import Model
from edgeprune.model.quantised import as_float


def padded(model: Model, multiple: int) -> Model:
    """Returns a model of the same logits whose stream, heads and channels are multiples, in fp32.

    model: RMS norms before its modules, no biases, no experts, layers alike. Heads are added in whole groups. A norm
    divides by more channels then, which its weights and its epsilon make up for.
    """
    decoder = model.decoder
    layer = decoder.layers[0]
    hidden = decoder.hidden_size + -decoder.hidden_size % multiple
    groups = layer.attention.num_key_value_heads
    while groups * layer.attention.heads_per_group * layer.attention.head_dim % multiple:
        groups += 1
    channels = layer.mlp.intermediate_size + -layer.mlp.intermediate_size % multiple
    share = decoder.hidden_size / hidden
    wide = replace(decoder, hidden_size=hidden, norm_eps=decoder.norm_eps * share)
    wide = wide.with_widths(groups, layer.attention.heads_per_group, channels)
    weights = {name: _filled(model.weights[name].float(), shape, share) for name, shape in wide.shapes().items()}
    return Model(f"{model.name}, filled up", model.directory, wide, weights, f"{model.fingerprint} filled {multiple}")


def _filled(weight: torch.Tensor, shape: tuple[int, ...], share: float) -> torch.Tensor:
    """Returns a weight with zeros behind its own rows and columns; that of a norm, times the root of the share."""
    if weight.dim() == 1:
        return F.pad(weight * share**0.5, (0, shape[0] - len(weight)))
    rows, columns = shape
    return F.pad(weight, (0, columns - weight.shape[1], 0, rows - len(weight)))


def narrowed(
    weights: WeightStream, decoder: Decoder, norms: Mapping[str, torch.Tensor]
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yields what `padded` was given, of the same weights rounded: fp32 values of a decoder's own shapes.

    norms: the model's own weights by name, of which those of one dimension are taken.
    """
    shapes = decoder.shapes()
    for name, weight in weights:
        shape = shapes[name]
        if len(shape) == 1:
            yield name, norms[name]
        else:
            yield name, as_float(weight)[: shape[0], : shape[1]]
