"""Codes in words of 32 bits, as compressed-tensors packs them."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from edgeprune.model.checkpoint.packed import pack, packed_parts, unpack, unpacked
from edgeprune.model.checkpoint.places import Place, StoredTensor
from edgeprune.model.checkpoint.quantization import STORED_AS
from tests.support.quantised import FLOAT_FORMATS, PACKED_FORMATS, WITHOUT, random_codes

QKV = ("layers.0.attention.q", "layers.0.attention.k", "layers.0.attention.v")


@given(bits=st.sampled_from([4, 8]), rows=st.integers(1, 5), columns=st.integers(1, 40), seed=st.integers(0, 9))
def test_codes_are_unpacked_as_they_were(bits, rows, columns, seed):
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(-(2 ** (bits - 1)), 2 ** (bits - 1), (rows, columns), generator=generator).to(torch.int8)
    words = pack(codes, bits)
    assert words.shape == (rows, -(-columns * bits // 32))
    assert torch.equal(unpack(words, bits, columns), codes)


STORED_FORMATS = PACKED_FORMATS | FLOAT_FORMATS


@pytest.mark.parametrize("form", STORED_FORMATS.values(), ids=STORED_FORMATS)
def test_compressed_tensors_reads_the_parts_as_the_same_weight(form):
    """Its own compressor, on 13 rows, which fill no word of zeros."""
    pytest.importorskip("compressed_tensors", reason=WITHOUT)
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    weight = random_codes(form, 13, 128)
    strategy = "tensor_group" if form.e4m3_scales else "group" if form.group else "channel"
    arguments = QuantizationArgs(
        num_bits=form.bits,
        type="int" if form.levels == "whole" else "float",
        symmetric=form.offset is None,
        strategy=strategy,
        group_size=form.group,
    )
    scheme = QuantizationScheme(targets=["Linear"], weights=arguments)
    compressor = BaseCompressor.get_value_from_registry(STORED_AS[form.levels])
    theirs = compressor.decompress(packed_parts(weight, torch.float32), scheme)
    assert torch.equal(theirs["weight"], weight.dequantised())


@given(form=st.sampled_from(list(STORED_FORMATS.values())), by_head=st.booleans(), neighbours=st.booleans())
def test_stacked_codes_are_read_back_whatever_the_order_of_their_rows(form, by_head, neighbours):
    sizes = (3, 3, 3) if by_head else (3, 1, 1)
    weights = {name: random_codes(form, 4 * sizes[index], 128, index) for index, name in enumerate(QKV)}
    place = Place("x.weight", QKV, by_head=by_head, neighbours=neighbours)
    shapes = tuple(tuple(weight.shape) for weight in weights.values())
    tensor = StoredTensor("x.weight", place, QKV, shapes, head_dim=4, form=form)
    parts = packed_parts(tensor.write(weights), torch.bfloat16)
    for name, weight in weights.items():
        found = unpacked(tensor, parts.__getitem__, name)
        assert torch.equal(found.codes, weight.codes)
        assert torch.equal(found.scales, weight.scales)
        assert found.scale_unit == weight.scale_unit
        assert (form.offset is not None) is (found.zeros is not None)
        assert weight.zeros is None or torch.equal(found.zeros, weight.zeros)
