"""Engines that TensorRT for RTX builds without a GPU, for every SM that it offers: time, memory, weights.

    python tools/bench_engines.py [--shapes smollm2,1.1b,qwen3-8b] [--sms 86,89] [--dialects opset24] [--formats]

Random weights in fp16 (a build does not depend on the values, but for zeros) of SmolLM2-135M's shape, of a Llama of
1.1 B parameters and of two of Qwen3-8B's layers behind a small vocabulary, at batch 1, prompt 512, context 2048 (4096
for Qwen3-8B). Peak memory is that of the process that builds. A weight ratio above 1.05 is a failure: something is
stored twice. The last two columns are computed, and of the whole model, with 36 layers for Qwen3-8B: the KV cache that
is held, and the bytes that a decode step moves at a full context.

--formats: two layers of each shape in every weight format instead, embedding and head in floats and untied: whether
they build, their layers' weights over those in fp16, and activations over those of the float build, in which a copy of
the largest matrix would show.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from edgeprune.dialects import IN_PLACE
from edgeprune.engine.onnx.graph import GraphVariant, graph_weight_bytes, write_graphs
from edgeprune.engine.work import bytes_per_token
from edgeprune.errors import EngineError
from edgeprune.model.checkpoint.configuration import decoder_of
from edgeprune.ondevice.figures import Workload
from edgeprune.ondevice.measure import LocalSession, build
from edgeprune.ondevice.tensorrt import WEIGHTS_TOLERANCE, BuildResult, compile_plan, offered_sms
from edgeprune.ondevice.worker import quiet
from edgeprune.precision import WEIGHT_FORMATS
from edgeprune.search.latency_table import RandomWeights

if TYPE_CHECKING:
    import torch

CONTEXTS = {"qwen3-8b": 4096}  # 2048 for the others
SHORT = Workload(batch=1, prompt=32, context=96)
LLAMA = {"model_type": "llama", "rms_norm_eps": 1e-5, "max_position_embeddings": 2048}
SHAPES = {
    "smollm2": {
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "vocab_size": 49152,
        "tie_word_embeddings": True,
    },
    "1.1b": {
        "hidden_size": 2048,
        "intermediate_size": 5632,
        "num_hidden_layers": 22,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "vocab_size": 32000,
        "tie_word_embeddings": False,
    },
    "qwen3-8b": {
        "model_type": "qwen3",
        "rms_norm_eps": 1e-6,
        "max_position_embeddings": 40960,
        "hidden_size": 4096,
        "intermediate_size": 12288,
        "num_hidden_layers": 2,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "vocab_size": 4096,
        "tie_word_embeddings": False,
    },
}
WHOLE = {"qwen3-8b": {"num_hidden_layers": 36, "vocab_size": 151936}}  # what a shape lacks of its model


class Random(Mapping):
    """Weights that are drawn when they are read, so that the whole model is never in memory."""

    def __init__(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        self._shapes = shapes

    def __getitem__(self, name: str) -> torch.Tensor:
        import torch

        shape = self._shapes[name]
        if len(shape) == 1:
            return torch.ones(shape)
        seed = zlib.crc32(name.encode())  # of its own: equal weights would be stored once
        return 0.02 * torch.randn(shape, generator=torch.Generator().manual_seed(seed))

    def __iter__(self) -> Iterator[str]:
        return iter(self._shapes)

    def __len__(self) -> int:
        return len(self._shapes)


def formats_table(shapes: list[str], sms: list[int]) -> None:
    """Prints the table of weight formats by SM; short prompts, whose activations hide no copy."""
    print(f"| shape | format | {' | '.join(f'SM {sm}' for sm in sms)} |")
    print(f"|---|---|{'---|' * len(sms)}")
    for shape in shapes:
        dense = decoder_of(LLAMA | SHAPES[shape] | {"num_hidden_layers": 2, "tie_word_embeddings": False})
        floats: dict[int, BuildResult] = {}
        tables = graph_weight_bytes(replace(dense, layers=()), "fp16")
        for form in (None, *(form for form in WEIGHT_FORMATS.values() if form.storage != "gguf")):
            if form is not None and form.offset == "zero":  # which TensorRT does not take
                continue
            decoder, cells = dense.with_format(form), []
            with tempfile.TemporaryDirectory() as folder:
                variant = GraphVariant("opset23", "last")
                graph = write_graphs(decoder, RandomWeights(decoder), Path(folder), "fp16", [variant]).graphs[variant]
                for sm in sms:
                    try:
                        result = compile_plan(graph, Path(folder) / "plan", SHORT, sm, "tensorrt-rtx")
                    except EngineError:
                        cells.append("refused")
                        continue
                    floats.setdefault(sm, result)
                    weights = (result.weights_bytes - tables) / (floats[sm].weights_bytes - tables)
                    cells.append(f"{weights:.3f}, {result.context_bytes / floats[sm].context_bytes:.2f}")
            print(f"| {shape} | {form.name if form else 'float'} | {' | '.join(cells)} |", flush=True)


def main() -> int:
    """Prints the table and returns 1 where a weight ratio is too large, else 0."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", default=",".join(SHAPES))
    parser.add_argument("--sms", default=",".join(map(str, offered_sms())))
    parser.add_argument("--dialects", default="opset24,opset23,primitive")
    parser.add_argument("--formats", action="store_true")
    arguments = parser.parse_args()
    if arguments.formats:
        formats_table(arguments.shapes.split(","), [int(sm) for sm in arguments.sms.split(",")])
        return 0
    failed = False
    columns = ["shape", "SM", "dialect", "seconds", "peak GiB", "engine MiB", "weights / graph", "activations MiB"]
    columns += ["cache MiB", "GB per step"]
    print(f"| {' | '.join(columns)} |")
    print("|---" * len(columns) + "|")
    for shape in arguments.shapes.split(","):
        decoder = decoder_of(LLAMA | SHAPES[shape])
        whole = decoder_of(LLAMA | SHAPES[shape] | WHOLE.get(shape, {}))
        workload = Workload(batch=1, prompt=512, context=CONTEXTS.get(shape, 2048))
        for dialect in arguments.dialects.split(","):
            with tempfile.TemporaryDirectory() as folder:
                variant = GraphVariant(dialect, "last")
                weights, context = Random(decoder.shapes()), workload.context
                graph = write_graphs(decoder, weights, Path(folder), "fp16", [variant], context).graphs[variant]
                held = graph_weight_bytes(decoder, "fp16", dialect, context)
                moved = bytes_per_token(whole, "fp16", workload, dialect in IN_PLACE)
                cache = moved.cache * (1 if dialect in IN_PLACE else 2) / 2**20
                for sm in map(int, arguments.sms.split(",")):
                    plan = Path(folder) / "model.engine"
                    result = build(LocalSession(), "tensorrt-rtx", graph, plan, workload, quiet, sm)
                    ratio = result.weights_bytes / held
                    failed |= ratio > WEIGHTS_TOLERANCE
                    activations = (result.activation_bytes + result.scratch_bytes) / 2**20
                    peak, size = result.peak_build_bytes / 2**30, plan.stat().st_size / 2**20
                    print(
                        f"| {shape} | {sm} | {dialect} | {result.seconds:.0f} | {peak:.2f} | {size:.0f} | "
                        f"{ratio:.3f} | {activations:.0f} | {cache:.0f} | {moved.total / 1e9:.2f} |",
                        flush=True,
                    )
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
