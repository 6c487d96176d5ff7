"""The command that makes calibration data."""

from __future__ import annotations

import json
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated

import typer

from edgeprune.cli import options
from edgeprune.cli.ending import shown_progress
from edgeprune.cli.options import OUTPUT, PATH
from edgeprune.cli.streams import console, made, show

CHOICE, PRIVACY = "Choice", "Secrets and personal data"


def samples(
    paths: Annotated[
        list[Path],
        typer.Argument(help="Texts, logs, chats as jsonl, tables, or folders of these; each is a source.", **PATH),
    ],
    output: Annotated[
        Path, typer.Option(help="Write the samples there, as jsonl for --calibration.", rich_help_panel=OUTPUT, **PATH)
    ],
    held_out: Annotated[
        Path | None,
        typer.Option(help="Write others there, drawn at random, for --evaluate.", rich_help_panel=OUTPUT, **PATH),
    ] = None,
    count: Annotated[int, typer.Option(help="Samples to choose.", rich_help_panel=CHOICE)] = 32,
    length: options.Length = None,
    model: Annotated[
        str | None,
        typer.Option(
            metavar="MODEL",
            help="Choose what covers this model's moments best, and measure how many are enough. Default: at random.",
            rich_help_panel=CHOICE,
        ),
    ] = None,
    column: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="Column of tables, or field of records, with the text. Default: text, content, messages.",
            rich_help_panel=CHOICE,
        ),
    ] = None,
    seed: options.Seed = 0,
    mask: Annotated[
        str, typer.Option(metavar="NAME,NAME", help="What rules find and mask, or `none`.", rich_help_panel=PRIVACY)
    ] = "keys,emails,accounts,phones",
    names: Annotated[
        Path | None,
        typer.Option(help="Also mask the names that this file lists, one a line.", rich_help_panel=PRIVACY, **PATH),
    ] = None,
    force: Annotated[
        bool, typer.Option("--force", help="Replace older files of this command.", rich_help_panel=OUTPUT)
    ] = False,
    json_: options.Json = False,
) -> None:
    """Make calibration data: read, mask, remove duplicates, balance, and choose what covers the rest."""
    from edgeprune.cli.sample_tables import print_samples
    from edgeprune.commands.samples import samples as run

    with shown_progress() as progress:
        report = run(
            paths,
            output=output,
            held_out=held_out,
            count=count,
            length=length,
            model=model,
            mask=mask,
            names=names,
            column=column,
            seed=seed,
            force=force,
            progress=progress,
        ).report
    with made("samples", output) if not json_ else nullcontext():
        if json_:
            show(json.dumps(report.as_json(), indent=2, allow_nan=False))
        else:
            print_samples(report, console())
