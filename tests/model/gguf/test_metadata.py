"""The decoder and the fields with which a GGUF file holds a model."""

from dataclasses import replace

import pytest

from edgeprune.errors import InputError
from edgeprune.model.decoder import Layer
from edgeprune.model.gguf.export import check_exportable
from tests.support.gguf_models import narrowed, saved, without_layers


def test_a_layer_that_does_not_turn_has_its_place(tmp_path):
    """llama.cpp lets every fourth layer of a smollm3 not turn, whatever layers are left."""
    dense = saved(tmp_path / "dense", "smollm3")
    assert (
        check_exportable(without_layers(dense, tmp_path / "last", [0, 1, 2, 3])).decoder.layers[3].attention.rotary
        is None
    )
    with pytest.raises(InputError, match="smollm3 cannot compute this model: attention of layer 2: rotary None"):
        check_exportable(without_layers(dense, tmp_path / "first", [1, 2, 3, 4]))


def test_a_narrow_qwen2_is_held_without_heads_of_zeros(tmp_path):
    """llama.cpp's qwen2 wants heads that fill the hidden size; its llama does not, and reads the biases too."""
    dense = saved(tmp_path / "dense", "qwen2", num_attention_heads=4)
    assert check_exportable(dense).architecture.name == "qwen2"
    held = check_exportable(narrowed(dense, tmp_path / "small", (2, 1, 80)))
    assert (held.architecture.name, held.decoder.layers[0].attention.num_attention_heads) == ("llama", 2)


def test_a_narrow_olmo2_is_filled_with_as_few_groups_as_may_be(tmp_path):
    dense = saved(tmp_path / "dense", "olmo2", num_attention_heads=4)
    held = check_exportable(narrowed(dense, tmp_path / "small", (1, 1, 80)))
    attention = held.decoder.layers[0].attention
    assert (attention.num_key_value_heads, attention.num_attention_heads) == (1, 4)


def test_gemma2_without_its_caps_is_refused(tmp_path):
    model = saved(tmp_path / "dense", "gemma2")
    with pytest.raises(InputError, match="gemma2 cannot compute this model: logits softcap None"):
        check_exportable(replace(model, decoder=replace(model.decoder, logits_softcap=None)))


def test_layers_of_different_widths_are_refused_of_families_that_have_no_architecture_for_them(tmp_path):
    model = saved(tmp_path / "dense", "qwen3")
    first, *others = model.decoder.layers
    layers = (Layer(first.attention, replace(first.mlp, intermediate_size=32)), *others)
    with pytest.raises(InputError, match="cannot hold layers of different widths of the family qwen3"):
        check_exportable(replace(model, decoder=replace(model.decoder, layers=layers)))


def test_a_gpt2_of_fewer_heads_is_filled_with_heads_of_their_own(tmp_path):
    dense = saved(tmp_path / "dense", "gpt2")
    target = dense.decoder.with_widths(2, 1, 96)
    attention = check_exportable(replace(dense, decoder=target)).decoder.layers[0].attention
    assert (attention.num_key_value_heads, attention.num_attention_heads) == (4, 4)
