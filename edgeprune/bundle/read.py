"""A bundle on disk as its documents: they are read back, and its page is written again from them."""

from __future__ import annotations

from pathlib import Path
from typing import TypeVar

from pydantic import BaseModel, ValidationError

from edgeprune.bundle.store import write_again
from edgeprune.errors import InputError
from edgeprune.files import parse_json, printable, read_text
from edgeprune.ondevice.bundle import FRONTIER, OTHER_VERSION, REPORT, open_bundle, rung_folder, rungs_of
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


def check_reports(folder: Path) -> None:
    """Raises InputError where a report of the bundle or of one of its rungs cannot be read."""
    for place in (folder, *(rung_folder(folder, index) for index in rungs_of(folder))):
        read_report(place)


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
    text = read_text(path, OTHER_VERSION)
    parse_json(text, str(path), remedy=OTHER_VERSION, finite=True)
    try:
        return document.model_validate_json(text)
    except ValidationError as error:
        first = error.errors()[0]
        place = printable(".".join(map(str, first["loc"])) or "it", 100)
        raise InputError(
            f"{path} cannot be read by this version of edgeprune: {place}: {first['msg'].lower()}", OTHER_VERSION
        ) from None
