"""The data files of a graph: its initializers, their offsets and their bytes.

It does not know operators. The layout follows from the Decoder alone, so that offsets are known before any weight is
read, and all variants of a model's graph refer to the same two files.

    embedding.data      embedding and head (one initializer where they are tied)
    model.onnx.data     everything else, in the order of use; the rotary tables last

Weights are read one initializer at a time, each once, and written in pieces: the memory holds the tensors of one
fused initializer and one piece.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING

from edgeprune.errors import InputError, NumericalError
from edgeprune.model.decoder import Attention, Decoder, Mlp
from edgeprune.precision import PRECISIONS, GraphPrecision

if TYPE_CHECKING:
    import torch

EMBEDDING_FILE = "embedding.data"
LAYERS_FILE = "model.onnx.data"
ALIGNMENT = 64  # bytes: a cache line, and more than any element
PIECE_BYTES = 1 << 25  # that are converted and written at a time


@dataclass(frozen=True)
class Initializer:
    """One tensor of a data file.

    sources: the names of the weights that it is made of, stacked along their rows; none for a rotary table;
    transposed: from nn.Linear's (out, in) to MatMul's (in, out); offset: in bytes; blocks: the matrices behind each
    other that the sources make, one for each expert. A rotary table is fp32 where the rest is bf16, because the
    dialect that reads it computes in fp32 then.
    """

    name: str
    file: str
    shape: tuple[int, ...]
    sources: tuple[str, ...]
    transposed: bool
    offset: int
    length: int  # bytes
    precision: GraphPrecision
    blocks: int = 1

    @property
    def parts(self) -> list[tuple[str, ...]]:
        """Returns the sources of each block."""
        block_size = max(1, len(self.sources) // self.blocks)
        return [self.sources[start : start + block_size] for start in range(0, len(self.sources), block_size)]


def rotates_by_tables(attention: Attention) -> bool:
    """Returns whether GroupQueryAttention rotates queries and keys itself, which it does in multiples of 16."""
    rotary = attention.rotary
    return rotary is not None and attention.head_dim % 16 == 0 and len(rotary.inverse_frequencies) % 8 == 0


def rotary_tables(number: int) -> tuple[str, str]:
    """Returns the names of the tables of cos and sin of a decoder's rotary embedding with this number."""
    name = f"rotary.{number}" if number else "rotary"
    return f"{name}.cos_table", f"{name}.sin_table"


def layout(decoder: Decoder, precision: GraphPrecision, max_positions: int | None) -> tuple[Initializer, ...]:
    """Returns all initializers in the order of the files.

    max_positions: rows of the rotary tables; None: without tables.
    """
    ends = {EMBEDDING_FILE: 0, LAYERS_FILE: 0}
    initializers: list[Initializer] = []

    def add(
        name: str,
        shape: tuple[int, ...],
        sources: tuple[str, ...],
        file: str = LAYERS_FILE,
        blocks: int = 1,
        transposed: bool = True,
    ) -> None:
        """Appends an initializer at the end of its file."""
        offset = -(-ends[file] // ALIGNMENT) * ALIGNMENT
        own: GraphPrecision = "fp32" if precision == "bf16" and not sources else precision
        length, turned = prod(shape) * PRECISIONS[own].element_bytes, transposed and len(shape) > 1
        initializers.append(Initializer(name, file, shape, sources, turned, offset, length, own, blocks))
        ends[file] = offset + length

    hidden, vocabulary = decoder.hidden_size, decoder.vocab_size

    def add_norm(name: str) -> None:
        """Appends the weight and the bias, if any, of a norm."""
        for source, shape in decoder.norm_shapes(name).items():
            add(f"{name}.{'bias' if source.endswith('_bias') else 'weight'}", shape, (source,))

    # Embedding and head, and learned positions.
    if decoder.tie_word_embeddings:
        add("head.weight", (hidden, vocabulary), ("embedding",), EMBEDDING_FILE)
    else:
        add("embedding.weight", (decoder.input_vocab_size, hidden), ("embedding",), EMBEDDING_FILE, transposed=False)
        add("head.weight", (hidden, vocabulary), ("head",), EMBEDDING_FILE)
    if decoder.learned_positions:
        add("positions.weight", (decoder.max_position_embeddings, hidden), ("positions",), transposed=False)
    # The layers in the order of use.
    for index, layer in enumerate(decoder.layers):
        for kind, part, inner in (("attention", layer.attention, _attention), ("mlp", layer.mlp, _mlp)):
            if part is None:
                continue
            prefix = f"layers.{index}.{kind}."
            if decoder.norms != "after":
                add_norm(prefix + "norm")
            for name, shape, sources, blocks in inner(part, hidden):
                add(prefix + name, shape, tuple(prefix + source for source in sources), blocks=blocks)
            if decoder.norms != "before":
                add_norm(prefix + "post_norm")
    add_norm("norm")
    # The rotary tables, of those embeddings that need them.
    if max_positions is not None:
        attentions = [layer.attention for layer in decoder.layers if layer.attention]
        tabled = {attention.rotary for attention in attentions if rotates_by_tables(attention)}
        for number, rotary in enumerate(decoder.rotaries):
            for name in rotary_tables(number) if rotary in tabled else ():
                add(name, (max_positions, len(rotary.inverse_frequencies)), (), transposed=False)
    return tuple(initializers)


Part = tuple[str, tuple[int, ...], tuple[str, ...], int]  # name, shape, sources, blocks


def _attention(attention: Attention, hidden: int) -> Iterator[Part]:
    """Yields the initializers of an attention but for its norms of the stream."""
    packed = attention.query_size + 2 * attention.key_value_size
    yield "qkv.weight", (hidden, packed), ("q", "k", "v"), 1
    if attention.input_bias:
        yield "qkv.bias", (packed,), ("q_bias", "k_bias", "v_bias"), 1
    if attention.qk_norm is not None:
        of_all = attention.qk_norm == "all"
        for part, size in (("q", attention.query_size), ("k", attention.key_value_size)):
            yield f"{part}_norm.weight", (size if of_all else attention.head_dim,), (f"{part}_norm",), 1
    yield "o.weight", (attention.query_size, hidden), ("o",), 1
    if attention.output_bias:
        yield "o.bias", (hidden,), ("o_bias",), 1


def _mlp(mlp: Mlp, hidden: int) -> Iterator[Part]:
    """Yields the initializers of an MLP but for its norms; those of all experts are one initializer."""
    width, inputs = mlp.intermediate_size, mlp.inputs
    if (experts := mlp.experts) is not None:
        count = experts.num_experts
        yield "router.weight", (hidden, count), ("router",), 1
        sources = tuple(f"experts.{e}.{name}" for e in range(count) for name in inputs)
        yield "gate_up.weight", (count, hidden, len(inputs) * width), sources, count
        yield "down.weight", (count, width, hidden), tuple(f"experts.{e}.down" for e in range(count)), count
        return
    yield "gate_up.weight", (hidden, len(inputs) * width), inputs, 1
    if mlp.input_bias:
        yield "gate_up.bias", (len(inputs) * width,), tuple(f"{name}_bias" for name in inputs), 1
    yield "down.weight", (width, hidden), ("down",), 1
    if mlp.output_bias:
        yield "down.bias", (hidden,), ("down_bias",), 1


def write_data(
    decoder: Decoder, weights: Mapping[str, torch.Tensor], folder: Path, initializers: tuple[Initializer, ...]
) -> None:
    """Writes both data files.

    weights: by the names of decoder.py, any floating type. Raises InputError for a weight that is missing or has
    another shape, and NumericalError for one that is not finite or overflows; both name the weight.
    """
    import torch

    shapes = decoder.shapes()
    for name in (EMBEDDING_FILE, LAYERS_FILE):
        with (folder / name).open("wb") as file:
            for initializer in initializers:
                if initializer.file != name:
                    continue
                # Zeros up to the offset, then the blocks, each in pieces.
                file.write(bytes(initializer.offset - file.tell()))
                for sources in initializer.parts or [()]:
                    tensors = _tensors(decoder, weights, initializer, sources, shapes)
                    for piece in _pieces(tensors, initializer.transposed, initializer.precision):
                        if initializer.precision == "bf16":  # numpy has no such type
                            piece = piece.view(torch.int16)
                        file.write(memoryview(piece.numpy()).cast("B"))
                    tensors.clear()  # before the next are read


def _tensors(
    decoder: Decoder,
    weights: Mapping[str, torch.Tensor],
    initializer: Initializer,
    sources: tuple[str, ...],
    shapes: Mapping[str, tuple[int, ...]],
) -> dict[str, torch.Tensor]:
    """Returns the tensors of one block by name: its weights, or the rotary table."""
    if not sources:
        return {initializer.name: _rotary_table(decoder, initializer)}
    return {name: _read(weights, name, shapes[name]) for name in sources}


def _pieces(tensors: dict[str, torch.Tensor], transposed: bool, precision: GraphPrecision) -> Iterator[torch.Tensor]:
    """Yields contiguous pieces of the stacked (and transposed) tensors, in the order of the file."""
    import torch

    # Some rows of one tensor after the other.
    if not transposed:
        for name, tensor in tensors.items():
            rows = max(1, PIECE_BYTES // (prod(tensor.shape[1:]) * PRECISIONS[precision].element_bytes))
            for piece in tensor.split(rows):
                yield _convert(name, piece, precision)
        return
    # Some columns (out, columns) of all tensors together, which are rows (columns, out) of the transposed ones.
    outputs = sum(tensor.shape[0] for tensor in tensors.values())
    columns = max(1, PIECE_BYTES // (outputs * PRECISIONS[precision].element_bytes))
    for pieces in zip(*(tensor.split(columns, dim=1) for tensor in tensors.values()), strict=True):
        converted = [_convert(name, piece, precision) for name, piece in zip(tensors, pieces, strict=True)]
        yield torch.cat(converted).t().contiguous()


def _convert(name: str, tensor: torch.Tensor, precision: GraphPrecision) -> torch.Tensor:
    """Returns a weight in a precision; raises NumericalError where it is not finite in it."""
    import torch

    converted = tensor.to(getattr(torch, PRECISIONS[precision].torch_dtype)).contiguous()
    if torch.isfinite(converted).all():
        return converted
    if torch.isfinite(tensor).all():
        raise NumericalError(
            f"weight {name} reaches {tensor.abs().max().item():.4g}, beyond {precision}'s limit "
            f"{torch.finfo(converted.dtype).max:.6g}",
            f"Write the graph in {'bf16 or ' if precision == 'fp16' else ''}fp32 (--precision fp32).",
        )
    raise NumericalError(
        f"weight {name} holds values that are not finite", "Check the checkpoint: download or convert it again."
    )


def _read(weights: Mapping[str, torch.Tensor], name: str, shape: tuple[int, ...]) -> torch.Tensor:
    """Returns a weight by name; raises InputError where it is missing or has another shape."""
    try:
        tensor = weights[name]
    except KeyError:
        raise InputError(
            f"weight {name} is missing, but the model's configuration requires it",
            "Load the model again: its weights and its configuration belong to different models.",
        ) from None
    if tuple(tensor.shape) != shape:
        raise InputError(
            f"weight {name} has shape {tuple(tensor.shape)}, but the model's configuration requires {shape}",
            "Load the model again: its weights and its configuration belong to different models.",
        )
    return tensor


def _rotary_table(decoder: Decoder, initializer: Initializer) -> torch.Tensor:
    """Returns cos or sin (positions, turned / 2) fp32 of the angles of decoder.py's Rotary, times its scaling."""
    import torch

    # The rotary embedding of this table, and whether it is that of sin.
    tables = {
        name: (rotary, is_sin)
        for number, rotary in enumerate(decoder.rotaries)
        for is_sin, name in enumerate(rotary_tables(number))
    }
    rotary, is_sin = tables[initializer.name]
    # The angles of all positions, in a grid by row and column; cos and sin are 0 in its prefix.
    positions, prefix = torch.arange(initializer.shape[0]), 0
    frequencies = torch.tensor(rotary.inverse_frequencies, dtype=torch.float32)
    if rotary.grid is None:
        angles = torch.outer(positions, frequencies)
    else:
        prefix, side = rotary.grid.prefix, rotary.grid.side
        rows, columns = (positions - prefix) // side, (positions - prefix) % side
        of_rows, of_columns = frequencies.chunk(2)
        angles = torch.cat([torch.outer(rows, of_rows), torch.outer(columns, of_columns)], dim=1)
    table = (angles.sin() if is_sin else angles.cos()) * rotary.scaling
    table[:prefix] = 0
    return table
