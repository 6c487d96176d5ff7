"""The tables of docs/samples.md: what the choice of samples by coverage is worth, and what more samples are.

    python -m tools.samples --sotu DIR --handbook DIR --cells docs/samples.jsonl --write docs/samples.md

Texts as for tools/quality.py. The demo model, its weights freed of their grid (tools/turned.py), loses 30 % of its
attention and MLP parameters, the same widths in every layer, refitted on samples of 256 tokens alone: none of the
model's own stand beside them. Each seed draws its own candidates from the speeches before 1990; a random subset is the
first of these, one by coverage what pruning/coverage.py chooses among all. Evaluation: the first 256 tokens of ten
excerpts of each text. Cells that stand in the file are not run again.
"""

from __future__ import annotations

import argparse
import functools
import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from edgeprune.model.load import load_model
from edgeprune.model.tokens.tokenizer import load_tokenizer
from edgeprune.pipeline.comparison import Comparison, Layout, WidthRule
from edgeprune.progress import Silent
from edgeprune.pruning.coverage import Herd, distance, sketches
from tools.pages import filled, table
from tools.quality import Texts, read_cells, read_texts, run
from tools.turned import turned

LENGTH = 256
DRAWN = 128  # rows of a seed
CANDIDATES = 64  # the first of these, among which subsets are chosen
EXCERPTS = 10
TEXTS = ("speeches", "handbook")  # like the samples, and of another domain
RATIO = 0.3
SEEDS = (0, 1, 2)
COVERED = (8, 16)
FITTED = (8, 32, 128)
COVERAGE, RANDOM = "coverage", "random"


@dataclass(frozen=True)
class Cell:
    choice: str
    samples: int
    seed: int = 0

    @property
    def key(self) -> str:
        return json.dumps(asdict(self))


def coverage_cells() -> Iterator[Cell]:
    for seed in SEEDS:
        for samples in COVERED:
            yield Cell(RANDOM, samples, seed)
            yield Cell(COVERAGE, samples, seed)


def fitting_cells() -> Iterator[Cell]:
    for samples in FITTED:
        yield Cell(RANDOM, samples)


class Bench:
    """Runs cells on the turned demo model."""

    def __init__(self, texts: Texts, model: Any) -> None:
        self.texts, self.model = texts, model
        self.evaluation = {name: [row[:LENGTH] for row in texts.evaluation[name][:EXCERPTS]] for name in TEXTS}
        self.losses: dict[Any, Any] = {}

    def rows(self, count: int, seed: int) -> np.ndarray:
        """Returns the first of a seed's rows (count, LENGTH) int64."""
        return self.texts.rows(DRAWN, seed)[:count, :LENGTH]

    @functools.cache  # noqa: B019
    def features(self, seed: int) -> np.ndarray:
        """Returns the sketches of a seed's candidates."""
        return sketches(self.model, [*self.rows(CANDIDATES, seed)], seed)

    def run(self, cell: Cell) -> dict[str, Any]:
        """Returns a cell's line: its rise, the nats of each excerpt, and of a subset its distance to the whole."""
        rows, extra = self.rows(cell.samples, cell.seed), {}
        if cell.samples in COVERED:
            tokens, left = np.full(CANDIDATES, LENGTH), np.arange(CANDIDATES)
            chosen = list(range(cell.samples))
            if cell.choice == COVERAGE:
                herd, chosen = Herd(self.features(cell.seed), tokens), []
                while len(chosen) < cell.samples:
                    chosen.append(herd(left))
                    left = left[left != chosen[-1]]
                rows = self.rows(CANDIDATES, cell.seed)[chosen]
            extra = {"distance": distance(self.features(cell.seed), tokens, chosen), "chosen": chosen}
        ids = torch.from_numpy(np.ascontiguousarray(rows))
        comparison = Comparison(self.model, ids, None, self.evaluation, LENGTH, cell.seed, Silent(), self.losses)
        target = comparison.target(RATIO, Layout.UNIFORM, WidthRule.EVEN)
        row = comparison.run_to(target, "default", RATIO, Layout.UNIFORM, WidthRule.EVEN)
        losses = comparison.losses[row.key]
        nats = {text: losses[text].nats.round(3).tolist() for text in TEXTS}
        return {"rise": row.rise, "ratio": row.ratio, "nats": nats, "seconds": row.seconds, **extra}

    def dense(self) -> dict[str, Any]:
        comparison = Comparison(self.model, None, None, self.evaluation, LENGTH, 0, Silent(), self.losses)
        return {"perplexity": comparison.dense.perplexity, "tokens": LENGTH}


Cells = Mapping[str, Mapping[str, Any]]


def coverage_table(cells: Cells) -> str:
    """Returns the table of subsets by coverage against random ones of equal size, each the mean of its seeds."""
    rows = []
    for samples in COVERED:
        pairs = [
            (cells[Cell(RANDOM, samples, seed).key], cells[Cell(COVERAGE, samples, seed).key])
            for seed in SEEDS
            if all(Cell(choice, samples, seed).key in cells for choice in (RANDOM, COVERAGE))
        ]
        for text in TEXTS if pairs else ():
            random, covering = ([one["rise"][text][0] for one in column] for column in zip(*pairs, strict=True))
            rows.append(
                [
                    str(samples),
                    text,
                    str(len(pairs)),
                    *(f"{np.mean([one['distance'] for one in column]):.2f}" for column in zip(*pairs, strict=True)),
                    *(f"{np.mean(v):.3f} ({', '.join(f'{x:.3f}' for x in v)})" for v in (random, covering)),
                    difference(pairs, text),
                ]
            )
    columns = [
        "samples",
        "text",
        "seeds",
        "distance, random",
        "by coverage",
        "rise, random",
        "by coverage",
        "coverage less random",
    ]
    return table(columns, rows)


def difference(pairs: list[tuple[Mapping[str, Any], Mapping[str, Any]]], text: str) -> str:
    """Returns the mean rise of the second of each pair over that of the first in nats a token, with the 95 % interval
    of a bootstrap over seeds and excerpts."""
    nats = np.array([np.subtract(one["nats"][text], other["nats"][text]) for other, one in pairs]) / (LENGTH - 1)
    generator = np.random.default_rng(0)
    seeds = generator.integers(len(nats), size=(2000, len(nats), 1))
    excerpts = generator.integers(nats.shape[1], size=(2000, 1, nats.shape[1]))
    low, high = np.quantile(nats[seeds, excerpts].mean(axis=(1, 2)), [0.025, 0.975])
    return f"{nats.mean():+.3f} [{low:+.3f}, {high:+.3f}]"


def fitting_table(cells: Cells) -> str:
    """Returns the table of the rise by the number of samples, on text like these and on other text."""
    rows = []
    for cell in fitting_cells():
        if row := cells.get(cell.key):
            rises = [f"{value:.3f} [{low:.3f}, {high:.3f}]" for value, low, high in row["rise"].values()]
            rows.append([str(cell.samples), f"{cell.samples * LENGTH:,}", *rises])
    return table(["samples", "tokens", *TEXTS], rows)


WRITERS = {"coverage": coverage_table, "fitting": fitting_table}


def fill(page: str, cells: Cells) -> str:
    """Returns the page with its tables made of the cells."""
    return filled(page, {name: write(cells) for name, write in WRITERS.items()})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sotu", type=Path, required=True)
    parser.add_argument("--handbook", type=Path, required=True)
    parser.add_argument("--cells", type=Path, required=True)
    parser.add_argument("--tables", default="coverage,fitting")
    parser.add_argument("--write", type=Path, help="the page, from the cells that are there")
    arguments = parser.parse_args()
    cells = read_cells(arguments.cells) if arguments.cells.is_file() else {}
    by_name = {"coverage": coverage_cells, "fitting": fitting_cells}
    todo = [cell for name in arguments.tables.split(",") if name for cell in by_name[name]()]
    if any(cell.key not in cells for cell in todo):
        demo = load_model("demo")
        texts = read_texts(arguments.sotu, arguments.handbook, load_tokenizer(demo.directory))
        run(Bench(texts, turned(demo)), todo, cells, arguments.cells)
    if arguments.write:
        arguments.write.write_text(fill(arguments.write.read_text(encoding="utf-8"), cells), encoding="utf-8")


if __name__ == "__main__":
    main()
