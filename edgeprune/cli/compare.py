"""The command that compares pruning methods."""

from __future__ import annotations

import json
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated, Any

import typer

from edgeprune.cli import options
from edgeprune.cli.ending import shown_progress
from edgeprune.cli.options import OUTPUT, PATH, SEARCH, takes
from edgeprune.cli.streams import console, made, show
from edgeprune.pipeline.request import METHODS, RATIOS, request_of

SAMPLES = ("model", "calibration", "evaluate", "samples", "length", "seed", "codec", "image_size", "num_heads", "cfg")


def _list_methods(value: bool) -> None:
    if value:
        from edgeprune.cli.tables import print_methods

        print_methods(console())
        raise typer.Exit


@takes(*SAMPLES)
def compare(
    ratios: Annotated[
        str, typer.Option(help="Percent of attention and MLP parameters to remove.", rich_help_panel=SEARCH)
    ] = RATIOS,
    methods: Annotated[
        str,
        typer.Option(
            help="Names with commas between, or `all`; weight formats are methods too: int8, default+int4.",
            rich_help_panel=SEARCH,
        ),
    ] = METHODS,
    list_methods: Annotated[
        bool,
        typer.Option(
            "--list-methods",
            callback=_list_methods,
            is_eager=True,
            help="Tell what each method does, and nothing else.",
            rich_help_panel=SEARCH,
        ),
    ] = False,
    layout: Annotated[
        str,
        typer.Option(
            metavar="uniform|per-layer|both",
            help="The same widths in every layer, or free ones.",
            rich_help_panel=SEARCH,
        ),
    ] = "uniform",
    html: Annotated[
        Path | None, typer.Option(help="Write a page with a plot there.", rich_help_panel=OUTPUT, **PATH)
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace an older page.", rich_help_panel=OUTPUT)] = False,
    json_: options.Json = False,
    **request: Any,
) -> None:
    """Compare pruning methods at equal ratios on the same samples and texts."""
    from edgeprune.commands.compare import compare as run
    from edgeprune.files import check_output_file
    from edgeprune.report.comparison import MARK, made_of, write_page
    from edgeprune.report.terminal import print_comparison

    if html is not None:
        check_output_file(html, "--html", MARK, force)
    with shown_progress() as progress:
        rows = run(ratios=ratios, methods=methods, layout=layout, progress=progress, **request).report
    if html is not None:
        write_page(html, rows, made_of(request_of(**request), ratios=ratios, methods=methods, layout=layout))
    with made("page", html) if html is not None else nullcontext():
        if json_:
            show(json.dumps({"rows": [row.as_json() for row in rows]}, indent=2, allow_nan=False))
        else:
            print_comparison(rows, console())
