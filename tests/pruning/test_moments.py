import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from edgeprune.pruning.moments import evened, gram, held_out_rows, moments_of


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10**6), tokens=st.integers(1, 300), chunk=st.integers(1, 400))
def test_gram_is_the_second_moment_whatever_the_chunk(seed, tokens, chunk):
    inputs = torch.randn(tokens, 12, generator=torch.Generator().manual_seed(seed))
    exact = inputs.double().T @ inputs.double()
    ours = gram(inputs, chunk)
    assert (ours - exact).abs().max() <= 1e-5 * exact.abs().max()
    assert torch.equal(ours, ours.T)


def test_every_fourth_sample_is_held_out():
    held = held_out_rows(9, 7).view(9, 7)
    assert [sample for sample in range(9) if held[sample].all()] == [3, 7]
    assert int(held.sum()) == 14


def test_of_fewer_than_four_samples_the_last_quarter_of_each_is_held_out():
    for samples in (1, 3):
        held = held_out_rows(samples, 40).view(samples, 40)
        assert held[:, 30:].all()
        assert not held[:, :30].any()


def test_moments_of_all_and_of_the_held_out_tokens():
    inputs = torch.randn(9, 7, 12, generator=torch.Generator().manual_seed(0))
    rows, held = inputs.flatten(0, 1).double(), held_out_rows(9, 7)
    found = moments_of(inputs)
    assert found.tokens == 63
    assert torch.allclose(found.all, rows.T @ rows, rtol=1e-5, atol=1e-4)
    assert torch.allclose(found.held_out, (rows[held].T @ rows[held]).float(), rtol=1e-5, atol=1e-4)
    total = rows.T @ rows
    known = moments_of(inputs, total)
    assert known.all is total
    assert torch.equal(known.held_out, found.held_out)


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10**6), samples=st.integers(1, 9), first=st.sampled_from([1.0, 3.0, 256.0]))
def test_evened_moments_are_those_in_which_no_token_counts_more(seed, samples, first):
    inputs = torch.randn(samples, 7, 5, generator=torch.Generator().manual_seed(seed))
    weighed = inputs.clone()
    weighed[:, 0] *= first**0.5
    found, expected = evened(moments_of(weighed), weighed, first), moments_of(inputs)
    assert found.tokens == expected.tokens
    assert torch.allclose(found.all, expected.all, rtol=1e-5, atol=2e-3)
    assert torch.allclose(found.held_out, expected.held_out, rtol=1e-4, atol=2e-3)
