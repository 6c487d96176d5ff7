"""The commands that only look: devices, plan, doctor. Like cli.py they parse, call one function and print."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from edgeprune.cli import options
from edgeprune.cli.options import console


def devices(
    name: Annotated[str | None, typer.Argument(metavar="[NAME]")] = None,
    toml: Annotated[bool, typer.Option("--toml", help="Print the profile's file, to copy and change.")] = False,
    json_: options.Json = False,
) -> None:
    """List the device profiles, or show one with the source and confidence of each figure."""
    from edgeprune.cli.tables import print_profile, print_profiles
    from edgeprune.profiles import list_profiles, load_profile, profile_toml

    if name is None:
        profiles = list_profiles()
        if json_:
            typer.echo(json.dumps([profile.model_dump(mode="json") for profile in profiles], indent=2))
        else:
            print_profiles(profiles, console())
    elif toml:
        typer.echo(profile_toml(load_profile(name)), nl=False)
    elif json_:
        typer.echo(load_profile(name).model_dump_json(indent=2))
    else:
        print_profile(load_profile(name), console())


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
    image_size: options.ImageSize = None,
    num_heads: options.NumHeads = None,
    json_: options.Json = False,
) -> None:
    """Estimate what a model of this shape needs and reaches: memory by part, prefill, decode; all estimated."""
    from edgeprune.cli.tables import print_plan, print_plans
    from edgeprune.commands.plan import Question, plan_all
    from edgeprune.commands.plan import plan as plan_one
    from edgeprune.model.checkpoint.llamagen import Hints

    question = Question(model, device, profile, precision, prompt, past, batch, Hints(image_size, num_heads))
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
            print_plans(plans, console())
        return
    planned = plan_one(question)
    if json_:
        typer.echo(json.dumps(planned.as_json(), indent=2, allow_nan=False))
    else:
        print_plan(planned, console())


def doctor(json_: options.Json = False) -> None:
    """Say which engines can build and run here, and what to install for the others."""
    from edgeprune.cli.tables import print_doctor
    from edgeprune.commands.doctor import examine

    findings = examine()
    if json_:
        typer.echo(json.dumps([finding.as_json() for finding in findings], indent=2))
    else:
        print_doctor(findings, console())


def report(bundle: options.Bundle) -> None:
    """Render a bundle's report.html again from its report.json, and say where it is."""
    from edgeprune.bundle.read import render_again

    typer.echo(str(render_again(bundle)))
