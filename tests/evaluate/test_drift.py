"""Drift: sketches against transformers' own activations, distances against closed forms and brute force."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from edgeprune.evaluate import drift as module
from edgeprune.evaluate.drift import LEAST_SAMPLES, Distance, covering, drift, module_names, sketches
from tests.support.tiny import as_model, llama

MODULES, FEATURES = 3, 10


def drawn(seed: int, count: int, shift: float = 0.0) -> np.ndarray:
    return np.random.default_rng(seed).normal(1 + shift, 0.5, (MODULES, count, FEATURES)).astype(np.float32)


def test_a_sketch_is_the_mean_of_products_of_projected_inputs():
    reference, ids = llama(), torch.randint(0, 101, (3, 20), generator=torch.Generator().manual_seed(1))
    # What transformers' own output projections read, and the residual stream behind their modules.
    inputs: dict[str, torch.Tensor] = {}
    for index, layer in enumerate(reference.model.layers):
        for kind, projection in (("attention", layer.self_attn.o_proj), ("mlp", layer.mlp.down_proj)):
            projection.register_forward_pre_hook(lambda _, x, name=f"{index} {kind}": inputs.update({name: x[0]}))
        layer.post_attention_layernorm.register_forward_pre_hook(
            lambda _, x, name=f"{index} attention stream": inputs.update({name: x[0]})
        )
        layer.register_forward_hook(
            lambda _, __, y, name=f"{index} mlp stream": inputs.update({name: y if torch.is_tensor(y) else y[0]})
        )
    with torch.no_grad():
        reference(ids)
    model = as_model(reference)
    found = sketches(model, ids.numpy())
    names = module_names(model.decoder)
    assert names == [(0, "attention"), (0, "mlp"), (1, "attention"), (1, "mlp")]
    assert found.shape == (4, 3, module.FEATURES)
    for number, (index, kind) in enumerate(names):
        x, stream = inputs[f"{index} {kind}"], inputs[f"{index} {kind} stream"]
        projected = (x / stream.norm(dim=-1, keepdim=True)) @ module._signs(x.shape[-1], number)
        moments = (projected.mT @ projected / ids.shape[1]).numpy()  # (3, p, p)
        products = np.einsum("apq,bpq->ab", moments, moments)
        assert found[number] @ found[number].T == pytest.approx(products, rel=1e-4)


def test_signs_are_the_same_everywhere_and_their_products_the_identity_on_average():
    signs = module._signs(4000, 7)
    assert torch.equal(signs, module._signs(4000, 7))
    assert not torch.equal(signs, module._signs(4000, 8))
    assert (signs[:3, :4] > 0).tolist() == [  # of numpy's PCG64(7), bits from the lowest
        [bool(np.random.PCG64(7).random_raw() >> (16 * row + column) & 1) for column in range(4)] for row in range(3)
    ]
    assert (signs.T @ signs * module.PROJECTED / 4000).numpy() == pytest.approx(np.eye(module.PROJECTED), abs=0.1)


def test_the_distance_is_that_of_the_means_without_bias():
    old, new = drawn(0, 6), drawn(1, 5, shift=1.0)
    squared = []
    for a, b in zip(old.astype(float), new.astype(float), strict=True):

        def within(x: np.ndarray) -> float:
            return np.mean([x[i] @ x[j] for i in range(len(x)) for j in range(len(x)) if i != j])

        length = a.mean(axis=0) @ a.mean(axis=0)
        squared.append((within(a) + within(b) - 2 * np.mean(a @ b.T)) / length)
    found = drift(old, new, seed=0)
    assert found.whole.value == pytest.approx(np.sqrt(np.mean(squared)))
    assert [of.value for of in found.modules] == pytest.approx(np.sqrt(np.maximum(squared, 0)))


def test_a_large_set_of_another_mean_is_as_far_as_the_means():
    old, new = drawn(0, 400), drawn(1, 300, shift=0.5)
    assert drift(old, new, seed=0, splits=50).whole.value == pytest.approx(0.5, rel=0.03)


def test_texts_of_the_same_kind_stay_inside_and_others_do_not():
    inside = sum(not drift(drawn(2 * s, 16), drawn(2 * s + 1, 8), 0, splits=200).whole.is_drift for s in range(60))
    assert inside >= 51  # 57 of 60 at 95 %; fewer than 51 once in 300
    outside = [drift(drawn(2 * s, 16), drawn(2 * s + 1, 8, 0.3), 0, splits=200).whole for s in range(20)]
    assert all(of.is_drift and of.p < 0.02 for of in outside)


@given(st.integers(LEAST_SAMPLES, 12), st.integers(LEAST_SAMPLES, 12), st.integers(0, 1000))
@settings(max_examples=25, deadline=None)
def test_it_depends_on_neither_the_order_of_samples_nor_their_scale(count: int, new: int, seed: int) -> None:
    old, others = drawn(seed, count), drawn(seed + 1, new, 0.2)
    order = np.random.default_rng(seed).permutation(new)
    first, second = drift(old, others, 0, splits=20), drift(4 * old, 4 * others[:, order], 0, splits=20)
    assert first.whole.value == pytest.approx(second.whole.value, abs=1e-6)
    assert first.samples[order] == pytest.approx(second.samples, abs=1e-6)
    assert drift(old, others, 0, splits=20).whole == first.whole
    assert 0 < first.whole.p <= 1


def test_each_sample_is_as_far_as_it_is():
    old, new = drawn(0, 8), drawn(1, 5, 1.0)
    relative = [
        ((b - a.mean(axis=0)) ** 2).sum(axis=1) / (a.mean(axis=0) ** 2).sum() for a, b in zip(old, new, strict=True)
    ]
    assert drift(old, new, 0, splits=20).samples == pytest.approx(np.sqrt(np.mean(relative, axis=0)), rel=1e-5)


def test_the_first_samples_stand_for_all_better_than_others():
    samples = drawn(3, 24)[0]
    order = covering(samples @ samples.T)
    assert sorted(order) == list(range(24))

    def error(count: int, of: tuple[int, ...] | np.ndarray) -> float:
        return float(np.linalg.norm(samples[list(of[:count])].mean(axis=0) - samples.mean(axis=0)))

    random = np.mean([error(6, np.random.default_rng(s).permutation(24)) for s in range(50)])
    assert error(6, order) < 0.7 * random
    best = min(range(24), key=lambda i: np.linalg.norm(samples[i] - samples.mean(axis=0)))
    assert order[0] == best
    assert all(error(k, order) >= 0 for k, _ in pairwise(range(1, 25)))


def test_a_distance_at_the_limit_is_no_drift():
    assert not Distance(0.1, 0.1, 0.05).is_drift
    assert Distance(0.11, 0.1, 0.04).is_drift
