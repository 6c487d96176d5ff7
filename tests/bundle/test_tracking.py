"""A bundle as a run of MLflow, in a real store of files: parameters, metrics, tags, artifacts."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from edgeprune.bundle.tracking import FIGURES, Tracking, metrics_of
from edgeprune.errors import EngineError, InputError
from tests.support.commands import SMALL, run
from tests.support.families import save_family
from tests.support.sample_reports import measured_content, report_of

mlflow = pytest.importorskip("mlflow", reason="MLflow is not installed")


@pytest.fixture
def store(tmp_path, monkeypatch) -> str:
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.delenv("MLFLOW_EXPERIMENT_NAME", raising=False)
    return (tmp_path / "mlruns").as_uri()


def bundle_of(folder: Path) -> Path:
    bundle = folder / "a bundle"
    bundle.mkdir()
    report = report_of(measured_content())
    (bundle / "report.json").write_text(report.model_dump_json())
    (bundle / "report.html").write_text("<p>")
    (bundle / "run.toml").write_text('memory = "60%"\nsamples = 8\n')
    return bundle


def test_a_run_holds_options_figures_with_their_sources_and_the_report(tmp_path, store):
    bundle, report = bundle_of(tmp_path), report_of(measured_content())
    run_id = Tracking(store).log(bundle, report)
    client = mlflow.MlflowClient(tracking_uri=store)
    logged = client.get_run(run_id)
    assert logged.info.run_name == "a bundle" and logged.info.status == "FINISHED"
    assert client.get_experiment(logged.info.experiment_id).name == "edgeprune"
    assert logged.data.params.items() >= {"memory": "60%", "samples": "8", "device": report.device.name}.items()
    assert logged.data.metrics == metrics_of(report)
    for name, metric in FIGURES.items():
        figure = getattr(report.fitted.performance, name)
        assert logged.data.metrics[metric] == figure.value
        assert logged.data.tags[f"source.{metric}"] == figure.source
    assert {entry.path for entry in client.list_artifacts(run_id)} == {"report.json", "report.html"}


def test_the_experiment_is_the_one_that_mlflows_variable_names(tmp_path, store, monkeypatch):
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "nightly")
    run_id = Tracking(store).log(bundle_of(tmp_path), report_of(measured_content()))
    client = mlflow.MlflowClient(tracking_uri=store)
    assert client.get_experiment(client.get_run(run_id).info.experiment_id).name == "nightly"


def test_a_run_that_cannot_be_finished_is_marked_and_the_bundle_named(tmp_path, store):
    bundle = bundle_of(tmp_path)
    (bundle / "report.html").unlink()
    tracking = Tracking(store)
    with pytest.raises(EngineError, match="cannot be written") as caught:
        tracking.log(bundle, report_of(measured_content()))
    assert "is complete" in caught.value.remedy
    client = mlflow.MlflowClient(tracking_uri=store)
    (experiment,) = [one for one in client.search_experiments() if one.name == "edgeprune"]
    (logged,) = client.search_runs([experiment.experiment_id])
    assert logged.info.status == "FAILED"


def test_a_server_that_does_not_answer_is_told_before_any_work(tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with pytest.raises(EngineError, match="cannot be written"):
        Tracking("http://127.0.0.1:1")
    with pytest.raises(InputError, match="no address of MLflow"):
        Tracking("gopher://x")


@pytest.mark.slow
def test_a_fit_logs_itself(tmp_path, store):
    save_family(tmp_path / "llama", "llama")
    words = ("--device", "jetson-orin", "--decode", "99%", "--max-quality-loss", "off", "--mlflow", store)
    done = run("fit", tmp_path / "llama", *SMALL, *words, "--output", tmp_path / "out", "--json")
    assert done.returncode in (0, 3), done.stderr
    client = mlflow.MlflowClient(tracking_uri=store)
    experiment = client.get_experiment_by_name("edgeprune")
    (logged,) = client.search_runs([experiment.experiment_id])
    report = json.loads(done.stdout)
    assert logged.info.run_name == "out"
    assert logged.data.metrics["decode_ms"] == report["fitted"]["performance"]["decode"]["value"]
    assert logged.data.params["decode"] == "99%"


def test_nothing_imports_mlflow_unasked():
    program = "import sys, edgeprune.commands.fit, edgeprune.bundle.tracking; assert 'mlflow' not in sys.modules"
    subprocess.run([sys.executable, "-c", program], check=True)
