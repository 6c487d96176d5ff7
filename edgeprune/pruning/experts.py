"""One width for all experts of a layer: each expert's own channels, and its own update, on the tokens that take it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F

from edgeprune.model.decoder import Mlp
from edgeprune.model.forward import LayerWeights, expert_tokens, mlp_activation, routed
from edgeprune.pruning.compensate import compensate
from edgeprune.pruning.moments import gram
from edgeprune.pruning.score import Projection, Score, magnitude
from edgeprune.pruning.select import top_units


@dataclass
class ExpertsCut:
    """output: (b, t, c), what the cut experts give; weights: their new ones, by name; few: the experts that saw fewer
    tokens than they keep channels, and were left without an update; errors: (before, after) of the others, relative
    to their own dense output, on held-out tokens."""

    output: torch.Tensor
    weights: LayerWeights
    few: list[int] = field(default_factory=list)
    errors: list[tuple[float, float]] = field(default_factory=list)


@dataclass(frozen=True)
class ExpertInputs:
    """Of one expert: the tokens that take it (n,) int64, their shares (n,), and the inputs of its down projection
    (1, n, i), times scale and share."""

    expert: int
    tokens: torch.Tensor
    shares: torch.Tensor
    inputs: torch.Tensor

    @property
    def prefix(self) -> str:
        return f"mlp.experts.{self.expert}."


def expert_inputs(states: torch.Tensor, weights: LayerWeights, mlp: Mlp, scale: torch.Tensor) -> Iterator[ExpertInputs]:
    """Every expert's inputs on normed states (b, t, c); scale: (b, t, 1), square roots of the tokens' weights."""
    flat, scales = states.flatten(0, 1), scale.expand(*states.shape[:2], 1).flatten()
    chosen, shares = routed(flat, weights, mlp.experts)
    for expert in range(mlp.experts.num_experts):
        tokens, places = expert_tokens(chosen, expert)
        own = shares[tokens, places]
        inner = mlp_activation(flat[tokens], weights, mlp, f"mlp.experts.{expert}.")
        yield ExpertInputs(expert, tokens, own, (inner * (own * scales[tokens])[:, None])[None])


def expert_projection(found: ExpertInputs, weights: LayerWeights, generator: torch.Generator) -> Projection:
    return Projection(weights[found.prefix + "down"], gram(found.inputs[0]), found.inputs, generator)


def cut_experts(
    states: torch.Tensor,
    weights: LayerWeights,
    mlp: Mlp,
    size: int,
    score: Score,
    compensates: bool,
    scale: torch.Tensor,
    generator: torch.Generator,
) -> ExpertsCut:
    """Every expert cut to `size` channels by its own scores; an expert that no token takes by its weights alone.

    states: (b, t, c) as the module sees them; scale: (b, t, 1). The update's target is the expert's own dense output
    on the tokens that take it: what the layers before have lost is left to the attentions behind.
    """
    cut = ExpertsCut(torch.zeros_like(states), {"mlp.router": weights["mlp.router"]})
    flat, scales = cut.output.view(-1, states.shape[-1]), scale.expand(*states.shape[:2], 1).flatten()
    for found in expert_inputs(states, weights, mlp, scale):
        projection = expert_projection(found, weights, generator)
        scores = (score if len(found.tokens) else magnitude)(projection, 1, size)
        kept = top_units(scores, size)
        for name in mlp.inputs:
            cut.weights[found.prefix + name] = weights[found.prefix + name][kept]
        down, inputs = projection.weight[:, kept], found.inputs[..., kept]
        if compensates and size < mlp.intermediate_size:
            if len(found.tokens) < size:
                cut.few.append(found.expert)
            else:
                whole = F.linear(found.inputs, projection.weight)
                lost, moments = whole - F.linear(inputs, down), projection.gram[kept[:, None], kept]
                solved = compensate(down, moments, inputs, lost, whole)
                down = solved.weight
                cut.errors.append((solved.error_before, solved.error_after))
        cut.weights[found.prefix + "down"] = down
        flat.index_add_(0, found.tokens, F.linear(inputs[0], down) / scales[found.tokens, None])
    return cut
