"""The real command line on small random models: every station, killed and resumed, and bad input."""

from __future__ import annotations

import json
import math
import signal
import time
from pathlib import Path

import pytest
import torch

from edgeprune.ondevice.bundle import open_bundle, sha256
from edgeprune.report.schema import Report
from tests.support import MOST_PAGE_BYTES
from tests.support.checkpoints import save_llama
from tests.support.commands import SMALL, begin, run, run_alone

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    """A folder with a small model, and text to calibrate on."""
    folder = tmp_path_factory.mktemp("home")
    # Large enough that its weights, and not the engine's workspace, are what a budget is about.
    save_llama(
        folder / "model",
        num_hidden_layers=4,
        hidden_size=512,
        num_attention_heads=8,
        head_dim=64,
        intermediate_size=1024,
        initializer_range=0.05,
    )
    words = ["the", "quick", "brown", "fox", "jumps", "over", "the", "lazy", "dog", "and", "runs", "away", "from", "it"]
    paragraphs = [" ".join(words[(i * j) % len(words)] for j in range(1, 60)) + f" {i}" for i in range(80)]
    (folder / "text.txt").write_text("\n\n".join(paragraphs))
    (folder / "few").mkdir()
    (folder / "few" / "text.txt").write_text("\n\n".join(paragraphs[:10]))  # every model of a comparison reads it all
    return folder


@pytest.fixture(scope="module")
def fitted(home) -> Path:
    bundle = home / "fitted"
    result = run_alone(
        "fit",
        home / "model",
        "--device",
        "jetson-orin",
        "--memory",
        "90%",
        "--calibration",
        home / "text.txt",
        "--output",
        bundle,
        "--json",
        *SMALL,
    )
    assert result.returncode == 0, result.stderr
    assert Report.model_validate_json(result.stdout) == Report.model_validate_json((bundle / "report.json").read_text())
    return bundle


def test_the_bundle_is_whole_and_true(fitted):
    manifest = open_bundle(fitted)
    assert all(sha256(fitted / name) == digest for name, digest in manifest["sha256"].items())
    report = Report.model_validate_json((fitted / "report.json").read_text())
    assert report.status == "met"
    assert report.rests_on == "estimated"
    assert report.fitted.performance.memory_total.value <= report.budget[0].limit
    weights = [side.performance.memory["weights"].value for side in (report.fitted, report.dense)]
    assert weights[0] < weights[1]
    assert report.fitted.formats
    assert report.levers.parts
    assert report.cross_check["decode_ratio"].source == "measured"
    assert report.quality.label == "perplexity"
    assert 0 < (fitted / "report.html").stat().st_size < MOST_PAGE_BYTES
    assert not list(fitted.parent.glob("*.work"))


def test_the_checkpoint_gives_the_graphs_logits(fitted):
    import numpy as np
    import onnxruntime
    from transformers import AutoModelForCausalLM

    ids = torch.randint(0, 257, (1, 12), generator=torch.Generator().manual_seed(0))
    expected = (
        AutoModelForCausalLM.from_pretrained(fitted / "model", local_files_only=True)(ids).logits.detach().numpy()
    )
    session = onnxruntime.InferenceSession(str(fitted / "onnx" / "model.onnx"), providers=["CPUExecutionProvider"])
    feeds = {
        "input_ids": ids.numpy(),
        "position_ids": np.arange(12)[None],
        "attention_mask": np.ones((1, 12), np.int64),
    }
    for node in session.get_inputs():
        if node.name.startswith("past"):
            feeds[node.name] = np.zeros((1, node.shape[1], 0, node.shape[3]), np.float16)
    logits = session.run(["logits"], feeds)[0].astype(np.float32)
    assert np.abs(logits - expected).max() < 1e-2 * np.abs(expected).max()  # the device's precision is fp16


def test_run_streams_text_from_the_bundle(fitted):
    result = run("run", fitted, "--prompt", "the quick", "--max-new-tokens", "5")
    assert result.returncode == 0, result.stderr
    again = run("run", fitted, "--prompt", "the quick", "--max-new-tokens", "5")
    assert result.stdout == again.stdout


def test_a_relative_path_run_elsewhere_works(home, tmp_path):
    result = run(
        "fit",
        home / "model",
        "--device",
        "jetson-orin",
        "--memory",
        "95%",
        "--calibration",
        home / "text.txt",
        "--output",
        "here",
        *SMALL,
        cwd=tmp_path,
    )
    assert result.returncode == 0, result.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["here"]


@pytest.mark.timing
def test_a_measured_budget_on_this_processor(home):
    """The verdict is the run's own; that it is true on a real model is shown by tools/bench_fit.py."""
    result = run(
        "fit", home / "model", "--device", "cpu", "--memory", "90%", "--output", home / "cpu", "--json", *SMALL
    )
    assert result.returncode in (0, 3), result.stderr
    report = Report.model_validate_json(result.stdout)
    assert report.rests_on == "measured"
    assert report.quality.label == "agreement with the dense model"
    assert {figure.source for figure in report.fitted.performance.memory.values()} == {"measured"}
    assert 1 <= len(report.search.candidates) <= 5


def test_a_budget_that_the_dense_model_meets_exports_it_unpruned(home):
    result = run(
        "fit",
        home / "model",
        "--device",
        "jetson-orin",
        "--memory",
        "8GiB",
        "--output",
        home / "dense",
        "--json",
        *SMALL,
    )
    assert result.returncode == 0, result.stderr
    report = Report.model_validate_json(result.stdout)
    assert (report.search.ending, report.ratio) == ("dense", 0)
    assert " as it is; it was not yet tried on the device." in report.headline
    assert "already meets" in result.stderr


@pytest.mark.parametrize("precision", ["fp16", "fp32"])
def test_an_engine_is_built_without_a_gpu(home, precision):
    pytest.importorskip("tensorrt_rtx", reason="TensorRT for RTX is not installed")
    result = run(
        "fit",
        home / "model",
        "--device",
        "l4",
        "--memory",
        "95%",
        "--calibration",
        home / "text.txt",
        "--output",
        home / precision,
        "--precision",
        precision,
        "--json",
        *SMALL,
    )
    assert result.returncode in (0, 3), result.stderr
    report = Report.model_validate_json(result.stdout)
    assert report.fitted.performance.memory["weights"].source == "built"
    assert report.fitted.performance.decode.source == "estimated"
    assert list((home / precision / "engine").glob("*.engine"))
    engine = report.fitted.performance.conditions["engine"]
    assert "SM 89, built in" in engine
    assert "MiB of memory at its peak" in engine


def test_for_an_sm_that_cannot_be_built_the_nearest_one_is_a_check(fitted):
    """Its figures stay estimates, and no engine of another SM is shipped."""
    pytest.importorskip("tensorrt_rtx", reason="TensorRT for RTX is not installed")
    report = Report.model_validate_json((fitted / "report.json").read_text())
    assert "SM 86" in report.fitted.performance.conditions["feasibility"]
    assert "not in the bundle" in report.fitted.performance.conditions["feasibility"]
    weights = report.fitted.performance.memory["weights"]
    assert (weights.source, report.rests_on) == ("estimated", "estimated")
    assert "the nearest to SM 87 that it offers" in weights.basis
    assert not list(fitted.rglob("*.engine"))


def test_require_measured_makes_an_estimate_a_failure(home):
    result = run(
        "fit",
        home / "model",
        "--device",
        "jetson-orin",
        "--memory",
        "8GiB",
        "--require-measured",
        "--no-checkpoint",
        "--output",
        home / "strict",
        *SMALL,
    )
    assert result.returncode == 4
    assert not (home / "strict" / "model").exists()


def test_a_quality_limit_that_only_the_dense_model_keeps_is_exit_code_3(home):
    """On the dense model's own text nothing does better than the dense model; on other text a random one may gain."""
    bundle = home / "quality"
    result = run(
        "fit",
        home / "model",
        "--device",
        "jetson-orin",
        "--memory",
        "70%",
        "--weights",
        "float",
        "--max-quality-loss",
        "0",
        "--output",
        bundle,
        "--json",
        "--samples",
        "16",
        "--length",
        "48",
        "--prompt",
        "16",
        "--context",
        "64",
    )
    assert result.returncode == 3, result.stderr
    report = Report.model_validate_json(result.stdout)
    assert (report.status, report.quality_status) == ("missed", "met")
    assert (report.quality_stop.tried, report.ratio, report.quality.rise_percent) == (0, 0, 0)
    assert report.quality_stop.rise_percent > 0
    assert report.quality_stop.performance.memory_total.value <= report.budget[0].limit
    assert report.fitted.widths == report.dense.widths
    quality = next(row for row in report.budget if row.name == "quality")
    assert (quality.status, quality.fitted.high) == ("met", 0)
    assert "within the quality limit of 0%; the smallest within it is kept" in report.headline
    assert open_bundle(bundle)


@pytest.mark.parametrize("stage", ["samples", "candidate-1", "evaluation 0"])
def test_a_killed_run_resumes_to_the_same_bundle(home, tmp_path, stage):
    """SIGKILL right after a stage was recorded (and in the middle of the next one), then --resume."""
    words = ["fit", home / "model", "--device", "jetson-orin", "--memory", "90%", "--seed", "3", *SMALL]
    whole = home / "whole"
    if not whole.exists():
        assert run(*words, "--output", whole).returncode == 0
    cut = tmp_path / "cut"
    process = begin(*words, "--output", cut)
    journal = tmp_path / "cut.work" / "journal.jsonl"
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline and process.poll() is None:
        if journal.exists() and f'"stage": "{stage}"' in journal.read_text():
            break
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert not cut.exists(), "a killed run leaves no bundle"
    refused = run(*words, "--output", cut)
    assert refused.returncode == 2
    assert "--resume" in refused.stderr
    other = run(*words, "--output", cut, "--resume", "--seed", "4")
    assert other.returncode == 2
    assert "seed" in other.stderr
    assert run(*words, "--output", cut, "--resume").returncode == 0
    weights = Path("rungs/0/model/model.safetensors")
    graphs = sorted(p.relative_to(whole) for p in (whole / "rungs/0/onnx").iterdir())
    for name in (weights, *graphs):
        assert (cut / name).read_bytes() == (whole / name).read_bytes(), name
    assert not journal.parent.exists()


def test_compare_puts_methods_side_by_side(home):
    page = home / "page.html"
    (home / "other.txt").write_text("\n\n".join(f"colourless green ideas {i} sleep furiously " * 40 for i in range(2)))
    result = run(
        "compare",
        home / "model",
        "--ratios",
        "20,40",
        "--methods",
        "magnitude,flap,default",
        "--layout",
        "both",
        "--calibration",
        home / "text.txt",
        "--evaluate",
        home / "few" / "text.txt",
        "--evaluate",
        home / "other.txt",
        "--samples",
        "4",
        "--length",
        "32",
        "--json",
        "--html",
        page,
    )
    assert result.returncode == 0, result.stderr
    dense, *rows = json.loads(result.stdout)["rows"]
    assert [dense["method"], dense["ratio"]] == ["dense", 0]
    assert {row["layout"] for row in rows[:6]} == {"uniform"}
    assert {row["layout"] for row in rows[6:]} == {"per-layer"}
    assert [row["method"] for row in rows] == ["default", "magnitude", "flap"] * 4
    for row in rows:
        assert abs(row["ratio"] - row["asked"]) <= 0.005
        assert set(row["perplexity"]) == set(row["rise"]) == {"text", "other"}
        assert row["peak_bytes"] > 0
        assert row["decode_bytes"] < dense["decode_bytes"]
        for text in ("text", "other"):
            value, low, high = row["rise"][text]
            assert low <= value <= high
            assert value == pytest.approx(math.log(row["perplexity"][text] / dense["perplexity"][text]), abs=1e-6)
        if row["method"] == "default":
            assert row["over_default"] == {}
        else:
            own = next(
                r
                for r in rows
                if r["method"] == "default" and (r["layout"], r["asked"]) == (row["layout"], row["asked"])
            )
            expected = row["rise"]["other"][0] - own["rise"]["other"][0]
            assert row["over_default"]["other"][0] == pytest.approx(expected, abs=1e-6)
    assert 0 < page.stat().st_size < MOST_PAGE_BYTES
    again = run("compare", home / "model", "--calibration", home / "text.txt", "--html", page)
    assert again.returncode == 2
    assert "--force" in again.stderr
    table = run(
        "compare",
        home / "model",
        "--ratios",
        "20",
        "--methods",
        "default",
        "--calibration",
        home / "text.txt",
        "--samples",
        "4",
        "--length",
        "32",
    )
    assert "layout uniform" in table.stdout
    assert "default" in table.stdout


def test_report_is_rendered_again(fitted):
    before = (fitted / "report.html").read_text()
    (fitted / "report.html").write_text("lost")
    result = run("report", fitted)
    assert result.returncode == 0, result.stderr
    assert len((fitted / "report.html").read_text()) == pytest.approx(len(before), rel=0.01)
