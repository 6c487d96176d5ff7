"""A finished bundle as a run of MLflow: options as parameters, figures as metrics, the report as artifacts.

It adds no figure to the report. A metric's source stands in a tag of its name.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgeprune.bundle.read import PAGE
from edgeprune.errors import EngineError, InputError
from edgeprune.ondevice.bundle import REPORT
from edgeprune.pipeline.run_file import RUN_FILE, read_run_file
from edgeprune.report.schema import Report

if TYPE_CHECKING:
    from mlflow import MlflowClient

EXPERIMENT = "edgeprune"  # where MLflow's own variable names none
FIGURES = {"memory_total": "memory_bytes", "prefill": "prefill_ms", "decode": "decode_ms"}
ANSWER = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2", "MLFLOW_HTTP_REQUEST_TIMEOUT": "20"}  # its own: minutes of retries


class Tracking:
    """An experiment of an MLflow server or store, asked for before any long work.

    Raises InputError where MLflow is not installed, EngineError where the server does not answer.
    """

    def __init__(self, uri: str) -> None:
        self._uri, self._client = uri, _client(uri)
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME") or EXPERIMENT
        try:
            found = self._client.get_experiment_by_name(name)
            self._experiment = found.experiment_id if found else self._client.create_experiment(name)
        except Exception as error:  # MLflow's own, and those of what it stores with
            raise EngineError(
                f"MLflow at {uri} cannot be written: {_reason(error)}", "Start its server, or leave --mlflow out."
            ) from None

    def log(self, bundle: Path, report: Report) -> str:
        """Writes a bundle's run; returns its id. Raises EngineError; the bundle is complete all the same."""
        try:
            return self._log(bundle, report)
        except Exception as error:
            raise EngineError(
                f"MLflow at {self._uri} cannot be written: {_reason(error)}",
                f"The bundle {bundle} is complete, its report is {bundle / PAGE}.",
            ) from None

    def _log(self, bundle: Path, report: Report) -> str:
        tags = {"edgeprune": report.edgeprune, "verdict": report.outcome, "grade": report.quality.grade}
        tags |= {f"source.{metric}": _figure(report, name).source for name, metric in FIGURES.items()}
        run = self._client.create_run(self._experiment, run_name=bundle.name, tags=tags).info.run_id
        try:
            for name, value in _parameters(bundle, report).items():
                self._client.log_param(run, name, value)
            for name, value in metrics_of(report).items():
                self._client.log_metric(run, name, value)
            for name in (REPORT, PAGE):
                self._client.log_artifact(run, str(bundle / name))
        except BaseException:
            self._client.set_terminated(run, "FAILED")
            raise
        self._client.set_terminated(run)
        return run


def metrics_of(report: Report) -> dict[str, float]:
    """Returns the figures of a report by name: those of the fitted model, of the dense one, and what was lost."""
    metrics = {}
    for name, metric in FIGURES.items():
        metrics[metric] = _figure(report, name).value
        metrics[f"dense_{metric}"] = getattr(report.dense.performance, name).value
    metrics |= {"parameters": report.fitted.parameters, "ratio": report.ratio, "total_ratio": report.total_ratio}
    metrics |= {"perplexity_rise_percent": report.quality.rise_percent}
    for text in report.quality.texts:
        metrics[f"perplexity.{_named(text.name)}"] = text.fitted
    for task in report.quality.tasks:
        metrics[f"score_percent.{_named(task.name)}"] = task.fitted.percent
    return {name: float(value) for name, value in metrics.items()}


def _figure(report: Report, name: str) -> Any:
    return getattr(report.fitted.performance, name)


def _parameters(bundle: Path, report: Report) -> dict[str, str]:
    """Returns the options that make the bundle again, and what they resolved to."""
    made = {"device": report.device.name, "engine": report.engine.name, "model_fingerprint": report.model.fingerprint}
    return {name: str(value) for name, value in (read_run_file(bundle / RUN_FILE) | made).items()}


def _named(text: str) -> str:
    """Returns a text as MLflow takes it for a name."""
    return "".join(character if character.isalnum() or character in "_-. /" else "_" for character in text)


def _client(uri: str) -> MlflowClient:
    try:
        os.environ.setdefault("GIT_PYTHON_REFRESH", "quiet")
        for name, value in ANSWER.items():
            os.environ.setdefault(name, value)
        from mlflow import MlflowClient
    except ImportError:
        raise InputError("--mlflow needs MLflow, which is not installed", 'pip install "edgeprune[mlflow]"') from None
    try:
        return MlflowClient(tracking_uri=uri)
    except Exception as error:  # an address of an unknown kind, or a store that it no longer writes
        raise InputError(
            f"--mlflow {uri} is no address of MLflow: {_reason(error)}", "Give http://HOST:PORT."
        ) from None


def _reason(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
