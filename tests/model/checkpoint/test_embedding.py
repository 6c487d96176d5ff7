"""The codes of an embedding, from its values and its scales alone."""

import pytest
import torch

from edgeprune.model.checkpoint.embedding import EMBEDDING_SCALES, codes_of, scale_parts, with_embedding_values
from tests.support.quantised import PACKED_FORMATS, random_codes


@pytest.mark.parametrize("form", PACKED_FORMATS.values(), ids=PACKED_FORMATS)
def test_codes_follow_from_values_and_scales(tmp_path, form):
    from safetensors.torch import load

    weight = random_codes(form, 300, 256)
    weight.codes[0], weight.codes[1] = form.least, 0
    weight.scales[2], weight.scales[3] = 2.0**-24, 60000.0
    others = [("positions", torch.zeros(3)), ("head", random_codes(form, 3, 256))]
    stream = dict(with_embedding_values([("embedding", weight), *others], tmp_path))
    assert torch.equal(stream["embedding"], weight.dequantised())
    assert all(stream[name] is other for name, other in others)
    parts = load((tmp_path / EMBEDDING_SCALES).read_bytes())
    assert parts.keys() == scale_parts(form).keys()
    found = codes_of(form, stream["embedding"], **parts)
    assert torch.equal(found.codes, weight.codes)
    assert found.codes.dtype == torch.int8
    assert torch.equal(found.scales, weight.scales)
    assert weight.zeros is None or torch.equal(found.zeros, weight.zeros)


def test_an_embedding_of_floats_needs_no_file(tmp_path):
    table = torch.randn(5, 32)
    assert dict(with_embedding_values([("embedding", table)], tmp_path))["embedding"] is table
    assert not list(tmp_path.iterdir())
