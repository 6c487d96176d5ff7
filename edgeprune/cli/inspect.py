"""The commands that inspect: devices, plan, doctor, report. Each parses, calls one function and prints."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer

from edgeprune.cli import options
from edgeprune.cli.options import DEVICE, takes
from edgeprune.cli.streams import console, show


def devices(
    name: Annotated[
        str | None,
        typer.Argument(metavar="NAME", help="A device, to see all its figures. Default: a line for each device."),
    ] = None,
    toml: Annotated[bool, typer.Option("--toml", help="Print the profile's file, to copy and change.")] = False,
    json_: options.Json = False,
) -> None:
    """List the device profiles, or show one with the source and confidence of each figure."""
    from edgeprune.cli.tables import print_profile, print_profiles
    from edgeprune.profiles import list_profiles, load_profile, profile_toml

    if name is None:
        profiles = list_profiles()
        if json_:
            show(json.dumps([profile.model_dump(mode="json") for profile in profiles], indent=2))
        else:
            print_profiles(profiles, console())
    elif toml:
        show(profile_toml(load_profile(name)).rstrip())
    elif json_:
        show(load_profile(name).model_dump_json(indent=2))
    else:
        print_profile(load_profile(name), console())


@takes("device", "profile", "precision", "tensorrt", "prompt", "batch", "image_size", "num_heads")
def plan(
    model: Annotated[str, typer.Argument(metavar="CONFIG", help="A config.json, or a model as for fit; no weights.")],
    weights: options.PlanWeights = "float",
    past: Annotated[
        int | None,
        typer.Option(help="Tokens in the cache before a step. Default: the profile's.", rich_help_panel=DEVICE),
    ] = None,
    json_: options.Json = False,
    **shape: Any,
) -> None:
    """Estimate what a model of this shape needs and reaches: memory by part, prefill, decode; all estimated."""
    from edgeprune.cli.tables import print_plan, print_plans
    from edgeprune.commands.plan import plan as run

    plans = run(model, weights=weights, past=past, **shape).report
    is_one = shape["device"] is not None or shape["profile"] is not None
    if json_:
        devices = [planned.as_json() for planned in plans]
        document = devices[0] if is_one else {"model": plans[0].model, "devices": devices}
        show(json.dumps(document, indent=2, allow_nan=False))
    elif is_one:
        print_plan(plans[0], console())
    else:
        print_plans(plans, console())


def doctor(json_: options.Json = False) -> None:
    """Show which engines can build and run on this machine, and what to install for the others."""
    from edgeprune.cli.tables import print_doctor
    from edgeprune.commands.doctor import examine

    findings = examine()
    if json_:
        show(json.dumps([finding.as_json() for finding in findings], indent=2))
    else:
        print_doctor(findings, console())


def report(bundle: options.Bundle) -> None:
    """Render a bundle's report.html again from its report.json, and print its path."""
    from edgeprune.bundle.read import render_again

    show(str(render_again(bundle)))
