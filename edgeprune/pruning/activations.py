"""Preparation of a module for a format that rounds activations: channels of like size, and scales of what is read.

SmoothQuant (Xiao et al. 2023, arXiv 2211.10438) divides the channels of what a matrix reads by factors s and multiplies
its columns with them, s_j = max|x_j|^alpha / max|w_j|^(1 - alpha), so that no few channels decide the scale of all. The
division goes into what makes the channels: the norm before the module, the rows of `v` and of `up` before its output
projection. The factors are powers of two: the function of the module stays the same to the last bit, in any type of
floats. It does not know the residual streams.
Shapes: b samples, t tokens, c hidden_size, f input features of the output projection.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from edgeprune.model.attention import LayerWeights, Tables
from edgeprune.model.checkpoint.families import FAMILIES
from edgeprune.model.decoder import Attention, Decoder, Mlp
from edgeprune.model.forward import OUTPUT, module_inputs, module_states
from edgeprune.model.quantised import ACTIVATION_STEPS, input_scale_of, scale_unit_for, storable, unit_above
from edgeprune.precision import WeightFormat

MOST_DOUBLINGS = 8  # of a channel, against the middle one
ALPHA = 0.8
"""How much of the unlikeness of channels goes into the weights. Their codes have a scale for each output, and GPTQ
makes up for their errors; of what is read, single tokens have values a hundred times the usual, under one scale."""


def is_smoothed(form: WeightFormat) -> bool:
    """Returns whether channels are brought to like size for a format: floats of 8 bits have range for all of them."""
    return form.levels != "e4m3"


def smoothed(
    decoder: Decoder, index: int, kind: str, weights: LayerWeights, read: torch.Tensor, inputs: torch.Tensor
) -> tuple[LayerWeights, torch.Tensor]:
    """Returns the weights of a module of the same function, and the factors (f,) that its output projection's inputs
    are divided by.

    read: (c,), the largest magnitudes of what the module reads; inputs: (f,), of what its output projection does.
    """
    module, new = getattr(decoder.layers[index], kind), dict(weights)
    # What the module reads comes from its norm.
    if norms := _norms(decoder, kind):
        names = names_before(module)
        factors = _powers(read, torch.stack([weights[name].abs().amax(dim=0) for name in names]).amax(dim=0))
        new |= {name: new[name] / factors for name in norms} | {name: new[name] * factors for name in names}
    # What the output projection reads comes from rows of another matrix, of which several of its inputs may be made.
    output, source = OUTPUT[kind], _linear_source(module)
    of_weight = weights[output].abs().amax(dim=0)
    if source is None:
        return new, torch.ones_like(inputs)
    by_row = (inputs, of_weight)
    if isinstance(module, Attention):
        by_row = tuple(_by_group(sizes, module).amax(dim=1).flatten() for sizes in by_row)
    rows = _powers(*by_row)
    for name in (source, f"{source}_bias"):
        if name in new:
            new[name] = new[name] / rows.view(-1, *(1,) * (new[name].dim() - 1))
    factors = rows
    if isinstance(module, Attention):
        factors = rows.unflatten(0, (-1, 1, module.head_dim)).expand(-1, module.heads_per_group, -1).flatten()
    new[output] = weights[output] * factors
    return new, factors


def names_before(module: Attention | Mlp) -> list[str]:
    """Returns the names of the matrices before the activation, which read the same."""
    if isinstance(module, Attention):
        return ["attention.q", "attention.k", "attention.v"]
    return [f"mlp.{name}" for name in module.inputs]


def _norms(decoder: Decoder, kind: str) -> Sequence[str]:
    """Returns the names of the weights that scale what a module reads; none where nothing does.

    Of a norm that a checkpoint stores less one, a small weight would be rounded to steps of that one.
    """
    if decoder.norms == "after" or FAMILIES[decoder.family].places[f"{kind}.norm"].shift:
        return ()
    return tuple(decoder.norm_shapes(f"{kind}.norm"))


def _linear_source(module: Attention | Mlp) -> str | None:
    """Returns the name of the matrix whose rows scale the inputs of the output projection; None where none does."""
    if isinstance(module, Attention):
        return "attention.v"
    is_linear = module.limit is None and not module.up_shift if module.gated else module.activation == "relu"
    return "mlp.up" if is_linear else None


def _by_group(features: torch.Tensor, attention: Attention) -> torch.Tensor:
    """Returns features (query_size,) as (groups, heads of a group, head_dim): a group's heads share its values."""
    return features.unflatten(0, (-1, attention.heads_per_group, attention.head_dim))


def _powers(of_inputs: torch.Tensor, of_weight: torch.Tensor) -> torch.Tensor:
    """Returns the factors (n,) of inputs and weights of these largest magnitudes (n,): powers of two around 1."""
    doublings = ALPHA * of_inputs.log2() - (1 - ALPHA) * of_weight.log2()
    is_known = doublings.isfinite()
    if not is_known.any():
        return torch.ones_like(of_inputs)
    doublings -= doublings[is_known].median()
    doublings = torch.where(is_known, doublings, 0.0).round().clamp(-MOST_DOUBLINGS, MOST_DOUBLINGS)
    return torch.exp2(doublings)


def largest_of(states: torch.Tensor) -> torch.Tensor:
    """Returns the largest magnitudes (features,) of states (b, t, features)."""
    return states.abs().amax(dim=(0, 1))


def input_scale_for(inputs: torch.Tensor, form: WeightFormat) -> torch.Tensor:
    """Returns the scale () of the codes of inputs in a format, the largest of which has the largest code.

    The largest belong to the few tokens on which all others rest: a finer scale that cuts them off loses more on texts
    of another kind. Floats lose nothing by a scale that is a power of two, and by one they are exact in all types.
    """
    largest = inputs.abs().amax()
    if form.levels == "whole":
        return storable(largest / ACTIVATION_STEPS)
    return scale_unit_for(largest, form) if form.e4m3_scales else unit_above(largest / form.most)


def rounded_module(
    decoder: Decoder,
    index: int,
    kind: str,
    weights: LayerWeights,
    source: torch.Tensor,
    tables: Tables,
    form: WeightFormat,
) -> LayerWeights:
    """Returns the weights of a module in floats, smoothed where its format needs it, with the scales of what its
    matrices read.

    source: (b, t, c), the stream that the module reads; a sample of it gives the scales.
    """
    read = module_states(decoder, kind, weights, source)
    inputs, new = module_inputs(decoder, index, kind, weights, source, tables), weights
    if is_smoothed(form):
        new, factors = smoothed(decoder, index, kind, weights, largest_of(read), largest_of(inputs))
        read, inputs = module_states(decoder, kind, new, source), inputs / factors
    scales = dict.fromkeys(names_before(getattr(decoder.layers[index], kind)), input_scale_for(read, form))
    scales[OUTPUT[kind]] = input_scale_for(inputs, form)
    return new | {input_scale_of(name): scale for name, scale in scales.items()}
