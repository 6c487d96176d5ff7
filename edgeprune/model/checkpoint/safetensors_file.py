"""Writes weights as safetensors files tensor by tensor, in shards; the whole model is never in memory."""

from __future__ import annotations

import json
from collections.abc import Iterable
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from edgeprune.errors import NumericalError
from edgeprune.model.checkpoint.configuration import checkpoint_tensors
from edgeprune.model.checkpoint.places import stored_stream
from edgeprune.model.decoder import Decoder

if TYPE_CHECKING:
    import torch

SHARD_BYTES = 5 * 10**9
NAMES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}


def write_weights(
    decoder: Decoder, weights: Iterable[tuple[str, torch.Tensor]], directory: Path, dtype: torch.dtype
) -> None:
    """Weights in the order of decoder.shapes() -> the family's tensors in safetensors files of at most SHARD_BYTES,
    with an index where there are several."""
    places = checkpoint_tensors(decoder)
    shapes, tensors = {key: place.shape for key, place in places.items()}, stored_stream(places, weights)
    size = dtype.itemsize
    shards: list[list[str]] = [[]]
    used = 0
    for name, shape in shapes.items():
        if shards[-1] and used + size * prod(shape) > SHARD_BYTES:
            shards.append([])
            used = 0
        shards[-1].append(name)
        used += size * prod(shape)
    stream = iter(tensors)
    weight_map = {}
    for number, shard in enumerate(shards, 1):
        file = "model.safetensors" if len(shards) == 1 else f"model-{number:05}-of-{len(shards):05}.safetensors"
        weight_map |= dict.fromkeys(shard, file)
        with (directory / file).open("wb") as out:
            _write_header(out, {name: shapes[name] for name in shard}, dtype)
            for name in shard:
                given, tensor = next(stream, ("nothing", None))
                if given != name or tuple(tensor.shape) != shapes[name]:
                    raise ValueError(f"expected {name} {shapes[name]}, got {given}")
                out.write(_bytes(as_stored(name, tensor, dtype)))
    if (extra := next(stream, None)) is not None:
        raise ValueError(f"{extra[0]} is no weight of this model")
    if len(shards) > 1:
        total = size * sum(map(prod, shapes.values()))
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (directory / "model.safetensors.index.json").write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")


def as_stored(name: str, tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The tensor in dtype. Raises NumericalError where a finite value becomes infinite, as beyond fp16's 65504."""
    import torch

    if tensor.dtype == dtype:
        return tensor
    converted = tensor.to(dtype)
    if torch.isfinite(tensor).all() and not torch.isfinite(converted).all():
        raise NumericalError(
            f"weight {name} reaches {tensor.abs().max().item():.3g}, {dtype} holds {torch.finfo(dtype).max:.3g}",
            "Give the checkpoint in bf16 or fp32.",
        )
    return converted


def _write_header(out: BinaryIO, shapes: dict[str, tuple[int, ...]], dtype: torch.dtype) -> None:
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in shapes.items():
        start, end = end, end + dtype.itemsize * prod(shape)
        header[name] = {"dtype": NAMES[str(dtype).removeprefix("torch.")], "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    out.write(len(text).to_bytes(8, "little") + text)


def _bytes(tensor: torch.Tensor) -> memoryview:
    import torch

    return memoryview(tensor.contiguous().view(torch.uint8).numpy()) if tensor.numel() else memoryview(b"")
