"""The rounding of a module's matrices on the walk: those before its activation on the states that they read, and its
output projection on that one's inputs.

It does not know the residual streams, nor which modules are cut.
Shapes: b samples, t tokens, c hidden_size.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from edgeprune.model.forward import LayerWeights
from edgeprune.model.quantised import QuantisedWeight
from edgeprune.precision import WeightFormat
from edgeprune.pruning.moments import gram, held_out_rows
from edgeprune.pruning.quantize import Quantisation, quantise


def round_on(weight: torch.Tensor, inputs: torch.Tensor, form: WeightFormat, moments: torch.Tensor) -> Quantisation:
    """Returns a weight (out_features, in_features) fp32 rounded on its inputs (b, t, in_features).

    moments: (in_features, in_features) fp64 of all inputs. Inputs of fewer tokens than features leave too much open for
    GPTQ: the weight is rounded to nearest.
    """
    flat = inputs.flatten(0, 1)  # (b * t, in_features)
    if len(flat) < weight.shape[1]:
        return quantise(weight, moments, None, form)
    return quantise(weight, moments, gram(flat[held_out_rows(*inputs.shape[:2])]), form)


def round_table(table: torch.Tensor, form: WeightFormat | None) -> torch.Tensor | QuantisedWeight:
    """Returns an embedding (vocab_size, c) rounded to nearest: any row may be read. None: the table as it is."""
    if form is None:
        return table
    return quantise(table, torch.zeros(table.shape[1], table.shape[1], dtype=torch.float64), None, form).weight


def round_together(
    weights: LayerWeights, names: Sequence[str], inputs: torch.Tensor, form: WeightFormat
) -> tuple[dict[str, QuantisedWeight], Quantisation]:
    """Returns the rounded weights of these names, which read the same inputs (b, t, c), and how good they are."""
    result = round_on(torch.cat([weights[name] for name in names]), inputs, form, gram(inputs.flatten(0, 1)))
    return dict(zip(names, result.weight.split([len(weights[name]) for name in names]), strict=True)), result
