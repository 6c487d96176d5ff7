"""One walk over the dense model that measures what every possible cut of each module would cost."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F

from edgeprune.model.decoder import Attention
from edgeprune.model.forward import OUTPUT, embed, layer_weights, module_inputs, modules_of, rotary_tables
from edgeprune.model.model import Model
from edgeprune.pruning.allocate import Sensitivities, nested_errors
from edgeprune.pruning.moments import gram
from edgeprune.pruning.prune import features_of, select_heads
from edgeprune.pruning.score import Score


def attention_errors(
    weight: torch.Tensor, moments: torch.Tensor, attention: Attention, rank: Callable[[int], torch.Tensor]
) -> np.ndarray:
    """Errors (num_key_value_heads, heads_per_group) of keeping that many groups of that many heads."""
    errors = np.zeros((attention.num_key_value_heads, attention.heads_per_group))
    for groups in range(1, attention.num_key_value_heads + 1):
        for heads_per_group in range(1, attention.heads_per_group + 1):
            _, heads = select_heads(rank, attention, groups, heads_per_group)
            kept = features_of(heads, attention.head_dim)
            is_removed = torch.ones(attention.query_size, dtype=torch.bool)
            is_removed[kept] = False
            order = torch.cat([kept, is_removed.nonzero().squeeze(1)])
            errors[groups - 1, heads_per_group - 1] = nested_errors(weight, moments, order)[len(kept)]
    return errors


@torch.inference_mode()
def measure_sensitivities(
    model: Model, ids: torch.Tensor, score: Score, seed: int,
    on_layer: Callable[[], None] = lambda: None, rows: int = 8,
) -> Sensitivities:
    """Sensitivities of all modules on the calibration samples ids (samples, tokens) int64."""
    decoder = model.decoder
    generator = torch.Generator().manual_seed(seed)
    tables = rotary_tables(decoder, ids.shape[1])
    hidden = embed(model, ids)
    errors: dict[str, list[np.ndarray]] = {"attention": [], "mlp": []}
    for index in range(len(decoder.layers)):
        weights = layer_weights(model, index)
        for kind in modules_of(decoder, index):
            weight = weights[OUTPUT[kind]]
            inputs = module_inputs(decoder, index, kind, weights, hidden, tables, rows)
            lengths = hidden.norm(dim=-1, keepdim=True).clamp_min(1e-12)
            moments = gram((inputs / lengths).flatten(0, 1)) / ids.numel()
            cache: dict[int, torch.Tensor] = {}

            def rank(unit: int) -> torch.Tensor:
                if unit not in cache:
                    cache[unit] = score(weight, moments, unit, generator)
                return cache[unit]

            if kind == "attention":
                errors[kind].append(attention_errors(weight, moments, decoder.layers[index].attention, rank))
            else:
                order = torch.sort(rank(1), descending=True, stable=True).indices
                errors[kind].append(nested_errors(weight, moments, order).numpy())
            hidden += F.linear(inputs, weight)
        on_layer()
    return Sensitivities(np.stack(errors["attention"]), np.stack(errors["mlp"]))
