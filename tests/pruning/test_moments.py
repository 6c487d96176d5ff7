import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from edgeprune.pruning.moments import gram, split_moments


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10**6), tokens=st.integers(1, 300), chunk=st.integers(1, 400))
def test_gram_is_the_second_moment_whatever_the_chunk(seed, tokens, chunk):
    inputs = torch.randn(tokens, 12, generator=torch.Generator().manual_seed(seed))
    exact = inputs.double().T @ inputs.double()
    ours = gram(inputs, chunk)
    assert (ours - exact).abs().max() <= 1e-5 * exact.abs().max()
    assert torch.equal(ours, ours.T)


def test_held_out_samples_are_disjoint_from_the_others_and_nothing_is_lost():
    inputs = torch.randn(9, 7, 4)
    moments = split_moments(inputs)
    held_out = inputs[[3, 7]].reshape(-1, 4).double()
    assert torch.allclose(moments.held_out, held_out.T @ held_out, rtol=1e-5, atol=1e-6)
    assert torch.allclose(moments.all, gram(inputs.reshape(-1, 4)), rtol=1e-5, atol=1e-5)


def test_a_single_sample_holds_out_its_last_quarter():
    inputs = torch.randn(1, 40, 4)
    last = inputs[0, 30:].double()
    assert torch.allclose(split_moments(inputs).held_out, last.T @ last, rtol=1e-5, atol=1e-6)
