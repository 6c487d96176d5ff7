"""The command that scores a bundle or a model on tasks. It parses, calls one function and prints."""

from __future__ import annotations

from typing import Annotated

import typer

from edgeprune.cli import options
from edgeprune.cli.ending import shown_progress
from edgeprune.cli.options import MODEL
from edgeprune.cli.streams import console, show


def evaluate(
    model: Annotated[
        str, typer.Argument(metavar="BUNDLE|MODEL", help="A bundle of `edgeprune fit`, or a model as for fit.")
    ],
    tasks: options.Tasks,
    dense: Annotated[
        str | None,
        typer.Option(
            metavar="MODEL",
            help="Pair with this model. Default: the one that the bundle was made of; for a model: none.",
            rich_help_panel=MODEL,
        ),
    ] = None,
    questions: options.Questions = None,
    json_: options.Json = False,
) -> None:
    """Score a bundle or a model on tasks, of lm-evaluation-harness or your own, paired with the dense model."""
    from edgeprune.commands.task_scores import task_scores
    from edgeprune.report.terminal import print_task_scores

    with shown_progress() as progress:
        report = task_scores(model, tasks=tasks, dense=dense, questions=questions, progress=progress).report
    if json_:
        show(report.model_dump_json(indent=2))
    else:
        print_task_scores(report, console())
