"""Weights written as safetensors files tensor by tensor, in shards; the whole model is never in memory.

It knows the file format, not the architecture: names and shapes come from the decoder's checkpoint tensors.
"""

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

SHARD_BYTES = 5 * 10**9  # of a file, at most
NAMES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}


def write_weights(
    decoder: Decoder, weights: Iterable[tuple[str, torch.Tensor]], directory: Path, dtype: torch.dtype
) -> None:
    """Writes weights into safetensors files of at most SHARD_BYTES, with an index where there are several.

    weights: in the order of decoder.shapes(); they are stored as the family's tensors. Raises ValueError for a wrong
    name or shape, and NumericalError for a weight that dtype cannot hold.
    """
    places = checkpoint_tensors(decoder)
    shapes, tensors = {key: place.shape for key, place in places.items()}, stored_stream(places, weights)
    # Distribute the tensors over shards before any is read.
    size = dtype.itemsize
    shards: list[list[str]] = [[]]
    used = 0
    for name, shape in shapes.items():
        if shards[-1] and used + size * prod(shape) > SHARD_BYTES:
            shards.append([])
            used = 0
        shards[-1].append(name)
        used += size * prod(shape)
    # Write each shard: its header, then its tensors as they come.
    stream = iter(tensors)
    weight_map = {}
    for number, shard in enumerate(shards, 1):
        file = "model.safetensors" if len(shards) == 1 else f"model-{number:05}-of-{len(shards):05}.safetensors"
        weight_map |= dict.fromkeys(shard, file)
        with (directory / file).open("wb") as out:
            _write_header(out, {name: shapes[name] for name in shard}, dtype)
            for name in shard:
                next_name, tensor = next(stream, ("nothing", None))
                if next_name != name or tuple(tensor.shape) != shapes[name]:
                    raise ValueError(f"expected {name} {shapes[name]}, got {next_name}")
                out.write(_bytes(as_stored(name, tensor, dtype)))
    if (extra := next(stream, None)) is not None:
        raise ValueError(f"{extra[0]} is not a weight of this model")
    # Several shards need an index.
    if len(shards) > 1:
        total = size * sum(map(prod, shapes.values()))
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (directory / "model.safetensors.index.json").write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")


def as_stored(name: str, tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Returns the tensor in dtype. Raises NumericalError where a finite value overflows, as beyond fp16's 65504."""
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
    """Writes the header of a file: its length in 8 bytes, then JSON, padded so that the data is aligned to 8 bytes."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in shapes.items():
        start, end = end, end + dtype.itemsize * prod(shape)
        header[name] = {"dtype": NAMES[str(dtype).removeprefix("torch.")], "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    out.write(len(text).to_bytes(8, "little") + text)


def _bytes(tensor: torch.Tensor) -> memoryview:
    """Returns the bytes of a tensor."""
    import torch

    return memoryview(tensor.contiguous().view(torch.uint8).numpy()) if tensor.numel() else memoryview(b"")
