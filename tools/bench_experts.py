"""Speed of a mixture of experts on a processor, by an operator that reads a token's own experts or of all.

    python -m tools.bench_experts

Two layers in the shapes of Mixtral (8 experts, 2 for a token) and of Qwen3-30B-A3B (128, 8), a quarter and a half as
wide, of random weights. Their graphs in floats with either way of computing experts and in formats of few bits run in
one process, in interleaved blocks as in tools/bench_graph.py; bytes are those that a decode step moves, counted.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from unittest import mock

import numpy as np
import torch
import typer

from edgeprune.engine.onnx.experts import all_experts
from edgeprune.engine.onnx.graph import ONNXRUNTIME_GRAPH, write_graphs
from edgeprune.engine.onnx.ops import OPERATORS
from edgeprune.engine.work import bytes_per_token
from edgeprune.model.decoder import Attention, Decoder, Experts, Layer, Mlp, Rotary
from edgeprune.ondevice.figures import Workload
from edgeprune.precision import WEIGHT_FORMATS
from edgeprune.pruning.grids import choose_grid
from tools.bench_graph import Graph, blocks, interval
from tools.pages import table

ROTARY = Rotary(tuple(10000.0 ** (-pair / 32) for pair in range(32)))
SHAPES = {"Mixtral": (1024, 3584, Experts(8, 2)), "Qwen3-30B-A3B": (1024, 384, Experts(128, 8))}
FORMATS = ("int8", "int4-32")
STEPS = {"decode": (128, 1), "prefill": (0, 256)}  # tokens in the cache, new ones
COLUMNS = ["shape", "experts read", "weights", "MB a step", *(f"{kind}, ms, and of the first row's" for kind in STEPS)]


class Weights(Mapping[str, torch.Tensor]):
    """Random weights of a decoder, each made when it is read, in its format."""

    def __init__(self, decoder: Decoder) -> None:
        self.decoder, self.shapes, self.formats = decoder, decoder.shapes(), decoder.weight_formats

    def __getitem__(self, name: str) -> torch.Tensor:
        weight = 0.02 * torch.randn(self.shapes[name]) + (len(self.shapes[name]) == 1)
        form = self.formats.get(name)
        if form is None:
            return weight
        return choose_grid(weight, torch.ones(weight.shape[1]), form, "ends").nearest(weight)

    def __iter__(self) -> Iterator[str]:
        return iter(self.shapes)

    def __len__(self) -> int:
        return len(self.shapes)


def main(rounds: int = 12, length: int = 4, threads: int = 2) -> None:
    """Write the graphs of both shapes, and compare their steps."""
    workload = Workload(1, 256, 512)
    typer.echo(table(COLUMNS, []))
    for shape, (hidden, width, experts) in SHAPES.items():
        layer = Layer(Attention(16, 4, 64, ROTARY), Mlp(width, experts=experts))
        dense = Decoder("mixtral", hidden, 4096, 2048, 1e-5, True, (layer,) * 2)
        with tempfile.TemporaryDirectory() as folder:
            graphs, moved = {}, {}
            for way, form in (("all", None), ("own", None), *(("own", name) for name in FORMATS)):
                decoder = dense.with_format(WEIGHT_FORMATS.get(form))
                own = OPERATORS["onnxruntime"]
                with mock.patch.dict(OPERATORS, onnxruntime=own if way == "own" else replace(own, experts=all_experts)):
                    files = write_graphs(
                        decoder, Weights(decoder), Path(folder) / f"{way}-{form}", "fp32", [ONNXRUNTIME_GRAPH]
                    )
                graphs[way, form] = Graph(files.graphs[ONNXRUNTIME_GRAPH], threads, 64, shared=True)
                routes = way == "own"
                moved[way, form] = bytes_per_token(decoder, "fp32", workload, in_place=True, routes=routes).total
            ids, columns = np.random.default_rng(0).integers(0, dense.vocab_size, 256), {}
            for kind, (past, count) in STEPS.items():
                steps = {key: graph.step(past, ids[:count]) for key, graph in graphs.items()}
                times = blocks(steps, rounds if past else max(rounds // 3, 2), length if past else 1)
                columns[kind] = {
                    key: f"{np.median(own):.1f}, {interval(own / times['all', None])}" for key, own in times.items()
                }
            for way, form in graphs:
                row = [shape, way, form or "fp32", f"{moved[way, form] / 1e6:.0f}"]
                typer.echo(f"| {' | '.join([*row, *(columns[kind][way, form] for kind in STEPS)])} |")
            del graphs, steps


if __name__ == "__main__":
    typer.run(main)
