"""A bundle on disk as its documents: they are read back, and its page is written again from them."""

from __future__ import annotations

from pathlib import Path
from typing import TypeVar

from pydantic import BaseModel

from edgeprune.bundle.store import write_again
from edgeprune.errors import InputError
from edgeprune.ondevice.bundle import FRONTIER, REPORT, open_bundle
from edgeprune.report.frontier import Frontier
from edgeprune.report.frontier_page import render_frontier
from edgeprune.report.html import render_html
from edgeprune.report.schema import Report

FRONTIER_FILE = "frontier.json"
PAGE, FRONTIER_PAGE = "report.html", "frontier.html"
Document = TypeVar("Document", bound=BaseModel)


def read_report(folder: Path) -> Report:
    """Returns the report of a bundle, or of a rung. Raises InputError where it cannot be read."""
    return _read(Report, folder / REPORT)


def read_frontier(folder: Path) -> Frontier:
    """Returns the document of a frontier's bundle. Raises InputError where it cannot be read."""
    return _read(Frontier, folder / FRONTIER_FILE)


def render_again(folder: Path) -> Path:
    """Writes the page of a bundle again, from report.json or frontier.json, and returns its path.

    Raises InputError where the folder is not a bundle or its document cannot be read.
    """
    if open_bundle(folder).get("kind") == FRONTIER:
        name, page = FRONTIER_PAGE, render_frontier(read_frontier(folder), folder.resolve().name)
    else:
        name, page = PAGE, render_html(read_report(folder))
    write_again(folder, {name: page})
    return folder / name


def _read(document: type[Document], path: Path) -> Document:
    """Returns a document of this type from a file. Raises InputError where it is missing or not one."""
    try:
        return document.model_validate_json(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        raise InputError(
            f"{path} cannot be read by this version of edgeprune", "Use the version that manifest.json names."
        ) from None
