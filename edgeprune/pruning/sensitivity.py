"""One walk over the dense model that measures what every possible cut of each module would cost."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch
import torch.nn.functional as F

from edgeprune.model.decoder import Attention
from edgeprune.model.forward import (
    OUTPUT,
    embed,
    layer_weights,
    module_inputs,
    modules_of,
    rotary_tables,
    token_losses,
    weight_stream,
)
from edgeprune.model.model import Model
from edgeprune.pruning.allocate import Sensitivities, Widths
from edgeprune.pruning.compensate import nested_errors
from edgeprune.pruning.moments import gram
from edgeprune.pruning.prune import Method, features_of, prune, select_heads
from edgeprune.pruning.score import Score

PROBE_SAMPLES = 16  # with fewer, wide modules look worse than they are: their update is under-determined
PROBE_HELD_OUT = 8
LEAST_RISE = 1e-4  # nats per token; noise may make a small cut look free


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


def _rank(
    score: Score, weight: torch.Tensor, moments: torch.Tensor, generator: torch.Generator, unit: int
) -> torch.Tensor:
    return score(weight, moments, unit, generator)


@torch.inference_mode()
def measure_sensitivities(
    model: Model,
    ids: torch.Tensor,
    score: Score,
    seed: int,
    on_layer: Callable[[], None] = lambda: None,
    rows: int = 8,
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
            rank = functools.cache(functools.partial(_rank, score, weight, moments, generator))
            if kind == "attention":
                errors[kind].append(attention_errors(weight, moments, decoder.layers[index].attention, rank))
            else:
                order = torch.sort(rank(1), descending=True, stable=True).indices
                errors[kind].append(nested_errors(weight, moments, order).numpy())
            hidden += F.linear(inputs, weight)
        on_layer()
    return Sensitivities(np.stack(errors["attention"]), np.stack(errors["mlp"]))


def probe_widths(dense: Widths) -> list[Widths | None]:
    """One cut of a quarter of each kind: groups, query heads, channels; None where nothing can go."""

    def cut(size: int) -> int:
        return size - max(1, size // 4)

    groups, heads, channels = dense
    return [
        dense._replace(num_key_value_heads=cut(groups)) if groups > 1 else None,
        dense._replace(heads_per_group=cut(heads)) if heads > 1 else None,
        dense._replace(intermediate_size=cut(channels)),
    ]


@torch.inference_mode()
def measure_response(
    model: Model, ids: torch.Tensor, sensitivities: Sensitivities, method: Method, seed: int,
    on_probe: Callable[[], None] = lambda: None,
) -> Sensitivities:  # fmt: skip
    """The sensitivities with their response measured: one small pruning for each kind of cut.

    ids (samples, tokens): the first half calibrates each probe, the second half gives the loss, up to a few of each.
    """
    half = max(1, len(ids) // 2)
    fit, held_out = ids[: min(PROBE_SAMPLES, half)], ids[-min(PROBE_HELD_OUT, half) :]
    layer = model.decoder.layers[0]
    dense = Widths(layer.attention.num_key_value_heads, layer.attention.heads_per_group, layer.mlp.intermediate_size)
    base = float(token_losses(model.decoder, weight_stream(model), held_out).mean())
    on_probe()
    response = np.zeros(3)
    for kind, widths in enumerate(probe_widths(dense)):
        if widths is not None:
            target = model.decoder.with_widths(*widths)
            losses = token_losses(target, prune(model, target, fit, method, seed), held_out)
            error = sensitivities.uniform_errors(widths)[kind]
            response[kind] = max(float(losses.mean()) - base, LEAST_RISE) / max(error, 1e-12)
        on_probe()
    return replace(sensitivities, response=response)
