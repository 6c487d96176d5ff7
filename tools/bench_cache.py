"""The tables of docs/precision.md on the KV cache: what its formats lose, and what int8 does to time and memory.

    python -m tools.bench_cache MODEL --sotu package/data --handbook FOLDER [--write docs/precision.md]

MODEL is what `edgeprune fit` takes; the texts are those of tools/quality.py, which says where they come from. Scales
are found on its calibration samples. Losses of int8 are those of the graph that ONNX Runtime deploys, whose attention
reads the codes in a prefill too; those of fp8, which no engine of this machine has, are of the model's walk in torch.
Times are measured as tools/bench_graph.py does it, on graphs that differ in the cache alone, on one thread.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import torch.nn.functional as F
import typer

from edgeprune.engine.onnx.graph import GraphVariant, write_graphs
from edgeprune.model.cache import cache_scales, with_cache
from edgeprune.model.forward import token_logits, weight_stream
from edgeprune.model.load import load_model
from edgeprune.model.model import Model
from edgeprune.model.tokens.tokenizer import load_tokenizer
from edgeprune.ondevice.onnxruntime import GraphRunner
from edgeprune.precision import CACHE_FORMATS, WEIGHT_FORMATS
from edgeprune.progress import Silent
from edgeprune.search.sensitivity import sensitivities_of
from tools.bench_graph import CAPACITY, PREFILL, Graph, blocks, interval, rounded
from tools.pages import filled, table
from tools.quality import CALIBRATION, LENGTH, read_texts

ALL, LAST = (GraphVariant("onnxruntime", logits) for logits in ("all", "last"))
EXCERPTS = 8  # of each text
PASTS = (128, 1024, 2047)
TEXTS = ("speeches", "handbook")
LOSSES = ["KV cache", "text", "rise, nats", "KL, nats", "predicted, nats"]
TIMES = ["weights", "past + new", "float, ms", "int8, ms", "time of float"]

Logits = Callable[[np.ndarray], torch.Tensor]  # of ids (1, tokens): (tokens - 1, vocabulary)


def graph_logits(model: Model, folder: Path) -> Logits:
    """Returns what a model's graph gives in ONNX Runtime, as it is deployed."""
    path = write_graphs(model.decoder, model.stored, folder, "fp32", [ALL], LENGTH).graphs[ALL]
    runner = GraphRunner(path, 1, LENGTH)

    def logits(ids: np.ndarray) -> torch.Tensor:
        runner.reset()
        return torch.from_numpy(runner.logits(ids[:, :-1])[0])

    return logits


def walk_logits(model: Model) -> Logits:
    """Returns what a model's walk gives."""
    return lambda ids: token_logits(model.decoder, weight_stream(model), torch.from_numpy(ids))[0]


def mean(values: list[float]) -> str:
    """Returns the mean of excerpts and its standard error."""
    return f"{np.mean(values):.4f} ({np.std(values, ddof=1) / len(values) ** 0.5:.4f})"


def loss_rows(model: Model, sotu: Path, handbook: Path, folder: Path) -> list[list[str]]:
    """Returns a row for each format and text: rise of the loss, divergence from floats, and what was predicted."""
    texts = read_texts(sotu, handbook, load_tokenizer(model.directory))
    ids, formats = texts.rows(CALIBRATION, 0), tuple(CACHE_FORMATS.values())
    predicted = sensitivities_of(model, ids, "default", 0, Silent(), caches=formats).caches
    quantised = {form: with_cache(model, form, cache_scales(model, torch.from_numpy(ids), form)) for form in formats}
    of = {"float": graph_logits(model, folder / "float")}
    for form, other in quantised.items():
        of[form.name] = graph_logits(other, folder / form.name) if form.name == "int8" else walk_logits(other)
    rows = []
    for text in TEXTS:
        rises, divergences = ({form.name: [] for form in formats} for _ in range(2))
        for excerpt in texts.evaluation[text][:EXCERPTS]:
            labels = torch.from_numpy(excerpt[1:])
            found = {name: logits(excerpt[None]).log_softmax(dim=-1) for name, logits in of.items()}
            losses = {name: float(F.nll_loss(one, labels)) for name, one in found.items()}
            for name, values in divergences.items():
                rises[name].append(losses[name] - losses["float"])
                values.append(float(F.kl_div(found[name], found["float"], reduction="batchmean", log_target=True)))
        for form in formats:
            measured = mean(rises[form.name]), mean(divergences[form.name])
            rows.append([form.name, text, *measured, f"{predicted[form.name].by_layer.sum():.4f}"])
    return rows


def time_rows(model: Model, folder: Path, rounds: int, length: int) -> list[list[str]]:
    """Returns a row for each format of the weights and each step: decode behind a past, and a prefill."""
    int8, generator = CACHE_FORMATS["int8"], np.random.default_rng(0)
    ids = generator.integers(0, model.decoder.vocab_size, PREFILL)
    scales = cache_scales(model, torch.from_numpy(ids[None]), int8)
    head_dim = next(layer.attention.head_dim for layer in model.decoder.layers if layer.attention)
    rows = []
    for weights, stored in (("fp32", model), ("int8", rounded(model, WEIGHT_FORMATS["int8"]))):
        graphs = {}
        for name, one in (("float", stored), ("int8", with_cache(stored, int8, scales))):
            place = folder / f"{weights} {name}"
            path = write_graphs(one.decoder, one.stored, place, "fp32", [LAST], CAPACITY).graphs[LAST]
            graphs[name] = Graph(path, 1, head_dim, shared=True)
        for past, count in (*((past, 1) for past in PASTS), (0, PREFILL)):
            steps = {name: graph.step(past, ids[:count]) for name, graph in graphs.items()}
            times = blocks(steps, rounds if past else max(rounds // 4, 1), length if past else 1)
            least = [f"{np.median(times[name]):.1f}" for name in graphs]
            rows.append([weights, f"{past} + {count}", *least, interval(times["int8"] / times["float"])])
    return rows


def main(
    model: str,
    sotu: Annotated[Path, typer.Option(help="Folder of the speeches.")],
    handbook: Annotated[Path, typer.Option(help="Folder of the handbook.")],
    write: Annotated[Path | None, typer.Option(help="Page whose tables are filled. Default: print them.")] = None,
    rounds: int = 12,
    length: int = 3,
) -> None:
    """Measure times, then losses, of MODEL's KV cache in its formats."""
    loaded = load_model(model)
    with tempfile.TemporaryDirectory() as name:
        times = table(TIMES, time_rows(loaded, Path(name), rounds, length))
        losses = table(LOSSES, loss_rows(loaded, sotu, handbook, Path(name)))
    if write is None:
        typer.echo(f"{losses}\n\n{times}")
        return
    text = write.read_text(encoding="utf-8")
    write.write_text(filled(text, {"cache losses": losses, "cache times": times}), encoding="utf-8")


if __name__ == "__main__":
    typer.run(main)
