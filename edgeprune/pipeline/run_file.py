"""run.toml: the options of a run as a file, to read and to write. It knows their names, not what they do."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgeprune.errors import InputError
from edgeprune.evaluate.tasks import is_file, names_of
from edgeprune.pipeline.request import DEFAULTS, DEMO, SELF
from edgeprune.profiles import read_toml, toml_value

if TYPE_CHECKING:
    from edgeprune.pipeline.setup import Setup

RUN_FILE = "run.toml"
NOT_WRITTEN = ("output", "resume", "force")  # where, and over what, belongs to the next run


def read_run_file(path: Path) -> dict[str, Any]:
    """Returns the options of a file by name, as they stand there, with underscores. Raises InputError."""
    options = read_toml(path, 'Give a TOML file with one option a line, such as memory = "90%".')
    if tables := [name for name, value in options.items() if isinstance(value, dict)]:
        raise InputError(f"{path} holds the table [{tables[0]}]", "Options stand at the top, one a line.")
    return {name.replace("-", "_"): value for name, value in options.items()}


def run_file(setup: Setup, names: Collection[str] = tuple(DEFAULTS)) -> str:
    """Returns the options of a run as TOML that makes it again from any folder: paths whole, and what the profile or
    the model decided written out.

    names: the options that the command has.
    """
    request, kind = setup.request, setup.kind
    resolved = {
        **{name: limit.asked for name, limit in setup.budget.limits.items()},
        "precision": setup.precision,
        "batch": request.batch or setup.profile.workload.batch,
    }
    if kind.writes_text:
        resolved |= {"prompt": setup.workload.prompt, "context": setup.workload.context, "length": setup.length}
    else:
        resolved |= {"cfg": kind.imaging.sampling.cfg, "images": kind.imaging.count}
    values = {field.name: getattr(request, field.name) for field in dataclasses.fields(request)} | resolved
    return toml_of({name: value for name, value in values.items() if name in names})


def toml_of(values: dict[str, Any]) -> str:
    """Returns options as TOML; what is left out, and what belongs to the next run alone, is not written."""
    lines = [
        f"{name.replace('_', '-')} = {toml_value(_written(name, value))}"
        for name, value in values.items()
        if value is not None and value != () and name not in NOT_WRITTEN
    ]
    return "\n".join(lines) + "\n"


def _written(name: str, value: Any) -> Any:
    if isinstance(value, Path):
        return str(value.absolute())
    if isinstance(value, tuple):
        return tuple(_written(name, each) for each in value)
    if name == "tasks":
        return ",".join(str(Path(one).absolute()) if is_file(one) else one for one in names_of(value))
    is_special = (name, value) in (("model", DEMO), ("calibration", SELF))
    if name in ("model", "calibration") and not is_special and Path(value).exists():
        return str(Path(value).absolute())  # else a hub id
    return value
