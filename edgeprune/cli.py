"""The command line: parse, call one function, print. Exit codes: 0 budget met, 2 bad input, 3 out of
reach, 4 engine or device failed, 130 interrupted, 1 a bug."""

from __future__ import annotations

import json
import logging
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from edgeprune import __version__, options
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
    length: options.Length = 256,
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
    from edgeprune.loop import fit as run
    from edgeprune.prepare import Request
    from edgeprune.progress import rich_progress
    from edgeprune.reading import read_report
    from edgeprune.report.terminal import print_report

    if from_ is not None or pick is not None:
        bundle = _picked(context_, from_, pick, output, force)
    else:
        request = Request(
            model=model, device=device, profile=profile, memory=memory, prefill=prefill, decode=decode,
            max_quality_loss=max_quality_loss, calibration=calibration, evaluate=tuple(evaluate or ()),
            samples=samples, length=length, method=method, layout=layout, vocabulary=vocabulary,
            precision=precision, batch=batch, prompt=prompt, context=context, engine=engine, target=target,
            keep_remote=keep_remote, rungs=rungs, export=tuple(export or ()),
            require_measured=require_measured, checkpoint=not no_checkpoint, output=output, resume=resume,
            force=force, seed=seed,
        )  # fmt: skip
        with rich_progress() as progress:
            bundle = run(request, progress)
    report = read_report(bundle)
    if json_:
        typer.echo(report.model_dump_json(indent=2))
    else:
        print_report(report, _console())
        typer.echo(f"\nbundle  {bundle}\nreport  {bundle / 'report.html'}")
    raise typer.Exit(report.exit_code(require_measured) if from_ is None else 0)


def _picked(context: typer.Context, bundle: Path | None, pick: int | None, output: Path | None, force: bool) -> Path:
    """fit --from: the exported bundle. Raises InputError for an option that says how to fit."""
    from edgeprune.picking import pick as export
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
    length: options.Length = 256,
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
    output: Annotated[Path | None, typer.Option(help="The bundle. Default: MODEL-DEVICE-frontier.")] = None,
    resume: options.Resume = False,
    force: options.Force = False,
    json_: options.Json = False,
    seed: options.Seed = 0,
) -> None:
    """Latency, memory and quality of a ladder of model sizes, to pick from: fit --from BUNDLE --pick K."""
    from edgeprune.loop import frontier as run
    from edgeprune.prepare import Request
    from edgeprune.progress import rich_progress
    from edgeprune.reading import read_frontier
    from edgeprune.report.frontier_terminal import print_frontier

    request = Request(
        model=model, device=device, profile=profile, calibration=calibration, evaluate=tuple(evaluate or ()),
        samples=samples, length=length, method=method, layout=layout, vocabulary=vocabulary,
        precision=precision, batch=batch, prompt=prompt,
        context=context, engine=engine, target=target, keep_remote=keep_remote, rungs=rungs, output=output,
        resume=resume, force=force, seed=seed,
    )  # fmt: skip
    with rich_progress() as progress:
        bundle = run(request, progress)
    found = read_frontier(bundle)
    if json_:
        typer.echo(found.model_dump_json(indent=2))
    else:
        print_frontier(found, bundle, _console())
        typer.echo(f"\nbundle  {bundle}\npage    {bundle / 'frontier.html'}")


@app.command()
def devices(
    name: Annotated[str | None, typer.Argument(metavar="[NAME]")] = None,
    toml: Annotated[bool, typer.Option("--toml", help="Print the profile's file, to copy and change.")] = False,
    json_: options.Json = False,
) -> None:
    """List the device profiles, or show one with the source and confidence of each figure."""
    from edgeprune.profiles import list_profiles, load_profile, profile_toml
    from edgeprune.report.terminal import print_profile, print_profiles

    if name is None:
        profiles = list_profiles()
        if json_:
            typer.echo(json.dumps([profile.model_dump(mode="json") for profile in profiles], indent=2))
        else:
            print_profiles(profiles, _console())
    elif toml:
        typer.echo(profile_toml(load_profile(name)), nl=False)
    elif json_:
        typer.echo(load_profile(name).model_dump_json(indent=2))
    else:
        print_profile(load_profile(name), _console())


@app.command()
def plan(
    model: Annotated[str, typer.Argument(metavar="CONFIG", help="A config.json, or a model as for fit; no weights.")],
    device: Annotated[str | None, typer.Option(help="Device profile. Default: a table of all.")] = None,
    profile: options.Profile = None,
    precision: Annotated[
        str | None, typer.Option(metavar="fp16|bf16|int8|int4|fp32", help="Default: the profile's.")
    ] = None,
    prompt: options.Prompt = None,
    past: Annotated[int | None, typer.Option(help="Tokens in the cache before a step. Default: the profile's.")] = None,
    batch: options.Batch = None,
    json_: options.Json = False,
) -> None:
    """Estimate what a model of this shape needs and reaches: memory by part, prefill, decode; all estimated."""
    from edgeprune.plan import Question, plan_all
    from edgeprune.plan import plan as plan_one
    from edgeprune.report.terminal import print_plan, print_plans

    question = Question(model, device, profile, precision, prompt, past, batch)
    if device is None and profile is None:
        plans = plan_all(question)
        if json_:
            typer.echo(
                json.dumps(
                    {"model": plans[0].model, "devices": [planned.as_json() for planned in plans]},
                    indent=2,
                    allow_nan=False,
                )
            )
        else:
            print_plans(plans, _console())
        return
    planned = plan_one(question)
    if json_:
        typer.echo(json.dumps(planned.as_json(), indent=2, allow_nan=False))
    else:
        print_plan(planned, _console())


@app.command()
def doctor(json_: options.Json = False) -> None:
    """Say which engines can build and run here, and what to install for the others."""
    from edgeprune.doctor import examine
    from edgeprune.report.terminal import print_doctor

    findings = examine()
    if json_:
        typer.echo(json.dumps([finding.as_json() for finding in findings], indent=2))
    else:
        print_doctor(findings, _console())


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
    from edgeprune.measuring import measure as run_measure
    from edgeprune.progress import rich_progress
    from edgeprune.report.terminal import print_report

    with rich_progress() as progress:
        report = run_measure(bundle, target, keep_remote, progress)
    if json_:
        typer.echo(report.model_dump_json(indent=2))
    else:
        print_report(report, _console())
    raise typer.Exit(report.exit_code())


@app.command()
def run(
    bundle: options.Bundle,
    prompt: Annotated[str, typer.Option(help="What to say to the model.")],
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 256,
    temperature: Annotated[float, typer.Option(min=0.0, help="0: always the likeliest token.")] = 0.0,
    top_p: Annotated[float, typer.Option(min=0.0, max=1.0)] = 1.0,
    seed: options.Seed = 0,
) -> None:
    """Generate text from a bundle's engine, or from its graph where the engine's GPU is not here, as it comes."""
    from edgeprune.generation import stream_text

    for piece in stream_text(bundle, prompt, max_new_tokens, temperature, top_p, seed, _note):
        sys.stdout.write(piece)
        sys.stdout.flush()
    sys.stdout.write("\n")


@app.command()
def compare(
    model: Annotated[str, typer.Argument(metavar="[MODEL]", help="As for fit.")] = "demo",
    ratios: Annotated[str, typer.Option(help="Percent of attention and MLP parameters to remove.")] = "20,30,50",
    methods: Annotated[
        str, typer.Option(help="Names, with commas between, or `all`.")
    ] = "default,flap,wanda+ls,wanda,magnitude,random",
    calibration: Annotated[str, typer.Option(metavar="PATH", help="Text, jsonl or folder.")] = "self",
    evaluate: options.Evaluate = None,
    samples: options.Samples = 32,
    length: options.Length = 256,
    layout: Annotated[
        str, typer.Option(metavar="uniform|per-layer|both", help="The same widths in every layer, or free ones.")
    ] = "uniform",
    html: Annotated[Path | None, typer.Option(help="Write a page with a plot there.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace an older page.")] = False,
    json_: options.Json = False,
    seed: options.Seed = 0,
) -> None:
    """Compare pruning methods at equal ratios on the same samples and texts."""
    from edgeprune.compare import compare as run_compare
    from edgeprune.progress import rich_progress
    from edgeprune.report.comparison import check_page, write_page
    from edgeprune.report.terminal import print_comparison

    if html is not None:
        check_page(html, force)
    with rich_progress() as progress:
        rows = run_compare(
            model, _numbers(ratios), _names(methods), calibration, evaluate or (), samples, length, layout, seed,
            progress,
        )  # fmt: skip
    if html is not None:
        write_page(html, rows)
    if json_:
        typer.echo(json.dumps({"rows": [row.as_json() for row in rows]}, indent=2, allow_nan=False))
    else:
        print_comparison(rows, _console())


@app.command()
def report(bundle: options.Bundle) -> None:
    """Render a bundle's report.html again from its report.json, and say where it is."""
    from edgeprune.reading import render_again

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


def _console() -> Any:
    from rich.console import Console

    return Console()


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
