"""The command that fits several models for several targets. It parses, calls one function and shows how far it is."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from edgeprune.cli import options
from edgeprune.cli.ending import resumable
from edgeprune.cli.options import OUTPUT, PATH
from edgeprune.cli.streams import console, made, note, show
from edgeprune.errors import InputError

if TYPE_CHECKING:
    from edgeprune.commands.fleet import OnChange, PlannedCell
    from edgeprune.report.fleet import Fleet

CLUSTER = "Cluster"
LEAST_ROWS = 5  # of a table on a terminal of few lines
LINE_SECONDS = 30.0  # between two lines on how far a fleet is, where there is no terminal


def fleet(
    file: Annotated[
        Path, typer.Argument(metavar="FLEET.toml", parser=PATH["parser"], help="Models, targets, shared options.")
    ],
    address: Annotated[
        str | None,
        typer.Option(
            metavar="auto|HOST:PORT",
            help="A Ray cluster that runs; auto: this machine's. Default: this machine alone.",
            rich_help_panel=CLUSTER,
        ),
    ] = None,
    cpus: Annotated[
        int,
        typer.Option(
            metavar="N",
            help="Cores of a cell; one that is measured on a processor takes all of its node.",
            rich_help_panel=CLUSTER,
        ),
    ] = 1,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only show the cells and what each takes.", rich_help_panel=OUTPUT)
    ] = False,
    output: Annotated[
        Path | None,
        typer.Option(
            help="The fleet's folder, seen by all nodes. Default: FLEET-fleet.", rich_help_panel=OUTPUT, **PATH
        ),
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with it.", rich_help_panel=OUTPUT)] = False,
    json_: options.Json = False,
) -> None:
    """Fit several models for several targets on a Ray cluster; cells share what they have in common."""
    if dry_run:
        if resume or output is not None or address is not None:
            raise InputError("--dry-run starts nothing", "Leave --resume, --output and --address out.")
        _plan(file, json_)
        return
    from edgeprune.commands.fleet import fleet as run
    from edgeprune.report.fleet_terminal import fleet_table

    with _shown() as on_change, resumable():
        result = run(file, output=output, address=address, cpus=cpus, resume=resume, on_change=on_change)
    with made("fleet", result.bundle):
        if json_:
            show(result.report.model_dump_json(indent=2))
        else:
            console().print(fleet_table(result.report, {}, len(result.report.cells)))
            for target in result.report.targets:
                best = result.report.best(target)
                show(f"best for {target}: {best.model if best else 'no usable model met the budget'}")
            show(f"\nfleet   {result.bundle}\npage    {result.bundle / 'fleet.html'}")
    raise typer.Exit(result.report.exit_code)


def _plan(file: Path, as_json: bool) -> None:
    """Shows the cells of a file and what each takes."""
    from edgeprune.commands.fleet import plan_fleet
    from edgeprune.ondevice.budget import format_bytes
    from edgeprune.report.terminal import table

    cells: list[PlannedCell] = plan_fleet(file).report
    if as_json:
        show(json.dumps({"cells": [cell.as_json() for cell in cells]}, indent=2))
        return
    rows = [
        (
            planned.cell.model,
            planned.cell.target,
            f"{planned.outlook.seconds / 60:.0f} min",
            format_bytes(planned.memory),
            format_bytes(planned.outlook.disk),
        )
        for planned in cells
    ]
    console().print(table(("model", "target", "time", "memory", "disk"), rows, whole=("time", "memory", "disk")))
    hours = sum(planned.outlook.seconds for planned in cells) / 3600
    show(
        f"{len(cells)} cells, {hours:.1f} hours one after the other; all of it estimated, for default options and one "
        "core of this machine. What cells share is made once, so that together they take less."
    )


@contextmanager
def _shown() -> Iterator[OnChange]:
    """Yields what shows how far a fleet is: a table on a terminal, lines elsewhere."""
    from rich.console import Console
    from rich.live import Live

    from edgeprune.report.fleet_terminal import fleet_table

    errors = Console(stderr=True)
    if not errors.is_terminal:
        yield _Lines()
        return
    with Live(console=errors, refresh_per_second=4, transient=True) as live:
        yield lambda document, running: live.update(fleet_table(document, running, max(LEAST_ROWS, errors.height - 4)))


class _Lines:
    """Writes a line for each cell that ended, and now and then one on all that run."""

    def __init__(self) -> None:
        self._told: set[int] = set()
        self._written = time.monotonic()

    def __call__(self, document: Fleet, running: Mapping[int, str]) -> None:
        from edgeprune.report.fleet_page import label_of

        for index, row in enumerate(document.cells):
            if row.has_ended and index not in self._told:
                self._told.add(index)
                self._write(f"{row.model} on {row.target}: {label_of(row)}{f': {row.reason}' if row.reason else ''}")
        if time.monotonic() - self._written >= LINE_SECONDS:
            self._write(f"{len(self._told)} of {len(document.cells)} cells have ended, {len(running)} run")

    def _write(self, text: str) -> None:
        self._written = time.monotonic()
        note(text)
