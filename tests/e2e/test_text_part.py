"""A fit of a model of images and text: of its text part, which the bundle holds as a model of its own."""

import json

import pytest
from transformers import AutoModelForImageTextToText

from edgeprune.model.load import load_model
from edgeprune.report.schema import Report
from tests.support.commands import SHORT, run
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
    assert any(warning.startswith("This is the text part of gemma3") for warning in report.warnings)
    config = json.loads((tmp_path / "out" / "model" / "config.json").read_text())
    assert config["architectures"] == ["Gemma3ForCausalLM"]
    whole = AutoModelForImageTextToText.from_pretrained(tmp_path / "out" / "whole")
    assert whole.config.text_config.intermediate_size == config["intermediate_size"]
    assert "`whole/`" in (tmp_path / "out" / "README.md").read_text()
    fitted = load_model(str(tmp_path / "out" / "model"))
    assert fitted.part_of == "" and fitted.decoder.layer_parameters < report.dense.parameters
