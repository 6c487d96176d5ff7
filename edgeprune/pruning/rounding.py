"""The rounding of a module's matrices on the walk: those before its activation on the states that they read, and its
output projection on that one's inputs.

It does not know the residual streams, nor which modules are cut.
Shapes: b samples, t tokens, c hidden_size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from edgeprune.model.attention import LayerWeights
from edgeprune.model.quantised import QuantisedWeight, rounded_inputs
from edgeprune.precision import WeightFormat
from edgeprune.pruning.activations import input_scale_for
from edgeprune.pruning.moments import Moments, moments_of
from edgeprune.pruning.quantize import Quantisation, quantise


def round_on(weight: torch.Tensor, moments: Moments, form: WeightFormat) -> Quantisation:
    """Returns a weight (out_features, in_features) fp32 rounded on the moments of its inputs.

    Inputs of fewer tokens than features leave too much open for GPTQ: the weight is rounded to nearest.
    """
    return quantise(weight, moments.all, moments.held_out if moments.tokens >= weight.shape[1] else None, form)


def round_table(table: torch.Tensor, form: WeightFormat | None) -> torch.Tensor | QuantisedWeight:
    """Returns an embedding (vocab_size, c) rounded to nearest: any row may be read. None: the table as it is."""
    if form is None:
        return table
    return quantise(table, torch.zeros(table.shape[1], table.shape[1], dtype=torch.float64), None, form).weight


def round_together(
    weights: LayerWeights, names: Sequence[str], inputs: torch.Tensor, scale: torch.Tensor, form: WeightFormat
) -> tuple[dict[str, QuantisedWeight], Quantisation]:
    """Returns the rounded weights of these names, which read the same inputs (b, t, c), and how good they are.

    scale: (b, 1, 1), the square roots of the tokens' weights. Where the format rounds the inputs, weights are rounded
    on the rounded ones.
    """
    input_scale = None
    if form.activation_bits is not None:
        input_scale = input_scale_for(inputs, form)
        inputs = rounded_inputs(inputs, input_scale, form)
    result = round_on(torch.cat([weights[name] for name in names]), moments_of(inputs * scale), form)
    result = replace(result, weight=replace(result.weight, input_scale=input_scale))
    return dict(zip(names, result.weight.split([len(weights[name]) for name in names]), strict=True)), result
