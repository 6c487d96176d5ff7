"""The commands that make and measure bundles: fit, frontier, measure."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from edgeprune.cli import options
from edgeprune.cli.ending import resumable, shown_progress
from edgeprune.cli.options import DEVICE, OUTPUT, PATH, SEARCH, takes
from edgeprune.cli.streams import console, made, show
from edgeprune.errors import InputError
from edgeprune.pipeline.request import DEFAULTS, FRONTIER_OPTIONS, FRONTIER_RUNGS

PICKING = ("--from", "--pick", "--output", "--force", "--json")  # what goes together


@takes(*DEFAULTS)
def fit(
    context_: typer.Context,
    from_: Annotated[
        Path | None,
        typer.Option(
            "--from",
            **PATH | {"metavar": "BUNDLE"},
            help="Make a bundle of one rung of `edgeprune frontier`'s.",
            rich_help_panel=OUTPUT,
        ),
    ] = None,
    pick: Annotated[int | None, typer.Option(metavar="K", help="The rung of --from.", rich_help_panel=OUTPUT)] = None,
    config: options.Config = None,
    json_: options.Json = False,
    **request: Any,
) -> None:
    """Prune, compensate, export, build and measure until the budget is met; write a bundle and a report."""
    from edgeprune.bundle.read import read_report
    from edgeprune.commands.fit import fit as run
    from edgeprune.report.terminal import print_report

    if from_ is not None or pick is not None:
        bundle = _picked(context_, from_, pick, request["output"], request["force"])
        report, code = read_report(bundle), 0
    else:
        with shown_progress() as progress, resumable():
            result = run(progress=progress, **request)
        bundle, report = result.bundle, result.report
        code = report.exit_code(request["require_measured"])
    with made("bundle", bundle):
        if json_:
            show(report.model_dump_json(indent=2))
        else:
            print_report(report, console())
            show(f"\nbundle  {bundle}\nreport  {bundle / 'report.html'}")
    raise typer.Exit(code)


def _picked(context: typer.Context, bundle: Path | None, rung: int | None, output: Path | None, force: bool) -> Path:
    """Returns the new bundle of fit --from. Raises InputError for an option of fitting."""
    from edgeprune.bundle.pick import pick

    if bundle is None or rung is None:
        raise InputError("--from and --pick go together", "Give the bundle and the rung: --from BUNDLE --pick K.")
    if others := [name for name in options.given(context) if name not in PICKING]:
        raise InputError(
            f"{', '.join(others)} with --from: a rung is exported as it was fitted",
            "Leave it out: only --pick, --output, --force and --json go with --from.",
        )
    with shown_progress() as progress:
        return pick(bundle, rung, output, force, progress)


@takes(*(name for name in FRONTIER_OPTIONS if name != "rungs"))
def frontier(
    rungs: Annotated[
        int,
        typer.Option(
            metavar="N",
            help="Sizes below the dense model, which is shown beside them and not counted.",
            rich_help_panel=SEARCH,
        ),
    ] = FRONTIER_RUNGS,
    config: options.Config = None,
    json_: options.Json = False,
    **request: Any,
) -> None:
    """Latency, memory and quality of a ladder of model sizes, to pick from: fit --from BUNDLE --pick K."""
    from edgeprune.commands.frontier import frontier as run
    from edgeprune.report.frontier_terminal import print_frontier

    with shown_progress() as progress, resumable():
        result = run(rungs=rungs, progress=progress, **request)
    with made("bundle", result.bundle):
        if json_:
            show(result.report.model_dump_json(indent=2))
        else:
            print_frontier(result.report, result.bundle, console())
            show(f"\nbundle  {result.bundle}\npage    {result.bundle / 'frontier.html'}")


def measure(
    bundle: options.Bundle,
    target: Annotated[
        str | None,
        typer.Option(metavar="ssh://USER@HOST[:PORT]", help="Where. Default: this machine.", rich_help_panel=DEVICE),
    ] = None,
    keep_remote: options.KeepRemote = False,
    json_: options.Json = False,
) -> None:
    """Build a bundle's engine where it is to run, check and measure it, and update the report."""
    from edgeprune.commands.measure import measure as run
    from edgeprune.report.terminal import print_report

    with shown_progress() as progress:
        report = run(bundle, target=target, keep_remote=keep_remote, progress=progress).report
    with made("bundle", bundle):
        if json_:
            show(report.model_dump_json(indent=2))
        else:
            print_report(report, console())
    raise typer.Exit(report.exit_code())
