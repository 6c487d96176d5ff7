"""Rope parameters from the fields and tensors of a GGUF file."""

import numpy as np
import pytest
import torch
from gguf import RopeScalingType

from edgeprune.model.load import load_model
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
