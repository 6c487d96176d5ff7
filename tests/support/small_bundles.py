"""Bundles of documents made up for tests, written without any run; their one rung is a file of no meaning."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from edgeprune.bundle.store import write_bundle
from edgeprune.report.frontier import frontier_of
from edgeprune.report.schema import Report


def write_report(folder: Path, report: Report) -> Path:
    """A bundle that holds a report and no model."""
    return _write(folder, {"report.json": report.model_dump_json(), "report.html": "an old page"}, {})


def write_checkpoint(folder: Path, report: Report, files: Mapping[str, bytes]) -> Path:
    """A bundle that holds a report, and files of no meaning as its checkpoint."""
    texts = {f"rungs/0/model/{name}": data for name, data in files.items()}
    return _write(folder, {"report.json": report.model_dump_json()} | texts, {"engine": "onnxruntime"}, chosen=0)


def write_ladder(folder: Path, reports: Sequence[Report]) -> Path:
    """A frontier's bundle that holds its document and no model."""
    texts = {"frontier.json": frontier_of(reports).model_dump_json(), "frontier.html": "an old page"}
    return _write(folder, texts, {"kind": "frontier"})


def _write(
    folder: Path, texts: Mapping[str, str | bytes], manifest: Mapping[str, str], chosen: int | None = None
) -> Path:
    rung, staging = (folder.with_name(f"{folder.name}.{part}") for part in ("rung", "work"))
    rung.mkdir(parents=True)
    (rung / "reference.npz").write_bytes(b"no reference")
    if chosen is not None:
        (rung / "model").mkdir()
        (rung / "model" / "config.json").write_bytes(b"{}")
    write_bundle(staging, folder, [rung], {}, texts, manifest, lambda files: {}, chosen=chosen)
    return folder
