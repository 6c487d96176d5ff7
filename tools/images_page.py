"""The figures of tools/images.py, as lines of a file and as the tables of docs/images.md. It measures nothing."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from edgeprune.errors import InputError
from tools.pages import filled, table

RATIOS = (0.1, 0.15, 0.2, 0.3)
METHODS = ("default", "obs", "wanda", "flap", "magnitude", "wanda+ls", "flap+ls", "magnitude+ls")
WITHOUT = ("obs", "wanda", "flap", "magnitude")  # methods that do not compensate by least squares
SCALES = (1.0, 1.25, 1.5, 2.0, 3.0)
NAMES = {"obs": "default without compensation"}


@dataclass(frozen=True)
class Cell:
    """A model, or images, to judge. ratio 0: nothing was pruned."""

    method: str
    ratio: float = 0.0

    @property
    def name(self) -> str:
        """Returns the name of its row."""
        return f"{self.method} {100 * self.ratio:g}" if self.ratio else self.method

    @property
    def generator_name(self) -> str:
        """Returns the name of its second row, whose figures are the generator's own."""
        return f"{self.name}, behind the codec"

    @property
    def default(self) -> Cell:
        """Returns the cell that a method is compared with."""
        return Cell("default", self.ratio)

    @property
    def label(self) -> str:
        """Returns the method as the tables name it."""
        return NAMES.get(self.method, self.method)


REAL, THROUGH_CODEC, DENSE = Cell("test images"), Cell("test images through the codec"), Cell("dense")
Rows = Mapping[str, Mapping[str, Any]]


@dataclass
class Ledger:
    """A file of one JSON line for each finished row; the first line holds what all have in common."""

    path: Path
    rows: dict[str, dict[str, Any]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.path.is_file():
            lines = map(json.loads, self.path.read_text(encoding="utf-8").splitlines())
            self.rows = {line["name"]: line for line in lines}

    def begin(self, fingerprint: Mapping[str, Any], training: Path) -> None:
        """Writes the first line of a new file. Raises InputError where the rows of an old one are of other settings."""
        parts = [json.loads(line) for line in training.read_text(encoding="utf-8").splitlines()]
        row = self.once("setting", lambda: {"fingerprint": dict(fingerprint), "training": parts})
        for name, value in fingerprint.items():
            if row["fingerprint"].get(name) != value:
                raise InputError(
                    f"{self.path} holds rows of {name} {row['fingerprint'].get(name)}, not of {value}",
                    "Give another file by --cells, or remove it.",
                )

    def once(self, name: str, compute: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """Returns a row; computes and appends it where it is missing."""
        if name not in self.rows:
            self.rows[name] = {"name": name, **json.loads(json.dumps(compute()))}
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(self.rows[name]) + "\n")
        return self.rows[name]


def interval(values: list[float], digits: int = 3, sign: str = "") -> str:
    """Returns a value, low and high as text."""
    value, low, high = (f"{value:{sign}.{digits}f}" for value in values)
    return f"{value} [{low}, {high}]"


def thousandths(values: list[float], sign: str = "") -> str:
    """Returns a value, low and high in thousandths, the unit of kernel distances in the tables."""
    return interval([1000 * value for value in values], digits=2, sign=sign)


def percent(values: list[float]) -> str:
    """Returns the first of the values, a share, in percent."""
    return f"{100 * values[0]:.1f} %"


def by_ratio(
    rows: Rows, cells: Callable[[float], list[Cell]], text: Callable[[Cell], str], first: Sequence[Cell] = ()
) -> str:
    """Returns a table with a line for each of the cells of a ratio, behind some that are the same at every ratio."""
    lines = [[cell.label, *[text(cell)] * len(RATIOS)] for cell in first if cell.name in rows]
    for place, cell in enumerate(cells(RATIOS[0])):
        lines.append([cell.label, *(text(cells(share)[place]) for share in RATIOS)])
    return table(["pictures", *(f"{100 * share:g} %" for share in RATIOS)], lines)


def methods(share: float) -> list[Cell]:
    return [Cell(method, share) for method in METHODS]


def others(share: float) -> list[Cell]:
    return methods(share)[1:]


def value(rows: Rows, name: str, key: str, sign: str = "") -> str:
    """Returns a figure of a row with its interval; empty where the row is missing."""
    return interval(rows[name][key], sign=sign) if name in rows else ""


def distance(rows: Rows, name: str, key: str, sign: str = "") -> str:
    """Returns a kernel distance of a row in thousandths with its interval; empty where the row is missing."""
    return thousandths(rows[name][key], sign) if name in rows else ""


def kernel_table(rows: Rows) -> str:
    return by_ratio(rows, methods, lambda cell: distance(rows, cell.name, "kernel"), [REAL, THROUGH_CODEC, DENSE])


def generator_table(rows: Rows) -> str:
    return by_ratio(rows, methods, lambda cell: distance(rows, cell.generator_name, "kernel"), [DENSE])


def difference_table(rows: Rows) -> str:
    return by_ratio(rows, others, lambda cell: distance(rows, cell.name, "over_default", "+"))


def generator_difference_table(rows: Rows) -> str:
    return by_ratio(rows, others, lambda cell: distance(rows, cell.generator_name, "over_default", "+"))


def perplexity_table(rows: Rows) -> str:
    return by_ratio(rows, methods, lambda cell: value(rows, cell.name, "rise", "+"))


def accuracy_table(rows: Rows) -> str:
    return by_ratio(rows, methods, lambda cell: value(rows, cell.name, "recognised"), [REAL, THROUGH_CODEC, DENSE])


def everything_table(rows: Rows) -> str:
    lines = []
    cells = [REAL, THROUGH_CODEC, DENSE]
    for share in RATIOS:
        cells += [Cell(method, share) for method in METHODS]
    for cell in cells:
        if row := rows.get(cell.name):
            lines.append(
                [
                    f"{100 * row['realised']:.1f} %" if cell.ratio else "",
                    cell.label,
                    f"{row['parameters'] / 1e6:.2f}" if "parameters" in row else "",
                    thousandths(row["kernel"]),
                    f"{row['frechet'][0]:.1f} ({row['frechet'][1]:.1f})",
                    percent(row["precision"]),
                    percent(row["recall"]),
                    percent(row["recognised"]),
                    f"{row['perplexity']:.2f}" if "perplexity" in row else "",
                    f"{row['seconds']:.0f}" if "seconds" in row else "",
                ]
            )
    columns = [
        "removed",
        "pictures",
        "million parameters",
        "kernel distance",
        "Frechet (floor)",
        "precision",
        "recall",
        "recognised",
        "perplexity",
        "seconds",
    ]
    return table(columns, lines)


def guidance_table(rows: Rows) -> str:
    lines = [
        [
            f"{scale:g}",
            thousandths(row["kernel"]),
            percent(row["precision"]),
            percent(row["recall"]),
            percent(row["recognised"]),
        ]
        for scale in SCALES
        if (row := rows.get(f"guidance {scale:g}"))
    ]
    return table(["scale", "kernel distance", "precision", "recall", "recognised"], lines)


def training_table(rows: Rows) -> str:
    parts = {part["part"]: part for part in rows["setting"]["training"]} if "setting" in rows else {}
    lines = []
    for name, part in parts.items():
        figures = [
            f"{key.replace('_', ' ')} {value:.4g}" for key, value in part.items() if isinstance(value, float | int)
        ]
        settings = part["settings"]
        lines.append([name, f"{settings['steps']} of {settings['batch']}", ", ".join(figures)])
    return table(["part", "steps", "figures"], lines)


TABLES = {
    "training": training_table,
    "guidance": guidance_table,
    "kernel": kernel_table,
    "differences": difference_table,
    "generator": generator_table,
    "generator differences": generator_difference_table,
    "perplexity": perplexity_table,
    "accuracy": accuracy_table,
    "everything": everything_table,
}


def fill(page: str, rows: Rows) -> str:
    """Returns the page with its tables made of the rows."""
    return filled(page, {name: write(rows) for name, write in TABLES.items()})
