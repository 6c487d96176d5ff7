"""Rope parameters from the fields and tensors of a GGUF file."""

import numpy as np
import pytest
import torch
from gguf import RopeScalingType

from edgeprune.errors import InputError
from edgeprune.model.gguf.file import Metadata
from edgeprune.model.gguf.names import FREQUENCIES, SHORT
from edgeprune.model.gguf.rope import rope_of, shortest
from edgeprune.model.load import load_model
from edgeprune.model.rope import rotary_of
from tests.support.gguf_files import SETTINGS, write
from tests.support.reference import decoder_of, weights_of
from tests.support.tiny import llama

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


@pytest.mark.parametrize("rope", [LLAMA3, {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}], ids=str)
def test_rope_scalings_come_along(tmp_path, rope):
    settings = SETTINGS | {"head_dim": 64, "num_attention_heads": 2, "num_key_value_heads": 1}
    reference = llama(**settings, rope_parameters=dict(rope))
    expected = np.array(decoder_of(reference.config).rotaries[0].inverse_frequencies)

    def more(writer):
        if rope is LLAMA3:
            dense = 10000.0 ** -(np.arange(0, 64, 2) / 64)
            writer.add_tensor("rope_freqs.weight", (dense / expected).astype(np.float32))
        else:
            writer.add_rope_scaling_type(RopeScalingType.LINEAR)
            writer.add_rope_scaling_factor(2.0)

    write(tmp_path / "m.gguf", reference, more=more)
    model = load_model(str(tmp_path / "m.gguf"))
    assert np.allclose(model.decoder.rotaries[0].inverse_frequencies, expected, rtol=1e-5)
    weights = weights_of(reference)
    assert all(torch.equal(model.weights[name], weight) for name, weight in weights.items())


SPELLINGS = {
    "no type": ({"llama.rope.scaling.factor": 2.0}, 2.0),
    "the old name": ({"llama.rope.scale_linear": 2.0}, 2.0),
    "both names": ({"llama.rope.scale_linear": 4.0, "llama.rope.scaling.factor": 2.0}, 2.0),
    "linear by nothing": ({"llama.rope.scaling.type": "linear"}, 1.0),
    "none": ({"llama.rope.scaling.type": "none", "llama.rope.scaling.factor": 2.0}, 1.0),
}


@pytest.mark.parametrize(("fields", "factor"), SPELLINGS.values(), ids=SPELLINGS)
def test_every_spelling_of_linear_rope_scaling_is_read(tmp_path, fields, factor):
    def more(writer):
        for key, value in fields.items():
            (writer.add_string if isinstance(value, str) else writer.add_float32)(key, value)

    reference = llama(**SETTINGS)
    write(tmp_path / "m.gguf", reference, more=more)
    expected = np.array(decoder_of(reference.config).rotaries[0].inverse_frequencies) / factor
    ours = load_model(str(tmp_path / "m.gguf")).decoder.rotaries[0].inverse_frequencies
    assert np.allclose(ours, expected, rtol=1e-6)


def metadata(architecture="llama", factors=None, **fields):
    own = {f"{architecture}.{name.replace('__', '.')}": value for name, value in fields.items()}
    own |= {"general.architecture": architecture, f"{architecture}.context_length": 512}
    return Metadata(own, (), factors or {})


@pytest.mark.parametrize("value", [1e-5, 1e-6, 10000.0, 0.1, 1 / 3])
def test_a_number_in_fp32_is_read_as_it_was_written(value):
    held = float(np.float32(value))
    assert np.float32(shortest(held)) == np.float32(value)
    assert shortest(held) == value or value == 1 / 3


def test_factors_that_llama3_does_not_explain_become_longrope():
    factors = np.array([1.0, 5.0, 2.0, 8.0], np.float32)
    found = rope_of(metadata(factors={FREQUENCIES: factors}), 8, "m.gguf")
    assert (found["rope_type"], found["short_factor"]) == ("longrope", [1.0, 5.0, 2.0, 8.0])
    assert (found["long_factor"], found["original_max_position_embeddings"]) == (found["short_factor"], 512)
    ours = rotary_of(found, {"max_position_embeddings": 512}, 8)
    plain = 10000.0 ** -(np.arange(0, 8, 2) / 8)
    assert ours.inverse_frequencies == pytest.approx(plain / factors)
    assert ours.scaling == 1.0


def test_the_attention_factor_of_yarn_is_relative_to_the_usual_one():
    fields = {
        "rope__scaling__type": "yarn",
        "rope__scaling__factor": 4.0,
        "rope__scaling__original_context_length": 128,
    }
    plain = rope_of(metadata(**fields), 8, "m.gguf")
    outer = {"max_position_embeddings": 512}
    usual = rotary_of(plain, outer, 8).scaling
    assert usual == pytest.approx(0.1 * np.log(4.0) + 1.0)
    other = rope_of(metadata(**fields, rope__scaling__attn_factor=0.5), 8, "m.gguf")
    assert rotary_of(other, outer, 8).scaling == pytest.approx(0.5 * usual)


@pytest.mark.parametrize(
    ("fields", "factors", "reason", "remedy"),
    [
        ({"rope__dimension_count": 4}, {}, "rotates 4 of 8 head dimensions", "all of them"),
        ({"rope__scaling__type": "ntk"}, {}, "unsupported rope scaling 'ntk'", "linear, llama3, yarn, longrope"),
        ({"rope__scaling__type": "yarn"}, {}, "'yarn' without its factor or original context", "Restore the file."),
        ({}, {SHORT: np.ones(3, np.float32)}, "has 3 rope_factors_short.weight for 4 pairs", "Restore the file."),
    ],
)
def test_rope_that_cannot_be_read_is_refused(fields, factors, reason, remedy):
    with pytest.raises(InputError) as caught:
        rope_of(metadata(factors=factors, **fields), 8, "m.gguf")
    assert reason in caught.value.message
    assert remedy in caught.value.remedy


def test_a_part_of_a_head_may_turn_where_the_architecture_can():
    assert rope_of(metadata("phi3", rope__dimension_count=4), 8, "m.gguf")["partial_rotary_factor"] == 0.5
    assert rope_of(metadata("phi3"), 8, "m.gguf")["partial_rotary_factor"] == 1.0
    assert "partial_rotary_factor" not in rope_of(metadata(), 8, "m.gguf")
