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


def write_ladder(folder: Path, reports: Sequence[Report]) -> Path:
    """A frontier's bundle that holds its document and no model."""
    texts = {"frontier.json": frontier_of(reports).model_dump_json(), "frontier.html": "an old page"}
    return _write(folder, texts, {"kind": "frontier"})


def _write(folder: Path, texts: Mapping[str, str], manifest: Mapping[str, str]) -> Path:
    rung, staging = (folder.with_name(f"{folder.name}.{part}") for part in ("rung", "work"))
    rung.mkdir(parents=True)
    (rung / "reference.npz").write_bytes(b"no reference")
    write_bundle(staging, folder, [rung], {}, texts, manifest, lambda files: {}, chosen=None)
    return folder
