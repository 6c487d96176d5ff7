"""The data files of a graph: its initializers, their offsets and their bytes.

It does not know operators. The layout follows from the Decoder alone, so that offsets are known before any weight is
read, and all variants of a model's graph refer to the same two files.

    embedding.data      embedding and head (one initializer where they are tied)
    model.onnx.data     everything else, in the order of use; the rotary tables last

The matrices of experts are one initializer, (experts, out, in) as nn.Linear has them, with the rows of gate and up in
turn: so ONNX Runtime's operators read them. Where each output has one scale they are (experts, in, out), because
TensorRT's builder holds the codes in floats when it has to turn them (RTX 1.7).

A matrix in a weight format is some initializers: `codes`, two of 4 bits a byte, the first in the low half;
`scales`, floats of the graph; `zeros`, the codes of 0.0 of an asymmetric format, which are stored as codes are;
`offsets`, floats of the graph, a group's minimum times its inputs; and `input_scale`, one float, of what the product
reads where the format rounds that. Scales of e4m3 are `scale_codes` and `scale_unit`, one float.

Weights are read one matrix at a time, each once, and written in pieces: the memory holds the weights of one fused
matrix and one piece.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import groupby
from math import prod
from pathlib import Path
from typing import IO, TYPE_CHECKING, Literal

from edgeprune.errors import InputError, NumericalError
from edgeprune.model.decoder import XIELU, Attention, Decoder, Mlp
from edgeprune.precision import PRECISIONS, GraphPrecision, WeightFormat

if TYPE_CHECKING:
    import torch

    from edgeprune.model.model import StoredWeights
    from edgeprune.model.quantised import QuantisedWeight

EMBEDDING_FILE = "embedding.data"
LAYERS_FILE = "model.onnx.data"
ALIGNMENT = 64  # bytes: a cache line, and more than any element
PIECE_BYTES = 1 << 25  # that are converted and written at a time


Role = Literal[
    "values",
    "codes",
    "numbers",
    "bytes",
    "scales",
    "scale_codes",
    "scale_unit",
    "zeros",
    "offsets",
    "input_scale",
    "cache scales",
]
SCALES: tuple[Role, ...] = ("scales", "scale_unit", "offsets", "input_scale")  # those of floats
OF_ALL: tuple[Role, ...] = ("scale_unit", "input_scale")  # one number for the matrix
FLOAT_TYPES = {"e4m3": "FLOAT8E4M3FN", "e2m1": "FLOAT4E2M1"}
CACHE_SCALES = (".key_scale", ".value_scale")  # ends of the names of the scales of a KV cache in codes
_OTHER_MODEL = "Load the model again: its weights and its configuration belong to different models."


@dataclass(frozen=True)
class Initializer:
    """One tensor of a data file.

    sources: the names of the weights that it is made of, stacked along their rows; none for a rotary table;
    transposed: from nn.Linear's (out, in) to MatMul's (in, out); offset: in bytes; precision: of floats; experts: how
    many matrices behind each other the sources make, None for one that is no expert's; form, role: of a matrix in a
    weight format, and what of it this is. A rotary table is fp32 where the rest is bf16, because the dialect that reads
    it computes in fp32 then; the scales of a KV cache are fp32 always.
    """

    name: str
    file: str
    shape: tuple[int, ...]
    sources: tuple[str, ...]
    transposed: bool
    offset: int
    precision: GraphPrecision
    experts: int | None = None
    form: WeightFormat | None = None
    role: Role = "values"

    @property
    def blocks(self) -> int:
        """Returns how many matrices stand behind each other."""
        return self.experts or 1

    @property
    def parts(self) -> list[tuple[str, ...]]:
        """Returns the sources of each block."""
        block_size = max(1, len(self.sources) // self.blocks)
        return [self.sources[start : start + block_size] for start in range(0, len(self.sources), block_size)]

    @property
    def bits(self) -> int:
        """Returns the bits of an element."""
        if self.form is None or self.role in SCALES:
            return 8 * PRECISIONS[self.precision].element_bytes
        return 8 if self.role in ("scale_codes", "bytes") else self.form.bits

    @property
    def length(self) -> int:
        """Returns the bytes of all elements."""
        return -(-prod(self.shape) * self.bits // 8)

    @property
    def onnx_type(self) -> str:
        """Returns ONNX's name of the type of an element."""
        if self.form is None or self.role in SCALES:
            return PRECISIONS[self.precision].onnx_type
        if self.role in ("numbers", "bytes"):
            return f"UINT{self.bits}"
        levels = "e4m3" if self.role == "scale_codes" else self.form.levels
        return FLOAT_TYPES.get(levels, f"INT{self.form.bits}")


def rotates_by_tables(attention: Attention) -> bool:
    """Returns whether GroupQueryAttention rotates queries and keys itself: in multiples of 16, and behind any norm."""
    rotary = attention.rotary
    if attention.qk_norm == "turned":
        return False
    return rotary is not None and attention.head_dim % 16 == 0 and len(rotary.inverse_frequencies) % 8 == 0


def rotary_tables(number: int) -> tuple[str, str]:
    """Returns the names of the tables of cos and sin of a decoder's rotary embedding with this number."""
    name = f"rotary.{number}" if number else "rotary"
    return f"{name}.cos_table", f"{name}.sin_table"


def layout(decoder: Decoder, precision: GraphPrecision, max_positions: int | None) -> tuple[Initializer, ...]:
    """Returns all initializers in the order of the files.

    max_positions: rows of the rotary tables; None: without tables. Raises InputError for embedding, head and experts in
    a format whose groups have minima, and for groups that do not divide.
    """
    ends = {EMBEDDING_FILE: 0, LAYERS_FILE: 0}
    initializers: list[Initializer] = []
    formats = decoder.weight_formats

    def add(
        name: str,
        shape: tuple[int, ...],
        sources: tuple[str, ...],
        file: str = LAYERS_FILE,
        experts: int | None = None,
        transposed: bool = True,
    ) -> None:
        """Appends a tensor at the end of its file, as one initializer or as those of its weight format."""
        own: GraphPrecision = "fp32" if precision == "bf16" and not sources else precision
        form = formats.get(sources[0]) if sources else None
        transposed = transposed and len(shape) > 1 and (not experts or (form is not None and form.group is None))
        if experts and transposed:
            shape = (shape[0], shape[2], shape[1])
        whole = Initializer(name, file, shape, sources, transposed, 0, own, experts)
        if name.endswith(CACHE_SCALES):
            whole = replace(whole, precision="fp32", role="cache scales", transposed=False)
        if form is not None and form.offset == "minimum" and (file == EMBEDDING_FILE or experts):
            what = "experts" if experts else "embedding and head"
            raise InputError(f"graphs have no {what} in {form.name}", "Give these int8 or floats.")
        for part in [whole] if form is None else _quantised(replace(whole, form=form)):
            offset = -(-ends[file] // ALIGNMENT) * ALIGNMENT
            initializers.append(replace(part, offset=offset))
            ends[file] = offset + part.length

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
            for name, shape, sources, experts in inner(part, hidden):
                add(prefix + name, shape, tuple(prefix + source for source in sources), experts=experts)
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


def _quantised(whole: Initializer) -> Iterator[Initializer]:
    """Yields the initializers of a matrix in a weight format, without their offsets.

    The codes of each expert are whole bytes, and so are its zeros: groups divide both sides of its matrices. Raises
    InputError where they do not.
    """
    inputs_axis = len(whole.shape) - (2 if whole.transposed else 1)
    groups = whole.form.groups_of(whole.shape[inputs_axis])
    grouped = (*whole.shape[:inputs_axis], groups, *whole.shape[inputs_axis + 1 :])
    is_vector = whole.form.group is None and len(whole.shape) == 2
    outputs = (*whole.shape[:inputs_axis], *whole.shape[inputs_axis + 1 :])
    shapes: dict[Role, tuple[int, ...]] = {"codes": whole.shape, "scales": outputs if is_vector else grouped}
    if whole.form.e4m3_scales:
        shapes = {"codes": whole.shape, "scale_codes": grouped, "scale_unit": ()}
    if whole.form.offset:
        shapes["zeros" if whole.form.offset == "zero" else "offsets"] = grouped
    if whole.form.activation_bits is not None:
        shapes["input_scale"] = ()
    for role, shape in shapes.items():
        transposed = whole.transposed and role not in OF_ALL
        yield replace(whole, name=f"{whole.name}.{role}", role=role, shape=shape, transposed=transposed)


def largest_matrix_bytes(decoder: Decoder, precision: GraphPrecision) -> int:
    """Returns the bytes in floats of the largest matrix that has a weight format; 0 where none has one."""
    codes = (prod(one.shape) for one in layout(decoder, precision, None) if one.role == "codes")
    return PRECISIONS[precision].element_bytes * max(codes, default=0)


Part = tuple[str, tuple[int, ...], tuple[str, ...], "int | None"]  # name, shape, sources, experts


def _attention(attention: Attention, hidden: int) -> Iterator[Part]:
    """Yields the initializers of an attention but for its norms of the stream."""
    packed = attention.query_size + 2 * attention.key_value_size
    yield "qkv.weight", (hidden, packed), ("q", "k", "v"), None
    if attention.input_bias:
        yield "qkv.bias", (packed,), ("q_bias", "k_bias", "v_bias"), None
    if attention.qk_norm is not None:
        of_all = attention.qk_norm == "all"
        for part, size in (("q", attention.query_size), ("k", attention.key_value_size)):
            yield f"{part}_norm.weight", (size if of_all else attention.head_dim,), (f"{part}_norm",), None
    if attention.sinks:
        yield "sinks", (attention.num_attention_heads,), ("sinks",), None
    yield "o.weight", (attention.query_size, hidden), ("o",), None
    if attention.output_bias:
        yield "o.bias", (hidden,), ("o_bias",), None
    if attention.cache_format is not None:
        for name in ("key_scale", "value_scale"):
            yield name, (1, attention.num_key_value_heads, 1, attention.head_dim), (name,), None


def _mlp(mlp: Mlp, hidden: int) -> Iterator[Part]:
    """Yields the initializers of an MLP but for its norms; those of all experts are one initializer."""
    width, inputs = mlp.intermediate_size, mlp.inputs
    if (experts := mlp.experts) is not None:
        count = experts.num_experts
        yield "router.weight", (hidden, count), ("router",), None
        if experts.bias:
            yield "router.bias", (count,), ("router_bias",), None

        def of_each(*names: str) -> tuple[str, ...]:
            """Returns the names of these weights of every expert."""
            return tuple(f"experts.{e}.{name}" for e in range(count) for name in names)

        yield "gate_up.weight", (count, len(inputs) * width, hidden), of_each(*inputs), count
        if mlp.input_bias:
            yield "gate_up.bias", (count, len(inputs) * width), of_each(*(f"{name}_bias" for name in inputs)), count
        yield "down.weight", (count, hidden, width), of_each("down"), count
        if mlp.output_bias:
            yield "down.bias", (count, hidden), of_each("down_bias"), count
        return
    yield "gate_up.weight", (hidden, len(inputs) * width), inputs, None
    if mlp.input_bias:
        yield "gate_up.bias", (len(inputs) * width,), tuple(f"{name}_bias" for name in inputs), None
    if mlp.activation == "xielu":
        for name, shape in XIELU.items():
            yield name, shape, (name,), None
    yield "down.weight", (width, hidden), ("down",), None
    if mlp.output_bias:
        yield "down.bias", (hidden,), ("down_bias",), None


def write_data(decoder: Decoder, weights: StoredWeights, folder: Path, initializers: tuple[Initializer, ...]) -> None:
    """Writes both data files.

    weights: by the names of decoder.py, of any floating type, or codes for those of decoder.weight_formats. Raises
    InputError for a weight that is missing or has another shape or format, and NumericalError for one that is not
    finite or overflows; both name the weight.
    """
    shapes, formats = decoder.shapes(), decoder.weight_formats

    def read(name: str) -> torch.Tensor | QuantisedWeight:
        """Returns a weight, which is checked."""
        return _read(weights, name, shapes[name], formats.get(name))

    for name in (EMBEDDING_FILE, LAYERS_FILE):
        own = [initializer for initializer in initializers if initializer.file == name]
        with (folder / name).open("wb") as file:
            # Codes, scales and zeros of a matrix are written together, because each weight is read once.
            for sources, matrix in groupby(own, key=lambda initializer: initializer.sources):
                if sources:
                    _write_matrix(read, file, list(matrix))
                for table in [] if sources else matrix:
                    _write(file, table, 0, {table.name: _rotary_table(decoder, table)})


def _write_matrix(
    read: Callable[[str], torch.Tensor | QuantisedWeight], file: IO[bytes], matrix: list[Initializer]
) -> None:
    """Writes the initializers of one matrix, or of one matrix for each expert, block by block."""
    for block, sources in enumerate(matrix[0].parts):
        tensors = {name: read(name) for name in sources}
        for initializer in matrix:
            held = {name: _held(name, one, initializer) for name, one in tensors.items()}
            if initializer.role in OF_ALL:
                if len({float(number) for number in held.values()}) > 1:
                    raise ValueError(f"the weights of {initializer.name} have several numbers")
                held = {name: number.reshape(1) for name, number in list(held.items())[:1]}
            _write(file, initializer, block, held)
        tensors.clear()  # before the next are read


def _write(file: IO[bytes], initializer: Initializer, block: int, tensors: dict[str, torch.Tensor]) -> None:
    """Writes one block of an initializer at its place in the file."""
    file.seek(initializer.offset + block * (initializer.length // initializer.blocks))
    for piece in _pieces(tensors, initializer):
        file.write(memoryview(piece.numpy()).cast("B"))


def _held(name: str, weight: torch.Tensor | QuantisedWeight, initializer: Initializer) -> torch.Tensor:
    """Returns what an initializer holds of a weight, (out, in) or (out, groups).

    Raises NumericalError for a weight of few bits that overflows.
    """
    if initializer.role in ("values", "cache scales"):
        return weight
    if initializer.role in ("scales", "scale_codes"):
        # The largest weight that the codes could stand for is seldom too large: then all are looked at.
        _convert(name, weight.scales, initializer.precision)
        largest = weight.scales.max() * (weight.form.most - weight.form.least)
        if weight.minima is not None:
            largest += weight.minima.abs().max()
        if largest > _largest(initializer.precision):
            _convert(name, weight.dequantised(), initializer.precision)
    # Of the mean of a group's inputs, whose sum is beyond fp16 sooner.
    if initializer.role == "offsets":
        return weight.minima * weight.form.group
    return getattr(weight, initializer.role)


def _pieces(tensors: dict[str, torch.Tensor], initializer: Initializer) -> Iterator[torch.Tensor]:
    """Yields contiguous pieces of the stacked (and transposed) tensors, in the order and the type of the file."""
    import torch

    # Some rows of one tensor after the other. Their number is even, so that 4 bits make whole bytes.
    if not initializer.transposed and not initializer.experts:
        for name, tensor in tensors.items():
            for piece in tensor.reshape(tensor.shape or 1).split(_lines(prod(tensor.shape[1:]), initializer)):
                yield _encoded(_converted(name, piece, initializer), initializer)
        return
    # Some columns (out, columns) of all tensors together, which are rows (columns, out) of the transposed ones; or some
    # rows of each. Those of an expert come in turn.
    axis = int(initializer.transposed)
    lines = _lines(sum(prod(tensor.shape) // tensor.shape[axis] for tensor in tensors.values()), initializer)
    for pieces in zip(*(tensor.split(lines, dim=axis) for tensor in tensors.values()), strict=True):
        converted = [_converted(name, piece, initializer) for name, piece in zip(tensors, pieces, strict=True)]
        joined = torch.stack(converted, dim=1).flatten(0, 1) if initializer.experts else torch.cat(converted)
        yield _encoded((joined.t() if initializer.transposed else joined).contiguous(), initializer)


def _lines(elements: int, initializer: Initializer) -> int:
    """Returns the even number of lines of so many elements that make a piece."""
    return max(2, 8 * PIECE_BYTES // (elements * initializer.bits) // 2 * 2)


def _converted(name: str, tensor: torch.Tensor, initializer: Initializer) -> torch.Tensor:
    """Returns floats in the initializer's precision, and codes as they are; raises NumericalError as `_convert`."""
    if initializer.role in ("codes", "zeros", "scale_codes"):
        return tensor
    return _convert(name, tensor, initializer.precision)


def _encoded(tensor: torch.Tensor, initializer: Initializer) -> torch.Tensor:
    """Returns the contiguous elements as numpy can hold them: bf16 as its bits, two codes of 4 bits in a byte."""
    import torch

    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.int16)
    if initializer.bits != 4:
        return tensor.contiguous()
    codes = tensor.flatten().view(torch.uint8)
    if len(codes) % 2:
        codes = torch.cat([codes, codes.new_zeros(1)])
    return (codes[0::2] & 15) | (codes[1::2] << 4)


def _convert(name: str, tensor: torch.Tensor, precision: GraphPrecision) -> torch.Tensor:
    """Returns a weight in a precision; raises NumericalError where it is not finite in it."""
    import torch

    converted = tensor.to(_dtype(precision)).contiguous()
    if torch.isfinite(converted).all():
        return converted
    if torch.isfinite(tensor).all():
        raise NumericalError(
            f"weight {name} reaches {tensor.abs().max().item():.4g}, beyond {precision}'s limit "
            f"{_largest(precision):.6g}",
            f"Write the graph in {'bf16 or ' if precision == 'fp16' else ''}fp32 (--precision fp32).",
        )
    raise NumericalError(
        f"weight {name} holds values that are not finite", "Check the checkpoint: download or convert it again."
    )


def _dtype(precision: GraphPrecision) -> torch.dtype:
    import torch

    return getattr(torch, PRECISIONS[precision].torch_dtype)


def _largest(precision: GraphPrecision) -> float:
    """Returns the largest number of a precision."""
    import torch

    return torch.finfo(_dtype(precision)).max


def _read(
    weights: StoredWeights, name: str, shape: tuple[int, ...], form: WeightFormat | None
) -> torch.Tensor | QuantisedWeight:
    """Returns a weight by name; raises InputError where it is missing or has another shape or format."""
    try:
        weight = weights[name]
    except KeyError:
        raise InputError(f"weight {name} is missing, but the model's configuration requires it", _OTHER_MODEL) from None
    if tuple(weight.shape) != shape:
        raise InputError(
            f"weight {name} has shape {tuple(weight.shape)}, but the model's configuration requires {shape}",
            _OTHER_MODEL,
        )
    stored = getattr(weight, "form", None)
    if stored != form:
        named = [one.name if one else "floats" for one in (stored, form)]
        raise InputError(
            f"weight {name} is stored in {named[0]}, but the model's configuration requires {named[1]}",
            "Give the weights as the checkpoint stores them, or a configuration without weight formats.",
        )
    return weight


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
