"""The steps of a VQ model on feature maps, each in closed form."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from edgeprune.model.codec.forward import nearest, walk
from edgeprune.model.codec.layers import NORM_EPS, CodecStep

C = 64  # 32 groups of 2


def weights_of(step, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {name: 0.3 * torch.randn(shape, generator=generator) for name, shape in step.shapes().items()}


def image(size=4, channels=C):
    return torch.randn(2, channels, size, size, generator=torch.Generator().manual_seed(9))


def normed(x, weights, name):
    """Each pair of channels over all positions."""
    pairs = x.view(len(x), 32, -1)
    mean, variance = pairs.mean(-1, keepdim=True), pairs.var(-1, keepdim=True, unbiased=False)
    x = ((pairs - mean) / (variance + NORM_EPS).sqrt()).view_as(x)
    return x * weights[f"{name}.weight"][:, None, None] + weights[f"{name}.bias"][:, None, None]


@given(seed=st.integers(0, 10**6), rows=st.integers(1, 6), codes=st.integers(1, 9))
def test_the_nearest_row_is_that_of_the_least_distance(seed, rows, codes):
    generator = torch.Generator().manual_seed(seed)
    given_, table = torch.randn(rows, 4, generator=generator), torch.randn(codes, 4, generator=generator)
    found = nearest(given_, table)
    distances = torch.stack([(table - row).square().sum(1) for row in given_])
    assert torch.allclose(distances[torch.arange(rows), found], distances.min(1).values, atol=1e-5)
    assert nearest(table, table).tolist() == list(range(codes))


def test_attention_mixes_all_positions_of_the_normed_map():
    step = CodecStep("attention", "a", C, C)
    weights, x = weights_of(step), image()
    rows = normed(x, weights, "a.norm").flatten(2).transpose(1, 2)  # (b, positions, c)
    q, k, v = (rows @ weights[f"a.{part}.weight"].flatten(1).T + weights[f"a.{part}.bias"] for part in "qkv")
    mixed = torch.softmax(q @ k.transpose(1, 2) / C**0.5, -1) @ v
    out = mixed @ weights["a.proj_out.weight"].flatten(1).T + weights["a.proj_out.bias"]
    assert torch.allclose(walk([step], weights, x), x + out.transpose(1, 2).reshape(x.shape), atol=1e-4)


@pytest.mark.parametrize("outputs", [C, 32])
def test_a_residual_step_keeps_its_input_or_maps_it_to_other_channels(outputs):
    step = CodecStep("residual", "r", C, outputs)
    weights, x = weights_of(step), image()
    inner = F.conv2d(
        F.silu(normed(x, weights, "r.norm1")), weights["r.conv1.weight"], weights["r.conv1.bias"], padding=1
    )
    inner = F.silu(F.group_norm(inner, 32, weights["r.norm2.weight"], weights["r.norm2.bias"], NORM_EPS))
    inner = F.conv2d(inner, weights["r.conv2.weight"], weights["r.conv2.bias"], padding=1)
    kept = x if outputs == C else F.conv2d(x, weights["r.nin_shortcut.weight"], weights["r.nin_shortcut.bias"])
    assert torch.allclose(walk([step], weights, x), inner + kept, atol=1e-4)


def test_up_and_down_take_neighbours_and_pad_on_the_right_and_below():
    """Kernels that pick one place: what is picked shows where the zeros are."""
    x = torch.arange(1.0, 17).view(1, 1, 4, 4)
    for place, picked in ((0, [[1, 3], [9, 11]]), (2, [[11, 0], [0, 0]])):
        kernel = torch.zeros(1, 1, 3, 3)
        kernel[0, 0, place, place] = 1
        weights = {"d.conv.weight": kernel, "d.conv.bias": torch.zeros(1)}
        assert walk([CodecStep("downsample", "d", 1, 1)], weights, x)[0, 0].tolist() == picked
    kernel = torch.zeros(1, 1, 3, 3)
    kernel[0, 0, 1, 1] = 1
    weights = {"u.conv.weight": kernel, "u.conv.bias": torch.zeros(1)}
    up = walk([CodecStep("upsample", "u", 1, 1)], weights, x)
    assert torch.equal(up, x.repeat_interleave(2, 2).repeat_interleave(2, 3))


def test_steps_are_applied_in_turn_without_a_gradient():
    steps = [CodecStep("activation", "n", C, C), CodecStep("point", "p", C, 3)]
    weights, x = weights_of(steps[0]) | weights_of(steps[1]), image().requires_grad_()
    found = walk(steps, weights, x)
    expected = F.conv2d(F.silu(normed(x, weights, "n")), weights["p.weight"], weights["p.bias"])
    assert torch.allclose(found, expected, atol=1e-5)
    assert not found.requires_grad
