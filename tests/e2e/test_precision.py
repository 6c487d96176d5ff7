"""A model that fp16 does not hold, on the real command line: found before anything is built, and fitted in bf16."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from edgeprune.report.schema import Report
from tests.support.checkpoints import save_llama
from tests.support.commands import SMALL, run

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What layer 1 writes is far beyond 65504, and none of its weights is; the norm before the head takes it all."""
    folder = tmp_path_factory.mktemp("home")
    save_llama(folder / "model", num_hidden_layers=3, intermediate_size=1024)
    path = folder / "model" / "model.safetensors"
    weights = load_file(path)
    weights["model.layers.1.mlp.down_proj.weight"] *= 5e4
    save_file(weights, path, {"format": "pt"})
    (folder / "text.txt").write_text(
        "\n\n".join(f"the quick brown fox jumps over {i} lazy dogs" * 9 for i in range(60))
    )
    return folder


def fit(home: Path, precision: str) -> subprocess.CompletedProcess:
    return run(
        "fit",
        home / "model",
        "--device",
        "l4",
        "--memory",
        "97%",
        "--calibration",
        home / "text.txt",
        "--output",
        home / precision,
        "--precision",
        precision,
        "--json",
        *SMALL,
    )


def test_fp16_is_refused_before_an_engine_is_built(home: Path) -> None:
    result = fit(home, "fp16")
    assert result.returncode == 2, result.stderr
    assert "layer 1 mlp: down reaches" in result.stderr
    assert "on the calibration samples, fp16 holds 65504" in result.stderr
    assert "Use --precision bf16 or fp32." in result.stderr
    assert "Traceback" not in result.stderr
    assert not list(home.rglob("*.engine"))
    assert not list(home.rglob("onnx-fp16"))


def test_bf16_is_fitted(home: Path) -> None:
    pytest.importorskip("tensorrt_rtx", reason="TensorRT for RTX is not installed")
    result = fit(home, "bf16")
    assert result.returncode in (0, 3), result.stderr
    report = Report.model_validate_json(result.stdout)
    assert report.precision == "bf16"
    assert report.fitted.performance.memory["weights"].source == "built"
    assert list((home / "bf16" / "engine").glob("*.engine"))
    assert json.loads((home / "bf16" / "model" / "config.json").read_text())["dtype"] == "bfloat16"
    stored = load_file(home / "bf16" / "model" / "model.safetensors").values()
    assert {weight.dtype for weight in stored if weight.dtype.is_floating_point} <= {torch.bfloat16, torch.float32}
    assert torch.bfloat16 in {weight.dtype for weight in stored}
    said = run("run", home / "bf16", "--prompt", "the quick", "--max-new-tokens", "3")
    assert said.returncode == 0, said.stderr
    assert "by ONNX Runtime on the processor" in said.stderr


def test_the_processor_has_no_bf16(home: Path) -> None:
    result = run("fit", home / "model", "--device", "cpu", "--precision", "bf16", "--output", home / "cpu")
    assert result.returncode == 2
    assert "cpu has no bf16: ONNX Runtime on a processor computes no product in it" in result.stderr
    assert "Use --precision fp32." in result.stderr
    shown = run("plan", home / "model", "--device", "l4", "--precision", "bf16", "--prompt", "16", "--json")
    assert shown.returncode == 0, shown.stderr
    assert json.loads(shown.stdout)["precision"] == "bf16"
