"""The inputs of some modules' output projections on the dense model, by which subsets of documents are judged.

It does not know what the documents are chosen for.

Shapes: t tokens of a document, f input features of an output projection.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from edgeprune.model.attention import Tables
from edgeprune.model.decoder import Decoder
from edgeprune.model.forward import (
    CHUNK_TOKENS,
    OUTPUT,
    add_module,
    embed,
    entering,
    has_experts,
    layer_weights,
    module_inputs,
    modules_of,
)
from edgeprune.model.model import Model
from edgeprune.pruning.walk import token_scale

DEPTHS = (0.25, 0.5, 0.75)  # of the layers that are probed; those behind the last are not computed


@dataclass(frozen=True, order=True)
class Probe:
    """A module whose output projection is probed; unit: the adjacent input features that pruning removes together."""

    layer: int
    kind: str
    unit: int


def probes_of(decoder: Decoder) -> list[Probe]:
    """Returns the modules to probe: those with one output projection, in the layers at DEPTHS."""
    layers = sorted({int(depth * (len(decoder.layers) - 1)) for depth in DEPTHS})
    return [
        Probe(layer, kind, decoder.layers[layer].attention.head_dim if kind == "attention" else 1)
        for layer in layers
        for kind in modules_of(decoder, layer)
        if not has_experts(decoder, layer, kind)
    ]


Visit = Callable[[Probe, torch.Tensor, int, torch.Tensor], None]  # probe, weight (c, f), document, inputs (t, f)


@torch.inference_mode()
def visit_inputs(
    model: Model, documents: Sequence[np.ndarray], visit: Visit, on_layer: Callable[[], None] = lambda: None
) -> None:
    """Calls `visit` with what each probe's output projection reads of each document (t,) int64, in their order.

    The inputs are fp32, times the square roots of the tokens' weights in least squares (see token_scale). The hidden
    states of all documents are in memory, and one layer's weights. Raises NumericalError where states are not finite.
    """
    decoder, probes = model.decoder, {(probe.layer, probe.kind): probe for probe in probes_of(model.decoder)}
    batches = list(_batches(documents))
    hidden = [embed(model, _padded(documents[batch])) for batch in batches]  # (b, t, c) each
    tables = {states.shape[1]: Tables(decoder, states.shape[1]) for states in hidden}
    for index in range(max(layer for layer, _ in probes) + 1):
        weights = layer_weights(model, index)
        for batch, states in zip(batches, hidden, strict=True):
            table, source = tables[states.shape[1]], entering(decoder, states)
            for kind in modules_of(decoder, index):
                probe = probes.get((index, kind))
                if probe is not None:
                    inputs = module_inputs(decoder, index, kind, weights, source, table)  # (b, t, f)
                add_module(decoder, index, kind, weights, states, table, source=source)
                if probe is not None:
                    inputs *= token_scale(states)
                    for number, rows in zip(range(batch.start, batch.stop), inputs, strict=True):
                        visit(probe, weights[OUTPUT[kind]], number, rows[: len(documents[number])])
        on_layer()


def layers_visited(decoder: Decoder) -> int:
    """Returns how many layers `visit_inputs` computes."""
    return max(probe.layer for probe in probes_of(decoder)) + 1


def _batches(documents: Sequence[np.ndarray]) -> Iterator[slice]:
    """Yields slices of documents that have, padded to the longest of them, at most CHUNK_TOKENS; one at least."""
    start, longest = 0, 0
    for number, document in enumerate(documents):
        longest = max(longest, len(document))
        if number > start and (number + 1 - start) * longest > CHUNK_TOKENS:
            yield slice(start, number)
            start, longest = number, len(document)
    if start < len(documents):
        yield slice(start, len(documents))


def _padded(documents: Sequence[np.ndarray]) -> torch.Tensor:
    """Returns ids (b, t) int64 of documents (tokens,); no token sees the zeros behind it."""
    longest = max(map(len, documents))
    return torch.from_numpy(np.stack([np.pad(ids, (0, longest - len(ids))) for ids in documents]).astype(np.int64))
