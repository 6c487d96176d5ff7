"""The commands that make and measure bundles: fit, frontier, measure."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from edgeprune.cli import options
from edgeprune.errors import InputError

PICKING = ("--from", "--pick", "--output", "--force", "--json")  # what goes together


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
    from edgeprune.bundle.read import read_report
    from edgeprune.commands.fit import fit as run
    from edgeprune.pipeline.request import Request
    from edgeprune.progress import rich_progress
    from edgeprune.report.terminal import print_report

    if from_ is not None or pick is not None:
        bundle = _picked(context_, from_, pick, output, force)
    else:
        request = Request(
            model=model,
            device=device,
            profile=profile,
            memory=memory,
            prefill=prefill,
            decode=decode,
            max_quality_loss=max_quality_loss,
            calibration=calibration,
            evaluate=tuple(evaluate or ()),
            samples=samples,
            length=length,
            method=method,
            layout=layout,
            vocabulary=vocabulary,
            precision=precision,
            batch=batch,
            prompt=prompt,
            context=context,
            engine=engine,
            target=target,
            keep_remote=keep_remote,
            codec=codec,
            image_size=image_size,
            num_heads=num_heads,
            cfg=cfg,
            images=images,
            features=features,
            rungs=rungs,
            export=tuple(export or ()),
            require_measured=require_measured,
            checkpoint=not no_checkpoint,
            output=output,
            resume=resume,
            force=force,
            seed=seed,
        )
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
    from edgeprune.bundle.read import read_frontier
    from edgeprune.commands.frontier import frontier as run
    from edgeprune.pipeline.request import Request
    from edgeprune.progress import rich_progress
    from edgeprune.report.frontier_terminal import print_frontier

    request = Request(
        model=model,
        device=device,
        profile=profile,
        calibration=calibration,
        evaluate=tuple(evaluate or ()),
        samples=samples,
        length=length,
        method=method,
        layout=layout,
        vocabulary=vocabulary,
        precision=precision,
        batch=batch,
        prompt=prompt,
        context=context,
        engine=engine,
        target=target,
        keep_remote=keep_remote,
        codec=codec,
        image_size=image_size,
        num_heads=num_heads,
        cfg=cfg,
        images=images,
        features=features,
        rungs=rungs,
        output=output,
        resume=resume,
        force=force,
        seed=seed,
    )
    with rich_progress() as progress:
        bundle = run(request, progress)
    found = read_frontier(bundle)
    if json_:
        typer.echo(found.model_dump_json(indent=2))
    else:
        print_frontier(found, bundle, options.console())
        typer.echo(f"\nbundle  {bundle}\npage    {bundle / 'frontier.html'}")


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
