"""The tables of docs/drift.md: how far nine texts lie from calibration data, and what they cost, on SmolLM2-135M.

    python -m tools.drift --sotu package/data --handbook handbook/usr/share/doc/debian-handbook/html \\
        --novel novel/package/data --cells docs/drift.jsonl --write docs/drift.md

tools/quality.py says where the texts come from. Some minutes on an idle core. The demo is pruned by 30 % with widths
that are the same everywhere, on SAMPLES samples of half of the speeches before 1990; the dense model reads all
texts, as in `edgeprune drift`. Made from --cells where that is there.
"""

from __future__ import annotations

import argparse
import inspect
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from edgeprune.evaluate.perplexity import log_rise, text_losses
from edgeprune.evaluate.perturb import code, upper_case
from edgeprune.model.load import load_model
from edgeprune.model.model import Model
from edgeprune.model.tokens.tokenizer import load_tokenizer
from edgeprune.pipeline.comparison import Comparison, Layout, WidthRule
from edgeprune.progress import Silent
from tools.pages import filled, table
from tools.quality import YEAR, pages

LENGTH, SAMPLES, COUNT = 96, 32, 16  # tokens of a sample, calibration samples, samples of a new text
DRAWS, POOL = 40, 24  # of COUNT samples from so many, of speeches, handbook and its translation
JUDGED = 8  # samples whose losses are measured
RATIO = 0.3
SOURCES = ("argparse", "ast", "collections", "csv", "http.client", "inspect", "json.decoder", "textwrap")


@dataclass(frozen=True)
class Texts:
    """Token ids (any, LENGTH) int64: of the calibration data, and of each new text."""

    calibration: np.ndarray
    new: dict[str, np.ndarray]


def read_texts(model: Model, sotu: Path, handbook: Path, novel: Path) -> Texts:
    """Returns random rows of the texts; speeches before YEAR are halved, so that no new one was calibrated on."""
    from importlib import import_module
    from pydoc_data.topics import topics

    tokenizer = load_tokenizer(model.directory)

    def rows(texts: Sequence[str], count: int, seed: int) -> np.ndarray:
        generator = np.random.default_rng(seed)
        documents = [np.asarray(tokenizer(text, verbose=False)["input_ids"], np.int64) for text in texts]
        documents = [ids for ids in documents if len(ids) > 2 * LENGTH]
        chosen = []
        for number in range(count):
            ids = documents[number % len(documents)]
            start = int(generator.integers(len(ids) - LENGTH))
            chosen.append(ids[start : start + LENGTH])
        return np.stack(chosen)

    speeches = [(int(path.name[:4]), path.read_text(encoding="utf-8")) for path in sorted(sotu.glob("*.txt"))]
    old = [text for year, text in speeches if year < YEAR]
    order = np.random.default_rng(0).permutation(len(old))
    known, unknown = ([old[i] for i in half] for half in np.array_split(order, 2))
    scraps = np.random.default_rng(1)
    chapters = [path.read_text(encoding="utf-8") for path in sorted(novel.glob("chapter_*.txt"))]
    programs = [inspect.getsource(import_module(name)) for name in SOURCES]
    texts = {
        "speeches": (unknown, POOL),
        "handbook": (pages(handbook / "en-US"), POOL),
        "handbook, Japanese": (pages(handbook / "ja-JP"), POOL),
        f"speeches from {YEAR} on": ([text for year, text in speeches if year >= YEAR], COUNT),
        "novel": (chapters, COUNT),
        "reference of Python": (list(topics.values()), COUNT),
        "Python programs": (programs, COUNT),
        "speeches in capital letters": ([upper_case(text, scraps) for text in unknown[:COUNT]], COUNT),
        "speeches in lines of code": ([code(text[:4000], scraps) for text in unknown[:COUNT]], COUNT),
    }
    new = {name: rows(of, count, seed) for seed, (name, (of, count)) in enumerate(texts.items())}
    return Texts(rows(known, SAMPLES, 99), new)


def pruned(model: Model, calibration: np.ndarray) -> Model:
    """Returns the demo pruned by RATIO, in memory, on samples (any, LENGTH) int64."""
    import torch

    from edgeprune.pruning.methods import method_named
    from edgeprune.pruning.prune import prune, result_of

    ids = torch.from_numpy(calibration)
    comparison = Comparison(model, ids, None, {}, LENGTH, 0, Silent())
    target = comparison.target(RATIO, Layout.UNIFORM, WidthRule.EVEN)
    method = method_named("default")
    weights = dict(prune(model, target, ids, method, 0, lambda record: _tell(".")))
    return replace(model, decoder=result_of(target, method), weights=weights, quantised={})


def measured(model: Model, texts: Texts) -> list[dict[str, Any]]:
    """Returns a line for each text: distances of draws, limit and p, and the rise in nats with its interval."""
    from edgeprune.evaluate.drift import drift, sketches
    from edgeprune.model.forward import weight_stream

    fitted = pruned(model, texts.calibration)
    _tell(" pruned ")
    moments = sketches(model, np.concatenate([texts.calibration, *texts.new.values()]), lambda: _tell(":"))
    ends = np.cumsum([SAMPLES, *map(len, texts.new.values())])
    calibration, *new = np.split(moments, ends[:-1], axis=1)
    _tell(" read ")
    judged = {name: list(rows[:JUDGED]) for name, rows in texts.new.items()}
    before, after = (
        text_losses(of.decoder, weight_stream(of), judged, LENGTH, lambda: _tell(",")) for of in (model, fitted)
    )
    lines = []
    for name, sketch in zip(texts.new, new, strict=True):
        found = drift(calibration, sketch[:, :COUNT], 0)
        generator, count = np.random.default_rng(0), sketch.shape[1]
        picks = [generator.permutation(count)[:COUNT] for _ in range(DRAWS if count > COUNT else 0)]
        lines.append(
            {
                "text": name,
                "distance": found.whole.value,
                "limit": found.whole.limit,
                "p": found.whole.p,
                "modules": [sum(of.is_drift for of in found.modules), len(found.modules)],
                "draws": [drift(calibration, sketch[:, pick], 0, splits=20).whole.value for pick in picks],
                "rise": log_rise(before[name], after[name], 0),
                "dense": before[name].perplexity,
            }
        )
        _tell(f"\n{name}: {found.whole} {lines[-1]['rise']}")
    return lines


def _tell(text: str) -> None:
    print(text, end="", file=sys.stderr, flush=True)


def texts_table(lines: Sequence[Mapping[str, Any]]) -> str:
    """Returns the table of distances and rises, the nearest text first."""
    rows = []
    for line in sorted(lines, key=lambda line: line["distance"]):
        value, low, high = line["rise"]
        out, of = line["modules"]
        rows.append(
            [
                line["text"],
                f"{100 * line['distance']:.0f} %",
                f"{100 * line['limit']:.0f} %",
                "inside" if line["distance"] <= line["limit"] else f"outside, p = {line['p']:.2g}",
                f"{out} of {of}",
                f"{line['dense']:.1f}",
                f"{value:.3f} [{low:.3f}, {high:.3f}]",
            ]
        )
    heads = ["new text", "distance", "limit", "verdict", "modules outside", "dense perplexity", "rise in nats"]
    return table(heads, rows)


def draws_table(lines: Sequence[Mapping[str, Any]]) -> str:
    """Returns the range of the distances of draws of COUNT samples."""
    rows = [
        [
            line["text"],
            f"{100 * min(line['draws']):.0f} %",
            f"{100 * max(line['draws']):.0f} %",
            str(len(line["draws"])),
        ]
        for line in lines
        if line["draws"]
    ]
    return table(["new text", "least distance", "largest", "draws"], rows)


def correlation_text(lines: Sequence[Mapping[str, Any]]) -> str:
    """Returns the correlation of distance and rise over all texts."""
    distances, rises = ([line[name] if name == "distance" else line[name][0] for line in lines] for name in KEYS)
    ranks = [np.argsort(np.argsort(values)) for values in (distances, rises)]
    plain, ranked = (np.corrcoef(*pair)[0, 1] for pair in ((distances, rises), ranks))
    return f"Over the {len(lines)} texts distance and rise correlate by {plain:.2f}, their ranks by {ranked:.2f}."


KEYS = ("distance", "rise")
WRITERS = {"texts": texts_table, "draws": draws_table, "correlation": correlation_text}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("sotu", "handbook", "novel", "cells"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    parser.add_argument("--write", type=Path, help="the page, from the cells that are there")
    arguments = parser.parse_args()
    if not arguments.cells.is_file():
        model = load_model("demo")
        lines = measured(model, read_texts(model, arguments.sotu, arguments.handbook, arguments.novel))
        arguments.cells.write_text("".join(json.dumps(line) + "\n" for line in lines))
    lines = [json.loads(line) for line in arguments.cells.read_text().splitlines()]
    if arguments.write:
        page = arguments.write.read_text(encoding="utf-8")
        made = {name: write(lines) for name, write in WRITERS.items()}
        arguments.write.write_text(filled(page, made), encoding="utf-8")


if __name__ == "__main__":
    main()
