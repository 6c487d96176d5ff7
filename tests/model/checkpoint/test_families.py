"""The families' differences from a plain Llama."""

import pytest
import torch
import transformers
from transformers import AutoConfig

from edgeprune.errors import InputError
from edgeprune.model.checkpoint.adapt import changed, windowed
from edgeprune.model.checkpoint.configuration import decoder_of
from edgeprune.model.checkpoint.families import FAMILIES
from edgeprune.model.rope import SenselessError
from tests.support.families import BASE, CASES
from tests.support.shapes import uniform

PLAIN = uniform(48, 4, (6, 2, 8), 64, 101)
OURS = {"llamagen"}  # families that transformers does not have


@pytest.mark.parametrize("name", sorted(FAMILIES.keys() - OURS))
def test_a_familys_class_and_fields_are_those_of_transformers(name):
    """Fields that a configuration leaves out have transformers' values."""
    family = FAMILIES[name]
    assert hasattr(transformers, family.architecture)
    slides = {"use_sliding_window": True} if "max_window_layers" in family.defaults else {}
    known = AutoConfig.for_model(name, **slides).to_dict()
    if name == "opt":
        known["layer_norm_eps"] = torch.nn.LayerNorm(1).eps  # not a field there
    for field in filter(None, (*family.fields.values(), family.activation, family.norm_eps)):
        assert field in known
    assert {field: known[field] for field in family.defaults if field in known} == {
        field: value for field, value in family.defaults.items() if field in known
    }


def kinds(case: str, **changes: object) -> list[tuple[int | None, bool]]:
    """Of each layer its window, and whether it rotates."""
    settings = {name: value for name, value in (BASE | CASES[case] | changes).items() if value is not None}
    family = case.partition(",")[0]
    decoder = decoder_of(settings | {"model_type": family, "architectures": [FAMILIES[family].architecture]})
    return [(layer.attention.window, layer.attention.rotary is not None) for layer in decoder.layers]


def test_every_family_has_its_pattern_of_windows_and_rotations():
    assert kinds("gemma2", num_hidden_layers=4) == [(6, True), (None, True)] * 2
    assert kinds("gemma3_text", num_hidden_layers=6, sliding_window_pattern=3) == [
        *[(6, True), (6, True), (None, True)] * 2
    ]
    assert kinds("smollm3", num_hidden_layers=4) == [(None, True), (None, False)] * 2
    assert kinds("mistral, sliding window") == [(7, True)] * 3
    assert kinds("qwen2, yarn, late windows") == [(None, True), (5, True), (5, True)]
    assert kinds("mixtral") == [(None, True)] * 3


def test_a_window_slides_where_the_configuration_or_the_family_says():
    types = ["sliding_attention", "full_attention"] * 2
    for config, windows in (
        ({"sliding_window": 4}, [None, None, 4, 4]),
        ({"sliding_window": 4, "layer_types": types}, [4, None, 4, None]),
        ({"sliding_window": None}, [None] * 4),
        ({"sliding_window": 8192}, [None] * 4),  # all positions
    ):
        found = windowed(PLAIN, config, lambda index: index >= 2)
        assert [layer.attention.window for layer in found.layers] == windows


@pytest.mark.parametrize(
    "config",
    [
        {"sliding_window": 0},
        {"sliding_window": 4, "layer_types": ["sliding_attention"]},
        {"sliding_window": 4, "layer_types": ["linear_attention"] * 4},
        {"sliding_window": 4, "layer_types": "full_attention"},
    ],
    ids=str,
)
def test_senseless_windows_are_named(config):
    with pytest.raises(SenselessError, match="layer_types" if "layer_types" in config else "sliding_window 0"):
        windowed(PLAIN, config, lambda index: True)


def test_fields_change_in_every_layer_or_in_each_its_own():
    everywhere = changed(PLAIN, {"softcap": 5.0}, {"gated": False})
    assert {(layer.attention.softcap, layer.mlp.gated) for layer in everywhere.layers} == {(5.0, False)}
    each = changed(PLAIN, lambda index: {"scale": float(index)})
    assert [layer.attention.scale for layer in each.layers] == [0.0, 1.0, 2.0, 3.0]
    assert [layer.mlp for layer in each.layers] == [layer.mlp for layer in PLAIN.layers]


REFUSED = [
    ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx true"),
    ("imagegpt", {"tie_word_embeddings": True}, "tie_word_embeddings true"),
    ("opt", {"do_layer_norm_before": False}, "do_layer_norm_before false"),
    ("opt", {"_remove_final_layer_norm": True}, "_remove_final_layer_norm true"),
    ("qwen3_moe", {"decoder_sparse_step": 2}, "layers without experts"),
    ("gemma3_text", {"use_bidirectional_attention": True}, "use_bidirectional_attention true"),
]


@pytest.mark.parametrize(("name", "config", "reason"), REFUSED)
def test_what_a_family_cannot_do_is_told(name, config, reason):
    refuse = FAMILIES[name].refuse
    assert reason in refuse(config)
    assert refuse({}) is None


@pytest.mark.parametrize("scalar", [-3, 0])
def test_a_scale_of_scores_that_is_no_number_is_told(scalar):
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = {"model_type": "gemma2", "vocab_size": 100, "query_pre_attn_scalar": scalar, **sizes}
    with pytest.raises(InputError, match=f"senseless: query_pre_attn_scalar {scalar}"):
        decoder_of(config | {"head_dim": 16})
