"""The command that makes a draft for a bundle. It parses, calls one function and prints."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from edgeprune.cli import options
from edgeprune.cli.ending import resumable, shown_progress
from edgeprune.cli.options import OUTPUT, PATH
from edgeprune.cli.streams import console, made, show


def draft(
    bundle: options.Bundle,
    rungs: Annotated[int, typer.Option(min=2, help="Smaller forms of the model to try.")] = 4,
    output: Annotated[
        Path | None, typer.Option(help="The draft's bundle. Default: BUNDLE-draft.", rich_help_panel=OUTPUT, **PATH)
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace an older one.", rich_help_panel=OUTPUT)] = False,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with an interrupted run.", rich_help_panel=OUTPUT)
    ] = False,
    json_: options.Json = False,
) -> None:
    """Make a draft of a bundle's own model, to guess tokens ahead for `run` and `serve`; or tell that none pays."""
    from edgeprune.commands.draft import draft as run
    from edgeprune.report.draft import print_draft

    with shown_progress() as progress, resumable():
        result = run(bundle, rungs=rungs, output=output, force=force, resume=resume, progress=progress)
    if json_:
        show(result.report.model_dump_json(indent=2))
    else:
        print_draft(result.report, console())
    if result.bundle is None:
        raise typer.Exit(3)
    with made("bundle", result.bundle):
        if not json_:
            show(f"{result.bundle}: edgeprune run {bundle} --draft {result.bundle} --prompt ...")
