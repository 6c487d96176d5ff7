"""The command line: parse, call one function, print. Exit codes: 0 budget met, 2 bad input, 3 out of
reach, 4 engine or device failed, 130 interrupted, 1 a bug."""

from __future__ import annotations

import json
import logging
import sys
from pathlib import Path
from typing import Annotated

import typer

from edgeprune import __version__
from edgeprune.cli import inspect as looking, options
from edgeprune.errors import EdgepruneError, InputError

app = typer.Typer(
    name="edgeprune", no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False,
    help="Fit a decoder-only transformer into a device's memory and latency budget.",
)  # fmt: skip

PICKING = ("--from", "--pick", "--output", "--force", "--json")  # what goes together


def _version(value: bool) -> None:
    if value:
        typer.echo(f"edgeprune {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Say more on standard error.")] = False,
    log_file: Annotated[Path | None, typer.Option(help="Write a detailed log there.")] = None,
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print it.")] = False,
) -> None:
    from edgeprune.log import set_up

    set_up(verbose, log_file)


@app.command()
def fit(
    context_: typer.Context,
    model: options.Model = "demo",
    device: options.Device = None,
    profile: options.Profile = None,
    memory: Annotated[
        str | None, typer.Option(metavar="SIZE|%", help="Peak device memory: 1.5GiB, 900MB or 90%.")
    ] = None,
    decode: Annotated[str | None, typer.Option(metavar="MS|%", help="Time per token: 25ms or 70%.")] = None,
    prefill: Annotated[str | None, typer.Option(metavar="MS|%", help="Time to first token: 0.5s or 70%.")] = None,
    max_quality_loss: Annotated[
        float | None, typer.Option(metavar="%", help="Acceptable rise of held-out perplexity.")
    ] = None,
    calibration: options.Calibration = "self",
    evaluate: options.Evaluate = None,
    samples: options.Samples = 32,
    length: options.Length = None,
    method: options.Method = "default",
    layout: options.Layout = "uniform",
    vocabulary: options.Vocabulary = "full",
    precision: options.Precision = None,
    batch: options.Batch = None,
    prompt: options.Prompt = None,
    context: options.Context = None,
    engine: options.EngineName = "auto",
    target: options.Target = None,
    keep_remote: options.KeepRemote = False,
    codec: options.Codec = None,
    image_size: options.ImageSize = None,
    num_heads: options.NumHeads = None,
    cfg: options.Cfg = None,
    images: options.Images = None,
    features: options.Features = None,
    rungs: Annotated[
        int, typer.Option(help="Models in the bundle; each further one is smaller, in case the device is slower.")
    ] = 1,
    require_measured: Annotated[
        bool, typer.Option("--require-measured", help="A verdict that rests on an estimate is a failure.")
    ] = False,
    export: options.Export = None,
    no_checkpoint: Annotated[bool, typer.Option("--no-checkpoint", help="Leave model/ out of the bundle.")] = False,
    from_: Annotated[
        Path | None, typer.Option("--from", metavar="BUNDLE", help="Export a rung of `edgeprune frontier`'s bundle.")
    ] = None,
    pick: Annotated[int | None, typer.Option(metavar="K", help="The rung of --from.")] = None,
    output: Annotated[
        Path | None, typer.Option(help="The bundle. Default: MODEL-DEVICE, or BUNDLE-pickK with --from.")
    ] = None,
    resume: options.Resume = False,
    force: options.Force = False,
    json_: options.Json = False,
    seed: options.Seed = 0,
) -> None:
    """Prune, compensate, export, build and measure until the budget is met; write a bundle and a report."""
    from edgeprune.commands.fit import fit as run
    from edgeprune.progress import rich_progress
    from edgeprune.bundle.read import read_report
    from edgeprune.report.terminal import print_report
    from edgeprune.pipeline.request import Request

    if from_ is not None or pick is not None:
        bundle = _picked(context_, from_, pick, output, force)
    else:
        request = Request(
            model=model, device=device, profile=profile, memory=memory, prefill=prefill, decode=decode,
            max_quality_loss=max_quality_loss, calibration=calibration, evaluate=tuple(evaluate or ()),
            samples=samples, length=length, method=method, layout=layout, vocabulary=vocabulary,
            precision=precision, batch=batch, prompt=prompt, context=context, engine=engine, target=target,
            keep_remote=keep_remote, codec=codec, image_size=image_size, num_heads=num_heads, cfg=cfg, images=images,
            features=features, rungs=rungs, export=tuple(export or ()),
            require_measured=require_measured, checkpoint=not no_checkpoint, output=output, resume=resume,
            force=force, seed=seed,
        )  # fmt: skip
        with rich_progress() as progress:
            bundle = run(request, progress)
    report = read_report(bundle)
    if json_:
        typer.echo(report.model_dump_json(indent=2))
    else:
        print_report(report, options.console())
        typer.echo(f"\nbundle  {bundle}\nreport  {bundle / 'report.html'}")
    raise typer.Exit(report.exit_code(require_measured) if from_ is None else 0)


def _picked(context: typer.Context, bundle: Path | None, pick: int | None, output: Path | None, force: bool) -> Path:
    """fit --from: the exported bundle. Raises InputError for an option that says how to fit."""
    from edgeprune.bundle.pick import pick as export
    from edgeprune.progress import rich_progress

    if bundle is None or pick is None:
        raise InputError("--from and --pick go together", "Give the bundle and the rung: --from BUNDLE --pick K.")
    if others := [name for name in options.given(context) if name not in PICKING]:
        raise InputError(
            f"{', '.join(others)} with --from: a rung is exported as it was fitted",
            "Leave it out: only --pick, --output, --force and --json go with --from.",
        )
    with rich_progress() as progress:
        return export(bundle, pick, output, force, progress)


@app.command()
def frontier(
    model: options.Model = "demo",
    device: options.Device = None,
    profile: options.Profile = None,
    rungs: Annotated[int, typer.Option(min=2, help="How many model sizes, the dense model not counted.")] = 6,
    calibration: options.Calibration = "self",
    evaluate: options.Evaluate = None,
    samples: options.Samples = 32,
    length: options.Length = None,
    method: options.Method = "default",
    layout: options.Layout = "uniform",
    vocabulary: options.Vocabulary = "full",
    precision: options.Precision = None,
    batch: options.Batch = None,
    prompt: options.Prompt = None,
    context: options.Context = None,
    engine: options.EngineName = "auto",
    target: options.Target = None,
    keep_remote: options.KeepRemote = False,
    codec: options.Codec = None,
    image_size: options.ImageSize = None,
    num_heads: options.NumHeads = None,
    cfg: options.Cfg = None,
    images: options.Images = None,
    features: options.Features = None,
    output: Annotated[Path | None, typer.Option(help="The bundle. Default: MODEL-DEVICE-frontier.")] = None,
    resume: options.Resume = False,
    force: options.Force = False,
    json_: options.Json = False,
    seed: options.Seed = 0,
) -> None:
    """Latency, memory and quality of a ladder of model sizes, to pick from: fit --from BUNDLE --pick K."""
    from edgeprune.commands.fit import frontier as run
    from edgeprune.progress import rich_progress
    from edgeprune.bundle.read import read_frontier
    from edgeprune.report.frontier_terminal import print_frontier
    from edgeprune.pipeline.request import Request

    request = Request(
        model=model, device=device, profile=profile, calibration=calibration, evaluate=tuple(evaluate or ()),
        samples=samples, length=length, method=method, layout=layout, vocabulary=vocabulary,
        precision=precision, batch=batch, prompt=prompt, context=context, engine=engine, target=target,
        keep_remote=keep_remote, codec=codec, image_size=image_size, num_heads=num_heads, cfg=cfg, images=images,
        features=features, rungs=rungs, output=output, resume=resume, force=force, seed=seed,
    )  # fmt: skip
    with rich_progress() as progress:
        bundle = run(request, progress)
    found = read_frontier(bundle)
    if json_:
        typer.echo(found.model_dump_json(indent=2))
    else:
        print_frontier(found, bundle, options.console())
        typer.echo(f"\nbundle  {bundle}\npage    {bundle / 'frontier.html'}")


for command in (looking.devices, looking.plan, looking.doctor):
    app.command()(command)


@app.command()
def measure(
    bundle: options.Bundle,
    target: Annotated[
        str | None, typer.Option(metavar="ssh://USER@HOST[:PORT]", help="Where. Default: this machine.")
    ] = None,
    keep_remote: options.KeepRemote = False,
    json_: options.Json = False,
) -> None:
    """Build a bundle's engine where it is to run, check and measure it, and update the report."""
    from edgeprune.commands.measure import measure as run_measure
    from edgeprune.progress import rich_progress
    from edgeprune.report.terminal import print_report

    with rich_progress() as progress:
        report = run_measure(bundle, target, keep_remote, progress)
    if json_:
        typer.echo(report.model_dump_json(indent=2))
    else:
        print_report(report, options.console())
    raise typer.Exit(report.exit_code())


@app.command()
def run(
    context_: typer.Context,
    bundle: options.Bundle,
    prompt: Annotated[str | None, typer.Option(help="What to say to a language model.")] = None,
    class_: Annotated[
        list[int] | None, typer.Option("--class", help="What to draw; may be given again. Default: all in turn.")
    ] = None,
    count: Annotated[int, typer.Option(min=1, help="Pictures.")] = 1,
    cfg: options.Cfg = None,
    output: Annotated[Path, typer.Option(help="The grid of the pictures.")] = Path("pictures.png"),
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Of a text.")] = 256,
    temperature: Annotated[
        float | None, typer.Option(min=0.0, help="0: always the likeliest. Default: 0 for texts, 1 for pictures.")
    ] = None,
    top_k: Annotated[int, typer.Option(min=0, help="Draw from the likeliest so many; 0: from all.")] = 0,
    top_p: Annotated[float, typer.Option(min=0.0, max=1.0, help="Draw from the likeliest that hold so much.")] = 1.0,
    force: Annotated[bool, typer.Option("--force", help="Replace an older --output.")] = False,
    seed: options.Seed = 0,
) -> None:
    """Generate text or pictures from a bundle's engine, or from its graph where the engine's GPU is not here."""
    if prompt is None:
        if "--max-new-tokens" in options.given(context_):
            raise InputError("--max-new-tokens without --prompt: a picture has its own number", "Leave it out.")
        _draw(bundle, class_ or [], count, cfg, output, temperature, top_k, top_p, force, seed)
        return
    if others := [name for name in options.given(context_) if name in options.PICTURES]:
        raise InputError(f"{', '.join(others)} with --prompt", f"{others[0]} is for pictures: leave one of them out.")
    from edgeprune.generate.text import stream_text

    for piece in stream_text(bundle, prompt, max_new_tokens, temperature or 0.0, top_k, top_p, seed, _note):
        sys.stdout.write(piece)
        sys.stdout.flush()
    sys.stdout.write("\n")


def _draw(
    bundle: Path, classes: list[int], count: int, cfg: float | None, output: Path, temperature: float | None,
    top_k: int, top_p: float, force: bool, seed: int,
) -> None:  # fmt: skip
    from edgeprune.generate.images import draw_grid, painter_of
    from edgeprune.generate.pixels import check_picture
    from edgeprune.progress import rich_progress

    check_picture(output, force)
    painter = painter_of(bundle, classes, count, cfg, 1.0 if temperature is None else temperature, top_k, top_p, _note)
    with rich_progress() as progress:
        seconds = draw_grid(painter, classes, count, seed, output, progress)
    typer.echo(str(output))
    _note(f"{seconds / count:.2f} s a picture, measured here, {min(count, painter.at_once)} at once")


@app.command()
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
    from edgeprune.progress import rich_progress
    from edgeprune.report.comparison import check_page, write_page
    from edgeprune.report.terminal import print_comparison
    from edgeprune.pipeline.request import Request

    if html is not None:
        check_page(html, force)
    request = Request(
        model=model, calibration=calibration, evaluate=tuple(evaluate or ()), samples=samples, length=length,
        codec=codec, image_size=image_size, num_heads=num_heads, cfg=cfg, seed=seed,
    )  # fmt: skip
    with rich_progress() as progress:
        rows = run_compare(request, _numbers(ratios), _names(methods), layout, progress)
    if html is not None:
        write_page(html, rows)
    if json_:
        typer.echo(json.dumps({"rows": [row.as_json() for row in rows]}, indent=2, allow_nan=False))
    else:
        print_comparison(rows, options.console())


@app.command()
def report(bundle: options.Bundle) -> None:
    """Render a bundle's report.html again from its report.json, and say where it is."""
    from edgeprune.bundle.read import render_again

    typer.echo(str(render_again(bundle)))


def _numbers(text: str) -> list[float]:
    try:
        return [float(part) for part in text.split(",") if part.strip()]
    except ValueError:
        raise InputError(f"malformed ratios {text!r}", "Write percentages with commas: --ratios 20,30,50.") from None


def _names(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


def _note(text: str) -> None:
    typer.echo(text, err=True)


def main() -> None:
    """The entry point: every error of ours is one message with a remedy, and its own exit code."""
    try:
        code = app(standalone_mode=False)
    except EdgepruneError as error:
        typer.echo(f"error: {error.message}\n{error.remedy}", err=True)
        logging.getLogger("edgeprune").debug("traceback", exc_info=True)
        code = error.exit_code
    except (KeyboardInterrupt, typer.Abort):
        typer.echo("interrupted: go on with --resume", err=True)
        code = 130
    except Exception as error:
        # The parser's own errors: typer brings click along under changing names.
        if not hasattr(error, "show"):
            raise
        error.show()
        code = error.exit_code
    sys.exit(code if isinstance(code, int) else 0)


if __name__ == "__main__":
    main()
