"""The command that compares two bundles or fleets. It parses, calls one function and prints."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from edgeprune.cli import options
from edgeprune.cli.options import PATH
from edgeprune.cli.streams import console, show
from edgeprune.errors import InputError
from edgeprune.report.diff import GUARDS

FAILED = 3


def diff(
    first: Annotated[
        Path, typer.Argument(metavar="OLD", parser=PATH["parser"], help="The bundle or fleet to compare with.")
    ],
    second: Annotated[Path, typer.Argument(metavar="NEW", parser=PATH["parser"], help="The one that may be worse.")],
    fail_on: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=PERCENT",
            help=f"End with exit code {FAILED} where the second is worse by more: {', '.join(GUARDS)}; may be given "
            "again.",
        ),
    ] = None,
    json_: options.Json = False,
) -> None:
    """Tell what changed between two bundles or fleets: verdict, figures, quality, widths, options, versions."""
    from edgeprune.commands.diff import diff as run
    from edgeprune.report.diff import DiffReport, print_diff
    from edgeprune.report.fleet_diff import print_fleet_diff

    report = run(first, second, fail_on=dict(map(_guard, fail_on or ()))).report
    if json_:
        show(report.model_dump_json(indent=2))
    else:
        (print_diff if isinstance(report, DiffReport) else print_fleet_diff)(report, console())
    raise typer.Exit(FAILED if report.failed else 0)


def _guard(text: str) -> tuple[str, float]:
    """Returns the name and the percent of NAME=PERCENT. Raises InputError."""
    name, _, percent = text.partition("=")
    try:
        return name, float(percent.removesuffix("%"))
    except ValueError:
        raise InputError(f"--fail-on {text!r} is not NAME=PERCENT", "Write --fail-on latency=5, for example.") from None
