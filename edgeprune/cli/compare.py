"""The command that compares pruning methods."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from edgeprune.cli import options
from edgeprune.errors import InputError


def compare(
    model: Annotated[str, typer.Argument(metavar="[MODEL]", help="As for fit.")] = "demo",
    ratios: Annotated[str, typer.Option(help="Percent of attention and MLP parameters to remove.")] = "20,30,50",
    methods: Annotated[
        str, typer.Option(help="Names, with commas between, or `all`.")
    ] = "default,flap,wanda+ls,wanda,magnitude,random",
    calibration: Annotated[
        str, typer.Option(metavar="PATH|self", help="Text, jsonl or folder; `self`: an image generator's own.")
    ] = "self",
    evaluate: options.Evaluate = None,
    samples: options.Samples = 32,
    length: options.Length = None,
    codec: options.Codec = None,
    image_size: options.ImageSize = None,
    num_heads: options.NumHeads = None,
    cfg: options.Cfg = None,
    layout: Annotated[
        str, typer.Option(metavar="uniform|per-layer|both", help="The same widths in every layer, or free ones.")
    ] = "uniform",
    html: Annotated[Path | None, typer.Option(help="Write a page with a plot there.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace an older page.")] = False,
    json_: options.Json = False,
    seed: options.Seed = 0,
) -> None:
    """Compare pruning methods at equal ratios on the same samples and texts."""
    from edgeprune.commands.compare import compare as run_compare
    from edgeprune.pipeline.request import Request
    from edgeprune.progress import rich_progress
    from edgeprune.report.comparison import check_page, write_page
    from edgeprune.report.terminal import print_comparison

    if html is not None:
        check_page(html, force)
    request = Request(
        model=model,
        calibration=calibration,
        evaluate=tuple(evaluate or ()),
        samples=samples,
        length=length,
        codec=codec,
        image_size=image_size,
        num_heads=num_heads,
        cfg=cfg,
        seed=seed,
    )
    with rich_progress() as progress:
        rows = run_compare(request, _numbers(ratios), _names(methods), layout, progress)
    if html is not None:
        write_page(html, rows)
    if json_:
        typer.echo(json.dumps({"rows": [row.as_json() for row in rows]}, indent=2, allow_nan=False))
    else:
        print_comparison(rows, options.console())


def _numbers(text: str) -> list[float]:
    try:
        return [float(part) for part in text.split(",") if part.strip()]
    except ValueError:
        raise InputError(f"malformed ratios {text!r}", "Write percentages with commas: --ratios 20,30,50.") from None


def _names(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]
