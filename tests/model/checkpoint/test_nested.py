"""The text part of a nested configuration: which one is taken, and what transformers reads of one that says little."""

import pytest
from transformers import AutoConfig

from edgeprune.model.checkpoint.configuration import decoder_of
from edgeprune.model.checkpoint.nested import NAMES, SIZES, defaults_taken, text_part


@pytest.mark.parametrize("family", SIZES)
def test_sizes_that_are_left_out_are_those_of_transformers(family):
    theirs = AutoConfig.for_model(family)
    assert SIZES[family] == {name: getattr(theirs, name) for name in NAMES}
    decoder = decoder_of(text_part({"model_type": "llava", "text_config": {"model_type": family}}))
    attention = decoder.layers[0].attention
    assert len(decoder.layers) == theirs.num_hidden_layers
    assert attention.num_key_value_heads == theirs.num_key_value_heads
    assert attention.head_dim == (getattr(theirs, "head_dim", None) or theirs.hidden_size // theirs.num_attention_heads)
    original = (theirs.rope_parameters or {}).get("original_max_position_embeddings")  # beyond it queries grow
    assert decoder.max_position_embeddings == (original if family == "ministral3" else theirs.max_position_embeddings)


def test_only_what_is_left_out_is_said():
    given = dict(zip(NAMES, (64, 96, 2, 4, 100), strict=True))
    nested = {"model_type": "mistral", "architectures": ["MistralForCausalLM"], **given}
    assert defaults_taken({"model_type": "mistral3", "text_config": nested}) == ""
    part = {"model_type": "mistral3", "tie_word_embeddings": True, "text_config": nested | {"hidden_size": None}}
    assert defaults_taken(part) == "hidden_size 4096"
    assert text_part(part) == {"model_type": "mistral", "tie_word_embeddings": True, **given, "hidden_size": 4096}


@pytest.mark.parametrize("text", [{"model_type": "mamba"}, {}, None, "llama", ["llama"]])
def test_a_part_that_is_not_supported_is_left_where_it_is(text):
    whole = {"model_type": "llava", "text_config": text}
    assert text_part(whole) is whole
    assert defaults_taken(whole) == ""


def test_a_whole_configuration_of_a_family_is_its_own_text_part():
    whole = {"model_type": "llama", "text_config": {"model_type": "qwen2"}}
    assert text_part(whole) is whole
