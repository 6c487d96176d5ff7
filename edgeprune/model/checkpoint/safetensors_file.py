"""Weights written as safetensors files tensor by tensor, in shards; the whole model is never in memory.

It knows the file format, not the architecture: names and shapes come from the decoder's checkpoint tensors. Nor does it
know how weights of few bits are packed.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from edgeprune.errors import NumericalError
from edgeprune.model.checkpoint.configuration import checkpoint_tensors
from edgeprune.model.checkpoint.places import Shape, StoredTensor, stored_stream
from edgeprune.model.decoder import Decoder
from edgeprune.precision import WeightFormat

if TYPE_CHECKING:
    import torch

    from edgeprune.model.model import Stored
    from edgeprune.model.quantised import QuantisedWeight

SHARD_BYTES = 5 * 10**9  # of a file, at most
NAMES = {
    "float64": "F64",
    "float32": "F32",
    "float16": "F16",
    "bfloat16": "BF16",
    "float8_e4m3fn": "F8_E4M3",
    "uint8": "U8",
    "bool": "BOOL",
    "int8": "I8",
    "int16": "I16",
    "int32": "I32",
    "int64": "I64",
}


@dataclass(frozen=True)
class Packing:
    """A checkpoint's way to store weights of few bits, by whatever name others know it.

    config: the field quantization_config. pack: returns the tensors of a weight by the names that stand in place of
    `weight`; it never looks at values, so that it tells shapes and types of a weight without memory.
    """

    config: dict[str, Any]
    pack: Callable[[QuantisedWeight], dict[str, torch.Tensor]]


def write_weights(
    decoder: Decoder,
    weights: Iterable[tuple[str, Stored]],
    directory: Path,
    dtype: torch.dtype,
    packing: Packing | None = None,
) -> None:
    """Writes weights into safetensors files of at most SHARD_BYTES, with an index where there are several.

    weights: in the order of decoder.shapes(), with codes for those of decoder.weight_formats that packing stores; they
    are stored as the family's tensors, floats in dtype. Raises ValueError for a wrong name or shape, and NumericalError
    for a weight that dtype cannot hold.
    """
    places = checkpoint_tensors(decoder)
    entries = {name: entry for place in places.values() for name, entry in entries_of(place, dtype, packing).items()}
    write_shards(entries, _all_packed(stored_stream(places, weights), packing), directory)


def entries_of(
    place: StoredTensor, dtype: torch.dtype, packing: Packing | None
) -> dict[str, tuple[torch.dtype, Shape]]:
    """Returns dtype and shape of all that a file holds of a tensor, by name. dtype: of the checkpoint's floats."""
    import torch

    if place.form is None or packing is None:
        return {place.key: (torch.float32 if place.exact else dtype, place.shape)}
    parts = _packed(place.key, _without_memory(place.form, place.shape), packing)
    return {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in parts}


def _packed(key: str, weight: QuantisedWeight, packing: Packing) -> Iterator[tuple[str, torch.Tensor]]:
    """Yields the tensors of a weight of few bits by their names in the file."""
    for name, tensor in packing.pack(weight).items():
        yield key.removesuffix("weight") + name, tensor


def _all_packed(stream: Iterable[tuple[str, Stored]], packing: Packing | None) -> Iterator[tuple[str, torch.Tensor]]:
    """Yields the tensors of the file in their order. Raises ValueError for codes that nothing packs."""
    from edgeprune.model.quantised import QuantisedWeight

    for key, tensor in stream:
        if not isinstance(tensor, QuantisedWeight):
            yield key, tensor
        elif packing is None:
            raise ValueError(f"{key} has codes, and the checkpoint holds floats")
        else:
            yield from _packed(key, tensor, packing)
        del tensor


def _without_memory(weight_format: WeightFormat, shape: Shape) -> QuantisedWeight:
    """Returns a weight of this format and shape that has no values."""
    import torch

    from edgeprune.model.quantised import QuantisedWeight

    with torch.device("meta"):
        codes = torch.empty(shape, dtype=torch.int8)
        scales = torch.empty(shape[0], weight_format.groups_of(shape[1]))
        zeros = torch.empty_like(scales, dtype=torch.int8) if weight_format.offset == "zero" else None
        input_scale = torch.empty(()) if weight_format.activation_bits else None
        unit = torch.empty(()) if weight_format.e4m3_scales else None
    return QuantisedWeight(weight_format, codes, scales, zeros, input_scale, scale_unit=unit)


def write_shards(
    entries: Mapping[str, tuple[torch.dtype, Shape]], tensors: Iterable[tuple[str, torch.Tensor]], directory: Path
) -> None:
    """Writes tensors of these types and shapes, which come in this order. Raises ValueError for others."""
    # Distribute the tensors over shards before any is read.
    sizes = {name: dtype.itemsize * prod(shape) for name, (dtype, shape) in entries.items()}
    shards: list[list[str]] = [[]]
    used = 0
    for name, size in sizes.items():
        if shards[-1] and used + size > SHARD_BYTES:
            shards.append([])
            used = 0
        shards[-1].append(name)
        used += size
    # Write each shard: its header, then its tensors as they come.
    stream = iter(tensors)
    weight_map = {}
    for number, shard in enumerate(shards, 1):
        file = "model.safetensors" if len(shards) == 1 else f"model-{number:05}-of-{len(shards):05}.safetensors"
        weight_map |= dict.fromkeys(shard, file)
        with (directory / file).open("wb") as out:
            write_header(out, {name: entries[name] for name in shard})
            for name in shard:
                dtype, shape = entries[name]
                next_name, tensor = next(stream, ("nothing", None))
                if next_name != name or tuple(tensor.shape) != shape:
                    raise ValueError(f"expected {name} {shape}, got {next_name}")
                out.write(tensor_bytes(as_stored(name, tensor, dtype)))
                del tensor  # a table is freed before the next tensor is made
    if (extra := next(stream, None)) is not None:
        raise ValueError(f"{extra[0]} is not a weight of this model")
    # Several shards need an index.
    if len(shards) > 1:
        index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": weight_map}
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


def write_header(out: BinaryIO, entries: Mapping[str, tuple[torch.dtype, Shape]]) -> None:
    """Writes the header of a file: its length in 8 bytes, then JSON, padded so that the data is aligned to 8 bytes."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, (dtype, shape) in entries.items():
        start, end = end, end + dtype.itemsize * prod(shape)
        header[name] = {"dtype": NAMES[str(dtype).removeprefix("torch.")], "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    out.write(len(text).to_bytes(8, "little") + text)


def tensor_bytes(tensor: torch.Tensor) -> memoryview:
    """Returns the bytes of a tensor."""
    import torch

    return memoryview(tensor.flatten().view(torch.uint8).numpy()) if tensor.numel() else memoryview(b"")
