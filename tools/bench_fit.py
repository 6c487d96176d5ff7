"""Speed and memory of the stations of a fit on the demo model, as a table with intervals.

    python tools/bench_fit.py [--repeats 3] [--fit]

Run it with the other cores idle. Times in seconds; pruning is a ratio to one dense forward pass over the
same tokens, interleaved in the same process. --fit also runs `edgeprune fit --device cpu --decode 70%`
and measures dense and fitted again in a fresh process. Against onnxruntime-genai: tools/bench_graph.py.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

SAMPLES, LENGTH = 16, 256


def seconds(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def row(what: str, values: list[float], unit: str, limit: str) -> None:
    low, high = min(values), max(values)
    print(f"{what:58} {np.median(values):8.2f} {unit:3} [{low:.2f}, {high:.2f}]  limit {limit}", flush=True)


def child(code: str, cache: str) -> float:
    """Seconds that a fresh process says it took."""
    environment = os.environ | {"EDGEPRUNE_CACHE": cache}
    result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    return float(result.stdout.split()[-1])


READ = """
import time
start = time.perf_counter()
from edgeprune.model.load import load_model, load_tokenizer
load_tokenizer(load_model("demo").directory)
print(time.perf_counter() - start)
"""


def bench_reading(repeats: int) -> None:
    first, cached = [], []
    for _ in range(repeats):
        with tempfile.TemporaryDirectory() as cache:
            first.append(child(READ, cache))
            cached.append(child(READ, cache))
    row("read GGUF and tokenizer with all imports, first time", first, "s", "15 s")
    row("read GGUF and tokenizer with all imports, from the cache", cached, "s", "3 s")


def bench_help(repeats: int) -> None:
    words = [sys.executable, "-m", "edgeprune.cli", "--help"]
    times = [seconds(lambda: subprocess.run(words, check=True, stdout=subprocess.DEVNULL)) for _ in range(repeats)]
    row("edgeprune --help", times, "s", "0.5 s")


def bench_writing(repeats: int) -> None:
    from edgeprune.engine.graph import write_graphs
    from edgeprune.loop import SPELLINGS
    from edgeprune.model.load import load_model

    model = load_model("demo")
    times = []
    for _ in range(repeats):
        with tempfile.TemporaryDirectory() as folder:
            arguments = (model.decoder, model.weights, Path(folder), "fp32", SPELLINGS, 2048)
            times.append(seconds(lambda: write_graphs(*arguments)))  # noqa: B023
    row("write the ONNX, fp32, six spellings", times, "s", "5 s")


def bench_pruning(repeats: int) -> None:
    """All layers, MLP to 3/4 and one query head of every group removed."""
    import torch

    from edgeprune.model.forward import token_losses, weight_stream
    from edgeprune.model.load import load_model
    from edgeprune.pruning.methods import METHODS
    from edgeprune.pruning.prune import prune
    from edgeprune.pruning.sensitivity import measure_sensitivities

    model = load_model("demo")
    ids = torch.randint(0, model.decoder.vocab_size, (SAMPLES, LENGTH), generator=torch.Generator().manual_seed(0))
    target = model.decoder.with_widths(3, 2, 1152)
    ratios: dict[str, list[float]] = {"prune": [], "sensitivities": []}
    for _ in range(repeats):
        before = seconds(lambda: token_losses(model.decoder, weight_stream(model), ids))
        pruned = seconds(lambda: list(prune(model, target, ids, METHODS["default"], 0)))
        measured = seconds(lambda: measure_sensitivities(model, ids, METHODS["default"].score, 0))
        dense = (before + seconds(lambda: token_losses(model.decoder, weight_stream(model), ids))) / 2
        ratios["prune"].append(pruned / dense)
        ratios["sensitivities"].append(measured / dense)
    tokens = SAMPLES * LENGTH
    row(f"pruning / one dense forward pass, {tokens} tokens", ratios["prune"], "x", "4 x")
    row("sensitivities / one dense forward pass", ratios["sensitivities"], "x", "-")


def bench_fit() -> None:
    from edgeprune.engine import local
    from edgeprune.engine.base import Workload
    from edgeprune.engine.graph import write_graphs
    from edgeprune.generation import RUN_SPELLING
    from edgeprune.loop import SPELLINGS
    from edgeprune.model.load import load_model
    from edgeprune.shipping import read_report

    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "fitted"
        words = ["fit", "demo", "--device", "cpu", "--decode", "70%", "--output", str(output)]
        took = seconds(lambda: subprocess.run([sys.executable, "-m", "edgeprune.cli", *words], check=False))
        report = read_report(output)
        print(
            f"fit --device cpu --decode 70%: {report.status}, {len(report.search.candidates)} candidates, {took:.0f} s"
        )
        model = load_model("demo")
        context = report.workload.context
        write_graphs(model.decoder, model.weights, Path(folder) / "dense", "fp32", SPELLINGS, context)
        workload = Workload(report.workload.batch, report.workload.prompt, context)
        graphs = (Path(folder) / "dense" / RUN_SPELLING.filename, output / "onnx" / RUN_SPELLING.filename)
        ratio = local.latency(*graphs, workload)["decode_ratio"]
        print(
            f"decode fitted / dense, measured again: {ratio.value:.3f} [{ratio.low:.3f}, {ratio.high:.3f}]  limit 0.73"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--fit", action="store_true")
    arguments = parser.parse_args()
    bench_help(arguments.repeats)
    bench_reading(arguments.repeats)
    bench_writing(arguments.repeats)
    bench_pruning(arguments.repeats)
    if arguments.fit:
        bench_fit()


if __name__ == "__main__":
    main()
