"""Attention in every dialect: rope scalings, groups, and heads of any size."""

from __future__ import annotations

from pathlib import Path

import pytest

from edgeprune.engine.onnx.graph import graph_weight_bytes, write_graphs
from tests.support.graph_models import VARIANTS, assert_same, check, llama, reference_logits, run_steps, sample, session
from tests.support.reference import decoder_of, weights_of

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}


YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 32}


@pytest.mark.parametrize("rope", [LLAMA3, YARN], ids=["llama3", "yarn"])
def test_rope_scaling(rope: dict[str, object], tmp_path: Path) -> None:
    model = llama(True, rope_parameters=rope)
    assert decoder_of(model.config).rotaries != decoder_of(llama(True).config).rotaries
    check(model, tmp_path)


def test_multi_head_and_single_key_head(tmp_path: Path) -> None:
    for heads in (6, 1):
        check(llama(True, num_key_value_heads=heads), tmp_path / str(heads))


@pytest.mark.parametrize("head_dim", [24, 20, 6])
def test_heads_of_any_size(head_dim: int, tmp_path: Path) -> None:
    """ONNX Runtime's operator takes multiples of 8 and turns multiples of 16: others turn before, without tables."""
    model, batch = llama(True, head_dim=head_dim), sample(30)
    decoder, reference = decoder_of(model.config), reference_logits(model, batch)
    files = write_graphs(decoder, weights_of(model), tmp_path, "fp32", VARIANTS)
    assert graph_weight_bytes(decoder, "fp32", "onnxruntime") == graph_weight_bytes(decoder, "fp32")
    for variant, path in files.graphs.items():
        width = -(-head_dim // 8) * 8 if variant.dialect == "onnxruntime" else head_dim
        (past,) = {tuple(value.shape) for value in session(path).get_inputs() if "past" in value.name}
        assert past == ("batch", 2, 128 if variant.dialect == "opset24" else "past", width)
        for walk in ([30], [20, 3, *[1] * 7]):
            logits = run_steps(path, batch, walk, 40 if variant.dialect == "onnxruntime" else None)
            assert_same(logits, walk, variant, reference, batch, 1e-5)
