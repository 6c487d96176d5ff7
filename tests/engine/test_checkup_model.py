"""The small model: ONNX Runtime computes what our own walk expects, in every format and dialect that it runs."""

from __future__ import annotations

from pathlib import Path

import pytest

from edgeprune.engine.checkup_model import small_decoder, write_small_model
from edgeprune.ondevice.onnxruntime import GraphRunner
from edgeprune.ondevice.reference import compare_logits, judge_logits, read_reference
from edgeprune.ondevice.worker import quiet
from tests.support.quantised import FLOAT_FORMATS, PACKED_FORMATS

FORMATS = [None, *PACKED_FORMATS.values(), *FLOAT_FORMATS.values()]


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMATS, ids=lambda form: form.name if form else "float")
@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
def test_every_format_gives_the_expected_logits(form, precision: str, tmp_path: Path) -> None:
    tables = form if form in PACKED_FORMATS.values() and form.bits == 8 else None
    model = write_small_model(tmp_path, precision, ["onnxruntime"], form, tables)
    ids, expected = read_reference(model.reference)
    runner = GraphRunner(model.graphs["onnxruntime"], 1, ids.shape[1], exact=True)
    agreement = compare_logits(runner, ids, expected, quiet)
    # In 16 bits an activation between two codes may take the other one, on one processor and not on another.
    if precision != "fp32" and form and form.activation_bits:
        judge_logits(agreement, precision, "graph", model.decoder.rounded_states)
    else:
        assert agreement["error"] < (0.02 if precision == "fp16" else 1e-4), agreement
    assert agreement["positions"] > 1


def test_the_logits_depend_on_the_tokens_and_the_files_on_nothing(tmp_path: Path) -> None:
    models = [write_small_model(tmp_path / name, "fp16", ["opset23"], None, None) for name in ("one", "two")]
    assert models[0].reference.read_bytes() == models[1].reference.read_bytes()
    assert models[0].graphs["opset23"].read_bytes() == models[1].graphs["opset23"].read_bytes()
    _, logits = read_reference(models[0].reference)
    assert len({int(row.argmax()) for row in logits}) > 2
    assert small_decoder().windows[1] < 64  # that the reference goes beyond
