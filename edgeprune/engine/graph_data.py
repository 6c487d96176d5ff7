"""The data files of a graph: which initializers there are, where they stand, and their bytes.

The layout follows from the Decoder alone, so offsets are known before any weight is read and
every spelling of a model can reference the same two files. It knows nothing about operators.

    embedding.data      embedding and head (one initializer where they are tied)
    model.onnx.data     everything else, in the order of use; the rotary tables last

Weights are read one initializer at a time, each once, and written in pieces: memory holds the
tensors of one fused initializer and one piece.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from edgeprune.errors import InputError, NumericalError
from edgeprune.model.decoder import Decoder

if TYPE_CHECKING:
    import torch

Precision = Literal["fp32", "fp16"]
ELEMENT_BYTES: dict[str, int] = {"fp32": 4, "fp16": 2}
EMBEDDING_FILE = "embedding.data"
LAYERS_FILE = "model.onnx.data"
ROTARY_TABLES = ("rotary.cos_table", "rotary.sin_table")
ALIGNMENT = 64  # bytes: a cache line, and more than any element
PIECE_BYTES = 1 << 25


@dataclass(frozen=True)
class Initializer:
    """One tensor of a data file. `sources` are the weights it is made of, stacked along their
    rows and, where `transposed`, turned from nn.Linear's (out, in) to MatMul's (in, out);
    without sources it is a rotary table."""

    name: str
    file: str
    shape: tuple[int, ...]
    sources: tuple[str, ...]
    transposed: bool
    offset: int
    length: int  # bytes


def layout(decoder: Decoder, precision: Precision, max_positions: int | None) -> tuple[Initializer, ...]:
    """Every initializer in the order of the files; `max_positions` rows of rotary tables, None for no tables."""
    ends = {EMBEDDING_FILE: 0, LAYERS_FILE: 0}
    found: list[Initializer] = []

    def add(name: str, shape: tuple[int, ...], sources: tuple[str, ...], transposed: bool, file: str) -> None:
        offset = -(-ends[file] // ALIGNMENT) * ALIGNMENT
        length = prod(shape) * ELEMENT_BYTES[precision]
        found.append(Initializer(name, file, shape, sources, transposed, offset, length))
        ends[file] = offset + length

    hidden, vocabulary = decoder.hidden_size, decoder.vocab_size
    if decoder.tie_word_embeddings:
        add("head.weight", (hidden, vocabulary), ("embedding",), True, EMBEDDING_FILE)
    else:
        add("embedding.weight", (vocabulary, hidden), ("embedding",), False, EMBEDDING_FILE)
        add("head.weight", (hidden, vocabulary), ("head",), True, EMBEDDING_FILE)
    for index, layer in enumerate(decoder.layers):
        if (attention := layer.attention) is not None:
            prefix = f"layers.{index}.attention."
            packed = attention.query_size + 2 * attention.key_value_size
            sources = (prefix + "q", prefix + "k", prefix + "v")
            add(prefix + "norm.weight", (hidden,), (prefix + "norm",), False, LAYERS_FILE)
            add(prefix + "qkv.weight", (hidden, packed), sources, True, LAYERS_FILE)
            add(prefix + "o.weight", (attention.query_size, hidden), (prefix + "o",), True, LAYERS_FILE)
        if (mlp := layer.mlp) is not None:
            prefix = f"layers.{index}.mlp."
            add(prefix + "norm.weight", (hidden,), (prefix + "norm",), False, LAYERS_FILE)
            sources = (prefix + "gate", prefix + "up")
            add(prefix + "gate_up.weight", (hidden, 2 * mlp.intermediate_size), sources, True, LAYERS_FILE)
            add(prefix + "down.weight", (mlp.intermediate_size, hidden), (prefix + "down",), True, LAYERS_FILE)
    add("norm.weight", (hidden,), ("norm",), False, LAYERS_FILE)
    if max_positions is not None:
        for name in ROTARY_TABLES:
            add(name, (max_positions, len(decoder.rotary.inverse_frequencies)), (), False, LAYERS_FILE)
    return tuple(found)


def write_data(
    decoder: Decoder,
    weights: Mapping[str, torch.Tensor],
    folder: Path,
    precision: Precision,
    initializers: tuple[Initializer, ...],
) -> None:
    """Write both data files. Raises InputError for a weight that is missing or has another shape,
    NumericalError for one that is not finite or overflows fp16; both name the weight."""
    for name in (EMBEDDING_FILE, LAYERS_FILE):
        with (folder / name).open("wb") as file:
            for initializer in initializers:
                if initializer.file != name:
                    continue
                file.write(bytes(initializer.offset - file.tell()))
                parts = _parts(decoder, weights, initializer)
                for piece in _pieces(parts, initializer.transposed, precision):
                    file.write(memoryview(piece.numpy()).cast("B"))
                parts.clear()  # before the next is read


def _parts(decoder: Decoder, weights: Mapping[str, torch.Tensor], initializer: Initializer) -> dict[str, torch.Tensor]:
    if not initializer.sources:
        return {initializer.name: _rotary_table(decoder, initializer)}
    shapes = decoder.shapes()
    return {name: _read(weights, name, shapes[name]) for name in initializer.sources}


def _pieces(parts: dict[str, torch.Tensor], transposed: bool, precision: Precision) -> Iterator[torch.Tensor]:
    """Contiguous pieces of the stacked (and transposed) parts, in the order of the file."""
    import torch

    axis = 1 if transposed else 0
    across = sum(part.shape[0] for part in parts.values()) if transposed else prod(next(iter(parts.values())).shape[1:])
    step = max(1, PIECE_BYTES // (across * ELEMENT_BYTES[precision]))
    for start in range(0, next(iter(parts.values())).shape[axis], step):
        rows = []
        for name, part in parts.items():
            piece = part.narrow(axis, start, min(step, part.shape[axis] - start))
            rows.append(_convert(name, piece, precision))
        stacked = rows[0] if len(rows) == 1 else torch.cat(rows)
        yield (stacked.t() if transposed else stacked).contiguous()


def _convert(name: str, tensor: torch.Tensor, precision: Precision) -> torch.Tensor:
    import torch

    converted = tensor.to(torch.float16 if precision == "fp16" else torch.float32).contiguous()
    if torch.isfinite(converted).all():
        return converted
    if torch.isfinite(tensor).all():
        raise NumericalError(
            f"weight {name} reaches {tensor.abs().max().item():.4g}, beyond fp16's limit 65504",
            "Write the graph in fp32 (--precision fp32).",
        )
    raise NumericalError(
        f"weight {name} holds values that are not finite", "Check the checkpoint: download or convert it again."
    )


def _read(weights: Mapping[str, torch.Tensor], name: str, shape: tuple[int, ...]) -> torch.Tensor:
    try:
        tensor = weights[name]
    except KeyError:
        raise InputError(
            f"weight {name} is missing, the model's description asks for it",
            "Load the model again: its weights and its configuration belong to different models.",
        ) from None
    if tuple(tensor.shape) != shape:
        raise InputError(
            f"weight {name} has shape {tuple(tensor.shape)}, the model's description says {shape}",
            "Load the model again: its weights and its configuration belong to different models.",
        )
    return tensor


def _rotary_table(decoder: Decoder, initializer: Initializer) -> torch.Tensor:
    """(positions, head_dim / 2) fp32: cos or sin of position * inverse frequency, times the scaling."""
    import torch

    positions = torch.arange(initializer.shape[0], dtype=torch.float32)
    frequencies = torch.tensor(decoder.rotary.inverse_frequencies, dtype=torch.float32)
    angles = torch.outer(positions, frequencies)
    return (angles.cos() if initializer.name == ROTARY_TABLES[0] else angles.sin()) * decoder.rotary.scaling
