"""Prefill and decode through `--engine llama.cpp` beside those of llama-bench on the same files, and of our graphs.

    python -m tools.bench_llama MODEL [--prompt 128] [--context 512] [--threads 2] [--rounds 8] [--no-graphs]

MODEL is what `edgeprune fit` takes. Its layers are rounded to each weight format, embedding and head to int8 (speed
does not depend on the values), and written as GGUF files and as graphs. llama-bench must be on the PATH; the release
whose library xllamacpp brings is the one to compare with. Each round runs them all, llama-bench in a process of its
own, and the order alternates; ratios are of blocks of one round, with the 95 % bootstrap interval of their median.
llama-bench's decode is the mean of the last steps of the context, ours the last one.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import typer

from edgeprune.engine.llamacpp import write_file
from edgeprune.engine.onnx.graph import ONNXRUNTIME_GRAPH, write_graphs
from edgeprune.model.load import load_model
from edgeprune.ondevice import llama_bench
from edgeprune.ondevice.figures import Workload
from edgeprune.ondevice.llamacpp import MODEL_FILE, Library, Timed
from edgeprune.ondevice.machine import cores, processor
from edgeprune.ondevice.onnxruntime import GRAPH_FILE
from edgeprune.ondevice.onnxruntime import Timed as TimedGraph
from edgeprune.ondevice.timing import Timings, stopwatch
from edgeprune.precision import WEIGHT_FORMATS
from tools.bench_graph import rounded
from tools.pages import table

FORMATS = ("float", "int8", "int4-32", "int4-32-asymmetric")
COLUMNS = ["format", "kind", "edgeprune, ms", "llama-bench, ms", "ratio", "ONNX Runtime, ms", "of llama-bench's"]
TIMES = 6  # steps of a block of ours


def blocks(runs: dict[str, Callable[[], list[float]]], rounds: int) -> Timings:
    """Returns the ms of all runs; the first round, which warms up, does not count."""
    found: dict[str, list[list[float]]] = {name: [] for name in runs}
    for index in range(rounds + 1):
        for name in list(runs)[:: 1 if index % 2 else -1]:
            block = runs[name]()
            if index:
                found[name].append(block)
    return Timings({name: np.array(times) for name, times in found.items()})


def block(run: Callable[[], None], times: int) -> Callable[[], list[float]]:
    """Returns a run of a block, whose first step does not count: the others had the caches."""

    def timed() -> list[float]:
        run()
        return [stopwatch(run)() for _ in range(times)]

    return timed


def main(
    model: str,
    prompt: int = 128,
    context: int = 512,
    threads: int = cores(),
    rounds: int = 8,
    graphs: bool = True,
    formats: str = ",".join(FORMATS),
) -> None:
    """Write MODEL in all formats, then compare."""
    workload, loaded, library = Workload(1, prompt, context), load_model(model).as_floats, Library()
    typer.echo(f"{processor()}, of which {threads} are used; prefill of {prompt} tokens, decode behind {context - 1}\n")
    typer.echo(table(COLUMNS, []))
    for name in formats.split(","):
        with tempfile.TemporaryDirectory() as place:
            folder = Path(place)
            stored = loaded if name == "float" else rounded(loaded, WEIGHT_FORMATS[name])
            write_file(stored, folder, "fp16")
            ours = Timed(folder / MODEL_FILE, workload, threads, 0, library)
            ours.prepare_decode()
            graph = None
            if graphs:
                write_graphs(stored.decoder, stored.stored, folder, "fp32", [ONNXRUNTIME_GRAPH], context)
                graph = TimedGraph(folder / GRAPH_FILE, workload, threads, 0)
            for kind, times in (("decode", TIMES), ("prefill", 1)):
                bench = llama_bench.run_of(folder / MODEL_FILE, workload, kind, threads)
                runs = {"llama-bench": lambda bench=bench: bench()[0], "ours": block(getattr(ours, kind), times)}
                if graph is not None:
                    runs["graph"] = block(getattr(graph, kind), times)
                timings = blocks(runs, rounds)
                own = [f"{timings.median(each).value:.1f}" for each in runs]
                ratios = []
                for each in list(runs)[1:]:
                    ratio = timings.ratio(each, "llama-bench")
                    ratios.append(f"{ratio.value:.3f} [{ratio.low:.3f}, {ratio.high:.3f}]")
                cells = [name, kind, own[1], own[0], ratios[0], *(own[2:] + ratios[1:])]
                typer.echo(f"| {' | '.join(cells)} |")
            ours.runner.close()


if __name__ == "__main__":
    typer.run(main)
