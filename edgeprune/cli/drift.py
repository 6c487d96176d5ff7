"""The command that compares new texts with the calibration data of a bundle."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from edgeprune.cli import options
from edgeprune.cli.ending import shown_progress
from edgeprune.cli.options import MODEL, PATH
from edgeprune.cli.streams import console, show
from edgeprune.pipeline.sketch import SAMPLES


def drift(
    bundle: options.Bundle,
    texts: Annotated[
        Path, typer.Option(help="The new texts: text, jsonl, or a folder of them.", rich_help_panel=MODEL, **PATH)
    ],
    since: Annotated[
        Path | None,
        typer.Option(
            help="The calibration data. Default: the sketch of it that the bundle holds.", rich_help_panel=MODEL, **PATH
        ),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            metavar="MODEL",
            help="The dense model. Default: that of the fit, where it is on this machine.",
            rich_help_panel=MODEL,
        ),
    ] = None,
    samples: Annotated[
        int, typer.Option(help="Of the new texts, at most; each as long as the fit's.", rich_help_panel=MODEL)
    ] = SAMPLES,
    seed: options.Seed = 0,
    json_: options.Json = False,
) -> None:
    """Tell how far new texts lie from a bundle's calibration data, what that costs, and what to do."""
    from edgeprune.commands.drift import drift as run
    from edgeprune.report.drift import print_drift

    with shown_progress() as progress:
        report = run(
            bundle, texts=texts, since=since, model=model, samples=samples, seed=seed, progress=progress
        ).report
    if json_:
        show(report.model_dump_json(indent=2))
    else:
        print_drift(report, console())
