"""Speed of our graphs on a processor, by weight format, beside llama.cpp on the same codes and onnxruntime-genai.

    python -m tools.bench_graph MODEL [--genai FOLDER] [--no-llama]

MODEL is what `edgeprune fit` takes (`demo`, or a directory in the Hugging Face layout), or `random`: some layers of the
1.1 B shape of tools/bench_memory.py. Its layers are rounded to each format, embedding and head to int8 (speed does not
depend on the values), and written as graphs and as GGUF files; --no-llama leaves llama.cpp out. FOLDER is what
`python -m onnxruntime_genai.models.builder -m MODEL -i MODEL -o FOLDER -p fp32 -e cpu --extra_options hf_token=false`
wrote from the same model (`pip install onnxruntime-genai`): our graphs of floats in all dialects are then compared with
it. Its prefill gives the logits of all tokens.

A decode is one token behind others in the cache, a prefill many tokens in an empty one. All engines run in one process
with the same number of threads, in interleaved blocks whose order alternates: graphs in the sessions that edgeprune
deploys, llama.cpp as `--engine llama.cpp` runs it (its defaults: cache in fp16, flash attention). A block counts as its
least time, since other work on the machine only adds; ratios are of blocks that ran next to each other, with the 95 %
bootstrap interval of their median.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnxruntime
import torch
import typer

from edgeprune.engine.onnx.graph import GraphVariant, write_graphs
from edgeprune.model.gguf.export import export_gguf
from edgeprune.model.load import load_model
from edgeprune.model.model import Model
from edgeprune.ondevice.llamacpp import Library, LlamaRunner
from edgeprune.ondevice.onnxruntime import ELEMENTS, open_session
from edgeprune.precision import WEIGHT_FORMATS, WeightFormat
from edgeprune.pruning.grids import choose_grid
from tools.bench_memory import write_checkpoint
from tools.pages import table

LAYERS, TOKENS = 4, 49152  # of the random model; a GGUF file needs its tokenizer's vocabulary
FORMATS = {"int8": "Q8_0", "int4-32": "Q4_0", "int4-32-asymmetric": "Q4_1"}  # and what llama.cpp has them in
ACTIVATIONS = {"w8a8": "int8"}  # formats that round activations too, and which of the graphs they are compared with
INPUT_SCALE = torch.tensor(2.0**-5)  # of these: the speed does not depend on it
DIALECTS = ("onnxruntime", "opset23", "primitive")
THREADS, PASTS, PREFILL = (1, 2), (128, 1024), 256
CAPACITY = 2048  # tokens of the one buffer that past and present share
COLUMNS = ["threads", "past + new", "graph", "ms", "speed of fp32", "beside", "its ms", "of its time"]

Run = Callable[[], object]  # one step, up to the logits of the last token


class Graph:
    """A graph in a session as edgeprune deploys it. shared: one buffer is past and present of a layer's cache."""

    def __init__(self, path: Path, threads: int, head_dim: int, shared: bool) -> None:
        self.session, self.head_dim, self.shared = open_session(path, threads), head_dim, shared

    def step(self, past: int, ids: np.ndarray) -> Run:
        """Returns a function that runs ids (tokens,) behind `past` tokens of random content."""
        total = past + len(ids)
        feeds = {
            "input_ids": ids[None],
            "position_ids": np.arange(past, total)[None],
            "attention_mask": np.ones((1, total), np.int64),
        }
        binding = self.session.io_binding()
        for value in self.session.get_inputs():
            if value.name in feeds:
                binding.bind_cpu_input(value.name, feeds[value.name])
                continue
            content = np.zeros(
                (1, value.shape[1], CAPACITY if self.shared else past, self.head_dim), ELEMENTS[value.type]
            )
            content[:, :, :past] = 0.1 * np.random.default_rng(0).standard_normal(
                (*content.shape[:2], past, self.head_dim)
            )
            cache = onnxruntime.OrtValue.ortvalue_from_numpy(content)
            binding.bind_ortvalue_input(value.name, cache)
            present = value.name.replace("past_key_values", "present")
            binding.bind_ortvalue_output(present, cache) if self.shared else binding.bind_output(present)
        binding.bind_output("logits")

        def run() -> np.ndarray:
            self.session.run_with_iobinding(binding)
            return binding.get_outputs()[-1].numpy()

        return run


class LlamaCpp:
    """A GGUF file in llama.cpp, as `--engine llama.cpp` runs it."""

    def __init__(self, path: Path, threads: int, library: Library) -> None:
        self.runner = LlamaRunner(path, CAPACITY, threads, library)

    def step(self, past: int, ids: np.ndarray) -> Run:
        """Returns a function that runs ids (tokens,) behind `past` tokens, which the cache keeps."""
        self.runner.reset()

        def run() -> np.ndarray:
            self.runner.reset(past)
            return self.runner.run(ids[None])

        return run


def rounded(model: Model, form: WeightFormat) -> Model:
    """Returns the model with its layers rounded to nearest in a format, embedding and head in int8."""
    decoder, codes = model.decoder.with_format(form, WEIGHT_FORMATS["int8"]), {}
    for name, own in decoder.weight_formats.items():
        weight = model.weights[name].float()
        codes[name] = choose_grid(weight, torch.ones(weight.shape[1]), own, "ends").nearest(weight)
        if own.activation_bits is not None:
            codes[name] = replace(codes[name], input_scale=INPUT_SCALE)
    return replace(model, decoder=decoder, quantised=codes)


def write_files(model: Model, folder: Path, genai: Path | None, llama: bool) -> tuple[dict[str, Path], dict[str, Path]]:
    """Writes the graphs and, for llama.cpp, the GGUF files of all formats; returns their paths by name."""
    graphs, ggufs = {}, {}
    dialects = DIALECTS if genai else DIALECTS[:1]
    variants = [GraphVariant(dialect, "last") for dialect in dialects]
    for name, kind in {"fp32": None, **FORMATS, **dict.fromkeys(ACTIVATIONS)}.items():
        stored = model if name == "fp32" else rounded(model, WEIGHT_FORMATS[name])
        start = time.perf_counter()
        files = write_graphs(
            stored.decoder, stored.stored, folder / name, "fp32", variants if name == "fp32" else variants[:1]
        )
        seconds, megabytes = time.perf_counter() - start, sum(files.data.values()) / 1e6
        typer.echo(f"{name}: {seconds:.2f} s for {megabytes:.0f} MB and {len(files.graphs)} graphs")
        graphs |= {name if v.dialect == "onnxruntime" else v.dialect: path for v, path in files.graphs.items()}
        if kind and llama:
            ggufs[kind] = export_gguf(stored, folder / f"{kind}.gguf")
    return graphs | ({"genai": genai / "model.onnx"} if genai else {}), ggufs


def blocks(steps: Mapping[str, Run], rounds: int, length: int) -> dict[str, np.ndarray]:
    """Returns the least ms of each block, (rounds,) for each engine; they take turns, and the order alternates."""
    least: dict[str, list[float]] = {name: [] for name in steps}
    for round_ in range(rounds + 1):
        for name in list(steps) if round_ % 2 else list(reversed(steps)):
            times = []
            for _ in range(length):
                start = time.perf_counter()
                steps[name]()
                times.append(1e3 * (time.perf_counter() - start))
            least[name].append(min(times))
    return {name: np.array(values[1:]) for name, values in least.items()}  # the first round warms up


def interval(values: np.ndarray) -> str:
    """Returns the median and its 95 % bootstrap interval."""
    rng = np.random.default_rng(0)
    medians = np.median(rng.choice(values, (2000, len(values))), axis=1)
    low, high = np.percentile(medians, [2.5, 97.5])
    return f"{np.median(values):.2f} [{low:.2f}, {high:.2f}]"


def compared(steps: Mapping[str, Run], first: list[str], rounds: int, length: int) -> list[list[str]]:
    """Returns a row of the table for each of our graphs; first: its first columns."""
    others = {"fp32": "genai"} | FORMATS | ACTIVATIONS | dict.fromkeys(DIALECTS[1:], "genai")
    times, rows = blocks(steps, rounds, length), []
    for name, other in others.items():
        if name not in steps:
            continue
        row = [*first, name, f"{np.median(times[name]):.1f}", interval(times["fp32"] / times[name])]
        if other in steps:
            row += [other, f"{np.median(times[other]):.1f}", interval(times[name] / times[other])]
        rows.append(row + [""] * (len(COLUMNS) - len(row)))
    return rows


def main(model: str, genai: Path | None = None, rounds: int = 24, length: int = 4, llama: bool = True) -> None:
    """Write MODEL in all formats, then compare decode and prefill."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if model == "random":
            (folder / "random").mkdir()
            write_checkpoint(folder / "random", LAYERS, "safetensors", TOKENS)
        loaded = load_model(str(folder / "random") if model == "random" else model)
        head_dim = next(layer.attention.head_dim for layer in loaded.decoder.layers if layer.attention)
        graphs, ggufs = write_files(loaded, folder, genai, llama)
        ids = np.random.default_rng(0).integers(0, loaded.decoder.vocab_size, PREFILL)
        library = Library() if llama else None
        typer.echo(table(COLUMNS, []))
        for threads in THREADS:
            engines = {n: Graph(path, threads, head_dim, n not in DIALECTS) for n, path in graphs.items()}
            engines |= {n: LlamaCpp(path, threads, library) for n, path in ggufs.items()}
            for past, count in (*((past, 1) for past in PASTS), (0, PREFILL)):
                steps = {n: engine.step(past, ids[:count]) for n, engine in engines.items()}
                first = [str(threads), f"{past} + {count}"]
                for row in compared(steps, first, *((rounds, length) if past else (max(rounds // 4, 1), 1))):
                    typer.echo(f"| {' | '.join(row)} |")


if __name__ == "__main__":
    typer.run(main)
