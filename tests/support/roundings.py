"""Models whose matrices are rounded to weight formats."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch

from edgeprune.model.decoder import Decoder
from edgeprune.model.quantised import QuantisedWeight, as_float
from edgeprune.precision import WEIGHT_FORMATS, WeightFormat
from edgeprune.pruning.grids import choose_grid

Stored = dict[str, torch.Tensor | QuantisedWeight]
INT8, W8A8 = WEIGHT_FORMATS["int8"], WEIGHT_FORMATS["w8a8"]
OF_WEIGHTS = [  # which tables and experts take too
    form for form in WEIGHT_FORMATS.values() if form.storage == "packed" and not form.activation_bits
]
OFFSET = WEIGHT_FORMATS["int4-offset"]
OF_LAYERS = [*OF_WEIGHTS, OFFSET]  # which graphs hold
INPUT_SCALE = torch.tensor(2.0**-5)  # reaches to 4
NARROW_OFFSET = replace(OFFSET, group=32)  # for widths that no groups of 64 divide
ATTENTIONS = (INT8, WEIGHT_FORMATS["int4-32"], WEIGHT_FORMATS["int4-32-asymmetric"], NARROW_OFFSET)
MLPS = (NARROW_OFFSET, WEIGHT_FORMATS["int4-32"], WEIGHT_FORMATS["int4-32-asymmetric"], None, INT8)


def rounded(decoder: Decoder, weights: Mapping[str, torch.Tensor]) -> Stored:
    """The weights of a decoder with formats, each matrix that has one rounded to nearest."""
    stored: Stored = {}
    largest = max(
        weight.detach().abs().max().float() for weight in weights.values()
    )  # matrices have one unit of scales
    for name in decoder.shapes():
        weight, form = weights[name].detach().float(), decoder.weight_formats.get(name)
        if form is None:
            stored[name] = weight
            continue
        even = torch.ones(weight.shape[-1])
        stored[name] = choose_grid(weight, even, form, "starts", largest).nearest(weight)
        if form.activation_bits:
            stored[name] = replace(stored[name], input_scale=INPUT_SCALE)
    return stored


def numbers(stored: Stored) -> dict[str, torch.Tensor]:
    """What the weights stand for, fp32."""
    return {name: as_float(weight) for name, weight in stored.items()}


def mixed(decoder: Decoder, first: int = 0) -> Decoder:
    """Another format in every module, floats among them; int8 where groups do not divide, and for experts where these
    have minima. The head is in int8."""

    def fitting(form: WeightFormat | None, *widths: int, experts: bool = False) -> WeightFormat | None:
        has_minima = experts and form == NARROW_OFFSET
        return INT8 if has_minima or (form and any(width % (form.group or 1) for width in widths)) else form

    hidden, layers = decoder.hidden_size, []
    for index, layer in enumerate(decoder.layers, first):
        attention, mlp = layer.attention, layer.mlp
        layers.append(
            (
                attention and fitting(ATTENTIONS[index % len(ATTENTIONS)], hidden, attention.query_size),
                mlp and fitting(MLPS[index % len(MLPS)], hidden, mlp.intermediate_size, experts=bool(mlp.experts)),
            )
        )
    return decoder.with_formats(layers, fitting(WEIGHT_FORMATS["int4-32"], hidden), INT8)
