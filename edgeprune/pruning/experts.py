"""The cut of a layer's experts to one width: each expert's own channels and own update, on the tokens routed to it.

It does not know the residual streams of the walk, nor the layers before.
Shapes: b samples, t tokens, c hidden_size, i intermediate_size of an expert, n tokens that are routed to it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F

from edgeprune.model.attention import LayerWeights
from edgeprune.model.decoder import Mlp
from edgeprune.model.mlp import expert_tokens, mlp_activation, routed
from edgeprune.precision import WeightFormat
from edgeprune.pruning.compensate import compensate
from edgeprune.pruning.moments import gram, moments_of
from edgeprune.pruning.quantize import Quantisation
from edgeprune.pruning.rounding import round_on, round_together
from edgeprune.pruning.score import Projection, Score, magnitude
from edgeprune.pruning.select import top_units


@dataclass
class ExpertsCut:
    """The experts of a layer after their cut.

    output: (b, t, c), the output of all cut experts together; weights: the new weights by name; few: the experts to
    which fewer tokens are routed than they keep channels, and which have no update for that; errors: (before, after)
    of the others, relative to what they aim at, on held-out tokens; roundings: of each expert's matrices before the
    activation and of its output projection, where they are rounded.
    """

    output: torch.Tensor
    weights: LayerWeights
    few: list[int] = field(default_factory=list)
    errors: list[tuple[float, float]] = field(default_factory=list)
    roundings: list[Quantisation] = field(default_factory=list)


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
    missing: torch.Tensor | None,
    scale: torch.Tensor,
    generator: torch.Generator,
    form: WeightFormat | None = None,
) -> ExpertsCut:
    """Cuts every expert to `size` channels by its own scores; one to which no token is routed, by its weights alone.

    states: (b, t, c), the states that the module reads, normed; missing: (b, t, c), what the uncut experts would have
    to give beside their output, consumed; None: no updates; scale: (b, t, 1), square roots of the tokens' weights;
    form: of all matrices but the router, None for floats. Every expert aims at its own dense output and all that is
    still missing of its tokens, the errors of the experts before it among that.
    """
    router = {name: weight for name, weight in weights.items() if name.startswith("mlp.router")}
    cut = ExpertsCut(torch.zeros_like(states), router)
    read, missing = states.flatten(0, 1), None if missing is None else missing.flatten(0, 1)  # (b * t, c) each
    # (b * t, c), (b * t,)
    flat, scales = cut.output.view(-1, states.shape[-1]), scale.expand(*states.shape[:2], 1).flatten()
    for expert in expert_inputs(states, weights, mlp, scale):
        tokens, own_scale = expert.tokens, scales[expert.tokens, None]  # (n,), (n, 1)
        # Select the channels, and cut the rows and columns of the weights.
        projection = expert_projection(expert, weights, generator)
        kept = torch.arange(size)
        if size < mlp.intermediate_size:
            kept = top_units((score if len(tokens) else magnitude)(projection, 1, size), size)
        names = [expert.prefix + name for name in mlp.inputs]
        new = {name: weights[name][kept] for name in (*names, *(f"{name}_bias" for name in names)) if name in weights}
        bias = weights.get(f"{expert.prefix}down_bias")
        down, inputs = projection.weight[:, kept], expert.inputs[..., kept]  # (c, size), (1, n, size)
        # Round the matrices before the activation on the expert's tokens, and compute what comes behind again.
        if form is not None:
            rounded, result = round_together(new, names, read[tokens][None], torch.ones(1), form)
            values = new | {name: weight.dequantised() for name, weight in rounded.items()}
            inner = mlp_activation(read[tokens], values, mlp, expert.prefix)  # (n, size)
            inputs = (inner * expert.shares[:, None] * own_scale)[None]
            cut.roundings.append(result)
        cut.weights |= new | rounded if form is not None else new
        # Update the down projection, where the expert has tokens enough.
        moments = None
        if missing is not None or form is not None:
            moments = moments_of(inputs, None if form is not None else projection.gram[kept[:, None], kept])
        if missing is not None:
            own = F.linear(expert.inputs, projection.weight)  # (1, n, c), of the dense expert
            if len(tokens) < size:
                cut.few.append(expert.expert)
            else:
                target = own + missing[tokens] * own_scale
                solved = compensate(down, moments, inputs, own - F.linear(inputs, down), target)
                down = solved.weight
                cut.errors.append((solved.error_before, solved.error_after))
        cut.weights[expert.prefix + "down"] = down
        if form is not None:
            result = round_on(down, moments, form)
            cut.weights[expert.prefix + "down"], down = result.weight, result.weight.dequantised()
            cut.roundings.append(result)
        # Add the expert's output to that of its tokens; its bias is that of the dense expert.
        output = F.linear(inputs[0], down)  # (n, c)
        flat.index_add_(0, tokens, output / own_scale)
        if bias is not None:
            cut.weights[f"{expert.prefix}down_bias"] = bias
            flat.index_add_(0, tokens, expert.shares[:, None] * bias)
        if missing is not None:
            missing.index_add_(0, tokens, (own[0] - output) / own_scale)
    return cut
