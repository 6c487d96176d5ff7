"""The time of the walk by part (bytes read, passes, moments, solves) of one layer of 1 B, 7 B and 70 B shapes.

    python tools/bench_walk.py [--shapes 1b,7b,70b] [--tokens 4096]

Each layer has random weights and is cut to 70 % of its heads and channels by the default method. Passes and moments are
scaled from the tokens that were read to those of a fit's defaults, then all to the model's layers. Of 70 B the MLP is
measured at half its channels: passes are doubled, moments counted four times, solves eight times, as their FLOPs grow.
Times on a GPU are predicted: the same FLOPs at the vendor's peaks times shares that stand below, bytes at that of the
disk; nothing of it was run.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from safetensors.torch import load_file, save_file

from edgeprune.model.attention import Tables
from edgeprune.model.decoder import Attention, Decoder, Layer, Mlp, Rotary
from edgeprune.pruning import compensate as compensation
from edgeprune.pruning import walk
from edgeprune.pruning.methods import DEFAULT, METHODS

LENGTH = 512  # tokens of a sample
FIT_TOKENS = 64 * LENGTH  # of a fit's defaults: 32 samples, and as many of the model's own
SHAPES = {  # hidden_size, intermediate_size, query heads, key/value heads, layers
    "1b": (2048, 5632, 32, 4, 22),
    "7b": (4096, 11008, 32, 32, 32),
    "70b": (8192, 28672, 64, 8, 80),
}
HALVED = ("70b",)  # whose MLP's moments and their factors do not fit into 24 GiB
KEPT = 0.7
PARTS = ("read", "passes", "moments", "solves", "else")
GPUS = {  # fp32 and fp64 TFLOP/s: vendor pages, dense, without tensor cores but for the H100's fp64
    "RTX 4090": (82.6, 1.29),
    "H100 SXM": (67.0, 67.0),
}
PRODUCTS, FACTORS, DISK = 0.6, 0.3, 5e9  # assumed: shares of the peaks that large products and factors reach; bytes/s
TIMED = {
    "passes": [(walk, name) for name in ("module_inputs", "add_module", "module_raw", "_without")],
    "moments": [(walk, "gram"), (walk, "moments_of"), (compensation, "cross")],
    "solves": [(walk, "compensate"), (walk, "kept_features")],
}


@dataclass
class Clock:
    """The seconds of each part, without those of parts within it."""

    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(PARTS, 0.0))
    _inner: float = 0.0

    def timed(self, part: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*arguments: Any, **named: Any) -> Any:
            begun, around, self._inner = time.perf_counter(), self._inner, 0.0
            result = call(*arguments, **named)
            whole = time.perf_counter() - begun
            self.seconds[part] += whole - self._inner
            self._inner = around + whole
            return result

        return wrapped


def decoder_of(shape: str, halved: bool = False) -> Decoder:
    hidden, channels, heads, groups, _ = SHAPES[shape]
    head_dim = hidden // heads
    rotary = Rotary(tuple(10000.0 ** (-2 * pair / head_dim) for pair in range(head_dim // 2)))
    layer = Layer(Attention(heads, groups, head_dim, rotary), Mlp(channels // 2 if halved else channels))
    return Decoder("llama", hidden, 1000, LENGTH, 1e-5, True, (layer,))


def cut(decoder: Decoder) -> Decoder:
    groups, heads, channels = decoder.layer_widths[0]
    groups, heads = (round(KEPT * groups), heads) if groups > 4 else (groups, max(1, round(KEPT * heads)))
    return decoder.with_widths(groups, heads, round(KEPT * channels / 64) * 64)


def random_layer(decoder: Decoder) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        name.removeprefix("layers.0."): torch.ones(shape)
        if len(shape) == 1
        else torch.randn(shape, generator=generator) * shape[1] ** -0.5
        for name, shape in decoder.layer_shapes(0).items()
    }


def read_seconds(weights: dict[str, torch.Tensor]) -> tuple[float, int]:
    """Returns the time of reading a layer in bf16 from the disk, and its bytes."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "layer.safetensors"
        save_file({name: weight.to(torch.bfloat16) for name, weight in weights.items()}, path)
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        begun = time.perf_counter()
        for weight in load_file(path).values():
            weight.float()
        return time.perf_counter() - begun, path.stat().st_size


@contextmanager
def timing(clock: Clock) -> Iterator[None]:
    with ExitStack() as stack:
        for part, places in TIMED.items():
            for module, name in places:
                stack.enter_context(mock.patch.object(module, name, clock.timed(part, getattr(module, name))))
        yield


@torch.inference_mode()
def measured(shape: str, tokens: int) -> tuple[dict[str, float], int]:
    """Returns the seconds of each part of one layer at the tokens of a fit, and the layer's bytes in bf16."""
    total, layer_bytes = dict.fromkeys(PARTS, 0.0), 0
    for kind in ("attention", "mlp"):
        halved = kind == "mlp" and shape in HALVED
        dense = decoder_of(shape, halved)
        weights = {name: one for name, one in random_layer(dense).items() if name.startswith(kind)}
        seconds, size = read_seconds(weights)
        clock = Clock()
        clock.seconds["read"] = seconds
        layer_bytes += size * (2 if halved else 1)
        states = torch.randn(tokens // LENGTH, LENGTH, dense.hidden_size, generator=torch.Generator().manual_seed(1))
        moving = walk.Walk(
            dense,
            cut(dense),
            METHODS[DEFAULT],
            torch.Generator().manual_seed(0),
            Tables(dense, LENGTH),
            1024,
            pruned=states,
            whole=states.clone(),
            importance=torch.ones(len(states), 1, 1),
            drifted=True,
        )
        moving.enter()
        with timing(clock):
            clock.timed("else", moving.module)(weights, 0, kind)
        more = {"read": 2, "passes": 2, "moments": 4, "solves": 8, "else": 2} if halved else dict.fromkeys(PARTS, 1)
        for part, spent in clock.seconds.items():
            of_tokens = FIT_TOKENS / tokens if part in ("passes", "moments", "else") else 1.0
            total[part] += spent * more[part] * of_tokens
    return total, layer_bytes


def rates() -> tuple[float, float]:
    """Returns this machine's FLOP/s in large products in fp32 and in factors in fp64."""
    square = torch.rand(4096, 4096)
    many = torch.rand(2048, 4096)
    moments = (square @ square.T).double() + 4096 * torch.eye(4096, dtype=torch.float64)
    found = []
    for call, flops in (
        (lambda: many @ square, 2 * many.numel() * 4096),
        (lambda: torch.linalg.cholesky(moments), 4096**3 / 3),
    ):
        call()
        begun, count = time.perf_counter(), 0
        while time.perf_counter() - begun < 2:
            call()
            count += 1
        found.append(flops * count / (time.perf_counter() - begun))
    return found[0], found[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", default=",".join(SHAPES))
    parser.add_argument("--tokens", type=int, default=4096)
    options = parser.parse_args()
    products, factors = rates()
    print(f"{torch.get_num_threads()} threads: {products / 1e9:.0f} GFLOP/s of fp32 products, ", end="")
    print(f"{factors / 1e9:.0f} of fp64 factors\n")
    print("| shape | where | read | passes | moments | solves | else | a layer | all layers |")
    print("|---|---|---|---|---|---|---|---|---|", flush=True)
    for shape in options.shapes.split(","):
        seconds, layer_bytes = measured(shape, options.tokens)
        row(shape, "here, measured", seconds)
        for name, (single, double) in GPUS.items():
            of_products = products / (single * 1e12 * PRODUCTS)
            of_factors = factors / (double * 1e12 * FACTORS)
            row(
                shape,
                f"{name}, predicted",
                {
                    "read": layer_bytes / DISK,
                    "passes": seconds["passes"] * of_products,
                    "moments": seconds["moments"] * of_products,
                    "solves": seconds["solves"] * of_factors,
                    "else": seconds["else"] * of_products,
                },
            )


def row(shape: str, where: str, seconds: dict[str, float]) -> None:
    total = sum(seconds.values())
    cells = " | ".join(f"{seconds[part]:.3g} s" for part in PARTS)
    print(f"| {shape} | {where} | {cells} | {total:.3g} s | {total * SHAPES[shape][4] / 60:.3g} min |", flush=True)


if __name__ == "__main__":
    main()
