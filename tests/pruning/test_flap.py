"""FLAP against its authors' formulas, written again from github.com/CASIA-IVA-Lab/FLAP on modules of transformers."""

from __future__ import annotations

import functools

import pytest
import torch

from edgeprune.model.forward import token_logits
from edgeprune.pruning.methods import METHODS
from edgeprune.pruning.prune import prune, result_of
from edgeprune.search.sensitivity import measure_scores
from edgeprune.search.widths import dense_widths, layer_parameters, standardised_cut
from tests.support.tiny import as_model, llama

HEAD, CHANNEL = 8 * 3, 1  # features of a group of query heads, and of a channel
FLAP = METHODS["flap"]


def ids(samples: int = 8, seed: int = 1) -> torch.Tensor:
    return torch.randint(0, 101, (samples, 24), generator=torch.Generator().manual_seed(seed))


class BiasGPT:
    """lib/layerwrapper.py: mean and fluctuation of what a projection reads, a sample at a time."""

    def __init__(self) -> None:
        self.nsamples, self.baseline_inp, self.fluc_inp = 0, 0.0, 0.0

    def add_batch(self, inp: torch.Tensor) -> None:
        inp = inp.double().flatten(0, 1).T  # (features, tokens)
        self.baseline_inp = self.baseline_inp * (self.nsamples / (self.nsamples + 1))
        self.baseline_inp = self.baseline_inp + inp.mean(dim=1) / (self.nsamples + 1)
        if self.nsamples > 0:
            # Their `old_baseline_inp` is the same tensor, changed in place: both factors subtract the new mean.
            self.fluc_inp = self.fluc_inp * ((self.nsamples - 1) / self.nsamples)
            centred = inp - self.baseline_inp[:, None]
            self.fluc_inp = self.fluc_inp + (centred * centred).sum(dim=1) / (self.nsamples + 1)
        self.nsamples += 1


@torch.no_grad()
def metrics(reference, samples):
    """lib/prune.py, WIFV with AL-AM: by kind the standardised metrics (layers, units), and the means (layers, features)
    on the dense model."""
    wrapped, handles = {}, []
    for index, layer in enumerate(reference.model.layers):
        for kind, module in (("attention", layer.self_attn.o_proj), ("mlp", layer.mlp.down_proj)):
            wrapped[kind, index] = (BiasGPT(), module)
            add = wrapped[kind, index][0].add_batch
            handles.append(module.register_forward_hook(lambda _, given, out, add=add: add(given[0])))
    for sample in samples:
        reference(sample[None])
    for handle in handles:
        handle.remove()
    scores, means = {}, {}
    for kind, unit, power in (("attention", HEAD, 2), ("mlp", CHANNEL, 1)):
        own = [wrapped[kind, index] for index in range(len(reference.model.layers))]
        metric = torch.stack([w.fluc_inp * module.weight.double().pow(2).sum(dim=0) for w, module in own]) ** power
        metric = (metric - metric.mean(dim=1, keepdim=True)) / metric.std(dim=1, keepdim=True)
        scores[kind] = metric.view(len(own), -1, unit).mean(dim=2)
        means[kind] = torch.stack([w.baseline_inp for w, _ in own])
    return scores, means


@torch.no_grad()
def compressed_logits(seed, masks, means, rows, **changes):
    """The dense model with its output projections masked, and their biases."""
    model = llama(seed, **changes)
    for index, layer in enumerate(model.model.layers):
        for kind, module, unit in (("attention", layer.self_attn.o_proj, HEAD), ("mlp", layer.mlp.down_proj, CHANNEL)):
            mask = masks[kind][index].repeat_interleave(unit)
            module.bias = torch.nn.Parameter(((means[kind][index] * ~mask) @ module.weight.double().T).float())
            module.weight *= mask
    return model(rows).logits[:, :-1]


def kept_of(scores: torch.Tensor, counts: list[int]) -> torch.Tensor:
    """A mask (layers, units) of so many of the highest scores in each layer."""
    ranks = scores.argsort(dim=1, descending=True).argsort(dim=1)
    return ranks < torch.tensor(counts)[:, None]


@pytest.mark.parametrize("widths", [[(1, 40), (2, 20), (1, 64)], [(2, 33), (1, 33), (2, 7)]])
def test_the_model_is_the_one_that_their_formulas_give(widths):
    """Their scores and means are those of the dense model, whatever was cut before."""
    reference = llama(3, num_hidden_layers=3)
    model = as_model(reference)
    target = model.decoder.with_layer_widths([(groups, 3, channels) for groups, channels in widths])
    weights = prune(model, target, ids(), FLAP, 0)
    obtained = token_logits(result_of(target, FLAP), weights, ids(seed=2))
    scores, means = metrics(reference, ids())
    masks = {
        "attention": kept_of(scores["attention"], [groups for groups, _ in widths]),
        "mlp": kept_of(scores["mlp"], [channels for _, channels in widths]),
    }
    expected = compressed_logits(3, masks, means, ids(seed=2), num_hidden_layers=3)
    assert torch.allclose(obtained, expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max()))


@pytest.mark.parametrize("removed", [0.2, 0.5])
def test_one_cut_over_all_layers_is_theirs(removed):
    """Their threshold is the nearest to a share of the parameters, ours the last one within it: one unit apart."""
    reference = llama(4, num_hidden_layers=4, num_attention_heads=12, num_key_value_heads=4, intermediate_size=96)
    model = as_model(reference)
    full, cost = dense_widths(model.decoder), functools.partial(layer_parameters, model.decoder)
    capacity = int(model.decoder.layer_parameters * (1 - removed))
    widths = standardised_cut(*measure_scores(model, ids(), FLAP.score, 0), full, cost, capacity)
    scores, _ = metrics(reference, ids())
    # lib/prune.py, with the parameters of a unit in place of those of LLaMA's heads.
    price = torch.cat(
        [torch.full_like(scores[kind], value).flatten() for kind, value in (("attention", 2 * 4 * 8), ("mlp", 3))]
    )
    ranked = torch.cat([scores["attention"].flatten(), scores["mlp"].flatten()]).sort(descending=True)
    spent = price[ranked.indices].cumsum(0)
    threshold = ranked.values[(spent - price.sum() * (1 - removed)).abs().argmin()]
    groups, channels = ((scores[kind] > threshold).sum(dim=1).tolist() for kind in ("attention", "mlp"))
    differing = sum(abs(a - w[0]) for a, w in zip(groups, widths, strict=True))
    differing += sum(abs(a - w[2]) for a, w in zip(channels, widths, strict=True))
    assert differing <= 2
