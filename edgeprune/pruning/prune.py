"""The layer-by-layer pruning of a model: moments -> score -> select -> cut -> compensate.

Two residual streams of the same samples run side by side: that of the dense model, and that of the layers pruned so
far. Each module's inputs are computed once on each. Neither the selection nor the compensation changes the inputs of
a module's own output projection, so that its pruned output is the kept columns of those inputs times the new weights,
and no second pass is needed. It does not know how the target's widths were chosen, nor where the weights are written.

Shapes: b samples, t tokens, c features of the residual stream (hidden_size).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace

import torch
import torch.nn.functional as F

from edgeprune.model.decoder import Decoder
from edgeprune.model.forward import (
    BIAS,
    CHUNK_TOKENS,
    OUTPUT,
    LayerWeights,
    Tables,
    add_module,
    check_finite,
    embed,
    entering,
    has_experts,
    layer_weights,
    module_inputs,
    module_output,
    module_raw,
    module_states,
    modules_of,
    row_chunks,
)
from edgeprune.model.model import Model
from edgeprune.pruning.compensate import compensate
from edgeprune.pruning.experts import cut_experts
from edgeprune.pruning.methods import Method, Recovery
from edgeprune.pruning.moments import gram
from edgeprune.pruning.score import Projection
from edgeprune.pruning.select import kept_features


@dataclass(frozen=True)
class ModuleRecord:
    """The record of what was done to one module.

    kept: how many of the `of` input features of the output projection stay, 0 where the whole module goes;
    damping, blend: as in Compensation; error_before, error_after: relative to the dense stream, on held-out
    calibration samples, nan where nothing was compensated; fell_back: no update lowered the error; few: the experts
    that too few tokens take for an update.
    """

    layer: int
    kind: str
    kept: int
    of: int
    damping: float | None = None
    blend: float = 0.0
    error_before: float = math.nan
    error_after: float = math.nan
    fell_back: bool = False
    few: tuple[int, ...] = ()


NO_STATE = 1e-3  # of the least scale of all tokens: some models embed a padding token as zeros


def token_scale(hidden: torch.Tensor) -> torch.Tensor:
    """Returns 1 / ||h_t|| (b, t, 1), the square roots of the tokens' weights in least squares, of hidden (b, t, c).

    The next norm sees a change of the stream relative to the stream's length. Without these weights, a few tokens
    whose stream is hundreds of times longer than usual would decide the moments (Sun et al. 2024, arXiv 2402.17762).
    States of zeros weigh next to nothing.
    """
    length = hidden.norm(dim=-1, keepdim=True)
    return torch.where(length > 0, 1.0 / length, NO_STATE / length.max().clamp_min(torch.finfo(torch.float32).eps))


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


@dataclass
class Walk:
    """The two residual streams of the samples, (b, t, c) fp32, on their way through the modules.

    whole: the stream of the dense model; pruned: the stream behind the modules that are pruned already. Both are
    updated in place. A method that does not compensate needs no dense stream: there both are the same tensor.
    importance: (b, 1, 1), the weight of each sample's tokens in the least squares problems; chunk: tokens that are
    computed at a time; drifted: a module was cut, so that the streams differ.
    """

    dense: Decoder
    target: Decoder
    method: Method
    generator: torch.Generator
    tables: Tables
    chunk: int
    pruned: torch.Tensor
    whole: torch.Tensor
    importance: torch.Tensor
    drifted: bool = False
    read_pruned: torch.Tensor = field(init=False)  # (b, t, c), the streams as the layer's modules read them
    read_whole: torch.Tensor = field(init=False)

    def enter(self) -> None:
        """Prepares both streams for the modules of the next layer."""
        self.read_pruned = entering(self.dense, self.pruned)
        self.read_whole = self.read_pruned if self.whole is self.pruned else entering(self.dense, self.whole)

    def module(self, weights: LayerWeights, index: int, kind: str) -> tuple[LayerWeights, ModuleRecord]:
        """Returns the module's new weights, none where the whole module goes, and its record; moves both streams."""
        before, after = (getattr(decoder.layers[index], kind) for decoder in (self.dense, self.target))
        size = before.query_size if kind == "attention" else before.intermediate_size
        compensates = self.method.recovery is Recovery.LEAST_SQUARES
        self.drifted |= before != after
        # An uncut module keeps its weights, unless its update can make up for what the modules before have lost.
        if before == after and not (self.drifted and compensates and not has_experts(self.dense, index, kind)):
            self._add(weights, index, kind, self.pruned, self.read_pruned)
            if compensates:
                if self.drifted:
                    self._add(weights, index, kind, self.whole, self.read_whole)
                else:
                    self.whole.copy_(self.pruned)
            same = {name: weight for name, weight in weights.items() if name.startswith(kind)}
            same.setdefault(BIAS[kind], torch.zeros(self.dense.hidden_size))  # where the method leaves biases at all
            return same, ModuleRecord(index, kind, size, size)
        # The dense stream goes first: its state behind the module is what the update aims at.
        raw = self._dense_output(weights, index, kind) if compensates else None  # (b, t, c)
        if after is None:
            return {}, ModuleRecord(index, kind, 0, size)
        if has_experts(self.dense, index, kind):
            return self._cut_experts(weights, index)
        return self._cut(weights, index, kind, raw)

    def _add(self, weights: LayerWeights, index: int, kind: str, hidden: torch.Tensor, source: torch.Tensor) -> None:
        add_module(self.dense, index, kind, weights, hidden, self.tables, self.chunk, source)

    def _dense_output(self, weights: LayerWeights, index: int, kind: str) -> torch.Tensor | None:
        """Takes the dense stream through the module.

        Returns the module's output before its norm (b, t, c); None where no norm follows the output.
        """
        if self.dense.norms == "before":
            self._add(weights, index, kind, self.whole, self.read_whole)
            return None
        raw = torch.empty_like(self.whole)
        for output, states in zip(row_chunks(raw, self.chunk), row_chunks(self.read_whole, self.chunk), strict=True):
            output.copy_(module_raw(self.dense, index, kind, weights, states, self.tables))
        self.whole += module_output(self.dense, kind, weights, raw)
        return raw

    def _cut_experts(self, weights: LayerWeights, index: int) -> tuple[LayerWeights, ModuleRecord]:
        """Cuts every expert of an MLP to the target's width; returns the new weights and the record."""
        before, after = (decoder.layers[index].mlp for decoder in (self.dense, self.target))
        compensates = self.method.recovery is Recovery.LEAST_SQUARES
        states = module_states(self.dense, "mlp", weights, self.read_pruned)  # (b, t, c)
        # Square roots of the tokens' weights in least squares.
        scale = token_scale(self.whole) * self.importance.sqrt() if compensates else torch.ones(1, 1, 1)  # (b, t, 1)
        # Cut the experts, and move the pruned stream by what they now give.
        size = after.intermediate_size
        cut = cut_experts(states, weights, before, size, self.method.score, compensates, scale, self.generator)
        norms = {name: weight for name, weight in weights.items() if name.startswith("mlp.") and "norm" in name}
        check_finite(cut.output, index, "mlp")
        self.pruned += module_output(self.dense, "mlp", norms, cut.output)
        # Record the mean errors of the experts that have an update.
        errors = [sum(column) / len(cut.errors) for column in zip(*cut.errors, strict=True)] or [math.nan] * 2
        record = ModuleRecord(
            index,
            "mlp",
            size,
            before.intermediate_size,
            error_before=errors[0],
            error_after=errors[1],
            few=tuple(cut.few),
        )
        return norms | cut.weights, record

    def _cut(
        self, weights: LayerWeights, index: int, kind: str, raw: torch.Tensor | None
    ) -> tuple[LayerWeights, ModuleRecord]:
        """Cuts a module without experts to the target's widths; returns the new weights and the record.

        raw: (b, t, c), the output of the dense output projection where a norm follows it. There the update aims at
        this output and not at the dense stream: behind a norm the output's length is lost.
        """
        weight, bias = weights[OUTPUT[kind]], weights.get(BIAS[kind])
        source = self.read_pruned
        compensates = self.method.recovery is Recovery.LEAST_SQUARES
        # Square roots of the tokens' weights in least squares.
        scale = torch.ones(1)
        if compensates:
            scale = token_scale(self.whole if raw is None else raw) * self.importance.sqrt()  # (b, t, 1)
        # Score the input features of the output projection, and select those that stay.
        # (b, t, in_features)
        inputs = module_inputs(self.dense, index, kind, weights, source, self.tables, self.chunk).mul_(scale)
        projection = Projection(weight, gram(inputs.flatten(0, 1)), inputs, self.generator)
        kept, rows = kept_features(
            *(getattr(decoder.layers[index], kind) for decoder in (self.dense, self.target)),
            functools.partial(self.method.score, projection),
        )
        # Cut the rows of the weights before the kept features, and the columns of the output projection.
        own = {name: tensor for name, tensor in weights.items() if name.startswith(kind)}
        new = {name: tensor[rows[name]] if name in rows else tensor for name, tensor in own.items()}
        new[OUTPUT[kind]] = weight[:, kept]  # (c, kept)
        # FLAP's recovery: the mean output of the removed features becomes a bias (c,).
        if self.method.recovery is Recovery.BIAS:
            removed = projection.mean  # (in_features,)
            removed[kept] = 0.0
            new[BIAS[kind]] = (weight.double() @ removed).float() + (0.0 if bias is None else bias)
        record = ModuleRecord(index, kind, len(kept), weight.shape[1])
        moments = projection.gram[kept[:, None], kept]  # (kept, kept)
        del projection  # the largest array of the walk: freed before those of the solve are made
        # Compute the inputs (b, t, kept) that the cut projection has, and the output (b, t, c) that is lost with the
        # others. A norm over all heads changes with the cut, and so do the inputs behind it.
        if "attention.q_norm" in rows and len(kept) < weight.shape[1]:
            whole = F.linear(inputs, weight)  # (b, t, c)
            keep_norms(self.dense, weights, new, rows, source, self.chunk)
            inputs = module_inputs(self.target, index, kind, new, source, self.tables, self.chunk).mul_(scale)
            moments, lost = gram(inputs.flatten(0, 1)), whole.sub_(F.linear(inputs, new[OUTPUT[kind]]))
        else:
            lost = _without(inputs, kept, weight) if compensates else None
            inputs = inputs[..., kept]
        # Update the kept columns toward the dense stream.
        if compensates:
            teacher = self.whole - self.pruned if raw is None else raw  # (b, t, c)
            if bias is not None:
                teacher = teacher - bias
            solved = compensate(new[OUTPUT[kind]], moments, inputs, lost, teacher.mul_(scale))
            new[OUTPUT[kind]] = solved.weight
            record = replace(
                record,
                damping=solved.damping,
                blend=solved.blend,
                error_before=solved.error_before,
                error_after=solved.error_after,
                fell_back=solved.damping is None and solved.error_before > 0,
            )
        # Move the pruned stream through the new module.
        output = F.linear(inputs, new[OUTPUT[kind]]).div_(scale)  # (b, t, c)
        if BIAS[kind] in new:
            output += new[BIAS[kind]]
        self.pruned += module_output(self.dense, kind, new, output)
        return new, record


def keep_norms(
    dense: Decoder,
    weights: LayerWeights,
    new: LayerWeights,
    rows: dict[str, torch.Tensor],
    states: torch.Tensor,
    chunk: int,
) -> None:
    """Rescales the weights of query and key norms that span all heads, in `new`, after heads were removed.

    Such a norm now divides the heads that are left by their own length. Its weights are multiplied by the mean ratio
    of the kept heads' length to the length of all, measured on states (b, t, c), so that queries and keys stay as
    long as they were. rows: the kept rows of each weight by name.
    """
    for part in ("q", "k"):
        name = f"attention.{part}"
        ratios = []
        for states_ in row_chunks(states, chunk):
            x = module_states(dense, "attention", weights, states_)
            projected = F.linear(x, weights[name], weights.get(f"{name}_bias"))  # (samples, t, heads * head_dim)
            kept = projected[..., rows[name]]  # (samples, t, kept heads * head_dim)
            ratios.append((kept.square().mean(dim=-1) / projected.square().mean(dim=-1)).sqrt().flatten())
        new[f"{name}_norm"] = new[f"{name}_norm"] * torch.cat(ratios).nanmean()


def _without(inputs: torch.Tensor, kept: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Returns the output (b, t, out_features) of the features of inputs (b, t, features) that are not kept."""
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
    """Yields the weights of result_of(target, method), in the order of its shapes(), fp32 where they were changed.

    model: the dense model; target: a decoder with as many layers as the dense one, some of them without attention,
    MLP or both; ids: (samples, tokens) int64 calibration samples; generated: (any, tokens) int64, samples that the
    model itself wrote: a method that compensates solves on these too, with the weights of sample_weights; on_module:
    called with the record of each module that is done; chunk: tokens that are computed at a time. Only one layer's
    weights and the samples' hidden states on both streams are held in memory. Raises NumericalError naming the layer
    whose activations are not finite.
    """
    dense, result = model.decoder, result_of(target, method)
    compensates = method.recovery is Recovery.LEAST_SQUARES
    if not compensates or generated is None:
        generated = ids[:0]
    importance = sample_weights(len(ids), len(generated))  # (b, 1, 1)
    ids = torch.cat([ids, generated])  # (b, t)
    # Both streams begin with the embedded samples.
    hidden = embed(model, ids)  # (b, t, c)
    walk = Walk(
        dense,
        target,
        method,
        torch.Generator().manual_seed(seed),
        Tables(dense, ids.shape[1]),
        chunk,
        pruned=hidden,
        whole=hidden.clone() if compensates else hidden,
        importance=importance,
    )
    del hidden
    position = 0  # of the next layer in the result, where empty layers are left out
    yield "embedding", model.weights["embedding"]
    if dense.learned_positions:
        yield "positions", model.weights["positions"]
    for index in range(len(dense.layers)):
        # Prune the modules of a layer, one after the other.
        weights = layer_weights(model, index)
        new: LayerWeights = {}
        walk.enter()
        for kind in modules_of(dense, index):
            module_weights, record = walk.module(weights, index, kind)
            new |= module_weights
            on_module(record)
        del weights
        # Hand out what stays of the layer, under its new number.
        if new:
            prefix = f"layers.{position}."
            for name in result.layer_shapes(position):
                yield name, new.pop(name.removeprefix(prefix))
            position += 1
    for name in dense.norm_shapes("norm"):
        yield name, model.weights[name]
    if not dense.tie_word_embeddings:
        yield "head", model.weights["head"]
