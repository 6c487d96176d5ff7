"""The commands that inspect: devices, plan, doctor, report. Each parses, calls one function and prints."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

from edgeprune.cli import options
from edgeprune.cli.ending import shown_progress
from edgeprune.cli.options import DEVICE, PATH, takes
from edgeprune.cli.streams import console, show
from edgeprune.errors import InputError


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


@takes("device", "profile", "engine", "precision", "tensorrt", "prompt", "batch", "image_size", "num_heads")
def plan(
    model: Annotated[str, typer.Argument(metavar="CONFIG", help="A config.json, or a model as for fit; no weights.")],
    weights: options.PlanWeights = "float",
    cache: options.PlanCache = "float",
    past: Annotated[
        int | None,
        typer.Option(help="Tokens in the cache before a step. Default: the profile's.", rich_help_panel=DEVICE),
    ] = None,
    work: Annotated[
        bool, typer.Option("--work", help="Also what a fit for the device takes here: time, memory, disk.")
    ] = False,
    json_: options.Json = False,
    **shape: Any,
) -> None:
    """Estimate what a model of this shape needs and reaches: memory by part, prefill, decode; all estimated."""
    from edgeprune.cli.tables import print_plan, print_plans
    from edgeprune.commands.plan import plan as run

    plans = run(model, weights=weights, cache=cache, past=past, work=work, **shape).report
    is_one = shape["device"] is not None or shape["profile"] is not None
    if json_:
        devices = [planned.as_json() for planned in plans]
        document = devices[0] if is_one else {"model": plans[0].model, "devices": devices}
        show(json.dumps(document, indent=2, allow_nan=False))
    elif is_one:
        print_plan(plans[0], console())
    else:
        print_plans(plans, console())
    if any(planned.outlook and planned.outlook.lacking for planned in plans):
        raise typer.Exit(3)


def _show_families(is_json: bool) -> None:
    from edgeprune.cli.tables import print_families
    from edgeprune.commands.families import families

    rows = families()
    if is_json:
        show(json.dumps([row.as_json() for row in rows], indent=2))
    else:
        print_families(rows, console())


def doctor(
    deep: Annotated[
        bool, typer.Option("--deep", help="Check every part of the way to a figure on this machine, in two minutes.")
    ] = False,
    target: Annotated[
        str | None,
        typer.Option(
            metavar="ssh://USER@HOST[:PORT]",
            help="Check a device in the same way: before all else.",
            rich_help_panel=DEVICE,
        ),
    ] = None,
    device: Annotated[
        str | None,
        typer.Option(
            metavar="NAME", help="The profile to check against. Default: that of the GPU there.", rich_help_panel=DEVICE
        ),
    ] = None,
    profile: Annotated[
        Path | None,
        typer.Option(help="A profile of your own, in the place of --device.", rich_help_panel=DEVICE, **PATH),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            metavar="MODEL|SIZE",
            help="What is to run there: is there room for it? A config.json, a model, or 6GiB.",
            rich_help_panel=DEVICE,
        ),
    ] = None,
    families: Annotated[
        bool, typer.Option("--families", help="The model families, and how near each is to transformers.")
    ] = False,
    json_: options.Json = False,
) -> None:
    """Show which engines build and run here; with --deep or --target, check every part of a device."""
    asked = {"--device": device, "--profile": profile, "--model": model, "--target": target, "--deep": deep or None}
    if families:
        if names := [name for name, value in asked.items() if value is not None]:
            raise InputError(f"--families with {names[0]}", "Leave one of them out.")
        _show_families(json_)
        return
    if deep or target is not None:
        _check_up(target, device, profile, model, json_)
    if names := [name for name, value in asked.items() if value is not None]:
        raise InputError(f"{names[0]} is given without --deep or --target", "Add --deep for this machine, or --target.")
    from edgeprune.cli.tables import print_doctor
    from edgeprune.commands.doctor import examine

    findings = examine()
    if json_:
        show(json.dumps([finding.as_json() for finding in findings], indent=2))
    else:
        print_doctor(findings, console())


def _check_up(target: str | None, device: str | None, profile: Path | None, model: str | None, json_: bool) -> NoReturn:
    """Prints what a device passed and what not. Exit code 0: nothing failed, else 1."""
    from edgeprune.cli.tables import print_checkup
    from edgeprune.commands.checkup import as_json, checkup

    with shown_progress() as progress:
        result = checkup(target=target, device=device, profile=profile, model=model, progress=progress)
    if json_:
        show(json.dumps(as_json(result), indent=2, allow_nan=False))
    else:
        print_checkup(result, console())
    raise typer.Exit(1 if result.count("failed") else 0)


def report(bundle: options.Bundle) -> None:
    """Render a bundle's report.html again from its report.json, and print its path."""
    from edgeprune.bundle.read import render_again

    show(str(render_again(bundle)))
