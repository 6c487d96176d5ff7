"""The steps of a VQ model and the shapes of its tensors."""

from __future__ import annotations

from math import prod

import pytest
import torch

from edgeprune.model.codec.layers import VqLayout
from tests.support.vq import VqModel

VQ8 = VqLayout(widths=(128, 256, 256, 512))


@pytest.mark.parametrize(
    ("layout", "multipliers", "total", "decoding", "tensors"),
    [(VqLayout(), (1, 1, 2, 2, 4), 71_883_403, 42_449_795, 194), (VQ8, (1, 2, 2, 4), 70_109_835, 41_415_171, 168)],
)
def test_the_published_codecs_have_their_parameters_and_names(layout, multipliers, total, decoding, tensors):
    shapes = layout.shapes()
    decoder = {name: shape for name, shape in shapes.items() if name.startswith("decoder.")}
    assert sum(map(prod, shapes.values())) == total
    assert (sum(map(prod, decoder.values())), len(decoder)) == (decoding, tensors)
    with torch.device("meta"):
        named = {name: tuple(tensor.shape) for name, tensor in VqModel(multipliers=multipliers).state_dict().items()}
    assert named.pop("quantize.codebook_used") == (65536,)
    assert named == shapes
    assert layout.shapes(encoder=False).keys() == {
        name for name in named if not name.startswith(("encoder.", "quant_conv."))
    }
