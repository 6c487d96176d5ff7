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


def token_scale(hidden: torch.Tensor) -> torch.Tensor:
    """1 / ||h_t|| (b, t, 1): square roots of the weights of the tokens in the least squares problems.

    The next norm sees a change of the stream relative to its length; and without weights a few tokens with
    a stream of hundreds of times the usual length own the moments (Sun et al. 2024, arXiv 2402.17762).
    """
    return 1.0 / hidden.norm(dim=-1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)


def sample_weights(users: int, generated: int) -> torch.Tensor:
    """Weights (users + generated, 1, 1) of the samples' tokens in the least squares problems.

    The two texts weigh the same together, however many samples each has. Samples of one domain know the
    directions that matter there, and least squares bends all others, the more the fewer they are; the
    model's own text holds those in place.
    """
    weights = torch.ones(users + generated, 1, 1)
    weights[users:] = users / max(generated, 1)
    return weights


def result_of(target: Decoder, method: Method) -> Decoder:
    """What pruning to `target` yields: without its empty layers, with biases where the method leaves them."""
    return replace(target.compact(), output_bias=method.recovery is Recovery.BIAS)


@dataclass
class Walk:
    """The two streams of the samples, (b, t, c) fp32, and what takes them through a module.

    whole: the dense model's; pruned: that of the modules before, as they are now. Both are updated in
    place. A method that does not compensate needs no dense stream: there the two are one.
    importance: (b, 1, 1), the weight of each sample's tokens in the least squares problems.
    """

    dense: Decoder
    target: Decoder
    method: Method
    generator: torch.Generator
    tables: tuple[torch.Tensor, torch.Tensor]
    chunk: int
    pruned: torch.Tensor
    whole: torch.Tensor
    importance: torch.Tensor
    drifted: bool = False

    def module(self, weights: LayerWeights, index: int, kind: str) -> tuple[LayerWeights, ModuleRecord]:
        """The module's new weights, none where it goes as a whole, and what was done."""
        size = weights[OUTPUT[kind]].shape[1]
        before, after = (getattr(decoder.layers[index], kind) for decoder in (self.dense, self.target))
        compensates = self.method.recovery is Recovery.LEAST_SQUARES
        self.drifted |= before != after
        if before == after and not (self.drifted and compensates):
            add_module(self.dense, index, kind, weights, self.pruned, self.tables, self.chunk)
            if compensates:
                self.whole.copy_(self.pruned)
            same = {name: weight for name, weight in weights.items() if name.startswith(kind)}
            same[BIAS[kind]] = torch.zeros(self.dense.hidden_size)  # where the method leaves biases at all
            return same, ModuleRecord(index, kind, size, size)
        if compensates:
            add_module(self.dense, index, kind, weights, self.whole, self.tables, self.chunk)
        if after is None:
            return {}, ModuleRecord(index, kind, 0, size)
        return self._cut(weights, index, kind)

    def _cut(self, weights: LayerWeights, index: int, kind: str) -> tuple[LayerWeights, ModuleRecord]:
        weight = weights[OUTPUT[kind]]
        compensates = self.method.recovery is Recovery.LEAST_SQUARES
        scale = token_scale(self.whole) * self.importance.sqrt() if compensates else torch.ones(1)
        inputs = module_inputs(self.dense, index, kind, weights, self.pruned, self.tables, self.chunk).mul_(scale)
        projection = Projection(weight, gram(inputs.flatten(0, 1)), inputs, self.generator)
        kept, rows = kept_features(
            *(getattr(decoder.layers[index], kind) for decoder in (self.dense, self.target)),
            functools.partial(self.method.score, projection),
        )
        new = {name: weights[name][index_] for name, index_ in rows.items()}
        new |= {f"{kind}.norm": weights[f"{kind}.norm"], OUTPUT[kind]: weight[:, kept]}
        if self.method.recovery is Recovery.BIAS:
            removed = projection.mean
            removed[kept] = 0.0
            new[BIAS[kind]] = (weight.double() @ removed).float()
        record = ModuleRecord(index, kind, len(kept), weight.shape[1])
        moments = projection.gram[kept[:, None], kept]
        del projection  # the largest array of the walk: not while those of the solve are made
        lost = _without(inputs, kept, weight) if compensates else None
        inputs = inputs[..., kept]
        if lost is not None:
            solved = compensate(new[OUTPUT[kind]], moments, inputs, lost, (self.whole - self.pruned).mul_(scale))
            new[OUTPUT[kind]] = solved.weight
            record = replace(
                record, damping=solved.damping, blend=solved.blend, error_before=solved.error_before,
                error_after=solved.error_after, fell_back=solved.damping is None and solved.error_before > 0,
            )  # fmt: skip
        self.pruned += F.linear(inputs, new[OUTPUT[kind]], new.get(BIAS[kind])).div_(scale)
        return new, record


def _without(inputs: torch.Tensor, kept: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """What the features of inputs (b, t, features) that are not kept give, (b, t, out_features)."""
    is_removed = torch.ones(inputs.shape[-1], dtype=torch.bool)
    is_removed[kept] = False
    return F.linear(inputs[..., is_removed], weight[:, is_removed])


@torch.inference_mode()
def prune(
    model: Model,
    target: Decoder,
    ids: torch.Tensor,
    method: Method,
    seed: int,
    on_module: Callable[[ModuleRecord], None] = lambda record: None,
    generated: torch.Tensor | None = None,
    chunk: int = CHUNK_TOKENS,
) -> Iterator[tuple[str, torch.Tensor]]:
    """The weights of result_of(target, method), in the order of its shapes(), fp32 where they were changed.

    model: the dense model; target: has the dense model's layers, some of them without attention, MLP or
    both; ids: (samples, tokens) int64 calibration samples; generated: (any, tokens) int64, what the model
    itself wrote: a method that compensates solves on these too, with the weights of sample_weights. One
    layer's weights and the samples' hidden states on both streams are held at a time. Raises
    NumericalError naming the layer whose activations are not finite.
    """
    dense, result = model.decoder, result_of(target, method)
    compensates = method.recovery is Recovery.LEAST_SQUARES
    if not compensates or generated is None:
        generated = ids[:0]
    importance = sample_weights(len(ids), len(generated))
    ids = torch.cat([ids, generated])
    hidden = embed(model, ids)
    walk = Walk(
        dense, target, method, torch.Generator().manual_seed(seed), rotary_tables(dense, ids.shape[1]), chunk,
        pruned=hidden, whole=hidden.clone() if compensates else hidden, importance=importance,
    )  # fmt: skip
    del hidden
    position = 0
    yield "embedding", model.weights["embedding"]
    for index in range(len(dense.layers)):
        weights = layer_weights(model, index)
        new: LayerWeights = {}
        for kind in modules_of(dense, index):
            module, record = walk.module(weights, index, kind)
            new |= module
            on_module(record)
        del weights
        if new:
            prefix = f"layers.{position}."
            for name in result.layer_shapes(position):
                yield name, new.pop(name.removeprefix(prefix))
            position += 1
    yield "norm", model.weights["norm"]
    if not dense.tie_word_embeddings:
        yield "head", model.weights["head"]
