"""Rates of each kind of work of a run on this machine, timed on small cases of the real thing.

It does not know how much work a run is.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from math import prod

from edgeprune.model.decoder import Decoder, Layer
from edgeprune.ondevice.durations import timing

ROWS, WIDTH = 512, 1024  # of the products, the factorisation and the weights that are timed, at most
LAYER_WEIGHTS = 1 << 27  # of the layer that is timed, at most
VALUE = 0.01  # of all its weights


@dataclass(frozen=True)
class Rates:
    """This machine's FLOP/s in a pass of many tokens through a layer, in other products of many rows, in a
    factorisation in fp64, and in a step of generation for so few sequences at once; and weights that find their grid in
    a second."""

    passes: float
    products: float
    factors: float
    steps: float
    weights: float


def probed(decoder: Decoder, sequences: int) -> Rates:
    """Returns this machine's rates on a layer and on matrices about as large as the model's, each timed for a moment.

    sequences: that are generated at once.
    """
    import torch

    from edgeprune.precision import WEIGHT_FORMATS
    from edgeprune.pruning.grids import choose_grid
    from edgeprune.pruning.linear import cholesky

    width = min(2 * WIDTH, decoder.hidden_size)
    # As many matrices as leave a processor's cache, so that few rows wait for the memory as they do in a model.
    matrices = torch.rand(max(1, (64 << 20) // (4 * width * width)), width, width)
    many, few = torch.rand(2 * ROWS, width), torch.rand(max(1, sequences), width)
    square = torch.rand(WIDTH, WIDTH)
    moments = (square @ square.T).double()
    with torch.inference_mode():
        products = _per_second(lambda turn: many @ matrices[0])
        return Rates(
            passes=_layer_rate(decoder) or 2.0 * many.numel() * width * products,
            products=2.0 * many.numel() * width * products,
            factors=WIDTH**3 / 3 * _per_second(lambda turn: cholesky(moments, 1.0)),
            steps=2.0 * few.numel() * width * _per_second(lambda turn: few @ matrices[turn % len(matrices)]),
            weights=square.numel()
            * _per_second(
                lambda turn: choose_grid(square, square[0], WEIGHT_FORMATS["int4-64"], "starts").nearest(square)
            ),
        )


def _layer_rate(decoder: Decoder) -> float | None:
    """Returns the FLOP/s of a pass of ROWS tokens through a layer like the first one with both modules; None where
    there is none, or it is too large to be made for this."""
    import torch

    from edgeprune.model.attention import Tables
    from edgeprune.model.forward import add_layer

    layer = next((layer for layer in decoder.layers if layer.attention and layer.mlp), None)
    if layer is None:
        return None
    alone = replace(decoder, layers=(_without_experts(layer),))
    shapes = {name.removeprefix("layers.0."): shape for name, shape in alone.layer_shapes(0).items()}
    parameters = sum(prod(shape) for shape in shapes.values() if len(shape) == 2)
    if parameters > LAYER_WEIGHTS:
        return None
    weights = {name: torch.full(shape, VALUE) for name, shape in shapes.items()}
    tokens = min(ROWS, decoder.max_position_embeddings)
    tables, hidden = Tables(alone, tokens), torch.rand(1, tokens, decoder.hidden_size)
    return 2.0 * tokens * parameters * _per_second(lambda turn: add_layer(alone, 0, weights, hidden.clone(), tables))


def _without_experts(layer: Layer) -> Layer:
    """Returns a layer whose MLP is one of its experts: each works on the tokens that it gets as an MLP does."""
    mlp = layer.mlp
    return replace(layer, mlp=replace(mlp, experts=None)) if mlp and mlp.experts else layer


def _per_second(call: Callable[[int], object]) -> float:
    """Returns how often a function is called in a second, after a first call that is not counted."""
    call(0)
    begun, calls = time.perf_counter(), 0
    while (seconds := time.perf_counter() - begun) < timing().probe_seconds or not calls:
        call(calls)
        calls += 1
    return calls / seconds
