"""Places of weights in a checkpoint: whatever is stored together, turned or shifted is read back."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from edgeprune.model.checkpoint.places import Place, StoredTensor, stored_stream, stored_tensors
from edgeprune.model.decoder import Decoder, Layer, Mlp, Picture
from edgeprune.model.quantised import QuantisedWeight
from tests.support.quantised import PACKED_FORMATS
from tests.support.shapes import uniform

QKV = ("layers.0.attention.q", "layers.0.attention.k", "layers.0.attention.v")


@given(
    heads=st.integers(1, 3),
    by_head=st.booleans(),
    transposed=st.booleans(),
    neighbours=st.booleans(),
    shift=st.sampled_from([0.0, 1.0]),
    skip=st.sampled_from([0, 2]),
    factor=st.sampled_from([1.0, 0.5]),
)
def test_what_is_written_is_read_back(heads, by_head, transposed, neighbours, shift, skip, factor):
    skip = 0 if by_head else skip
    sizes = (heads, heads, heads) if by_head else (heads, 1, 1)
    shapes = tuple((size * 4, 5) for size in sizes)
    place = Place("x", QKV, by_head=by_head, transposed=transposed, neighbours=neighbours, shift=shift, skip=skip)
    stored = StoredTensor("x", place, QKV, shapes, head_dim=4, factor=factor)
    generator = torch.Generator().manual_seed(heads)
    weights = {name: torch.randn(shape, generator=generator) for name, shape in zip(QKV, shapes, strict=True)}
    tensor = stored.write(weights)
    assert tuple(tensor.shape) == stored.shape
    for name, weight in weights.items():
        assert torch.allclose(stored.read(tensor, name), weight, atol=1e-6)


@given(form=st.sampled_from(list(PACKED_FORMATS.values())), by_head=st.booleans(), neighbours=st.booleans())
def test_codes_move_as_their_numbers_do(form, by_head, neighbours):
    generator = torch.Generator().manual_seed(0)
    groups = form.groups_of(256)
    weights = {}
    for name in QKV:
        codes = torch.randint(form.least, form.most + 1, (8, 256), generator=generator, dtype=torch.int8)
        scales = torch.rand(8, groups, generator=generator)
        zeros = torch.ones_like(scales, dtype=torch.int8) if form.offset else None
        weights[name] = QuantisedWeight(form, codes, scales, zeros)
    stored = StoredTensor(
        "x", Place("x", QKV, by_head=by_head, neighbours=neighbours), QKV, ((8, 256),) * 3, head_dim=4
    )
    expected = stored.write({name: weight.dequantised() for name, weight in weights.items()})
    assert torch.equal(stored.write(weights).dequantised(), expected)
    with pytest.raises(ValueError, match="x cannot be of few bits"):
        replace(stored, factor=0.5).write(weights)


def test_the_layouts_are_those_that_checkpoints_have():
    """Heads of 2 channels; every row holds its own number."""
    rows = torch.arange(12.0)[:, None]
    by_head = StoredTensor("x", Place("x", QKV, by_head=True), QKV, ((4, 1),) * 3, head_dim=2)
    assert by_head.read(rows, QKV[0]).flatten().tolist() == [0, 1, 6, 7]
    assert by_head.read(rows, QKV[2]).flatten().tolist() == [4, 5, 10, 11]
    stacked = StoredTensor("x", Place("x", QKV, neighbours=True), QKV, ((4, 1),) * 3, head_dim=4)
    assert stacked.read(rows, QKV[1]).flatten().tolist() == [4, 6, 5, 7]  # pairs that turn together lie apart
    assert stacked.read(rows, QKV[2]).flatten().tolist() == [8, 9, 10, 11]  # values do not turn
    shifted = StoredTensor("x", Place("x", shift=1.0, skip=2), ("norm",), ((3, 1),))
    assert shifted.read(rows[:5], "norm").flatten().tolist() == [3, 4, 5]


def test_an_embedding_in_two_tensors_is_cut_behind_the_vocabulary():
    decoder = Decoder("llamagen", 4, 6, 17, 1e-5, True, (), picture=Picture(4, 2))
    places = {"embedding": Place("codes", inputs="classes"), "norm": Place("norm")}
    tensors = stored_tensors(decoder, places)
    assert {key: tensor.shape for key, tensor in tensors.items()} == {"codes": (6, 4), "classes": (3, 4), "norm": (4,)}
    table = torch.randn(9, 4)
    written = dict(stored_stream(tensors, [("embedding", table), ("norm", torch.ones(4))]))
    assert torch.equal(torch.cat([written["codes"], written["classes"]]), table)


def fused(decoder: Decoder) -> dict[str, StoredTensor]:
    names = {name.split(".", 2)[-1] if "layers" in name else name for name in decoder.shapes()}
    places = {name: Place(f"l.{{i}}.{name}" if "." in name else name) for name in names}
    places |= {f"attention.{part}": Place("l.{i}.qkv", ("attention.q", "attention.k", "attention.v")) for part in "qkv"}
    return stored_tensors(decoder, places)


def test_a_stream_becomes_whole_tensors_in_their_order():
    decoder = uniform(8, 2, (2, 1, 4), 6, 10)
    tensors = fused(decoder)
    weights = {name: torch.randn(shape) for name, shape in decoder.shapes().items()}
    written = dict(stored_stream(tensors, weights.items()))
    assert list(written) == list(tensors)
    assert {key: tuple(tensor.shape) for key, tensor in written.items()} == {k: t.shape for k, t in tensors.items()}
    assert torch.equal(written["l.1.qkv"], torch.cat([weights[f"layers.1.attention.{part}"] for part in "qkv"]))
    with pytest.raises(ValueError, match="more is not a weight of this model"):
        list(stored_stream(tensors, [("more", torch.zeros(1))]))


def test_output_projections_alone_have_the_factor_of_the_residuals():
    decoder = replace(uniform(8, 1, (2, 1, 4), 6, 10), residual_scale=0.25)
    factors = {key: tensor.factor for key, tensor in fused(decoder).items()}
    assert {key for key, factor in factors.items() if factor != 1.0} == {"l.0.attention.o", "l.0.mlp.down"}
    layer = Layer(None, Mlp(6))
    assert fused(replace(decoder, layers=(layer,)))["l.0.mlp.down"].factor == 0.25
