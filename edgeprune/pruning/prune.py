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
    """What happened to one module: kept of its input features of the output projection, 0 where it went
    as a whole. Errors are relative to the dense stream, on held-out calibration samples; nan where
    nothing was compensated. few: experts that saw too few tokens to be compensated."""

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
    """1 / ||h_t|| (b, t, 1), next to nothing for states of zeros: square roots of the weights in least squares.

    The next norm sees a change of the stream relative to its length; and without weights a few tokens with
    a stream of hundreds of times the usual length own the moments (Sun et al. 2024, arXiv 2402.17762).
    """
    length = hidden.norm(dim=-1, keepdim=True)
    return torch.where(length > 0, 1.0 / length, NO_STATE / length.max().clamp_min(torch.finfo(torch.float32).eps))


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
    return target.compact().with_output_biases() if method.recovery is Recovery.BIAS else target.compact()


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
    tables: Tables
    chunk: int
    pruned: torch.Tensor
    whole: torch.Tensor
    importance: torch.Tensor
    drifted: bool = False
    read_pruned: torch.Tensor = field(init=False)  # what the modules of the layer read of each stream
    read_whole: torch.Tensor = field(init=False)

    def enter(self) -> None:
        """A layer begins."""
        self.read_pruned = entering(self.dense, self.pruned)
        self.read_whole = self.read_pruned if self.whole is self.pruned else entering(self.dense, self.whole)

    def module(self, weights: LayerWeights, index: int, kind: str) -> tuple[LayerWeights, ModuleRecord]:
        """The module's new weights, none where it goes as a whole, and what was done."""
        before, after = (getattr(decoder.layers[index], kind) for decoder in (self.dense, self.target))
        size = before.query_size if kind == "attention" else before.intermediate_size
        compensates = self.method.recovery is Recovery.LEAST_SQUARES
        self.drifted |= before != after
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
        raw = self._dense_output(weights, index, kind) if compensates else None
        if after is None:
            return {}, ModuleRecord(index, kind, 0, size)
        if has_experts(self.dense, index, kind):
            return self._cut_experts(weights, index)
        return self._cut(weights, index, kind, raw)

    def _add(self, weights: LayerWeights, index: int, kind: str, hidden: torch.Tensor, source: torch.Tensor) -> None:
        add_module(self.dense, index, kind, weights, hidden, self.tables, self.chunk, source)

    def _dense_output(self, weights: LayerWeights, index: int, kind: str) -> torch.Tensor | None:
        """Takes the dense stream through the module; where its output is normed, returns it before that (b, t, c)."""
        if self.dense.norms == "before":
            self._add(weights, index, kind, self.whole, self.read_whole)
            return None
        raw = torch.empty_like(self.whole)
        for part, states in zip(row_chunks(raw, self.chunk), row_chunks(self.read_whole, self.chunk), strict=True):
            part.copy_(module_raw(self.dense, index, kind, weights, states, self.tables))
        self.whole += module_output(self.dense, kind, weights, raw)
        return raw

    def _cut_experts(self, weights: LayerWeights, index: int) -> tuple[LayerWeights, ModuleRecord]:
        before, after = (decoder.layers[index].mlp for decoder in (self.dense, self.target))
        compensates = self.method.recovery is Recovery.LEAST_SQUARES
        states = module_states(self.dense, "mlp", weights, self.read_pruned)
        scale = token_scale(self.whole) * self.importance.sqrt() if compensates else torch.ones(1, 1, 1)
        size = after.intermediate_size
        cut = cut_experts(states, weights, before, size, self.method.score, compensates, scale, self.generator)
        norms = {name: part for name, part in weights.items() if name.startswith("mlp.") and "norm" in name}
        check_finite(cut.output, index, "mlp")
        self.pruned += module_output(self.dense, "mlp", norms, cut.output)
        errors = [sum(part) / len(cut.errors) for part in zip(*cut.errors, strict=True)] or [math.nan] * 2
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
        """raw: what the dense output projection gave, where a norm follows it: there the update aims at that, and
        not at the dense stream, of which it sees no more than a direction."""
        weight, bias = weights[OUTPUT[kind]], weights.get(BIAS[kind])
        source = self.read_pruned
        compensates = self.method.recovery is Recovery.LEAST_SQUARES
        scale = torch.ones(1)
        if compensates:
            scale = token_scale(self.whole if raw is None else raw) * self.importance.sqrt()
        inputs = module_inputs(self.dense, index, kind, weights, source, self.tables, self.chunk).mul_(scale)
        projection = Projection(weight, gram(inputs.flatten(0, 1)), inputs, self.generator)
        kept, rows = kept_features(
            *(getattr(decoder.layers[index], kind) for decoder in (self.dense, self.target)),
            functools.partial(self.method.score, projection),
        )
        own = {name: part for name, part in weights.items() if name.startswith(kind)}
        new = {name: part[rows[name]] if name in rows else part for name, part in own.items()}
        new[OUTPUT[kind]] = weight[:, kept]
        if self.method.recovery is Recovery.BIAS:
            removed = projection.mean
            removed[kept] = 0.0
            new[BIAS[kind]] = (weight.double() @ removed).float() + (0.0 if bias is None else bias)
        record = ModuleRecord(index, kind, len(kept), weight.shape[1])
        moments = projection.gram[kept[:, None], kept]
        del projection  # the largest array of the walk: not while those of the solve are made
        if "attention.q_norm" in rows and len(kept) < weight.shape[1]:
            whole = F.linear(inputs, weight)
            keep_norms(self.dense, weights, new, rows, source, self.chunk)
            inputs = module_inputs(self.target, index, kind, new, source, self.tables, self.chunk).mul_(scale)
            moments, lost = gram(inputs.flatten(0, 1)), whole.sub_(F.linear(inputs, new[OUTPUT[kind]]))
        else:
            lost = _without(inputs, kept, weight) if compensates else None
            inputs = inputs[..., kept]
        if compensates:
            teacher = self.whole - self.pruned if raw is None else raw
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
        output = F.linear(inputs, new[OUTPUT[kind]]).div_(scale)
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
    """Where a norm spans all heads, those that are left are divided by their own length: its weights in `new` take
    the mean ratio of both lengths, on the states (b, t, c), so that queries and keys stay as long as they were."""
    for part in ("q", "k"):
        name = f"attention.{part}"
        ratios = []
        for states_ in row_chunks(states, chunk):
            x = module_states(dense, "attention", weights, states_)
            projected = F.linear(x, weights[name], weights.get(f"{name}_bias"))
            kept = projected[..., rows[name]]
            ratios.append((kept.square().mean(dim=-1) / projected.square().mean(dim=-1)).sqrt().flatten())
        new[f"{name}_norm"] = new[f"{name}_norm"] * torch.cat(ratios).nanmean()


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
    position = 0
    yield "embedding", model.weights["embedding"]
    if dense.learned_positions:
        yield "positions", model.weights["positions"]
    for index in range(len(dense.layers)):
        weights = layer_weights(model, index)
        new: LayerWeights = {}
        walk.enter()
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
    for name in dense.norm_shapes("norm"):
        yield name, model.weights[name]
    if not dense.tie_word_embeddings:
        yield "head", model.weights["head"]
