"""The GGUF file of a checkpoint, as llama.cpp runs it: fields, tokenizer, and tensors one after the other.

Whether and how a file can hold the model is decided in metadata.py; blocks.py packs weights of few bits.
"""

from __future__ import annotations

import logging
import os
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from edgeprune.errors import InputError
from edgeprune.model.checkpoint.configuration import read_config
from edgeprune.model.checkpoint.places import stored_stream
from edgeprune.model.checkpoint.safetensors_file import as_stored
from edgeprune.model.decoder import Decoder
from edgeprune.model.gguf.blocks import BLOCK, block_type, format_of_blocks, packed
from edgeprune.model.gguf.convert import reordered
from edgeprune.model.gguf.metadata import Held, check_by_layer, held
from edgeprune.model.gguf.names import is_always_fp32
from edgeprune.model.gguf.tokenizer_write import tokenizer_fields
from edgeprune.model.heads import filled, heads_differ
from edgeprune.model.model import Model
from edgeprune.precision import WeightFormat

if TYPE_CHECKING:
    import torch
    from gguf import GGMLQuantizationType, GGUFWriter

    from edgeprune.model.model import Stored

    Types = Mapping[str, GGMLQuantizationType]  # by the keys of the file's tensors

QUANTISATION_VERSION = 2
TOKENS = "tokenizer.ggml.tokens"
NO_TOKENIZER = {
    "tokenizer.ggml.model": "none",
    TOKENS: None,
}  # only the number of tokens, which is a field of the model
OUTPUTS = (".attention.o", ".mlp.down")  # the ends of the names of the projections that residual_scale multiplies


def check_exportable(model: Model, reduced: bool = False, by_layer: bool = False) -> Held:
    """Returns the form in which a GGUF file will hold the model.

    reduced: its vocabulary will be cut down; by_layer: its layers will differ in width.

    Raises InputError, before any work, where llama.cpp cannot compute the model or has no pre-tokenizer for its texts.
    """
    if by_layer:
        check_by_layer(model.decoder)
    return _checked(model, model.name, reduced)[0]


def _checked(model: Model, name: str, reduced: bool = False) -> tuple[Held, dict[str, Any]]:
    """Returns the form of the model in the file, and the fields of its tokenizer. Raises InputError."""
    form = _form(model)
    return form, tokenizer_fields(model.directory, model.decoder.vocab_size, reduced, name)


def _form(model: Model) -> Held:
    """Returns the form of the model in the file. Raises InputError."""
    decoder = model.decoder.with_format(None)
    if any(weight.endswith(OUTPUTS) for weight in model.decoder.weight_formats):
        # Codes stand for the final values, in which the scale is multiplied already.
        decoder = replace(decoder, residual_scale=1.0)
    return held(decoder, read_config(model.directory))


def export_gguf(model: Model, path: Path, dtype: torch.dtype | None = None, has_tokenizer: bool = True) -> Path:
    """Writes a model as GGUF and returns the path.

    Weights of few bits keep their exact values, in ggml's types; of those of compressed-tensors whose blocks cannot
    hold them, which a warning names, fp32 does. The others have the dtype that is given, by default the checkpoint's;
    norms, biases and routers are fp32. At most one layer's tensors are in memory at a time. The file is complete or
    absent. has_tokenizer: without one the file can be timed only. Raises InputError for a model that llama.cpp cannot
    compute and for a file that cannot be written, NumericalError for a weight that the type cannot hold.
    """
    form, tokenizer = _checked(model, path.stem) if has_tokenizer else (_form(model), NO_TOKENIZER)
    decoder = model.decoder
    stored = {name: model.quantised if name in decoder.weight_formats else model.weights for name in decoder.shapes()}
    weights = ((name, place[name]) for name, place in stored.items())
    return write_gguf(path, decoder, form, tokenizer, dtype or _float_dtype(model, form), weights)


def write_gguf(
    path: Path,
    decoder: Decoder,
    form: Held,
    tokenizer: Mapping[str, Any],
    dtype: torch.dtype,
    weights: Iterable[tuple[str, Stored]],
) -> Path:
    """Writes the file of weights as they come, and returns its path.

    decoder: with the formats of the weights; dtype: of the matrices that are floats; weights: in the order of
    decoder.shapes(). Complete or absent, and raises, as export_gguf.
    """
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        _write(part, decoder, form, tokenizer, dtype, weights)
        part.replace(path)
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror or error}", "Free some space there.") from None
    finally:
        part.unlink(missing_ok=True)
    return path


def _float_dtype(model: Model, form: Held) -> torch.dtype:
    """Returns the dtype of the matrices that are floats: those of a checkpoint have one."""
    import torch

    formats = model.decoder.weight_formats
    for key, stored in form.tensors.items():
        if not is_always_fp32(key) and (source := _source(model.decoder, stored.names[0])) not in formats:
            return model.weights[source].dtype
    return torch.float32


def _write(
    path: Path,
    decoder: Decoder,
    form: Held,
    tokenizer: Mapping[str, Any],
    dtype: torch.dtype,
    weights: Iterable[tuple[str, Stored]],
) -> None:
    """Writes the whole file: header, fields, descriptions of the tensors, then their data in the same order."""
    import torch
    from gguf import GGUFWriter
    from gguf.quants import quant_shape_to_byte_shape

    tensors, types = form.tensors, types_of(decoder, form, dtype)
    shapes = {key: _stacked(s.shape, len(s.names)) if _is_experts(key) else s.shape for key, s in tensors.items()}
    writer = GGUFWriter(path, form.architecture.name)
    try:
        # Fields: of the file, of the model, of the tokenizer and with it the name.
        general = {
            "general.type": "model",
            "general.quantization_version": QUANTISATION_VERSION,
            "general.file_type": _file_type(types, shapes),
        }
        for key, value in {**general, **form.fields, **tokenizer}.items():
            if key != "general.architecture" and value is not None:  # which the writer adds itself
                _add(writer, key, value)
        # Descriptions of all tensors, rope factors first.
        for key, values in form.factors.items():
            writer.add_tensor_info(key, values.shape, values.dtype, values.nbytes)
        for key, shape in shapes.items():
            size = prod(quant_shape_to_byte_shape(shape, types[key]))
            writer.add_tensor_info(key, shape, np.dtype(np.float32), size, types[key])
        # The data, tensor by tensor; weights are read when their turn comes.
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for values in form.factors.values():
            writer.write_tensor_data(values)
        dtypes = {kind: plain for plain, kind in plain_types().items()}
        for key, tensor in stored_stream(tensors, _as_held(decoder, form, types, weights)):
            stored = as_stored(key, tensor, dtypes[types[key]]) if types[key] in dtypes else tensor
            writer.write_tensor_data(stored.contiguous().view(torch.uint8).numpy())
    finally:
        writer.close()


def plain_types() -> dict[torch.dtype, GGMLQuantizationType]:
    """Returns the types of the file that store floats, by their dtype."""
    import torch
    from gguf import GGMLQuantizationType

    return {
        torch.float32: GGMLQuantizationType.F32,
        torch.float16: GGMLQuantizationType.F16,
        torch.bfloat16: GGMLQuantizationType.BF16,
    }


def types_of(decoder: Decoder, form: Held, dtype: torch.dtype) -> Types:
    """Returns the type of every tensor of the file; warns of weights of compressed-tensors that become fp32.

    dtype: of the matrices that are floats. Raises InputError where blocks of ggml cannot hold what was rounded to them.
    """
    import torch

    formats, plain = decoder.weight_formats, plain_types()
    types, unpacked = {}, []
    for key, stored in form.tensors.items():
        weight_format = formats.get(_source(decoder, stored.names[0]))
        if is_always_fp32(key):
            types[key] = plain[torch.float32]
        elif weight_format is None:
            types[key] = plain[dtype]
        elif all(
            _keeps_values(decoder, form, weight_format, *named)
            for named in zip(stored.names, stored.shapes, strict=True)
        ):
            types[key] = block_type(weight_format)
        elif weight_format.storage == "gguf":
            raise InputError(
                f"blocks of {weight_format.name} do not hold {key}: llama.cpp's {form.architecture.name} needs other "
                "heads, or another scale of the scores, than the model has",
                "Use --weights float.",
            )
        else:
            types[key] = plain[torch.float32]
            unpacked.append(key)
    if unpacked:
        logging.getLogger(__name__).warning(
            "%d matrices of few bits, such as %s, are fp32 in the GGUF file: no blocks of %d inputs hold their values",
            len(unpacked),
            unpacked[0],
            BLOCK,
        )
    return types


def _source(decoder: Decoder, name: str) -> str:
    """Returns the name of the model's weight for one of the file's: a tied head may be written a second time."""
    return "embedding" if name == "head" and decoder.tie_word_embeddings else name


def _keeps_values(decoder: Decoder, form: Held, weight_format: WeightFormat, name: str, shape: tuple[int, ...]) -> bool:
    """Returns whether blocks of the file hold a weight of few bits as it is. shape: in the file."""
    # What the least code of an offset stands for is seldom a number of fp16; floats of few bits have no blocks.
    if weight_format.storage in ("offset", "floats"):
        return False
    multiple = format_of_blocks(weight_format).multiple
    if shape[1] % multiple or (form.factor != 1.0 and name.endswith(_scaled(form.decoder))):
        return False
    if ".attention." not in name:
        return True
    # Heads of zeros must fill whole blocks of `o`, and may change the values of q and k.
    index, part = int(name.split(".")[1]), name.rsplit(".", 1)[-1]
    own, wanted = decoder.layers[index].attention, form.decoder.layers[index].attention
    if not heads_differ(own, wanted):
        return True
    return own.head_dim % multiple == 0 if part == "o" else part == "v" or own.qk_norm != "all"


def _file_type(types: Types, shapes: Mapping[str, tuple[int, ...]]) -> int:
    """Returns `general.file_type`: the type of most numbers in matrices."""
    from gguf import LlamaFileType

    numbers: Counter[str] = Counter()
    for key, kind in types.items():
        if not is_always_fp32(key):
            numbers[kind.name] += prod(shapes[key])
    most = numbers.most_common(1)[0][0]
    if most == "F32":
        return int(LlamaFileType.ALL_F32)
    names = LlamaFileType.__members__
    return int(names.get(f"MOSTLY_{most}") or names[f"MOSTLY_{most}_S"])  # of K types S, M and L say how many are finer


def _is_experts(key: str) -> bool:
    return "_exps." in key


def _stacked(shape: tuple[int, ...], count: int) -> tuple[int, ...]:
    """Returns the shape (experts, out_features, in_features) of experts whose rows stand in one matrix."""
    return (count, shape[0] // count, shape[1])


def _add(writer: GGUFWriter, key: str, value: Any) -> None:
    """Adds a field, with its type from the value; a bool comes first because it is an int too."""
    match value:
        case bool():
            writer.add_bool(key, value)
        case int():
            writer.add_uint32(key, value)
        case float():
            writer.add_float32(key, value)
        case str():
            writer.add_string(key, value)
        case _:
            writer.add_array(key, list(value))


def _as_held(
    decoder: Decoder, form: Held, types: Types, weights: Iterable[tuple[str, Stored]]
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yields the weights that the file holds, by name, in the order of the shapes of its decoder.

    Those of few bits come as blocks, (out_features, bytes of a row) uint8. All that follows moves whole rows, or whole
    heads of zero bytes, which are zeros.
    """
    from edgeprune.model.quantised import QuantisedWeight

    plain, blocks = set(plain_types().values()), set()
    for key, stored in form.tensors.items():
        if types[key] not in plain:
            blocks.update(stored.names)
    table, is_twice = None, decoder.tie_word_embeddings and not form.decoder.tie_word_embeddings
    for name, weight in _with_filling(form.decoder, decoder.shapes().keys(), weights):
        if isinstance(weight, QuantisedWeight):
            weight = packed(name, weight) if name in blocks else weight.dequantised()
        if name == "embedding" and is_twice:
            table = weight
        # Heads of zeros, the scale of the scores, and the order of rotary pairs.
        weight = filled(decoder, form.decoder, name, weight)
        if form.factor != 1.0 and name.endswith(_scaled(form.decoder)):
            weight = weight.float() * form.factor
        yield name, reordered(form.decoder, name, weight) if form.architecture.interleaved else weight
        del weight  # freed before the next one is made
    if table is not None:
        yield "head", table


def _with_filling(
    held: Decoder, own: Collection[str], weights: Iterable[tuple[str, Stored]]
) -> Iterator[tuple[str, Stored]]:
    """Yields the weights, and zeros in the places of those that the file holds and the model does not have.

    held: the file's decoder; own: the names of the weights, which come in the order of its shapes.
    """
    import torch

    shapes, came = held.shapes(), iter(weights)
    for name, shape in shapes.items():
        if name in own:
            yield next(came)
        elif name != "head":  # a tied table that is written twice
            yield name, torch.zeros(shape)


def _scaled(decoder: Decoder) -> tuple[str, ...]:
    """Returns the ends of the names of the weights that scale the queries: their norm where they have one."""
    attention = decoder.first_attention
    return (".attention.q_norm",) if attention.qk_norm is not None else (".attention.q", ".attention.q_bias")
