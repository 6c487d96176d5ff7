"""The command that serves a bundle. It parses, calls one function and prints."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from edgeprune.cli import options
from edgeprune.cli.options import PATH
from edgeprune.cli.streams import note, show
from edgeprune.errors import InputError


def serve(
    bundle: options.Bundle,
    host: Annotated[str, typer.Option(help="The address to listen at.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="The port; 0: any that is free.")] = 8000,
    slots: Annotated[
        int | None,
        typer.Option(
            min=1,
            max=64,
            help="Requests that are answered at once, by steps of all of them; an odd number becomes the next even "
            "one. Default: the batch that the bundle was fitted for.",
        ),
    ] = None,
    queue: Annotated[int, typer.Option(min=0, help="More requests that may wait; others get status 429.")] = 32,
    draft: options.Draft = None,
    target: Annotated[
        str | None,
        typer.Option(
            help="Serve on the device behind ssh, as ssh://USER@HOST[:PORT], and forward its port here.",
            metavar="ADDRESS",
        ),
    ] = None,
    api_key_file: Annotated[
        Path | None, typer.Option(help="A file with the key that requests must bring.", **PATH)
    ] = None,
) -> None:
    """Serve a bundle with the interface of OpenAI's chat and text completions, until Ctrl-C."""
    from edgeprune.commands.serve import serve as serve_here
    from edgeprune.commands.serve import serve_there
    from edgeprune.ondevice.serve import serving_line

    def ready(address: str, count: int) -> None:
        show(serving_line(bundle.resolve().name, address, count))

    if target is None:
        serve_here(bundle, host, port, slots, queue, api_key_file, draft, note, ready)
    elif draft is not None:
        raise InputError("--draft with --target: a draft works on this machine", "Run serve.pyz with --draft there.")
    else:
        serve_there(bundle, target, host, port, slots, queue, api_key_file, note, ready)
