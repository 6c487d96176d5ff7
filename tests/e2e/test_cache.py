"""A KV cache in 8 bits, through the real command line on a small random model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from edgeprune.report.schema import Report
from tests.support.checkpoints import save_llama
from tests.support.commands import run

pytestmark = pytest.mark.slow

OWN = ("--samples", "4", "--length", "32", "--prompt", "16", "--context", "128", "--weights", "float")


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its cache is a large part of its memory."""
    folder = tmp_path_factory.mktemp("home")
    sizes = {"hidden_size": 128, "num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 32}
    save_llama(folder / "model", **sizes, num_hidden_layers=3, intermediate_size=256, initializer_range=0.05)
    texts = (f"the quick brown fox jumps over {i} lazy dogs" * 9 for i in range(60))
    (folder / "text.txt").write_text("\n\n".join(texts))
    return folder


def fitted(home: Path, name: str, *words: str) -> Report:
    given = (home / "model", "--calibration", home / "text.txt", "--output", home / name, "--max-quality-loss", "off")
    result = run("fit", *given, *words, *OWN, "--json")
    assert result.returncode in (0, 3), result.stderr
    return Report.model_validate_json(result.stdout)


def cache_bytes(side) -> float:
    return side.performance.memory["cache"].value


def test_on_the_processor_it_is_measured_judged_and_run(home: Path) -> None:
    bundle = home / "int8"
    report = fitted(home, "int8", "--device", "cpu", "--cache", "int8", "--memory", "2GiB")
    assert (report.dense.cache, report.fitted.cache) == ("float", "int8")
    assert report.fitted.parameters == report.dense.parameters  # nothing else was needed
    assert cache_bytes(report.dense) == 4 * cache_bytes(report.fitted)
    assert report.fitted.performance.memory["cache"].source == "measured"
    assert all(text.fitted != text.dense for text in report.quality.texts)
    assert [part.name for part in report.levers.parts] == ["KV cache in int8"]
    assert report.levers.parts[0].nats > 0
    assert "KV cache in int8" in (bundle / "report.html").read_text()
    assert "onnxruntime-genai does not run such a cache" in (bundle / "README.md").read_text()
    assert not (bundle / "onnx" / "genai_config.json").exists()
    assert json.loads((bundle / "deployment.json").read_text())["rungs"][0]["cache"] == "int8"
    said = run("run", bundle, "--prompt", "the quick", "--max-new-tokens", "5")
    assert said.returncode == 0, said.stderr
    measured = run("measure", bundle)
    assert measured.returncode in (0, 3), measured.stderr
    assert "KV cache in int8" in measured.stdout
    assert Report.model_validate_json((bundle / "report.json").read_text()).measurement.engine == "onnxruntime"


def test_auto_keeps_floats_where_the_budget_is_met_with_them(home: Path) -> None:
    report = fitted(home, "auto", "--device", "cpu", "--memory", "2GiB")
    assert report.fitted.cache == "float"
    assert (home / "auto" / "onnx" / "genai_config.json").is_file()
    (choice,) = (choice for choice in report.choices if choice.name == "KV cache")
    assert choice.value == "float, int8"


@pytest.mark.parametrize(("device", "form"), [("rtx-a2000", "int8"), ("l4", "fp8")])
def test_tensorrt_builds_it_and_the_report_says_what_was_estimated(home: Path, device: str, form: str) -> None:
    pytest.importorskip("tensorrt_rtx", reason="TensorRT for RTX is not installed")
    (home / "config.toml").write_text(f'cache = "{form}"\n')
    report = fitted(
        home, f"tensorrt-{form}", "--device", device, "--config", str(home / "config.toml"), "--memory", "2GiB"
    )
    assert report.fitted.cache == form
    assert cache_bytes(report.dense) == cache_bytes(report.fitted)  # floats once; codes as past and as present
    choices = {choice.name: choice.value for choice in report.choices}
    assert (choices["dialect"], choices[f"dialect of {form} cache"]) == ("opset24", "opset23")
    (rung,) = json.loads((home / f"tensorrt-{form}" / "deployment.json").read_text())["rungs"]
    assert (rung["cache"], rung["graph"]) == (form, "model.last.onnx")
    assert report.fitted.performance.memory["weights"].source == "built"
    assert all(text.fitted != text.dense for text in report.quality.texts)
    assert run("run", home / f"tensorrt-{form}", "--prompt", "the quick", "--max-new-tokens", "3").returncode == 0


def test_a_ladder_takes_it_too(home: Path) -> None:
    words = ("--device", "jetson-orin", "--cache", "int8", "--rungs", "2", "--calibration", home / "text.txt")
    result = run("frontier", home / "model", *words, *OWN, "--output", home / "ladder", "--json")
    assert result.returncode == 0, result.stderr
    reports = sorted((home / "ladder" / "rungs").glob("*/report.json"))
    assert {Report.model_validate_json(path.read_text()).fitted.cache for path in reports} == {"int8"}


def test_plan_says_what_it_costs_where_floats_stay_in_place(home: Path) -> None:
    words = ("plan", home / "model", "--device", "l4", "--json")
    plain, codes = (json.loads(run(*words, "--cache", form).stdout) for form in ("float", "fp8"))
    assert codes["cache"] == "fp8"
    parts = [one["parts"]["memory_bytes"]["cache"] for one in (plain, codes)]
    assert parts[0] == parts[1]
    assert (plain["dialect"], codes["dialect"]) == ("opset24", "opset23")
    assert codes["decode_ms"] > plain["decode_ms"] > codes["decode_in_place_ms"]
    refused = run(*words, "--cache", "float,int8")
    assert refused.returncode == 2
    assert "A plan is of one: --cache int8." in refused.stderr
