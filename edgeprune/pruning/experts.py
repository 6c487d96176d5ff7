"""The cut of a layer's experts to one width: each expert's own channels and own update, on the tokens routed to it.

It does not know the residual streams of the walk, nor the layers before.
Shapes: b samples, t tokens, c hidden_size, i intermediate_size of an expert, n tokens that are routed to it.
"""

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
    """The experts of a layer after their cut.

    output: (b, t, c), the output of all cut experts together; weights: the new weights by name; few: the experts to
    which fewer tokens are routed than they keep channels, and which have no update for that; errors: (before, after)
    of the others, relative to their own dense output, on held-out tokens.
    """

    output: torch.Tensor
    weights: LayerWeights
    few: list[int] = field(default_factory=list)
    errors: list[tuple[float, float]] = field(default_factory=list)


@dataclass(frozen=True)
class ExpertInputs:
    """The tokens of one expert.

    tokens: (n,) int64, the indices of the tokens that are routed to it, among b * t; shares: (n,), the expert's share
    in the output of each; inputs: (1, n, i), the inputs of its down projection, times scale and share.
    """

    expert: int
    tokens: torch.Tensor
    shares: torch.Tensor
    inputs: torch.Tensor

    @property
    def prefix(self) -> str:
        """Returns the beginning of the names of the expert's weights."""
        return f"mlp.experts.{self.expert}."


def expert_inputs(states: torch.Tensor, weights: LayerWeights, mlp: Mlp, scale: torch.Tensor) -> Iterator[ExpertInputs]:
    """Yields the inputs of every expert.

    states: (b, t, c), normed; scale: (b, t, 1), square roots of the tokens' weights.
    """
    flat, scales = states.flatten(0, 1), scale.expand(*states.shape[:2], 1).flatten()  # (b * t, c), (b * t,)
    chosen, shares = routed(flat, weights, mlp.experts)  # (b * t, experts of a token) each
    for expert in range(mlp.experts.num_experts):
        tokens, places = expert_tokens(chosen, expert)
        own = shares[tokens, places]
        # (n, i)
        inner = mlp_activation(flat[tokens], weights, mlp, f"mlp.experts.{expert}.")
        yield ExpertInputs(expert, tokens, own, (inner * (own * scales[tokens])[:, None])[None])


def expert_projection(expert: ExpertInputs, weights: LayerWeights, generator: torch.Generator) -> Projection:
    """Returns the down projection of an expert with its inputs, as scores and compensation take it."""
    return Projection(weights[expert.prefix + "down"], gram(expert.inputs[0]), expert.inputs, generator)


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
    """Cuts every expert to `size` channels by its own scores; one to which no token is routed, by its weights alone.

    states: (b, t, c), the states that the module reads, normed; scale: (b, t, 1), square roots of the tokens'
    weights. The target of an update is the expert's own dense output on its tokens: the attentions behind make up for
    what the layers before have lost.
    """
    cut = ExpertsCut(torch.zeros_like(states), {"mlp.router": weights["mlp.router"]})
    # (b * t, c), (b * t,)
    flat, scales = cut.output.view(-1, states.shape[-1]), scale.expand(*states.shape[:2], 1).flatten()
    for expert in expert_inputs(states, weights, mlp, scale):
        # Select the channels, and cut the rows and columns of the weights.
        projection = expert_projection(expert, weights, generator)
        scores = (score if len(expert.tokens) else magnitude)(projection, 1, size)
        kept = top_units(scores, size)
        for name in mlp.inputs:
            cut.weights[expert.prefix + name] = weights[expert.prefix + name][kept]
        down, inputs = projection.weight[:, kept], expert.inputs[..., kept]  # (c, size), (1, n, size)
        # Update the down projection, where the expert has tokens enough.
        if compensates and size < mlp.intermediate_size:
            if len(expert.tokens) < size:
                cut.few.append(expert.expert)
            else:
                whole = F.linear(expert.inputs, projection.weight)  # (1, n, c)
                lost, moments = whole - F.linear(inputs, down), projection.gram[kept[:, None], kept]
                solved = compensate(down, moments, inputs, lost, whole)
                down = solved.weight
                cut.errors.append((solved.error_before, solved.error_after))
        cut.weights[expert.prefix + "down"] = down
        # Add the expert's output to that of its tokens.
        flat.index_add_(0, expert.tokens, F.linear(inputs[0], down) / scales[expert.tokens, None])
    return cut
