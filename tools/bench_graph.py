"""Decode p50 of our graphs against onnxruntime-genai's, and the seconds of writing them.

    python tools/bench_graph.py MODEL GENAI

MODEL is what `edgeprune fit` takes (`demo`, or a directory in the Hugging Face layout); GENAI is the
folder that `python -m onnxruntime_genai.models.builder -m MODEL -i MODEL -o GENAI -p fp32 -e cpu
--extra_options hf_token=false` wrote from the same model (`pip install onnxruntime-genai`).
All graphs run in one process on plain ONNX Runtime, in interleaved blocks, with the same number of
threads; ratios are of blocks that ran next to each other.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnxruntime
import typer

from edgeprune.engine.onnx.graph import GraphVariant, write_graphs
from edgeprune.model.load import load_model

DTYPES = {"tensor(float)": np.float32, "tensor(float16)": np.float16}


def decode_step(path: Path, head_dim: int, threads: int, past: int, capacity: int | None) -> Callable[[], np.ndarray]:
    """Returns a function that decodes one token at `past` and returns its logits.

    capacity: tokens of the one buffer that past and present share; None: they are two.
    """
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    scalars = {
        "input_ids": np.array([[7]], np.int64),
        "position_ids": np.array([[past]], np.int64),
        "attention_mask": np.ones((1, past + 1), np.int64),
    }
    binding = session.io_binding()
    for value in session.get_inputs():
        if value.name in scalars:
            binding.bind_cpu_input(value.name, scalars[value.name])
            continue
        shape = (1, value.shape[1], capacity or past, head_dim)
        rng = np.random.default_rng(0)
        content = np.zeros(shape, DTYPES[value.type])
        content[:, :, :past] = rng.standard_normal((1, shape[1], past, head_dim)) * 0.1
        cache = onnxruntime.OrtValue.ortvalue_from_numpy(content)
        binding.bind_ortvalue_input(value.name, cache)
        if capacity is not None:
            binding.bind_ortvalue_output(value.name.replace("past_key_values", "present"), cache)
        else:
            binding.bind_output(value.name.replace("past_key_values", "present"))
    binding.bind_output("logits")

    def step() -> np.ndarray:
        session.run_with_iobinding(binding)
        return binding.get_outputs()[-1].numpy()

    return step


def blocks(steps: dict[str, Callable[[], np.ndarray]], rounds: int, length: int) -> dict[str, np.ndarray]:
    """Returns the median ms of each block, (rounds,) for each graph; graphs take turns, and the order alternates."""
    medians: dict[str, list[float]] = {name: [] for name in steps}
    for round_ in range(rounds + 1):
        for name in list(steps) if round_ % 2 else list(reversed(steps)):
            times = []
            for _ in range(length):
                start = time.perf_counter()
                steps[name]()
                times.append(1e3 * (time.perf_counter() - start))
            medians[name].append(float(np.median(times)))
    return {name: np.array(values[1:]) for name, values in medians.items()}  # the first round warms up


def interval(values: np.ndarray) -> tuple[float, float, float]:
    """Returns the median and its 95 % bootstrap interval."""
    rng = np.random.default_rng(0)
    medians = np.median(rng.choice(values, (2000, len(values))), axis=1)
    low, high = np.percentile(medians, [2.5, 97.5])
    return float(np.median(values)), float(low), float(high)


def main(model: str, genai: Path, rounds: int = 15, length: int = 8, capacity: int = 2048) -> None:
    """Write MODEL's graphs, then compare their decode p50 with the graph in the folder GENAI."""
    loaded = load_model(model)
    variants = [GraphVariant("onnxruntime", "all"), GraphVariant("opset23", "all"), GraphVariant("primitive", "all")]
    head_dim = next(layer.attention.head_dim for layer in loaded.decoder.layers if layer.attention)
    with tempfile.TemporaryDirectory() as folder:
        for attempt in range(3):
            start = time.perf_counter()
            files = write_graphs(loaded.decoder, loaded.weights, Path(folder), "fp32", variants)
            seconds, megabytes = time.perf_counter() - start, sum(files.data.values()) / 1e6
            typer.echo(f"write {attempt}: {seconds:.2f} s for {megabytes:.0f} MB and {len(variants)} graphs")
        for threads in (1, 2):
            for past in (128, 1024):
                steps = {"genai": decode_step(genai / "model.onnx", head_dim, threads, past, capacity)}
                for variant, path in files.graphs.items():
                    shared = capacity if variant.dialect == "onnxruntime" else None
                    steps[variant.dialect] = decode_step(path, head_dim, threads, past, shared)
                wanted = steps["genai"]()
                for name, medians in (measured := blocks(steps, rounds, length)).items():
                    ratio, low, high = interval(medians / measured["genai"])
                    error = np.abs(steps[name]() - wanted).max() / np.abs(wanted).max()
                    typer.echo(
                        f"threads {threads} past {past:4d} {name:12s} {np.median(medians):6.2f} ms "
                        f"{ratio:.3f} x genai [{low:.3f}, {high:.3f}], logits differ by {error:.1e}"
                    )


if __name__ == "__main__":
    typer.run(main)
