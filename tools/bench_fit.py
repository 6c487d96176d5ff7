"""Speed of the stages of a fit on the demo model, as a table with intervals.

    python tools/bench_fit.py [--repeats 3] [--fit]

Run it with the other cores idle. Times in seconds; pruning, rounding and the search's measurements are ratios to one
dense forward pass over the same tokens, interleaved in the same process. --fit TEXT also runs
`edgeprune fit --device cpu --decode 55% --calibration TEXT` and measures dense and fitted again in a fresh process.
Against other engines: tools/bench_graph.py.
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
from typing import TYPE_CHECKING
from unittest import mock

import numpy as np

if TYPE_CHECKING:
    from edgeprune.model.decoder import Decoder

SAMPLES, LENGTH = 32, 256  # the product's default


def seconds(run: Callable[[], object]) -> float:
    """Returns how long a call takes, in seconds."""
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def row(label: str, values: list[float], unit: str, limit: str) -> None:
    """Prints the median of the values with the least and the largest."""
    low, high = min(values), max(values)
    print(f"{label:58} {np.median(values):8.2f} {unit:3} [{low:.2f}, {high:.2f}]  limit {limit}", flush=True)


def child(code: str, cache: str) -> float:
    """Returns the seconds that a fresh process printed. cache: edgeprune's cache folder in it."""
    environment = os.environ | {"EDGEPRUNE_CACHE": cache}
    result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    return float(result.stdout.split()[-1])


READ = """
import time
start = time.perf_counter()
from edgeprune.model.load import load_model
from edgeprune.model.tokens.tokenizer import load_tokenizer
load_tokenizer(load_model("demo").directory)
print(time.perf_counter() - start)
"""


def bench_reading(repeats: int) -> None:
    """Times the demo model's GGUF and tokenizer, read without and with a cache."""
    first, cached = [], []
    for _ in range(repeats):
        with tempfile.TemporaryDirectory() as cache:
            first.append(child(READ, cache))
            cached.append(child(READ, cache))
    row("read GGUF and tokenizer with all imports, first time", first, "s", "15 s")
    row("read GGUF and tokenizer with all imports, from the cache", cached, "s", "3 s")


def bench_help(repeats: int) -> None:
    """Times the start of the command line."""
    words = [sys.executable, "-m", "edgeprune.cli.app", "--help"]
    times = [seconds(lambda: subprocess.run(words, check=True, stdout=subprocess.DEVNULL)) for _ in range(repeats)]
    row("edgeprune --help", times, "s", "0.5 s")


def bench_writing(repeats: int) -> None:
    """Times the writing of the graphs."""
    from edgeprune.engine.onnx.graph import write_graphs
    from edgeprune.model.load import load_model
    from edgeprune.pipeline.stages import VARIANTS

    model = load_model("demo")
    times = []
    for _ in range(repeats):
        with tempfile.TemporaryDirectory() as folder:
            arguments = (model.decoder, model.weights, Path(folder), "fp32", VARIANTS, 2048)
            times.append(seconds(lambda: write_graphs(*arguments)))  # noqa: B023
    row("write the ONNX, fp32, six variants", times, "s", "5 s")


LIMITS = {"numerical+ls": "4 x", "default": "8 x"}
MEASURED = "sensitivities of widths and two formats, with probes"


def least_flops(dense: Decoder, target: Decoder) -> float:
    """Returns the multiplications and additions of a pruning that compensates, as a multiple of a dense forward pass.

    Counted for each token are the layers on the dense stream; on the pruned stream all projections but the outputs,
    the products of the kept and the removed features, half of the symmetric moments and the right-hand sides of the
    least squares problems. Attention's products and all solves are left out on both sides.
    """
    hidden = dense.hidden_size
    work = float(dense.layer_parameters)
    for whole, small in zip(dense.layers, target.layers, strict=True):
        for features, kept in (
            (whole.attention.query_size, small.attention.query_size),
            (whole.mlp.intermediate_size, small.mlp.intermediate_size),
        ):
            work += features * hidden + features * features / 2 + kept * hidden
        work += hidden * (whole.attention.query_size + 2 * whole.attention.key_value_size)
        work += 2 * hidden * whole.mlp.intermediate_size
    return work / (dense.layer_parameters + dense.vocab_size * hidden)


def bench_pruning(repeats: int) -> None:
    """Times pruning of all layers, with the MLP at 3/4 and one query head of every group removed; the same with all
    layers rounded to int4 in the same walk; and what the search measures before."""
    import torch

    from edgeprune.model.forward import token_losses, weight_stream
    from edgeprune.model.load import load_model
    from edgeprune.precision import WEIGHT_FORMATS
    from edgeprune.progress import Silent
    from edgeprune.pruning.methods import DEFAULT, METHODS
    from edgeprune.pruning.prune import prune
    from edgeprune.search.sensitivity import sensitivities_of

    model = load_model("demo")
    ids = torch.randint(0, model.decoder.vocab_size, (SAMPLES, LENGTH), generator=torch.Generator().manual_seed(0))
    target = model.decoder.with_widths(3, 2, 1152)
    forms = WEIGHT_FORMATS["int8"], WEIGHT_FORMATS["int4-64"]
    rounded = target.with_format(forms[1])

    def measure() -> None:
        with tempfile.TemporaryDirectory() as cache, mock.patch.dict(os.environ, {"EDGEPRUNE_CACHE": cache}):
            sensitivities_of(model, ids.numpy(), DEFAULT, 0, Silent(), forms, forms[:1])

    works: dict[str, Callable[[], object]] = {
        name: lambda name=name: list(prune(model, target, ids, METHODS[name], 0)) for name in LIMITS
    }
    works["rounded"] = lambda: list(prune(model, rounded, ids, METHODS[DEFAULT], 0))
    works[MEASURED] = measure
    ratios: dict[str, list[float]] = {name: [] for name in works}

    def forward() -> float:
        return seconds(lambda: token_losses(model.decoder, weight_stream(model), ids))

    for _ in range(repeats):
        dense = forward()
        for name, work in works.items():
            took = seconds(work)
            before, dense = dense, forward()
            ratios[name].append(2 * took / (before + dense))
    for name, limit in LIMITS.items():
        row(f"prune by {name} / one dense forward pass", ratios[name], "x", limit)
    added = np.subtract(ratios["rounded"], ratios[DEFAULT])
    row("int4-64 in the same walk adds / one dense forward pass", list(added), "x", "1.5 x")
    row(f"{MEASURED} / one pass", ratios[MEASURED], "x", "4 x")
    print(f"{SAMPLES * LENGTH} tokens; the floor of pruning by FLOPs is {least_flops(model.decoder, target):.2f} x")


def bench_fit(calibration: Path) -> None:
    """Fits the demo model to 55 % of its decode on this processor and measures the result again."""
    from edgeprune.bundle.read import read_report
    from edgeprune.engine.onnx.graph import write_graphs
    from edgeprune.model.load import load_model
    from edgeprune.ondevice import measure
    from edgeprune.ondevice.durations import timing
    from edgeprune.ondevice.figures import Workload
    from edgeprune.ondevice.onnxruntime import GRAPH_FILE
    from edgeprune.ondevice.worker import quiet
    from edgeprune.pipeline.stages import VARIANTS

    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "fitted"
        words = ["fit", "demo", "--device", "cpu", "--decode", "55%", "--output", str(output)]
        words += ["--calibration", str(calibration)]
        took = seconds(lambda: subprocess.run([sys.executable, "-m", "edgeprune.cli.app", *words], check=False))
        report = read_report(output)
        print(
            f"fit --device cpu --decode 55%: {report.status}, {len(report.search.candidates)} candidates, {took:.0f} s"
        )
        for text in report.quality.texts:
            rise, low, high = text.rise_percent, text.low_percent, text.high_percent
            print(f"perplexity on {text.name}: {rise:+.2f} % [{low:+.2f}, {high:+.2f}]  limit +1 %")
        model = load_model("demo")
        context = report.workload.context
        write_graphs(model.decoder, model.weights, Path(folder) / "dense", "fp32", VARIANTS, context)
        workload = Workload(report.workload.batch, report.workload.prompt, context)
        graphs = (Path(folder) / "dense" / GRAPH_FILE, output / "onnx" / GRAPH_FILE)
        ratio = measure.ratios_on_onnxruntime(
            measure.LocalSession(), *graphs, workload, timing().measure_seconds, quiet
        )["decode_ratio"]
        print(
            f"decode fitted / dense, measured again: {ratio.value:.3f} [{ratio.low:.3f}, {ratio.high:.3f}]  limit 0.56"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--fit", type=Path, metavar="TEXT", help="also a whole fit, calibrated with this file")
    arguments = parser.parse_args()
    bench_help(arguments.repeats)
    bench_reading(arguments.repeats)
    bench_writing(arguments.repeats)
    bench_pruning(arguments.repeats)
    if arguments.fit:
        bench_fit(arguments.fit)


if __name__ == "__main__":
    main()
