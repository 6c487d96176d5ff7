"""Decoders as plain data: their shapes, widths and counts."""

from dataclasses import replace
from math import prod

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgeprune.model.decoder import Attention, Decoder, Experts, Grid, Layer, Mlp, Picture, Rotary, ratio
from tests.support.shapes import SMOLLM2, uniform

DENSE = uniform(48, 3, (6, 2, 8), 64, 101)
widths = st.tuples(st.integers(0, 2), st.integers(1, 3), st.integers(0, 64))


def test_the_sizes_of_a_published_model_are_its_own():
    """SmolLM2-135M: 134,515,008 parameters with the tied table, 28,311,552 in it."""
    assert (SMOLLM2.parameters, SMOLLM2.table_parameters) == (134_515_008, 28_311_552)
    assert SMOLLM2.layer_parameters == SMOLLM2.parameters - SMOLLM2.table_parameters - 61 * 576
    assert SMOLLM2.cache_bytes(2, 100, 4) == 4 * 2 * 2 * 100 * 30 * 3 * 64


@given(st.lists(widths, min_size=3, max_size=3))
def test_widths_are_read_back_as_they_were_given(layers):
    narrow = DENSE.with_layer_widths(layers)
    assert DENSE.with_layer_widths(narrow.layer_widths) == narrow
    assert [(g, c) for g, _, c in narrow.layer_widths] == [(g, c) for g, _, c in layers]
    assert narrow.is_uniform == (len(set(narrow.layer_widths)) == 1)
    shapes = narrow.shapes()
    for index, (groups, heads, channels) in enumerate(layers):
        assert (f"layers.{index}.attention.norm" in shapes) == (groups > 0)
        if groups:
            assert shapes[f"layers.{index}.attention.q"] == (groups * heads * 8, 48)
            assert shapes[f"layers.{index}.attention.k"] == (groups * 8, 48)
        assert shapes.get(f"layers.{index}.mlp.down") == ((48, channels) if channels else None)
    assert len(narrow.compact().layers) == sum(groups > 0 or channels > 0 for groups, _, channels in layers)
    removed = sum(prod(shape) for name, shape in DENSE.shapes().items() if "layers" in name and len(shape) == 2)
    kept = sum(prod(shape) for name, shape in shapes.items() if "layers" in name and len(shape) == 2)
    assert ratio(narrow, DENSE) == pytest.approx(1 - kept / removed)


def test_every_option_adds_its_weights_and_no_others():
    plain = uniform(48, 1, (6, 2, 8), 64, 101)
    attention, mlp = plain.layers[0].attention, plain.layers[0].mlp

    def added(**changes) -> dict[str, tuple[int, ...]]:
        module = {name: changes.pop(name) for name in ("attention", "mlp") if name in changes}
        layer = Layer(replace(attention, **module.get("attention", {})), replace(mlp, **module.get("mlp", {})))
        shapes = replace(plain, layers=(layer,), **changes).shapes()
        return {name.removeprefix("layers.0."): shape for name, shape in shapes.items() if name not in plain.shapes()}

    assert added(tie_word_embeddings=False) == {"head": (101, 48)}
    assert added(learned_positions=True) == {"positions": (8192, 48)}
    assert added(norm="layer") == dict.fromkeys(("attention.norm_bias", "mlp.norm_bias", "norm_bias"), (48,))
    assert added(norms="both") == {"attention.post_norm": (48,), "mlp.post_norm": (48,)}
    assert added(attention={"qk_norm": "head"}) == {"attention.q_norm": (8,), "attention.k_norm": (8,)}
    assert added(attention={"qk_norm": "all"}) == {"attention.q_norm": (48,), "attention.k_norm": (16,)}
    assert added(attention={"input_bias": True}) == {
        "attention.q_bias": (48,),
        "attention.k_bias": (16,),
        "attention.v_bias": (16,),
    }
    assert added(mlp={"input_bias": True}) == {"mlp.gate_bias": (64,), "mlp.up_bias": (64,)}
    experts = added(mlp={"experts": Experts(2, 1)})
    assert experts["mlp.router"] == (2, 48)
    assert experts["mlp.experts.1.down"] == (48, 64)
    assert len(experts) == 1 + 2 * 3
    assert plain.with_output_biases().shapes().keys() - plain.shapes().keys() == {
        "layers.0.attention.o_bias",
        "layers.0.mlp.down_bias",
    }


def test_tokens_that_begin_a_picture_stand_behind_the_codes():
    picture = Picture(4, num_classes=3)
    decoder = replace(DENSE, picture=picture)
    assert [picture.opening(101, label) for label in (0, 2, None)] == [101, 103, 104]
    assert decoder.input_vocab_size == 105
    assert decoder.shapes()["embedding"] == (105, 48)
    assert decoder.most_fed == picture.tokens == 16
    assert Grid(1, 4).positions == 17
    assert [p.is_guided for p in (picture, Picture(4, 3, has_null=False), Picture(4, 0))] == [True, False, False]
    assert (DENSE.input_vocab_size, DENSE.most_fed) == (101, None)


def test_rotary_embeddings_and_windows_are_listed_once_in_their_order():
    first, second = Rotary((1.0,)), Rotary((0.5,))
    modules = [Attention(2, 1, 2, rotary, window=window) for rotary, window in ((first, None), (second, 4), (first, 4))]
    layers = (*(Layer(module, None) for module in modules), Layer(None, Mlp(4)))
    decoder = Decoder("llama", 4, 5, 6, 1e-5, True, layers)
    assert decoder.rotaries == (first, second)
    assert decoder.windows == (None, 4)
    assert decoder.cache_bytes(1, 1, 2, head_multiple=8) == 2 * 3 * 2 * 8
