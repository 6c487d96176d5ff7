"""The block-by-block walk: moments -> score -> select -> cut -> compensate.

Two residual streams of the same samples run side by side: that of the dense model, and that of the
already pruned blocks. Each module's inputs are computed once on each. Neither the selection nor the
compensation changes the inputs of a module's own output projection, so that its pruned output is the
kept columns of those inputs times the new weights: no second pass.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F

from edgeprune.model.decoder import Decoder
from edgeprune.model.forward import (
    BIAS,
    CHUNK_TOKENS,
    OUTPUT,
    LayerWeights,
    add_module,
    embed,
    layer_weights,
    module_inputs,
    modules_of,
    rotary_tables,
)
from edgeprune.model.model import Model
from edgeprune.pruning.compensate import compensate
from edgeprune.pruning.methods import Method, Recovery
from edgeprune.pruning.moments import gram
from edgeprune.pruning.score import Projection
from edgeprune.pruning.select import kept_features


@dataclass(frozen=True)
class ModuleRecord:
    """What happened to one module: kept of its input features of the output projection, 0 where it went
    as a whole. Errors are relative to the dense stream, on held-out calibration samples; nan where
    nothing was compensated."""

    layer: int
    kind: str
    kept: int
    of: int
    damping: float | None = None
    blend: float = 0.0
    error_before: float = math.nan
    error_after: float = math.nan
    fell_back: bool = False


def prune_module(
    weights: LayerWeights,
    inputs: torch.Tensor,
    teacher: torch.Tensor,
    dense: Decoder,
    target: Decoder,
    index: int,
    kind: str,
    method: Method,
    generator: torch.Generator,
) -> tuple[LayerWeights, torch.Tensor, ModuleRecord]:
    """One module: its new weights, its output on the samples (b, t, c), and what was done.

    inputs: (b, t, features), of the output projection on the pruned stream; teacher: (b, t, c), the
    output that takes the pruned stream back to the dense one.
    """
    weight = weights[OUTPUT[kind]]
    compensates = method.recovery is Recovery.LEAST_SQUARES
    projection = Projection(weight, gram(inputs.flatten(0, 1)), inputs, generator)
    kept, rows = kept_features(
        *(getattr(decoder.layers[index], kind) for decoder in (dense, target)),
        functools.partial(method.score, projection),
    )
    new = {name: weights[name][index_] for name, index_ in rows.items()}
    new |= {f"{kind}.norm": weights[f"{kind}.norm"], OUTPUT[kind]: weight[:, kept]}
    if method.recovery is Recovery.BIAS:
        removed = projection.mean
        removed[kept] = 0.0
        new[BIAS[kind]] = (weight.double() @ removed).float()
    record = ModuleRecord(index, kind, len(kept), weight.shape[1])
    if compensates:
        own = F.linear(inputs, weight)
        inputs, moments = inputs[..., kept], projection.gram[kept[:, None], kept]
        del projection  # the largest arrays of the walk: not while those of the solve are made
        solved = compensate(new[OUTPUT[kind]], moments, inputs, own, teacher)
        new[OUTPUT[kind]] = solved.weight
        record = replace(
            record, damping=solved.damping, blend=solved.blend, error_before=solved.error_before,
            error_after=solved.error_after, fell_back=solved.damping is None and solved.error_before > 0,
        )  # fmt: skip
    else:
        inputs = inputs[..., kept]
    return new, F.linear(inputs, new[OUTPUT[kind]], new.get(BIAS[kind])), record


def token_scale(hidden: torch.Tensor) -> torch.Tensor:
    """1 / ||h_t|| (b, t, 1): square roots of the weights of the tokens in the least squares problems.

    The next norm sees a change of the stream relative to its length; and without weights a few tokens with
    a stream of hundreds of times the usual length own the moments (Sun et al. 2024, arXiv 2402.17762).
    """
    return 1.0 / hidden.norm(dim=-1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)


def result_of(target: Decoder, method: Method) -> Decoder:
    """What pruning to `target` yields: without its empty layers, with biases where the method leaves them."""
    return replace(target.compact(), output_bias=method.recovery is Recovery.BIAS)


@torch.inference_mode()
def prune(
    model: Model,
    target: Decoder,
    ids: torch.Tensor,
    method: Method,
    seed: int,
    on_module: Callable[[ModuleRecord], None] = lambda record: None,
    chunk: int = CHUNK_TOKENS,
) -> Iterator[tuple[str, torch.Tensor]]:
    """The weights of result_of(target, method), in the order of its shapes(), fp32 where they were changed.

    model: the dense model; target: has the dense model's layers, some of them without attention, MLP or
    both; ids: (samples, tokens) int64 calibration samples. One layer's weights and the samples' hidden
    states on both streams are held at a time. Raises NumericalError naming the layer whose activations
    are not finite.
    """
    dense = model.decoder
    generator = torch.Generator().manual_seed(seed)
    tables = rotary_tables(dense, ids.shape[1])
    pruned = embed(model, ids)
    result = result_of(target, method)
    teaches = method.recovery is Recovery.LEAST_SQUARES
    whole = pruned.clone() if teaches else pruned
    drifted = False
    position = 0
    yield "embedding", model.weights["embedding"]
    for index in range(len(dense.layers)):
        weights = layer_weights(model, index)
        new: LayerWeights = {}
        for kind in modules_of(dense, index):
            size = weights[OUTPUT[kind]].shape[1]
            stays = getattr(target.layers[index], kind)
            is_cut = stays != getattr(dense.layers[index], kind)
            drifted |= is_cut
            if not is_cut and not (drifted and teaches):
                add_module(dense, index, kind, weights, pruned, tables, chunk)
                if teaches:
                    whole.copy_(pruned)
                new |= {name: weight for name, weight in weights.items() if name.startswith(kind)}
                new[BIAS[kind]] = torch.zeros(dense.hidden_size)  # where the method leaves biases at all
                on_module(ModuleRecord(index, kind, size, size))
                continue
            if teaches:
                add_module(dense, index, kind, weights, whole, tables, chunk)
            if stays is None:
                on_module(ModuleRecord(index, kind, 0, size))
                continue
            scale = token_scale(whole) if teaches else torch.ones(1)
            module, output, record = prune_module(
                weights,
                module_inputs(dense, index, kind, weights, pruned, tables, chunk).mul_(scale),
                (whole - pruned).mul_(scale),
                dense, target, index, kind, method, generator,
            )  # fmt: skip
            new |= module
            pruned += output.div_(scale)
            on_module(record)
        if new:
            prefix = f"layers.{position}."
            for name in result.layer_shapes(position):
                yield name, new[name.removeprefix(prefix)]
            position += 1
    yield "norm", model.weights["norm"]
    if not dense.tie_word_embeddings:
        yield "head", model.weights["head"]
