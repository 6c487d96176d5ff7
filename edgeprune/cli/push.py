"""The command that publishes a bundle's checkpoint. It parses, calls one function and prints."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from edgeprune.cli import options
from edgeprune.cli.ending import shown_progress
from edgeprune.cli.streams import show
from edgeprune.ondevice.budget import format_bytes


def push(
    bundle: options.Bundle,
    repository: Annotated[str, typer.Argument(metavar="REPOSITORY", help="On the Hugging Face hub, as OWNER/NAME.")],
    public: Annotated[bool, typer.Option("--public", help="Everybody may see a repository that is new.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Tell what would be sent; send nothing.")] = False,
    json_: options.Json = False,
) -> None:
    """Publish a bundle's checkpoint with its model card; reports and texts stay here."""
    from edgeprune.commands.push import push as push_bundle

    with shown_progress() as progress:
        done = push_bundle(bundle, repository, public, dry_run, progress)
    if json_:
        show(json.dumps(done.as_json(), indent=2))
        return
    for name, size in done.files.items():
        show(f"{format_bytes(size):>12}  {name}")
    seen = "everybody" if public else "its owner alone"
    new = f" a new repository for {seen}," if done.is_new else ""
    total = f"{len(done.files)} files, {format_bytes(sum(done.files.values()))}"
    if done.url is None:
        show(f"Would send to{new} {done.repository}: {total}. Nothing was sent.")
    else:
        show(f"Sent to{new} {done.repository}: {total}. {done.url}")
