import json
from dataclasses import replace

import pytest
from transformers import AutoConfig, LlamaConfig, MistralConfig

from edgeprune.errors import InputError
from edgeprune.model.checkpoint.adapt import changed
from edgeprune.model.checkpoint.configuration import HEADS, LAYER_WIDTHS, config_for, decoder_of, loadable
from edgeprune.model.checkpoint.families import FAMILIES
from edgeprune.model.decoder import Mlp
from edgeprune.precision import WEIGHT_FORMATS
from tests.support.reference import decoder_of as reference_decoder
from tests.support.ropes import ROPES
from tests.support.shapes import uniform
from tests.support.tiny import config


@pytest.mark.parametrize("rope", ROPES.values(), ids=ROPES)
@pytest.mark.parametrize("tied", [True, False])
def test_a_decoder_says_what_transformers_builds(rope, tied):
    reference = config(rope_parameters=rope, tie_word_embeddings=tied)
    ours, expected = (
        decoder_of(reference.to_dict() | {"architectures": ["LlamaForCausalLM"]}),
        reference_decoder(reference),
    )
    assert ours.rotaries[0].inverse_frequencies == pytest.approx(expected.rotaries[0].inverse_frequencies, rel=1e-6)
    assert ours.rotaries[0].scaling == expected.rotaries[0].scaling
    assert ours.shapes() == expected.shapes()
    assert ours.norm_eps == expected.norm_eps


def test_older_configurations_are_read_too():
    plain = {
        "model_type": "llama",
        "hidden_size": 48,
        "num_attention_heads": 6,
        "num_hidden_layers": 2,
        "intermediate_size": 64,
        "vocab_size": 101,
        "rope_theta": 50000.0,
        "rope_scaling": None,
    }
    assert decoder_of(plain).rotaries[0].inverse_frequencies[1] == pytest.approx(50000.0 ** (-2 / 8))
    scaled = decoder_of(plain | {"rope_scaling": {"type": "linear", "factor": 2.0}})
    assert scaled.rotaries[0].inverse_frequencies[0] == 0.5


@pytest.mark.parametrize("kind", [LlamaConfig, MistralConfig])
def test_fields_left_out_mean_what_transformers_takes(kind):
    """Mistral's defaults are 8 key/value heads and a window of 4096, not those of Llama."""
    given_ = {
        "model_type": kind.model_type,
        "hidden_size": 64,
        "num_attention_heads": 16,
        "num_hidden_layers": 1,
        "intermediate_size": 32,
        "vocab_size": 50,
    }
    full = kind(**given_)
    ours = decoder_of(given_)
    assert ours.windows == (full.to_dict().get("sliding_window"),)
    attention = ours.layers[0].attention
    assert (attention.num_key_value_heads, attention.head_dim) == (full.num_key_value_heads, full.head_dim)
    assert ours.max_position_embeddings == full.max_position_embeddings
    assert (ours.norm_eps, ours.tie_word_embeddings) == (full.rms_norm_eps, full.tie_word_embeddings)
    nulls = decoder_of(given_ | {"num_key_value_heads": None, "head_dim": None})
    assert nulls.layers[0].attention.num_key_value_heads == 16


BAD = {
    "another family": ({"model_type": "mamba"}, "unsupported architecture 'mamba'"),
    "another class of a family": ({"model_type": "gpt2"}, "unsupported architecture LlamaForCausalLM"),
    "no family": ({"model_type": None}, "unsupported architecture"),
    "a classifier": ({"architectures": ["LlamaForSequenceClassification"]}, "LlamaForSequenceClassification"),
    "another activation": ({"hidden_act": "mish"}, "hidden_act 'mish'"),
    "a size in words": ({"vocab_size": "300"}, "vocab_size '300' is no number"),
    "no window": (
        {"model_type": "mistral", "architectures": ["MistralForCausalLM"], "sliding_window": 0},
        "sliding_window 0",
    ),
    "too few kinds of layers": (
        {
            "model_type": "qwen2",
            "architectures": ["Qwen2ForCausalLM"],
            "use_sliding_window": True,
            "sliding_window": 8,
            "layer_types": ["full_attention"],
        },
        "layer_types",
    ),
    "another mixer": (
        {
            "model_type": "qwen2",
            "architectures": ["Qwen2ForCausalLM"],
            "layer_types": ["full_attention", "linear_attention"],
        },
        "linear_attention",
    ),
    "another rope": ({"rope_parameters": {"rope_type": "proportional", "rope_theta": 1e4}}, "'proportional'"),
    "yarn without a factor": ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}}, "factor"),
    "a missing field": ({"vocab_size": None}, "incomplete"),
    "odd heads": ({"num_key_value_heads": 4}, "do not divide"),
    "a part rotated with scaling": (
        {"rope_parameters": {"rope_type": "linear", "factor": 2.0}, "partial_rotary_factor": 0.5},
        "partial_rotary_factor 0.5 with rope scaling",
    ),
    "a Phi-3 with another scaling": (
        {
            "model_type": "phi3",
            "architectures": ["Phi3ForCausalLM"],
            "rope_parameters": {"rope_type": "linear", "factor": 2.0},
        },
        "'linear' (longrope is supported)",
    ),
    "a GPT-NeoX with another head": (
        {"model_type": "gpt_neox", "architectures": ["GPTNeoXForCausalLM"], "head_dim": 4},
        "head_dim 4",
    ),
    "an architecture that is a number": ({"architectures": 1}, "senseless: architectures 1"),
    "factors that are flags": (
        {"rope_parameters": ROPES["llama3"] | {"low_freq_factor": True, "high_freq_factor": True}},
        "incomplete or senseless",
    ),
    "an OPT with a projected embedding": (
        {"model_type": "opt", "architectures": ["OPTForCausalLM"], "word_embed_proj_dim": 24},
        "word_embed_proj_dim 24",
    ),
    "a GPT-2 of words": (
        {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], "n_embd": "many", "n_head": 2, "n_layer": 1},
        "senseless",
    ),
    "a GPT-2 without sizes": ({"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"]}, "n_embd is missing"),
    "some layers without experts": (
        {"model_type": "qwen3_moe", "architectures": ["Qwen3MoeForCausalLM"], "mlp_only_layers": [0]},
        "mlp_only_layers",
    ),
    "more experts than memory": (
        {"model_type": "mixtral", "architectures": ["MixtralForCausalLM"], "num_local_experts": 2**31},
        "senseless: 2 of 2147483648 experts",
    ),
    "more experts for a token than there are": (
        {"model_type": "mixtral", "architectures": ["MixtralForCausalLM"], "num_experts_per_tok": 9},
        "senseless: 9 of 8 experts",
    ),
    "a family that is a list": ({"model_type": ["llama"]}, "unsupported architecture"),
    "a window in words": (
        {"model_type": "mistral", "architectures": ["MistralForCausalLM"], "sliding_window": "wide"},
        "senseless",
    ),
    "no heads": ({"num_attention_heads": 0}, "senseless"),
    "negative sizes": ({"hidden_size": -48}, "hidden_size -48"),
    "no layers": ({"num_hidden_layers": 0}, "num_hidden_layers 0"),
    "layers beyond all memory": ({"num_hidden_layers": 2**40}, "num_hidden_layers 1099511627776"),
    "an infinite size": ({"intermediate_size": float("inf")}, "senseless"),
    "an odd head": ({"head_dim": 7}, "head_dim 7"),
    "words": ({"vocab_size": "many"}, "senseless"),
    "negative theta": ({"rope_parameters": {"rope_type": "default", "rope_theta": -1e4}}, "senseless"),
    "theta that is no number": (
        {"rope_parameters": {"rope_type": "default", "rope_theta": float("nan")}},
        "rope_theta nan",
    ),
    "a factor that is no number": (
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": float("nan")}},
        "not finite",
    ),
    "linear without factor": ({"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4}}, "senseless"),
    "rope that is no object": ({"rope_parameters": 7}, "senseless"),
}


@pytest.mark.parametrize(("changes", "reason"), BAD.values(), ids=BAD)
def test_what_is_not_supported_is_named(changes, reason):
    base = config().to_dict() | {"architectures": ["LlamaForCausalLM"]}
    with pytest.raises(InputError) as caught:
        decoder_of(base | changes)
    assert reason in caught.value.message
    if "of the family" in caught.value.message:
        assert caught.value.remedy == f"Give a checkpoint of {FAMILIES[(base | changes)['model_type']].architecture}."
    elif "unsupported architecture" in caught.value.message:
        assert "llama, mistral" in caught.value.remedy


def test_a_pruned_llama_whose_heads_do_not_divide_becomes_a_mistral():
    source = config().to_dict() | {"architectures": ["LlamaForCausalLM"]}
    dense = decoder_of(source)
    assert config_for(dense.with_widths(2, 2, 40), source)["model_type"] == "llama"
    five = config_for(decoder_of(source | {"num_key_value_heads": 1}).with_widths(1, 5, 40), source)
    assert (five["model_type"], five["sliding_window"], five["num_attention_heads"]) == ("mistral", None, 5)
    with pytest.raises(Exception, match="num_attention_heads|attention heads"):
        LlamaConfig(hidden_size=48, num_attention_heads=5, num_key_value_heads=1, head_dim=8)


def test_all_else_of_the_source_is_kept():
    source = config(rope_parameters=ROPES["llama3"]).to_dict() | {
        "architectures": ["LlamaForCausalLM"],
        "bos_token_id": 7,
        "auto_map": {"AutoModel": "code.Model"},
    }
    dense = decoder_of(source)
    half = replace(dense.with_widths(2, 2, 40), layers=dense.with_widths(2, 2, 40).layers[:1])
    result = config_for(half, source)
    changed = {name: value for name, value in result.items() if source.get(name) != value}
    assert changed == {"num_attention_heads": 4, "intermediate_size": 40, "num_hidden_layers": 1}
    assert "auto_map" not in result  # its code is not part of the checkpoint
    assert decoder_of(result) == half


@pytest.mark.parametrize("rope", ROPES.values(), ids=ROPES)
def test_transformers_reads_the_mistral_as_meant(tmp_path, rope):
    source = config(rope_parameters=rope, num_key_value_heads=1).to_dict() | {"architectures": ["LlamaForCausalLM"]}
    del source["max_position_embeddings"]
    target = decoder_of(source).with_widths(1, 5, 40)
    (tmp_path / "config.json").write_text(json.dumps(config_for(target, source)))
    read = AutoConfig.from_pretrained(tmp_path)
    assert (type(read), read.sliding_window, read.head_dim) == (MistralConfig, None, 8)
    assert decoder_of(json.loads(read.to_json_string()) | {"architectures": ["MistralForCausalLM"]}) == replace(
        target, family="mistral"
    )


def test_layers_that_differ_are_described_by_a_field_of_our_own():
    source = config().to_dict() | {"architectures": ["LlamaForCausalLM"]}
    dense = decoder_of(source)
    first, second = dense.layers
    for layers in (
        (first, replace(second, mlp=Mlp(8))),
        (replace(first, attention=None),) * 2,
        (replace(second, mlp=None),),
    ):
        target = replace(dense, layers=layers)
        written = json.loads(json.dumps(config_for(target, source)))
        assert decoder_of(written) == target
        assert LAYER_WIDTHS in written


@pytest.mark.parametrize(
    "widths", [None, 7, [[1, 1]], [[1, 1, 8]], [[1, 0, 8]] * 2, [[-1, 1, 8]] * 2, [["x", 1, 1]] * 2]
)
def test_a_damaged_field_of_our_own_is_refused(widths):
    source = config().to_dict() | {"architectures": ["LlamaForCausalLM"], LAYER_WIDTHS: widths}
    with pytest.raises(InputError, match="edgeprune_layer_widths"):
        decoder_of(source)


@pytest.mark.parametrize("heads", [None, 7, [1], ["x", 1], [0, 3], [3, 3], [2, 0], [2, 4], [-1, 3]])
def test_damaged_heads_of_a_padded_checkpoint_are_refused(heads):
    source = config().to_dict() | {"architectures": ["LlamaForCausalLM"], HEADS: heads}
    with pytest.raises(InputError, match="edgeprune_heads"):
        decoder_of(source)


def test_added_heads_fill_the_groups_of_a_format():
    """15 heads divide the hidden size, but 240 inputs are no whole groups of 32: 16 are the next."""
    decoder = changed(uniform(480, 2, (14, 14, 16), 64, 50), {"input_bias": True})
    assert loadable(decoder, {}).layer_widths[0] == (15, 1, 64)
    assert loadable(decoder.with_format(WEIGHT_FORMATS["int8"]), {}).layer_widths[0] == (15, 1, 64)
    one = decoder.with_formats([(None, None), (WEIGHT_FORMATS["int4-32"], None)], None, None)
    assert loadable(one, {}).layer_widths == [(16, 1, 64)] * 2


@pytest.mark.parametrize(
    ("family", "dense", "left", "stored"),
    [
        ("gemma3_text", (4, 1, 256), (1, 3), (1, 4)),  # 3 heads divide no hidden size of 640
        ("gemma3_text", (4, 1, 256), (1, 2), (1, 2)),
        ("gemma2", (8, 4, 256), (3, 2), (4, 2)),
        ("phi3", (20, 5, 32), (5, 3), (5, 4)),  # with LongRoPE all 20 have to be there
        ("phi3", (20, 5, 32), (3, 4), (5, 4)),
    ],
)
def test_where_groups_of_zeros_do_not_do_heads_stand_in_every_group(family, dense, left, stored):
    """A search for more groups alone would never end."""
    source = {"rope_scaling": {"type": "longrope", "original_max_position_embeddings": 64}} if family == "phi3" else {}
    decoder = replace(uniform(640, 2, dense, 64, 50).with_widths(*left, 64), family=family)
    assert loadable(decoder, source).layer_widths[0] == (*stored, 64)
