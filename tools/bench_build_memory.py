"""Peak memory of engine builds against the estimate of edgeprune/engine/build_memory.py, by size and weight format.

    python tools/bench_build_memory.py [--shapes 1024x4,2048x12] [--formats float,int8,int4-64] [--dialects opset23]

Random weights in fp16, batch 1, prompt 512, context 2048, TensorRT for RTX for SM 86 without a GPU. The peak is that of
the process that builds. A shape is its hidden size and its layers; `tied` has one table.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

from edgeprune.engine.build_memory import build_memory
from edgeprune.engine.checkup_model import RandomWeights
from edgeprune.engine.onnx.graph import GraphVariant, graph_weight_bytes, write_graphs
from edgeprune.model.decoder import Attention, Decoder, Layer, Mlp, Rotary
from edgeprune.ondevice.figures import Workload
from edgeprune.ondevice.measure import LocalSession, build
from edgeprune.ondevice.worker import quiet
from edgeprune.precision import WEIGHT_FORMATS
from edgeprune.profiles import load_profile

WORKLOAD = Workload(batch=1, prompt=512, context=2048)
SM = 86
ROTARY = Rotary(tuple(10000.0 ** (-pair / 32) for pair in range(32)))


def shape(hidden: int, intermediate: int, layers: int, vocabulary: int, tied: bool = False) -> Decoder:
    """Returns a decoder with heads of 64, three or four of them in a group."""
    heads = hidden // 64
    attention = Attention(heads, heads // (3 if heads % 4 else 4), 64, ROTARY)
    layer = Layer(attention, Mlp(intermediate))
    return Decoder("llama", hidden, vocabulary, WORKLOAD.context, 1e-5, tied, (layer,) * layers)


SHAPES = {
    "256x2": shape(256, 512, 2, 512),
    "1024x4": shape(1024, 3072, 4, 8192),
    "1024x4 tied": shape(1024, 3072, 4, 32000, True),
    "576x12 tied": shape(576, 1536, 12, 49152, True),
    "1024x12": shape(1024, 3072, 12, 32000),
    "2048x3 tied": shape(2048, 5632, 3, 65536, True),
    "2048x6": shape(2048, 5632, 6, 32000),
    "2048x12": shape(2048, 5632, 12, 32000),
    "576x30 tied": shape(576, 1536, 30, 49152, True),  # SmolLM2, which the estimate was not fitted to
    "2048x22": shape(2048, 5632, 22, 32000),  # a Llama of 1.1 B parameters, nor this one
}


def main() -> int:
    """Prints the table; returns 1 where the estimate is more than 15 % off."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", default=",".join(SHAPES))
    parser.add_argument("--formats", default="float,int8,int4-64")
    parser.add_argument("--dialects", default="opset23,primitive")
    arguments = parser.parse_args()
    worst = 0.0
    print("| shape | format | dialect | graph MiB | peak MiB | peak / graph | estimated MiB | error |")
    print("|---|---|---|---|---|---|---|---|")
    for name in arguments.shapes.split(","):
        for form_name in arguments.formats.split(","):
            form = WEIGHT_FORMATS.get(form_name)
            decoder = SHAPES[name].with_format(form, form if form_name == "int8" else None)
            for dialect in arguments.dialects.split(","):
                profile = load_profile("rtx-a4000").model_copy(update={"dialect": dialect})
                peak = _peak(decoder, dialect)
                graph = graph_weight_bytes(decoder, "fp16", dialect, WORKLOAD.context)
                expected = build_memory(decoder, profile, WORKLOAD, "fp16").host
                worst = max(worst, abs(expected / peak - 1))
                print(
                    f"| {name} | {form_name} | {dialect} | {graph / 2**20:.0f} | {peak / 2**20:.0f} | "
                    f"{peak / graph:.2f} | {expected / 2**20:.0f} | {100 * (expected / peak - 1):+.0f} % |",
                    flush=True,
                )
    return int(worst > 0.15)


def _peak(decoder: Decoder, dialect: str) -> int:
    """Returns the bytes of the building process at their peak."""
    with tempfile.TemporaryDirectory() as folder:
        variant = GraphVariant(dialect, "last")
        files = write_graphs(decoder, RandomWeights(decoder), Path(folder), "fp16", [variant])
        plan = Path(folder) / "model.engine"
        session, graph = LocalSession(), files.graphs[variant]
        return build(session, "tensorrt-rtx", graph, plan, WORKLOAD, quiet, SM).peak_build_bytes


if __name__ == "__main__":
    sys.exit(main())
