"""The block-by-block walk: moments -> score -> select -> cut -> compensate.

Each module's inputs are computed once, on the stream of the already pruned blocks before it.
Neither the selection nor the compensation changes the inputs of a module's own output projection,
so that its pruned output is the kept columns of those inputs times the new weights: no second pass.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from edgeprune.errors import InputError
from edgeprune.model.decoder import Attention, Decoder
from edgeprune.model.forward import OUTPUT, embed, layer_weights, module_inputs, modules_of, rotary_tables
from edgeprune.model.model import Model
from edgeprune.pruning import score
from edgeprune.pruning.compensate import Compensation, compensate
from edgeprune.pruning.moments import split_moments
from edgeprune.pruning.score import Score


@dataclass(frozen=True)
class Method:
    """How units are ranked, and whether the kept weights take over what the removed ones gave."""

    score: Score
    compensates: bool


METHODS = {
    "default": Method(score.numerical, compensates=True),
    "magnitude": Method(score.magnitude, compensates=False),
    "random": Method(score.random, compensates=False),
}


@dataclass(frozen=True)
class ModuleRecord:
    """What happened to one module. Errors are relative, on held-out calibration samples."""

    layer: int
    kind: str
    kept: int
    of: int
    damping: float | None
    error_before: float
    error_after: float
    fell_back: bool


def method_named(name: str) -> Method:
    """Raises InputError with the known names."""
    if name not in METHODS:
        raise InputError(f"unknown method {name!r}", f"Methods are: {', '.join(METHODS)}.")
    return METHODS[name]


def top_units(scores: torch.Tensor, count: int) -> torch.Tensor:
    """Sorted indices of the `count` largest scores; of equal ones the first."""
    return torch.sort(scores, descending=True, stable=True).indices[:count].sort().values


def select_heads(
    rank: Callable[[int], torch.Tensor], dense: Attention, groups: int, heads_per_group: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Whole key/value groups first, then the same number of query heads in every kept group.

    rank(unit) scores the units of that many features. Returns the kept groups and the kept query
    heads, sorted; query head j of the result reads group j // heads_per_group of the result.
    """
    kept_groups = torch.arange(dense.num_key_value_heads)
    if groups < dense.num_key_value_heads:
        kept_groups = top_units(rank(dense.heads_per_group * dense.head_dim), groups)
    within = torch.arange(dense.heads_per_group).expand(dense.num_key_value_heads, -1)
    if heads_per_group < dense.heads_per_group:
        by_group = rank(dense.head_dim).view(dense.num_key_value_heads, dense.heads_per_group)
        within = torch.stack([top_units(row, heads_per_group) for row in by_group])
    heads = kept_groups[:, None] * dense.heads_per_group + within[kept_groups]
    return kept_groups, heads.flatten()


def features_of(units: torch.Tensor, unit: int) -> torch.Tensor:
    """Indices of all features of the given units of `unit` adjacent features each."""
    return (units[:, None] * unit + torch.arange(unit)).flatten()


def kept_rows(
    dense: Decoder, target: Decoder, index: int, kind: str, rank: Callable[[int], torch.Tensor]
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Kept input features of the output projection, and kept rows of every projection before it."""
    if kind == "mlp":
        channels = top_units(rank(1), target.layers[index].mlp.intermediate_size)
        return channels, {"mlp.gate": channels, "mlp.up": channels}
    old, new = dense.layers[index].attention, target.layers[index].attention
    groups, heads = select_heads(rank, old, new.num_key_value_heads, new.heads_per_group)
    queries, keys = features_of(heads, old.head_dim), features_of(groups, old.head_dim)
    return queries, {"attention.q": queries, "attention.k": keys, "attention.v": keys}


def prune_module(
    weights: dict[str, torch.Tensor],
    inputs: torch.Tensor,
    dense: Decoder,
    target: Decoder,
    index: int,
    kind: str,
    method: Method,
    generator: torch.Generator,
) -> tuple[dict[str, torch.Tensor], torch.Tensor, ModuleRecord]:
    """One module: its new weights, its output on the samples (b, t, c), and what was done."""
    output = OUTPUT[kind]
    weight = weights[output]
    kept_size = target.layer_shapes(index)[f"layers.{index}.{output}"][1]
    if kept_size == weight.shape[1]:
        names = [name for name in weights if name.startswith(kind)]
        record = ModuleRecord(index, kind, kept_size, kept_size, None, 0.0, 0.0, fell_back=False)
        return {name: weights[name] for name in names}, F.linear(inputs, weight), record
    moments = split_moments(inputs)
    kept, rows = kept_rows(dense, target, index, kind, lambda unit: method.score(weight, moments.all, unit, generator))
    if method.compensates:
        solved = compensate(weight, moments, kept)
    else:
        solved = Compensation(weight[:, kept], None, float("nan"), float("nan"))
    new = {name: weights[name][index_] for name, index_ in rows.items()}
    new |= {f"{kind}.norm": weights[f"{kind}.norm"], output: solved.weight}
    record = ModuleRecord(
        index,
        kind,
        kept_size,
        weight.shape[1],
        solved.damping,
        solved.error_before,
        solved.error_after,
        fell_back=method.compensates and solved.damping is None,
    )
    return new, F.linear(inputs[..., kept], solved.weight), record


@torch.inference_mode()
def prune(
    model: Model,
    target: Decoder,
    ids: torch.Tensor,
    method: Method,
    seed: int,
    on_module: Callable[[ModuleRecord], None] = lambda record: None,
    rows: int = 8,
) -> Iterator[tuple[str, torch.Tensor]]:
    """The weights of `target`, in the order of target.shapes(), fp32 where they were changed.

    model: the dense model; ids: (samples, tokens) int64 calibration samples. One layer's weights
    and the samples' hidden states are held at a time. Raises NumericalError naming the layer
    whose activations are not finite.
    """
    dense = model.decoder
    generator = torch.Generator().manual_seed(seed)
    tables = rotary_tables(dense, ids.shape[1])
    hidden = embed(model, ids)
    yield "embedding", model.weights["embedding"]
    for index in range(len(dense.layers)):
        weights = layer_weights(model, index)
        new: dict[str, torch.Tensor] = {}
        for kind in modules_of(dense, index):
            inputs = module_inputs(dense, index, kind, weights, hidden, tables, rows)
            module, output, record = prune_module(weights, inputs, dense, target, index, kind, method, generator)
            new |= module
            hidden += output
            on_module(record)
        prefix = f"layers.{index}."
        for name in target.layer_shapes(index):
            yield name, new[name.removeprefix(prefix)]
    yield "norm", model.weights["norm"]
    if not dense.tie_word_embeddings:
        yield "head", model.weights["head"]
