"""FLEET.toml: models, targets and shared options, and the cells that they make. It knows options, not what they do.

[defaults]            options of all cells, as in `fit --config`
[[models]]            options of a model, one table each; `name` is its row
[[targets]]           options of a target: device or profile, budget, ssh address; `name` is its column
[[cells]]             in place of both: options of single cells, with `model_name` and `target_name`
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgeprune.errors import InputError
from edgeprune.files import printable
from edgeprune.pipeline.request import DEFAULTS, DEMO, PATHS, SELF, request_of, unknown_option
from edgeprune.pipeline.setup import FILE_ENDINGS
from edgeprune.profiles import profile_of, read_toml

TABLES = ("models", "targets", "cells")
OF_FLEET = ("output", "resume", "force")  # options that the fleet gives its cells
LIMITS = ("memory", "decode", "prefill")  # by which targets of one device are told apart
FORM = 'Write [defaults], [[models]] and [[targets]], such as [[targets]] with device = "jetson-orin".'
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._%-]{0,79}")  # of a folder


@dataclass(frozen=True)
class Cell:
    """One fit of a fleet: its row and column, and its options in the words of `fit`, with underscores."""

    model: str
    target: str
    options: Mapping[str, Any]

    @property
    def folder(self) -> Path:
        """Returns the place of its bundle in the fleet's folder."""
        return Path(self.model) / self.target


def read_fleet(path: Path) -> list[Cell]:
    """Returns the cells of a file, those of one target behind each other; paths are whole.

    Raises InputError for a file that cannot be read, options that do not exist, devices that are not known, and names
    that are ambiguous.
    """
    content = read_toml(path, FORM)
    if unknown := [name for name in content if name not in ("defaults", *TABLES)]:
        raise InputError(f"{path} holds {printable(unknown[0], 60)!r}, which no fleet has", FORM)
    defaults = _options(path, "defaults", content.get("defaults", {}))
    tables = {name: _tables(path, name, content.get(name, [])) for name in TABLES}
    if tables["cells"] and (tables["models"] or tables["targets"]):
        raise InputError(f"{path} holds [[cells]] beside [[models]] or [[targets]]", "Write one or the other.")
    cells = [_cell(path, defaults | one) for one in tables["cells"]] or list(_product(path, defaults, tables))
    counts = Counter(cell.folder for cell in cells)
    if twice := [folder for folder, count in counts.items() if count > 1]:
        raise InputError(
            f"{path}: two cells are {twice[0].parent.name} on {twice[0].name}", "Give each a name of its own."
        )
    for cell in cells:
        _check(path, cell)
    return cells


def _product(path: Path, defaults: dict[str, Any], tables: dict[str, list[dict[str, Any]]]) -> Iterator[Cell]:
    """Yields the cells of all models on the first target, then on the next."""
    for name in ("models", "targets"):
        if not tables[name]:
            raise InputError(f"{path} has no [[{name}]]", FORM)
        names = Counter(_name_of(path, name, defaults | one) for one in tables[name])
        if (most := names.most_common(1)[0])[1] > 1:
            raise InputError(f"{path}: {most[1]} {name} are named {most[0]}", 'Give each a name = "...".')
    for target in tables["targets"]:
        for model in tables["models"]:
            options = {name: value for name, value in (defaults | model | target).items() if name != "name"}
            names = _name_of(path, "models", defaults | model), _name_of(path, "targets", defaults | target)
            yield Cell(*names, options)


def _cell(path: Path, options: dict[str, Any]) -> Cell:
    """Returns a cell that is listed by itself."""
    given = dict(options)
    names = (
        _checked(path, given.pop("model_name", None) or _stem(given)),
        _checked(path, given.pop("target_name", None) or _target(given)),
    )
    return Cell(*names, given)


def _name_of(path: Path, kind: str, options: Mapping[str, Any]) -> str:
    return _checked(path, options.get("name") or (_stem(options) if kind == "models" else _target(options)))


def _stem(options: Mapping[str, Any]) -> str:
    model = Path(str(options.get("model", DEMO)))
    return model.stem if model.suffix.lower() in FILE_ENDINGS else model.name


def _target(options: Mapping[str, Any]) -> str:
    """Returns the name of a target: its device and its budget."""
    device = options.get("device") or Path(str(options.get("profile", "no-device"))).stem
    limits = [f"{name}-{options[name]}".replace(" ", "") for name in LIMITS if options.get(name)]
    return "-".join([str(device), *limits])


def _checked(path: Path, name: object) -> str:
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise InputError(
            f"{path}: the name {printable(name, 60)!r} is none for a folder",
            "Give a name = of letters, digits, dots, dashes and underscores.",
        )
    return name


def _tables(path: Path, name: str, content: Any) -> list[dict[str, Any]]:
    """Returns the options of each table of that name."""
    if not isinstance(content, list):
        raise InputError(f"{path}: {name} is not a list of tables", f"Write [[{name}]].")
    return [_options(path, name, one) for one in content]


def _options(path: Path, table: str, content: Any) -> dict[str, Any]:
    """Returns the options of a table by name, with underscores. Raises InputError for one that no cell has."""
    if not isinstance(content, dict):
        raise InputError(f"{path}: {table} is not a table of options", FORM)
    options = {name.replace("-", "_"): value for name, value in content.items()}
    names = {"models": ("name",), "targets": ("name",), "cells": ("model_name", "target_name")}.get(table, ())
    for name in options:
        if name in OF_FLEET:
            raise InputError(f"{path}: {name} is the fleet's own", "Leave it out: a cell's bundle has its place.")
        if name not in names and name not in DEFAULTS:
            raise unknown_option(name, sorted({*DEFAULTS, *names} - set(OF_FLEET)))
    return {name: _whole(name, value) for name, value in options.items()}


def _whole(name: str, value: Any) -> Any:
    """Returns an option whose paths lead there from any folder; a hub id is none."""
    if isinstance(value, list):
        return [_whole(name, one) for one in value]
    is_path = name in PATHS and isinstance(value, str) and value not in (DEMO, SELF)
    if not is_path or (name in ("model", "calibration") and not Path(value).expanduser().exists()):
        return value
    return str(Path(value).expanduser().absolute())


def _check(path: Path, cell: Cell) -> None:
    """Raises InputError, which names the cell, where its options cannot be a request."""
    try:
        request = request_of(**cell.options)
        if (request.device is None) == (request.profile is None):
            raise InputError("give one of device and profile", "`edgeprune devices` lists the devices.")
        profile_of(request.device, request.profile)
    except InputError as error:
        raise InputError(f"{path}, {cell.model} on {cell.target}: {error.message}", error.remedy) from None
