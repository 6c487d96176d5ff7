"""The layer-by-layer pruning of a model: moments -> score -> select -> cut -> round -> compensate.

The weights of the result are handed out as they are made. It does not know how the target's widths and formats were
chosen, nor where the weights are written.

Shapes: b samples, t tokens, c features of the residual stream (hidden_size).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import ParamSpec, TypeVar

import torch

from edgeprune.model.attention import LayerWeights, Tables
from edgeprune.model.decoder import Decoder
from edgeprune.model.forward import CHUNK_TOKENS, embed, embedded, layer_weights, modules_of, normed
from edgeprune.model.model import Model
from edgeprune.model.quantised import QuantisedWeight
from edgeprune.pruning.methods import Method, Recovery
from edgeprune.pruning.moments import moments_of
from edgeprune.pruning.rounding import round_on, round_table
from edgeprune.pruning.walk import ModuleRecord, Walk


def sample_weights(users: int, generated: int) -> torch.Tensor:
    """Returns the weights (users + generated, 1, 1) of the samples' tokens in the least squares problems.

    All of the user's samples together weigh as much as all generated ones, however many there are of each. Samples of
    one domain determine only the directions that matter in that domain. Least squares distorts all other directions,
    the more the fewer samples there are; the model's own text holds them in place.
    """
    weights = torch.ones(users + generated, 1, 1)
    weights[users:] = users / max(generated, 1)
    return weights


def result_of(target: Decoder, method: Method) -> Decoder:
    """Returns the decoder that pruning to `target` yields: without empty layers, with the method's biases."""
    return target.compact().with_output_biases() if method.recovery is Recovery.BIAS else target.compact()


Step, Arguments = TypeVar("Step"), ParamSpec("Arguments")


def _in_inference_mode(steps: Callable[Arguments, Iterator[Step]]) -> Callable[Arguments, Iterator[Step]]:
    """Decorates a generator: each step is made in inference mode and, unlike by torch's own decorator, not held until
    the next one is made; the first one is a whole table."""

    @functools.wraps(steps)
    def wrapped(*arguments: Arguments.args, **named: Arguments.kwargs) -> Iterator[Step]:
        stream = steps(*arguments, **named)
        while True:
            with torch.inference_mode():
                step = next(stream, None)
            if step is None:
                return
            yield step
            del step

    return wrapped


@_in_inference_mode
def prune(
    model: Model,
    target: Decoder,
    ids: torch.Tensor,
    method: Method,
    seed: int,
    on_module: Callable[[ModuleRecord], None] = lambda record: None,
    generated: torch.Tensor | None = None,
    chunk: int = CHUNK_TOKENS,
) -> Iterator[tuple[str, torch.Tensor | QuantisedWeight]]:
    """Yields the weights of result_of(target, method), in the order of its shapes(), fp32 where they were changed, and
    rounded where the target says so.

    model: the dense model; target: a decoder with as many layers as the dense one, some of them without attention,
    MLP or both; ids: (samples, tokens) int64 calibration samples; generated: (any, tokens) int64, samples that the
    model itself wrote: a method that compensates solves on these too, with the weights of sample_weights; on_module:
    called with the record of each module that is done; chunk: tokens that are computed at a time. Only one module's
    weights, the layer's new ones and the samples' hidden states on both streams are held in memory. Raises
    NumericalError naming the layer whose activations are not finite.
    """
    dense, result = model.decoder, result_of(target, method)
    compensates = method.recovery is Recovery.LEAST_SQUARES
    if not compensates or generated is None:
        generated = ids[:0]
    importance = sample_weights(len(ids), len(generated))  # (b, 1, 1)
    ids = torch.cat([ids, generated])  # (b, t)
    # Both streams begin with the embedded samples, each in its own table.
    table, positions = round_table(model.weights["embedding"], target.embedding_format), None
    if dense.learned_positions:
        positions = model.weights["positions"]
    hidden = embedded(dense, ids, table, positions)  # (b, t, c)
    whole = hidden
    if compensates:
        whole = hidden.clone() if target.embedding_format is None else embed(model, ids)
    walk = Walk(
        dense,
        target,
        method,
        torch.Generator().manual_seed(seed),
        Tables(dense, ids.shape[1]),
        chunk,
        pruned=hidden,
        whole=whole,
        importance=importance,
        drifted=target.embedding_format is not None,
    )
    del hidden, whole
    position = 0  # of the next layer in the result, where empty layers are left out
    yield "embedding", table
    del table
    if positions is not None:
        yield "positions", positions
    for index in range(len(dense.layers)):
        # Prune the modules of a layer, one after the other; each consumes its weights.
        new: LayerWeights = {}
        walk.enter()
        for kind in modules_of(dense, index):
            module_weights, record = walk.module(layer_weights(model, index, kind), index, kind)
            new |= module_weights
            del module_weights
            on_module(record)
        # Hand out what stays of the layer, under its new number.
        if new:
            prefix = f"layers.{position}."
            for name in result.layer_shapes(position):
                yield name, new.pop(name.removeprefix(prefix))
            position += 1
    norm = {name: model.weights[name] for name in dense.norm_shapes("norm")}
    yield from norm.items()
    if dense.tie_word_embeddings:
        return
    head, form = model.weights["head"], target.head_format
    if form is not None:
        floats = {name: weight.float() for name, weight in norm.items()}
        states = normed(dense, walk.pruned, floats, "norm").mul_(importance.sqrt())  # (b, t, c)
        head = round_on(head, moments_of(states), form).weight
    yield "head", head
