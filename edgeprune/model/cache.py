"""The scales of a KV cache in codes, from the keys and values of calibration samples, and a model that has them.

It does not know engines, nor how a format was chosen.
"""

from __future__ import annotations

from collections import ChainMap
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from edgeprune.model.attention import LayerWeights, Tables, attention_heads
from edgeprune.model.decoder import Attention
from edgeprune.model.forward import CHUNK_TOKENS, add_layer, embed, module_states, row_chunks
from edgeprune.model.model import Model
from edgeprune.model.quantised import input_scale_of, rounded_inputs, values_by_name
from edgeprune.precision import CacheFormat

LEAST_SCALE = 1e-8  # of a channel that no sample moves

Scales = Mapping[str, torch.Tensor]  # (1, num_key_value_heads, 1, head_dim) fp32, by their names in decoder.py


def scales_of(key: torch.Tensor, value: torch.Tensor, form: CacheFormat) -> dict[str, torch.Tensor]:
    """Returns the scales (1, k, 1, d) of keys and values (b, k, t, d): the largest of each channel gets the largest
    code."""
    found = {"attention.key_scale": key, "attention.value_scale": value}
    return {
        name: (x.abs().amax(dim=(0, 2), keepdim=True) / form.most).clamp_min(LEAST_SCALE) for name, x in found.items()
    }


@torch.inference_mode()
def cache_scales(
    model: Model, ids: torch.Tensor, form: CacheFormat, on_layer: Callable[[], None] = lambda: None
) -> dict[str, torch.Tensor]:
    """Returns the scales of all layers of a model with its cache in floats.

    ids: calibration samples (samples, tokens) int64; on_layer is called after each layer. Raises NumericalError where
    activations are not finite.
    """
    decoder, scales = model.decoder, {}
    tables, hidden = Tables(decoder, ids.shape[1]), embed(model, ids)  # (b, t, c)
    for index, layer in enumerate(decoder.layers):
        prefix = f"layers.{index}."
        weights = values_by_name(
            (name.removeprefix(prefix), model.stored[name]) for name in decoder.layer_shapes(index)
        )
        if layer.attention is not None:
            for name, scale in _largest(model, weights, layer.attention, hidden, tables, form).items():
                scales[f"layers.{index}.{name}"] = scale
        add_layer(decoder, index, weights, hidden, tables)
        on_layer()
    return scales


def _largest(
    model: Model, weights: LayerWeights, attention: Attention, hidden: torch.Tensor, tables: Tables, form: CacheFormat
) -> dict[str, torch.Tensor]:
    """Returns the scales of one layer, from some samples at a time."""
    largest: dict[str, torch.Tensor] = {}
    for part in row_chunks(hidden, CHUNK_TOKENS):
        states = module_states(model.decoder, "attention", weights, part)
        states = rounded_inputs(states, weights.get(input_scale_of("attention.q")), attention.weight_format)
        _, key, value = attention_heads(states, weights, attention, tables, model.decoder.norm_eps)
        for name, scale in scales_of(key, value, form).items():
            largest[name] = torch.maximum(largest[name], scale) if name in largest else scale
    return largest


def with_cache(model: Model, form: CacheFormat, scales: Scales) -> Model:
    """Returns the same model with its KV cache in a format."""
    return replace(model, decoder=model.decoder.with_cache(form), weights=ChainMap(dict(scales), model.weights))


def write_scales(scales: Scales, path: Path) -> None:
    """Writes scales to a file."""
    save_file({name: scale.contiguous() for name, scale in scales.items()}, path)


def read_scales(path: Path) -> dict[str, torch.Tensor]:
    """Returns the scales of a file."""
    return load_file(path)
