"""A fit of a model of images and text: of its text part, which the bundle holds as a model of its own."""

import json

import numpy as np
import pytest
from transformers import AutoModelForImageTextToText

from edgeprune.model.load import load_model
from edgeprune.report.schema import Report
from tests.support.commands import SHORT, run
from tests.support.graph_models import session
from tests.support.wholes import save_whole


@pytest.mark.slow
def test_the_text_part_is_fitted_and_the_report_says_so(tmp_path):
    save_whole(tmp_path / "whole", "gemma3")
    asked = (
        "--decode",
        "99.99%",
        "--weights",
        "float",
        "--max-quality-loss",
        "off",
        "--export",
        "whole",
        "--output",
        tmp_path / "out",
    )
    result = run("fit", tmp_path / "whole", "--device", "jetson-orin", *SHORT, *asked)
    assert result.returncode in (0, 3), result.stderr
    assert "the text part (of gemma3: images are left out" in result.stderr
    report = Report.model_validate_json((tmp_path / "out" / "report.json").read_text())
    (warning,) = (one for one in report.warnings if one.startswith("This is the text part of gemma3"))
    assert warning.endswith("Its graphs take tokens alone: gemma3 gives images more than embeddings in their place.")
    config = json.loads((tmp_path / "out" / "model" / "config.json").read_text())
    assert config["architectures"] == ["Gemma3ForCausalLM"]
    whole = AutoModelForImageTextToText.from_pretrained(tmp_path / "out" / "whole")
    assert whole.config.text_config.intermediate_size == config["intermediate_size"]
    text = (tmp_path / "out" / "README.md").read_text()
    assert "`whole/`" in text and "embeddings.last.onnx" not in text
    assert not list((tmp_path / "out" / "onnx").glob("*embedding*.onnx"))
    fitted = load_model(str(tmp_path / "out" / "model"))
    assert fitted.part_of == "" and fitted.decoder.layer_parameters < report.dense.parameters


@pytest.mark.slow
def test_where_images_are_embeddings_the_bundle_has_graphs_that_read_these(tmp_path):
    save_whole(tmp_path / "whole", "smolvlm")
    floats = ("--weights", "float", "--cache", "float")
    asked = ("--memory", "99%", *floats, "--max-quality-loss", "off", "--output", tmp_path / "out")
    result = run("fit", tmp_path / "whole", "--device", "cpu", *SHORT, *asked)
    assert result.returncode in (0, 3), result.stderr
    report = Report.model_validate_json((tmp_path / "out" / "report.json").read_text())
    (warning,) = (one for one in report.warnings if one.startswith("This is the text part of smolvlm"))
    assert warning.endswith("Graphs named `embeddings` take those of images among those of tokens.")
    assert "embeddings.last.onnx" in (tmp_path / "out" / "README.md").read_text()
    # Of tokens they give what the deployed graph gives.
    graphs, ids = tmp_path / "out" / "onnx", np.arange(20, 36)[None]
    (embeddings,) = session(graphs / "embedding.onnx").run(None, {"input_ids": ids})
    inputs = {"position_ids": np.arange(16)[None], "attention_mask": np.ones((1, 16), np.int64)}
    logits = []
    for name, given in (("model.last", {"input_ids": ids}), ("model.embeddings.last", {"inputs_embeds": embeddings})):
        graph = session(graphs / f"{name}.onnx")
        empty = {one.name: one.shape for one in graph.get_inputs() if one.name.startswith("past_key_values.")}
        past = {name: np.zeros((1, shape[1], 0, shape[3]), np.float32) for name, shape in empty.items()}
        logits.append(graph.run(["logits"], inputs | given | past)[0])
    assert np.array_equal(*logits)
