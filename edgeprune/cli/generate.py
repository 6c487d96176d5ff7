"""The command that generates text or pictures from a bundle. It parses, calls one function and prints."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer

from edgeprune.cli import options
from edgeprune.cli.ending import shown_progress
from edgeprune.cli.options import IMAGES, PATH
from edgeprune.cli.streams import made, note, show
from edgeprune.errors import InputError
from edgeprune.files import check_text
from edgeprune.pipeline.request import check_seed

TEXT, SAMPLING = "Text", "Sampling"
OF_DRAWING = ("--top-k", "--top-p", "--seed")  # that a temperature of 0 has no use for


def run(
    context_: typer.Context,
    bundle: options.Bundle,
    prompt: Annotated[
        str | None, typer.Option(help="What it answers; a language model needs one.", rich_help_panel=TEXT)
    ] = None,
    max_new_tokens: Annotated[
        int | None,
        typer.Option(min=1, help="Of a text. Default: 256, or what the context has room for.", rich_help_panel=TEXT),
    ] = None,
    draft: options.Draft = None,
    class_: Annotated[
        list[int] | None,
        typer.Option(
            "--class", help="What to draw; may be given again. Default: every class in turn.", rich_help_panel=IMAGES
        ),
    ] = None,
    count: Annotated[int, typer.Option(min=1, help="Pictures.", rich_help_panel=IMAGES)] = 1,
    cfg: options.Cfg = None,
    output: Annotated[Path, typer.Option(help="The grid of the pictures.", rich_help_panel=IMAGES, **PATH)] = Path(
        "pictures.png"
    ),
    temperature: Annotated[
        float | None,
        typer.Option(
            min=0.0, help="0: always the likeliest. Default: 0 for texts, 1 for pictures.", rich_help_panel=SAMPLING
        ),
    ] = None,
    top_k: Annotated[
        int, typer.Option(min=0, help="Draw from the likeliest so many; 0: from all.", rich_help_panel=SAMPLING)
    ] = 0,
    top_p: Annotated[
        float,
        typer.Option(min=0.0, max=1.0, help="Draw from the likeliest that hold so much.", rich_help_panel=SAMPLING),
    ] = 1.0,
    force: Annotated[bool, typer.Option("--force", help="Replace an older --output.", rich_help_panel=IMAGES)] = False,
    seed: Annotated[int, typer.Option(help="Of everything drawn.", rich_help_panel=SAMPLING)] = 0,
) -> None:
    """Generate text or pictures from a bundle's engine, or from its graph where this machine lacks the engine's GPU."""
    check_seed(seed)
    if context_.args:
        text = shlex.quote(" ".join(([] if prompt is None else [prompt]) + context_.args))
        raise InputError(
            f"{context_.args[0]!r} stands where no option takes it",
            f"A text goes after --prompt, in quotes: edgeprune run {shlex.quote(str(bundle))} --prompt {text}",
        )
    if temperature is None:
        temperature = 1.0 if prompt is None else 0.0
    ignored = [name for name in options.given(context_) if name in OF_DRAWING]
    if ignored and temperature == 0:
        note(f"{', '.join(ignored)}: of no effect without a --temperature above 0, such as 0.7: it is greedy")
    # Without a prompt the bundle is an image generator's.
    if prompt is None:
        if draft is not None:
            raise InputError("--draft without --prompt: pictures are drawn without one", "Leave it out.")
        if "--max-new-tokens" in options.given(context_):
            raise InputError("--max-new-tokens without --prompt: a picture has its own number", "Leave it out.")
        _draw(bundle, list(dict.fromkeys(class_ or [])), count, cfg, output, temperature, top_k, top_p, force, seed)
        return
    if others := [name for name in options.given(context_) if name in options.IMAGES_OF_RUN]:
        raise InputError(f"{', '.join(others)} with --prompt", f"{others[0]} is for pictures: leave one of them out.")
    check_text(prompt, "--prompt")
    # Print the text as it is generated.
    from edgeprune.generate.text import stream_text

    for piece in stream_text(bundle, prompt, max_new_tokens, temperature, top_k, top_p, seed, note, draft):
        sys.stdout.write(piece)
        sys.stdout.flush()
    show("")


def _draw(
    bundle: Path,
    classes: list[int],
    count: int,
    cfg: float | None,
    output: Path,
    temperature: float,
    top_k: int,
    top_p: float,
    force: bool,
    seed: int,
) -> None:
    """Writes the grid of the pictures to output, prints its path, and the time of a picture to standard error.

    Raises InputError where the output cannot be written or an option is not for this bundle.
    """
    from edgeprune.generate.images import draw_grid, painter_of
    from edgeprune.generate.pixels import check_picture

    # Check the output before the bundle is opened.
    check_picture(output, force)
    painter = painter_of(bundle, classes, count, cfg, temperature, top_k, top_p, note)
    with shown_progress() as progress:
        seconds = draw_grid(painter, classes, count, seed, output, progress)
    with made("pictures", output):
        show(str(output))
    note(f"{seconds / count:.2f} s a picture, measured here, {min(count, painter.at_once)} at once")
