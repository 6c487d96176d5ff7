"""Rotary frequencies, as transformers computes them."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import LlamaConfig

from edgeprune.model.checkpoint.configuration import decoder_of
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
