"""The bundle of a finished run, written from its results: the reports, the texts, the rungs' files.

It searches and measures nothing.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from edgeprune.bundle.deployment import deployment
from edgeprune.bundle.read import FRONTIER_FILE, FRONTIER_PAGE, PAGE
from edgeprune.bundle.readme import frontier_readme, readme
from edgeprune.bundle.store import write_bundle
from edgeprune.engine.remote import program, service_program
from edgeprune.files import link_or_copy
from edgeprune.model.checkpoint.nested import MERGED
from edgeprune.model.export import write_exports
from edgeprune.model.origin import CARD, origin_of
from edgeprune.model.tokens.tokenizer import tokenizer_files
from edgeprune.model.tokens.vocabulary import read_vocabulary
from edgeprune.ondevice.budget import Budget
from edgeprune.ondevice.bundle import FRONTIER, REPORT, TOKENIZER
from edgeprune.ondevice.finish import DEPLOYMENT
from edgeprune.pipeline.journal import Journal
from edgeprune.pipeline.provenance import manifest_of
from edgeprune.pipeline.request import FRONTIER_OPTIONS
from edgeprune.pipeline.results import Fitted, has_checkpoint
from edgeprune.pipeline.run_file import RUN_FILE, run_file
from edgeprune.profiles import profile_toml
from edgeprune.report import schema
from edgeprune.report.build import build_report
from edgeprune.report.card import card
from edgeprune.report.deploy import FINISH, SERVE
from edgeprune.report.frontier import frontier_of, pick_command
from edgeprune.report.frontier_page import render_frontier
from edgeprune.report.html import render_html
from edgeprune.report.schema import Step


def write_fitted(rungs: Sequence[Fitted], journal: Journal, command: str) -> None:
    """Writes the finished bundle of a fit to the setup's output.

    rungs: the chosen one first, smaller ones after it; journal: of the run, in whose folder the bundle is assembled;
    command: the command line of the run.
    """
    # Collect each rung's files with its own report.
    fitted, setup, work = rungs[0], rungs[0].setup, journal.folder
    folders = [
        rung_folder(rung, build_report(rung, {}, command), work / "rungs" / str(index), tokenizer_folder(fitted))
        for index, rung in enumerate(rungs)
    ]
    # Write the texts of the whole bundle; the report lists all files, so it is rendered last.
    texts = {
        "profile.toml": profile_toml(setup.profile),
        "README.md": readme(build_report(fitted, {}, command), setup.model.part_of in MERGED),
        DEPLOYMENT: json.dumps(deployment(rungs), indent=2) + "\n",
        FINISH: program(),
        **({SERVE: service_program()} if setup.kind.writes_text else {}),
        RUN_FILE: run_file(setup),
    }

    def render(files: dict[str, int]) -> dict[str, str]:
        return rendered(build_report(fitted, files, command))

    shared = setup.kind.shared_files(setup.model, tokenizer_folder(fitted), work)
    manifest = manifest_of(setup, command, journal.id)
    write_bundle(work / "bundle", setup.output, folders, shared, texts, manifest, render)


def rung_folder(fitted: Fitted, report: schema.Report, folder: Path, tokenizer: Path) -> Path:
    """Fills a folder with all that a rung consists of, links to the work of the run and its own report; returns it.

    tokenizer: the folder of the bundle's tokenizer; a rung with another one, for a vocabulary of its own, brings it
    along.
    """
    # Link what the run wrote: checkpoint, exports, graphs, engine, reference.
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    exported = fitted.chosen.exported
    if has_checkpoint(fitted):
        _write_checkpoint(fitted, report, folder / "model")
    setup = fitted.setup
    models = fitted.chosen.model, setup.model
    write_exports(setup.request.export, *models, folder, setup.model.name, setup.workload.context)
    (folder / "onnx").symlink_to(exported.graphs)
    if exported.engine.is_dir():
        (folder / "engine").symlink_to(exported.engine)
    (folder / exported.reference.name).symlink_to(exported.reference)
    if fitted.sketch is not None:
        (folder / fitted.sketch.name).symlink_to(fitted.sketch)
    # Add the rung's own tokenizer and report.
    if (own := tokenizer_folder(fitted)) != tokenizer:
        (folder / TOKENIZER).mkdir()
        for name, path in tokenizer_files(own).items():
            shutil.copyfile(path, folder / TOKENIZER / name)  # no link: it may be the user's own file
    (folder / REPORT).write_text(as_json(report), encoding="utf-8")
    return folder


def _write_checkpoint(fitted: Fitted, report: schema.Report, folder: Path) -> None:
    """Fills a folder with links to a checkpoint's files, and with a card of its own in place of the source's."""
    folder.mkdir()
    for path in sorted(fitted.chosen.model.directory.iterdir()):
        if path.is_file() and path.name != CARD:
            link_or_copy(path, folder / path.name)
    origin = origin_of(fitted.setup.request.model, fitted.setup.model.directory)
    (folder / CARD).write_text(card(report, origin), encoding="utf-8")


def rendered(report: schema.Report) -> dict[str, str]:
    """Returns the two forms of a bundle's report, by the names of their files."""
    return {REPORT: as_json(report), PAGE: render_html(report)}


def as_json(document: BaseModel) -> str:
    """Returns the text of a document's file."""
    return document.model_dump_json(indent=2) + "\n"


def tokenizer_folder(fitted: Fitted) -> Path:
    """Returns the folder of the dense model's tokenizer, or of the fitted model's where its vocabulary is its own."""
    own = fitted.chosen.model.directory
    return fitted.setup.model.directory if read_vocabulary(own) is None else own


def write_frontier(rungs: Sequence[Fitted], journal: Journal, command: str) -> None:
    """Writes the finished bundle of a frontier to the setup's output.

    rungs: the largest first; journal and command: as of write_fitted. Each rung has all that a
    bundle of its own needs: see `pick`.
    """
    # Collect each rung's files with its own report and deployment.json. The run itself has no budget, its rungs have.
    setup, work = replace(rungs[0].setup, budget=Budget()), journal.folder
    reports, folders = [], []
    for index, rung in enumerate(rungs):
        step = Step(title="Pick this rung: a bundle of its own", command=pick_command(setup.output.name, index))
        reports.append(build_report(rung, {}, command).model_copy(update={"deploy": [step]}))
        folders.append(rung_folder(rung, reports[-1], work / "rungs" / str(index), setup.model.directory))
        (folders[-1] / DEPLOYMENT).write_text(json_text(deployment([rung])), encoding="utf-8")
    # Write the document of the frontier and the texts of the whole bundle.
    frontier = frontier_of(reports)
    texts = {
        "profile.toml": profile_toml(setup.profile),
        "README.md": frontier_readme(frontier, setup.output.name),
        RUN_FILE: run_file(setup, FRONTIER_OPTIONS),
    }

    def render(files: dict[str, int]) -> dict[str, str]:
        return {FRONTIER_FILE: as_json(frontier), FRONTIER_PAGE: render_frontier(frontier, setup.output.name)}

    manifest = {"kind": FRONTIER, **manifest_of(setup, command, journal.id)}
    shared = setup.kind.shared_files(setup.model, setup.model.directory, work)
    write_bundle(work / "bundle", setup.output, folders, shared, texts, manifest, render, chosen=None)


def json_text(value: Any) -> str:
    """Returns the text of a JSON file."""
    return json.dumps(value, indent=2) + "\n"
