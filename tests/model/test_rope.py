"""Rotary frequencies, as transformers computes them."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from edgeprune.errors import InputError
from edgeprune.model.checkpoint.configuration import decoder_of
from edgeprune.model.rope import SenselessError, longrope_context, rope_parameters, rotary_of
from tests.support.reference import decoder_of as reference_decoder
from tests.support.ropes import ROPES
from tests.support.tiny import config


@given(
    theta=st.floats(100.0, 1e6),
    factor=st.floats(1.0, 64.0),
    low=st.floats(0.5, 2.0),
    width=st.floats(0.5, 8.0),
    context=st.integers(16, 8192),
)
def test_llama3_scaling_is_that_of_transformers(theta, factor, low, width, context):
    rope = {
        "rope_type": "llama3",
        "rope_theta": theta,
        "factor": factor,
        "low_freq_factor": low,
        "high_freq_factor": low + width,
        "original_max_position_embeddings": context,
    }
    reference = config(rope_parameters=rope)
    ours = decoder_of(reference.to_dict() | {"architectures": ["LlamaForCausalLM"]}).rotaries[0]
    # transformers computes in fp32, where the blend's difference loses some digits
    expected = reference_decoder(reference).rotaries[0]
    assert ours.inverse_frequencies == pytest.approx(expected.inverse_frequencies, rel=1e-5)


THETA = st.sampled_from([{}, {"rope_theta": 5e5}])


SCALING = st.sampled_from(
    [
        {},
        {"rope_type": "default"},
        {"type": "linear", "factor": 2.0},
        {"rope_type": "linear", "factor": 4.0},
        {k: v for k, v in ROPES["llama3"].items() if k != "rope_theta"},
    ]
)


@given(
    outer=THETA, inner=THETA, scaling=SCALING, other=SCALING, key=st.sampled_from(["rope_scaling", "rope_parameters"])
)
def test_every_spelling_of_rope_is_read_as_transformers_reads_it(outer, inner, scaling, other, key):
    """Old and new field names, theta outside or inside, and files that have both."""
    spelling = {**outer, key: {**scaling, **inner} if scaling else None}
    if other:
        spelling.setdefault("rope_parameters", {**other})
    plain = config().to_dict() | {"architectures": ["LlamaForCausalLM"]}
    del plain["rope_parameters"]
    expected = reference_decoder(LlamaConfig(**json.loads(json.dumps(plain | spelling)))).rotaries[0]
    ours = decoder_of(plain | spelling).rotaries[0]
    assert ours.inverse_frequencies == pytest.approx(expected.inverse_frequencies, rel=1e-6)
    assert ours.scaling == expected.scaling


LONGROPE = {
    "rope_type": "longrope",
    "short_factor": [1.0, 2.0, 4.0, 8.0],
    "long_factor": [9.0] * 4,
    "original_max_position_embeddings": 64,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
KINDS = {
    "yarn": YARN,
    "yarn with its own factor": YARN | {"attention_factor": 0.7},
    "yarn with both scales": YARN | {"mscale": 0.5, "mscale_all_dim": 0.8, "beta_fast": 16, "beta_slow": 2},
    "yarn in whole pairs": YARN | {"truncate": False},
    "longrope": LONGROPE,
    "longrope with its own factor": LONGROPE | {"attention_factor": 1.2},
}


@pytest.mark.parametrize("parameters", KINDS.values(), ids=KINDS)
def test_every_kind_gives_the_frequencies_of_transformers(parameters):
    """longrope with its short factors, as for positions within the original context."""
    outer = {"max_position_embeddings": 256}
    if parameters["rope_type"] == "longrope":
        outer["original_max_position_embeddings"] = 64
    rope = {"rope_theta": 5e5} | parameters
    reference = config(rope_parameters=rope, **outer)
    frequencies, scaling = ROPE_INIT_FUNCTIONS[parameters["rope_type"]](reference, "cpu", seq_len=64)
    ours = rotary_of(rope, outer, 8)
    assert ours.inverse_frequencies == pytest.approx(frequencies.tolist(), rel=1e-5)
    assert ours.scaling == pytest.approx(scaling)


def test_a_part_of_a_head_turns_with_the_frequencies_of_that_part():
    assert rotary_of({"partial_rotary_factor": 0.5}, {}, 8) == rotary_of({}, {}, 4)
    assert rotary_of({}, {"partial_rotary_factor": 0.5}, 8).inverse_frequencies == (1.0, 10000.0**-0.5)


def test_only_longrope_ends_with_its_original_context():
    outer = {"max_position_embeddings": 256}
    assert longrope_context(LONGROPE, outer) == 64
    assert longrope_context({"type": "su"}, outer) == 256
    assert longrope_context(YARN, outer) is None
    assert rotary_of(LONGROPE, outer, 8) == rotary_of(LONGROPE | {"rope_type": "su"}, outer, 8)


@pytest.mark.parametrize(
    ("parameters", "error", "reason"),
    [
        ({"rope_type": "ntk"}, InputError, "unsupported rope scaling 'ntk'"),
        ({"rope_theta": -1.0}, SenselessError, "rope_theta -1.0"),
        ({"partial_rotary_factor": 0.4}, SenselessError, "partial_rotary_factor 0.4 of head_dim 8"),
        ({"partial_rotary_factor": 2.0}, SenselessError, "partial_rotary_factor 2.0 of head_dim 8"),
        ({"rope_type": "linear"}, KeyError, "factor"),
        (LONGROPE | {"short_factor": [1.0]}, SenselessError, "1 short_factor values for 4 pairs"),
        (LONGROPE | {"long_factor": [1.0]}, SenselessError, "1 long_factor values for 4 pairs"),
        ({"rope_type": "x" * 10000}, InputError, r"scaling 'x{29} \.\.\. x{29}'$"),
        (
            {
                "rope_type": "llama3",
                "factor": 2.0,
                "low_freq_factor": 4.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 64,
            },
            SenselessError,
            "low_freq_factor 4 is not below high_freq_factor 4",
        ),
    ],
    ids=[
        "kind",
        "theta",
        "part",
        "more than all",
        "no factor",
        "too few factors",
        "too few long factors",
        "a long name",
        "no range",
    ],
)
def test_parameters_that_make_no_sense_are_named(parameters, error, reason):
    with pytest.raises(error, match=reason) as caught:
        rotary_of(parameters, {"max_position_embeddings": 256}, 8)
    if error is InputError:
        assert "llama3, yarn, longrope" in caught.value.remedy
    with pytest.raises(SenselessError, match="rope parameters 7"):
        rope_parameters({"rope_scaling": 7})
