import pytest
from transformers import LlamaConfig

from edgeprune.errors import InputError
from edgeprune.model.families import config_for, decoder_of
from tests.reference import decoder_of as reference_decoder
from tests.tiny import config

ROPES = {
    "default": {"rope_type": "default", "rope_theta": 50000.0},
    "linear": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0},
    "llama3": {
        "rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    },
}  # fmt: skip


@pytest.mark.parametrize("rope", ROPES.values(), ids=ROPES)
@pytest.mark.parametrize("tied", [True, False])
def test_a_decoder_says_what_transformers_builds(rope, tied):
    reference = config(rope_parameters=rope, tie_word_embeddings=tied)
    ours, expected = (
        decoder_of(reference.to_dict() | {"architectures": ["LlamaForCausalLM"]}),
        reference_decoder(reference),
    )
    assert ours.rotary.inverse_frequencies == pytest.approx(expected.rotary.inverse_frequencies, rel=1e-6)
    assert ours.rotary.scaling == expected.rotary.scaling
    assert ours.shapes() == expected.shapes()
    assert ours.norm_eps == expected.norm_eps


def test_older_configurations_are_read_too():
    plain = {
        "model_type": "llama", "hidden_size": 48, "num_attention_heads": 6, "num_hidden_layers": 2,
        "intermediate_size": 64, "vocab_size": 101, "rope_theta": 50000.0, "rope_scaling": None,
    }  # fmt: skip
    assert decoder_of(plain).rotary.inverse_frequencies[1] == pytest.approx(50000.0 ** (-2 / 8))
    scaled = decoder_of(plain | {"rope_scaling": {"type": "linear", "factor": 2.0}})
    assert scaled.rotary.inverse_frequencies[0] == 0.5


BAD = {
    "another family": ({"model_type": "gpt2"}, "unsupported architecture 'gpt2'"),
    "no family": ({"model_type": None}, "unsupported architecture"),
    "a classifier": ({"architectures": ["LlamaForSequenceClassification"]}, "LlamaForSequenceClassification"),
    "biases": ({"attention_bias": True}, "attention_bias"),
    "another activation": ({"hidden_act": "gelu"}, "hidden_act 'gelu'"),
    "quantised": ({"quantization_config": {"bits": 4}}, "quantization_config"),
    "a window": (
        {"model_type": "mistral", "architectures": ["MistralForCausalLM"], "sliding_window": 16},
        "sliding_window",
    ),
    "another rope": ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}}, "'yarn'"),
    "a missing field": ({"vocab_size": None}, "incomplete"),
    "odd heads": ({"num_key_value_heads": 4}, "do not divide"),
}


@pytest.mark.parametrize(("changes", "reason"), BAD.values(), ids=BAD)
def test_what_is_not_supported_is_named(changes, reason):
    base = config().to_dict() | {"architectures": ["LlamaForCausalLM"]}
    with pytest.raises(InputError) as caught:
        decoder_of(base | changes)
    assert reason in caught.value.message
    if "unsupported architecture" in caught.value.message:
        assert "llama, mistral" in caught.value.remedy


def test_a_pruned_llama_whose_heads_do_not_divide_becomes_a_mistral():
    source = config().to_dict() | {"architectures": ["LlamaForCausalLM"]}
    dense = decoder_of(source)
    assert config_for(dense.with_widths(2, 2, 40), source)["model_type"] == "llama"
    five = config_for(decoder_of(source | {"num_key_value_heads": 1}).with_widths(1, 5, 40), source)
    assert (five["model_type"], five["sliding_window"], five["num_attention_heads"]) == ("mistral", None, 5)
    with pytest.raises(Exception, match="num_attention_heads|attention heads"):
        LlamaConfig(hidden_size=48, num_attention_heads=5, num_key_value_heads=1, head_dim=8)
