"""The walk of the samples through a model's modules: each is cut, rounded, and updated toward the dense model.

Two residual streams of the same samples run side by side: that of the dense model, and that of the modules made so
far. A cut module's inputs are computed once on each, where neither selection nor compensation changes the inputs of its
output projection: its output is the kept columns of those inputs times the new weights. Where the matrices before are
rounded, the inputs are computed again. It does not know how the target was chosen.

Shapes: b samples, t tokens, c features of the residual stream (hidden_size).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
import torch.nn.functional as F

from edgeprune.model.attention import LayerWeights, Tables
from edgeprune.model.decoder import Decoder
from edgeprune.model.forward import (
    BIAS,
    OUTPUT,
    add_module,
    check_finite,
    entering,
    has_experts,
    module_activation,
    module_inputs,
    module_output,
    module_raw,
    module_states,
    row_chunks,
)
from edgeprune.model.mlp import experts_output
from edgeprune.model.quantised import rounded_inputs, values_by_name
from edgeprune.precision import WeightFormat
from edgeprune.pruning.activations import input_scale_for, is_smoothed, largest_of, names_before, smoothed
from edgeprune.pruning.compensate import FIRST_DAMPING, compensate
from edgeprune.pruning.experts import cut_experts
from edgeprune.pruning.methods import Method, Recovery
from edgeprune.pruning.moments import Moments, evened, gram, moments_of
from edgeprune.pruning.quantize import Quantisation, Rounding
from edgeprune.pruning.rounding import round_on, round_together
from edgeprune.pruning.score import Projection
from edgeprune.pruning.select import kept_features


@dataclass(frozen=True)
class ModuleRecord:
    """The record of what was done to one module.

    kept: how many of the `of` input features of the output projection stay, 0 where the whole module goes;
    damping, blend: as in Compensation; error_before, error_after: relative to the dense stream, on held-out
    calibration samples, nan where nothing was compensated; fell_back: no update lowered the error; few: the experts
    that too few tokens take for an update; roundings, rounding_errors: of the matrices before the activation and of the
    output projection, as in Quantisation; empty where they stay floats.
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
    roundings: tuple[Rounding, ...] = ()
    rounding_errors: tuple[float, ...] = ()


FIRST_SHARE = 1 / 2  # of a sample's tokens, that its first one counts as

NO_STATE = 1e-3  # of the least scale of all tokens: some models embed a padding token as zeros


def token_scale(hidden: torch.Tensor) -> torch.Tensor:
    """Returns 1 / ||h_t|| (b, t, 1), the square roots of the tokens' weights in least squares, of hidden (b, t, c).

    The next norm sees a change of the stream relative to the stream's length. Without these weights, a few tokens
    whose stream is hundreds of times longer than usual would decide the moments (Sun et al. 2024, arXiv 2402.17762).
    States of zeros weigh next to nothing.
    """
    length = hidden.norm(dim=-1, keepdim=True)
    return torch.where(length > 0, 1.0 / length, NO_STATE / length.max().clamp_min(torch.finfo(torch.float32).eps))


@dataclass
class CutModule:
    """A module on its way to the target: its weights so far, by name and fp32, and what its output projection reads.

    inputs: (b, t, kept) fp32, times the square roots of the tokens' weights; total: (kept, kept) fp64, the moments of
    these where they are known; lost: (b, t, c), what the module gave before its cut less what the kept inputs
    give, and what these lose where the format rounds them.
    """

    kind: str
    weights: LayerWeights
    inputs: torch.Tensor | None = None
    total: torch.Tensor | None = None
    lost: torch.Tensor | None = None

    @property
    def weight(self) -> torch.Tensor:
        """Returns the weight (c, kept) of the output projection."""
        return self.weights[OUTPUT[self.kind]]


@dataclass
class Walk:
    """The two residual streams of the samples, (b, t, c) fp32, on their way through the modules.

    whole: the stream of the dense model; pruned: the stream behind the modules that are pruned already. Both are
    updated in place. A method without least squares has one stream: there both are the same tensor.
    importance: (b, 1, 1), the weight of each sample's tokens in the least squares problems; chunk: tokens that are
    computed at a time; drifted: a module was cut, so that the streams differ; dampings: by kind, what the last module
    chose, where the next one's search starts.
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
    dampings: dict[str, float] = field(default_factory=dict)
    read_pruned: torch.Tensor = field(init=False)  # (b, t, c), the streams as the layer's modules read them
    read_whole: torch.Tensor = field(init=False)

    @functools.cached_property
    def first(self) -> float:
        """Returns how many tokens the first one of a sample counts as where an output projection is updated.

        Models let attention rest on it (Xiao et al. 2023, arXiv 2309.17453): all later tokens read what became of it.
        Rounding alone leaves it near enough.
        """
        if self.dense.layer_widths == self.target.layer_widths:
            return 1.0
        return max(1.0, FIRST_SHARE * self.whole.shape[1])

    def _scale(self, aim: torch.Tensor) -> torch.Tensor:
        """Returns the square roots (b, t, 1) of the tokens' weights where an update aims at (b, t, c)."""
        scale = token_scale(aim) * self.importance.sqrt()
        scale[:, 0] *= math.sqrt(self.first)
        return scale

    def enter(self) -> None:
        """Prepares both streams for the modules of the next layer."""
        self.read_pruned = entering(self.dense, self.pruned)
        self.read_whole = self.read_pruned if self.whole is self.pruned else entering(self.dense, self.whole)

    def module(self, weights: LayerWeights, index: int, kind: str) -> tuple[LayerWeights, ModuleRecord]:
        """Returns the module's new weights, none where the whole module goes, and its record; moves both streams.

        weights: of the module alone; consumed. FLAP takes scores and means from the dense model: there the one stream
        moves as if nothing were cut.
        """
        if self.method.recovery is not Recovery.BIAS:
            return self._module(weights, index, kind)
        dense = self.pruned.clone()
        self._add(weights, index, kind, dense, self.read_pruned)
        made = self._module(weights, index, kind)
        self.pruned.copy_(dense)
        return made

    def _module(self, weights: LayerWeights, index: int, kind: str) -> tuple[LayerWeights, ModuleRecord]:
        before, after = (getattr(decoder.layers[index], kind) for decoder in (self.dense, self.target))
        size = before.query_size if kind == "attention" else before.intermediate_size
        compensates = self.method.recovery is Recovery.LEAST_SQUARES
        self.drifted |= before != after
        # An uncut module keeps its weights, unless its update can make up for what the modules before have lost.
        if before == after and not (self.drifted and compensates):
            self._add(weights, index, kind, self.pruned, self.read_pruned)
            if compensates:
                if self.drifted:
                    self._add(weights, index, kind, self.whole, self.read_whole)
                else:
                    self.whole.copy_(self.pruned)
            weights.setdefault(BIAS[kind], torch.zeros(self.dense.hidden_size))  # where the method leaves biases at all
            return weights, ModuleRecord(index, kind, size, size)
        # The dense stream goes first: its state behind the module is what the update aims at.
        raw = self._dense_output(weights, index, kind) if compensates else None  # (b, t, c)
        if after is None:
            return {}, ModuleRecord(index, kind, 0, size)
        if has_experts(self.dense, index, kind):
            return self._cut_experts(weights, index, raw)
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

    def _cut_experts(
        self, weights: LayerWeights, index: int, raw: torch.Tensor | None
    ) -> tuple[LayerWeights, ModuleRecord]:
        """Cuts every expert of an MLP to the target's width; returns the new weights and the record.

        raw: as in `_cut`.
        """
        before, after = (decoder.layers[index].mlp for decoder in (self.dense, self.target))
        states = module_states(self.dense, "mlp", weights, self.read_pruned)  # (b, t, c)
        # Square roots of the tokens' weights in least squares, and what the dense experts would have to give besides.
        scale, missing = torch.ones(1, 1, 1), None
        if self.method.recovery is Recovery.LEAST_SQUARES:
            target = self.whole if raw is None else raw
            scale = self._scale(target)  # (b, t, 1)
            missing = target - experts_output(states, weights, before)  # (b, t, c)
            if raw is None:
                missing -= self.pruned
        # Cut the experts, and move the pruned stream by what they now give.
        size = after.intermediate_size
        cut = cut_experts(
            states, weights, before, size, self.method.score, missing, scale, self.generator, after.weight_format
        )
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
        return norms | cut.weights, with_roundings(record, cut.roundings)

    def _cut(
        self, weights: LayerWeights, index: int, kind: str, raw: torch.Tensor | None
    ) -> tuple[LayerWeights, ModuleRecord]:
        """Cuts a module without experts to the target's widths and formats; returns the new weights and the record.

        raw: (b, t, c), the output of the dense output projection where a norm follows it. There the update aims at
        this output and not at the dense stream: behind a norm the output's length is lost.
        """
        after, size = getattr(self.target.layers[index], kind), weights[OUTPUT[kind]].shape[1]
        compensates = self.method.recovery is Recovery.LEAST_SQUARES
        # Square roots of the tokens' weights in least squares.
        scale = torch.ones(1)
        if compensates:
            scale = self._scale(self.whole if raw is None else raw)  # (b, t, 1)
        module = self._selected(weights, index, kind, scale)
        weights.clear()
        record = ModuleRecord(index, kind, module.weight.shape[1], size)
        # Round the matrices before the activation; what comes behind sees what they give now.
        rounded, results, input_scale = {}, [], None
        if (form := after.weight_format) is not None:
            names = names_before(after)
            if form.activation_bits is not None and is_smoothed(form):
                self._smooth(module, index, kind)
            read = module_states(self.dense, kind, module.weights, self.read_pruned)
            rounded, result = round_together(module.weights, names, read, self.importance.sqrt(), form)
            del read
            results.append(result)
            module.weights |= values_by_name(rounded.items())
            self._compute_again(module, index, kind, scale)
            for name in names:
                del module.weights[name]
            if form.activation_bits is not None:
                input_scale = self._round_inputs(module, scale, form)
        # Update the kept columns toward the dense stream.
        moments = moments_of(module.inputs, module.total) if compensates or form is not None else None
        if compensates:
            record = self._compensate(module, kind, moments, raw, scale, record)
        # Round the output projection last, on the same inputs, of which none counts more.
        if form is not None:
            if compensates:
                moments = evened(moments, module.inputs, self.first)
            result = round_on(module.weight, moments, form)
            del moments
            results.append(result)
            rounded[OUTPUT[kind]] = replace(result.weight, input_scale=input_scale)
            module.weights[OUTPUT[kind]] = result.weight.dequantised()
        # Move the pruned stream through the new module.
        output = F.linear(module.inputs, module.weight).div_(scale)  # (b, t, c)
        if BIAS[kind] in module.weights:
            output += module.weights[BIAS[kind]]
        self.pruned += module_output(self.dense, kind, module.weights, output)
        return module.weights | rounded, with_roundings(record, results)

    def _selected(self, weights: LayerWeights, index: int, kind: str, scale: torch.Tensor) -> CutModule:
        """Returns a module cut to the features that stay, by the score of the input features of its output projection.

        scale: (b, t, 1), of the inputs.
        """
        before, after = (getattr(decoder.layers[index], kind) for decoder in (self.dense, self.target))
        weight, bias, source = weights[OUTPUT[kind]], weights.get(BIAS[kind]), self.read_pruned
        # A module that is only rounded keeps all; its inputs are computed when the matrices before are rounded.
        if before == replace(after, weight_format=None) and after.weight_format is not None:
            return CutModule(kind, dict(weights))
        # Score the input features of the output projection, and select those that stay.
        # (b, t, in_features)
        inputs = module_inputs(self.dense, index, kind, weights, source, self.tables, self.chunk).mul_(scale)
        projection = Projection(weight, gram(inputs.flatten(0, 1)), inputs, self.generator)
        kept, rows = kept_features(before, after, functools.partial(self.method.score, projection))
        # Cut the rows of the weights before the kept features, and the columns of the output projection.
        new = {name: tensor[rows[name]] if name in rows else tensor for name, tensor in weights.items()}
        new[OUTPUT[kind]] = weight[:, kept]  # (c, kept)
        # FLAP's recovery: the mean output of the removed features becomes a bias (c,).
        if self.method.recovery is Recovery.BIAS:
            removed = projection.mean  # (in_features,)
            removed[kept] = 0.0
            new[BIAS[kind]] = (weight.double() @ removed).float() + (0.0 if bias is None else bias)
        module = CutModule(kind, new)
        # The inputs (b, t, kept) that the cut projection has; later, where the matrices before are rounded first. A
        # norm over all heads changes with the cut, and so do the inputs behind it.
        has_norms = "attention.q_norm" in rows and len(kept) < weight.shape[1]
        if not has_norms and after.weight_format is None:
            module.inputs, module.total = inputs[..., kept], projection.gram[kept[:, None], kept]
        del projection  # the largest array of the walk: freed before those of the solve are made
        if has_norms:
            keep_norms(self.dense, weights, new, rows, source, self.chunk)
            self._compute_again(module, index, kind, scale)
        # The output (b, t, c) that is lost with the other inputs.
        if self.method.recovery is Recovery.LEAST_SQUARES:
            if has_norms:
                module.lost = F.linear(inputs, weight).sub_(F.linear(module.inputs, module.weight))
            else:
                module.lost = _without(inputs, kept, weight)
        return module

    def _smooth(self, module: CutModule, index: int, kind: str) -> None:
        """Brings the channels of what the module's matrices read to like size, by a function that stays the same."""
        read, inputs = torch.zeros(self.dense.hidden_size), torch.zeros(module.weight.shape[1])
        for hidden in row_chunks(self.read_pruned, self.chunk):
            states = module_states(self.dense, kind, module.weights, hidden)
            read = torch.maximum(read, largest_of(states))
            activation = module_activation(self.target, index, kind, module.weights, hidden, self.tables)
            inputs = torch.maximum(inputs, largest_of(activation))
        module.weights, factors = smoothed(self.target, index, kind, module.weights, read, inputs)
        if module.inputs is not None:
            module.inputs /= factors
            module.total = None

    def _round_inputs(self, module: CutModule, scale: torch.Tensor, form: WeightFormat) -> torch.Tensor:
        """Rounds what the output projection reads, as its format does; returns the scale ()."""
        input_scale = input_scale_for(module.inputs / scale, form)
        inputs = rounded_inputs(module.inputs / scale, input_scale, form).mul_(scale)
        if module.lost is not None:
            module.lost += F.linear(module.inputs - inputs, module.weight)
        module.inputs, module.total = inputs, None
        return input_scale

    def _compute_again(self, module: CutModule, index: int, kind: str, scale: torch.Tensor) -> None:
        """Computes the inputs of the output projection after weights before it have changed."""
        module.inputs = module.total = None  # freed before
        inputs = module_inputs(self.target, index, kind, module.weights, self.read_pruned, self.tables, self.chunk)
        module.inputs = inputs.mul_(scale)
        if module.lost is None and self.method.recovery is Recovery.LEAST_SQUARES:
            module.lost = torch.zeros_like(self.pruned)

    def _compensate(
        self,
        module: CutModule,
        kind: str,
        moments: Moments,
        raw: torch.Tensor | None,
        scale: torch.Tensor,
        record: ModuleRecord,
    ) -> ModuleRecord:
        """Updates the output projection of a cut module; returns the record with how good the update is."""
        first = self.dampings.get(kind, FIRST_DAMPING)
        # Nothing here holds the target: it is freed as soon as it is solved for.
        solved = compensate(
            module.weight, moments, module.inputs, module.lost, self._teacher(module, kind, raw).mul_(scale), first
        )
        module.lost = None
        self.dampings[kind] = solved.damping or first
        module.weights[OUTPUT[kind]] = solved.weight
        return replace(
            record,
            damping=solved.damping,
            blend=solved.blend,
            error_before=solved.error_before,
            error_after=solved.error_after,
            fell_back=solved.damping is None and solved.error_before > 0,
        )

    def _teacher(self, module: CutModule, kind: str, raw: torch.Tensor | None) -> torch.Tensor:
        """Returns what the output projection without its bias would have to give (b, t, c); raw: as in `_cut`."""
        teacher = self.whole - self.pruned if raw is None else raw
        return teacher - module.weights[BIAS[kind]] if BIAS[kind] in module.weights else teacher


def with_roundings(record: ModuleRecord, results: Sequence[Quantisation]) -> ModuleRecord:
    """Returns the record with how the module's matrices were rounded."""
    return replace(
        record,
        roundings=tuple(result.rounding for result in results),
        rounding_errors=tuple(result.error for result in results),
    )


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
