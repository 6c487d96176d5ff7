"""The cut of a mixture's experts, each on the tokens that are routed to it."""

import pytest
import torch

from edgeprune.model.decoder import Experts, Mlp
from edgeprune.model.mlp import experts_output
from edgeprune.pruning.experts import cut_experts, expert_inputs
from edgeprune.pruning.score import magnitude, obs, wanda

MLP = Mlp(12, experts=Experts(3, 2))
SIZE = 8  # of the hidden states


def weights(seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = {"mlp.router": (3, SIZE)}
    for expert in range(3):
        shapes |= {f"mlp.experts.{expert}.{name}": (12, SIZE) for name in ("gate", "up")}
        shapes[f"mlp.experts.{expert}.down"] = (SIZE, 12)
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def states(samples: int = 8, tokens: int = 24) -> torch.Tensor:
    return torch.randn(samples, tokens, SIZE, generator=torch.Generator().manual_seed(1))


def cut(own, x, size, score=obs, missing=0.0, scale=None):
    """missing: beside what the dense experts give, in every channel; None: no update."""
    scale = torch.ones(len(x), 1, 1) if scale is None else scale
    missing = None if missing is None else torch.zeros_like(x) + missing
    return cut_experts(x, own, MLP, size, score, missing, scale, torch.Generator().manual_seed(2))


def test_experts_of_full_width_stay_as_they_are_where_nothing_is_missing():
    own, x = weights(), states()
    result = cut(own, x, 12, scale=torch.rand(8, 24, 1) + 0.5)
    assert result.weights.keys() == own.keys()
    assert all(torch.allclose(result.weights[name], own[name], rtol=0, atol=1e-5) for name in own)
    assert torch.allclose(result.output, experts_output(x, own, MLP), rtol=1e-4, atol=1e-4)
    assert result.few == []
    assert all(before < 1e-9 for before, _ in result.errors)


@pytest.mark.parametrize("size", [12, 7])
def test_experts_give_what_is_missing_too(size):
    """All of a token's experts together: the later ones make up for what those before could not give."""
    own, x = weights(), states()
    wish = 0.3 * experts_output(x, weights(seed=5), MLP)
    target = experts_output(x, own, MLP) + wish
    alone, together = cut(own, x, size), cut(own, x, size, missing=wish)
    off = [(result.output - target).square().sum() for result in (alone, together)]
    assert off[1] < 0.75 * off[0]
    if size == 12:  # the first experts aim at all of it; least squares over all at once are the best there is
        assert together.errors[0][0] > together.errors[-1][0] > 0


def test_the_output_is_that_of_the_new_weights_whatever_the_tokens_weigh():
    own, x = weights(), states()
    result = cut(own, x, 7, scale=torch.rand(8, 24, 1) + 0.5)
    narrow = Mlp(7, experts=MLP.experts)
    assert {result.weights[f"mlp.experts.{expert}.down"].shape for expert in range(3)} == {(SIZE, 7)}
    assert torch.allclose(result.output, experts_output(x, result.weights, narrow), rtol=1e-4, atol=1e-4)


def test_the_update_of_each_expert_brings_the_whole_nearer():
    own, x = weights(), states()
    dense = experts_output(x, own, MLP)
    repaired, bare = (cut(own, x, 7, missing=missing) for missing in (0.0, None))
    assert (repaired.output - dense).square().sum() < 0.9 * (bare.output - dense).square().sum()
    assert len(repaired.errors) == 3
    assert all(after < before for before, after in repaired.errors)
    assert bare.errors == []


def test_every_token_reaches_its_likeliest_experts_with_shares_of_one():
    own, x = weights(), states(2, 5)
    shares = torch.zeros(10, 3)
    for inputs in expert_inputs(x, own, MLP, torch.ones(2, 1, 1)):
        assert inputs.inputs.shape == (1, len(inputs.tokens), 12)
        shares[inputs.tokens, inputs.expert] = inputs.shares
    chances = torch.softmax(x.flatten(0, 1) @ own["mlp.router"].T, -1)
    assert torch.equal(shares > 0, chances > chances.min(-1, keepdim=True).values)
    assert torch.allclose(shares.sum(-1), torch.ones(10))


@pytest.mark.parametrize("tokens", [0, 3])
def test_an_expert_that_saw_too_few_tokens_has_no_update(tokens):
    """The last expert is routed to by the first tokens alone; without any, its weights alone decide."""
    own, x = weights(), states(1, 40)
    x[..., 0] = 1.0
    x[0, :tokens, 0] = -1.0
    own["mlp.router"][2] = 0.0
    own["mlp.router"][2, 0] = -1e4
    result = cut(own, x, 7)
    assert result.few == [2]
    assert len(result.errors) == 2
    dense = own["mlp.experts.2.down"]
    columns = result.weights["mlp.experts.2.down"].T
    kept = [j for j in range(12) if any(torch.equal(dense[:, j], column) for column in columns)]
    assert len(kept) == 7
    assert torch.equal(result.weights["mlp.experts.2.up"], own["mlp.experts.2.up"][kept])
    if tokens == 0:
        result = cut(own, x, 7, score=wanda)  # whose scores are all equal without any input
        by_weight = cut(own, x, 7, score=magnitude, missing=None)
        assert torch.equal(result.weights["mlp.experts.2.down"], by_weight.weights["mlp.experts.2.down"])
