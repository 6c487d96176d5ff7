"""The GGUF file of a checkpoint, as llama.cpp runs it: fields, tokenizer, and tensors one after the other.

Whether and how a file can hold the model is decided in metadata.py; blocks.py packs weights of few bits.
"""

from __future__ import annotations

import logging
import os
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from edgeprune.errors import InputError
from edgeprune.model.checkpoint.configuration import read_config
from edgeprune.model.checkpoint.places import stored_stream
from edgeprune.model.checkpoint.safetensors_file import as_stored
from edgeprune.model.decoder import Attention, Decoder
from edgeprune.model.gguf.blocks import BLOCK, block_type, packed
from edgeprune.model.gguf.convert import reordered
from edgeprune.model.gguf.metadata import Held, held
from edgeprune.model.gguf.names import is_always_fp32
from edgeprune.model.gguf.tokenizer_write import tokenizer_fields
from edgeprune.model.model import Model

if TYPE_CHECKING:
    import torch
    from gguf import GGMLQuantizationType, GGUFWriter

    Types = Mapping[str, GGMLQuantizationType]  # by the keys of the file's tensors

QUANTISATION_VERSION = 2
OUTPUTS = (".attention.o", ".mlp.down")  # the ends of the names of the projections that residual_scale multiplies


def check_exportable(model: Model, reduced: bool = False) -> Held:
    """Returns the form in which a GGUF file will hold the model. reduced: its vocabulary will be cut down.

    Raises InputError, before any work, where llama.cpp cannot compute the model or has no pre-tokenizer for its texts.
    """
    return _checked(model, model.name, reduced)[0]


def _checked(model: Model, name: str, reduced: bool = False) -> tuple[Held, dict[str, Any]]:
    """Returns the form of the model in the file, and the fields of its tokenizer. Raises InputError."""
    decoder = model.decoder.with_format(None)
    if any(weight.endswith(OUTPUTS) for weight in model.decoder.weight_formats):
        # Codes stand for the final values, in which the scale is multiplied already.
        decoder = replace(decoder, residual_scale=1.0)
    form = held(decoder, read_config(model.directory))
    return form, tokenizer_fields(model.directory, model.decoder.vocab_size, reduced, name)


def export_gguf(model: Model, path: Path) -> Path:
    """Writes a model of uniform layers as GGUF and returns the path.

    Weights of few bits keep their exact values, in Q8_0, Q4_0 or Q4_1; of those whose blocks cannot hold them, which a
    warning names, fp32 does. The others have the dtype of the checkpoint; norms, biases and routers are fp32. At most
    one layer's tensors are in memory at a time. The file is complete or absent. Raises InputError for a model that
    llama.cpp cannot compute and for a file that cannot be written, NumericalError for a weight that the type cannot
    hold.
    """
    form, tokenizer = _checked(model, path.stem)
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        _write(model, form, tokenizer, part)
        part.replace(path)
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror or error}", "Free some space there.") from None
    finally:
        part.unlink(missing_ok=True)
    return path


def _write(model: Model, form: Held, tokenizer: Mapping[str, Any], path: Path) -> None:
    """Writes the whole file: header, fields, descriptions of the tensors, then their data in the same order."""
    import torch
    from gguf import GGUFWriter
    from gguf.quants import quant_shape_to_byte_shape

    tensors, types = form.tensors, _types(model, form)
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
            if key != "general.architecture":  # which the writer adds itself
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
        dtypes = {kind: dtype for dtype, kind in _plain_types().items()}
        for key, tensor in stored_stream(tensors, _weights(model, form, types)):
            stored = as_stored(key, tensor, dtypes[types[key]]) if types[key] in dtypes else tensor
            writer.write_tensor_data(stored.contiguous().view(torch.uint8).numpy())
    finally:
        writer.close()


def _plain_types() -> dict[torch.dtype, GGMLQuantizationType]:
    """Returns the types of the file that store floats, by their dtype."""
    import torch
    from gguf import GGMLQuantizationType

    return {
        torch.float32: GGMLQuantizationType.F32,
        torch.float16: GGMLQuantizationType.F16,
        torch.bfloat16: GGMLQuantizationType.BF16,
    }


def _types(model: Model, form: Held) -> Types:
    """Returns the type of every tensor of the file; warns of weights of few bits that become fp32."""
    import torch

    formats, plain = model.decoder.weight_formats, _plain_types()
    dtype, types, unpacked = None, {}, []
    for key, stored in form.tensors.items():
        weight_format = formats.get(source := _source(model, stored.names[0]))
        if is_always_fp32(key):
            types[key] = plain[torch.float32]
        elif weight_format is None:
            dtype = dtype or model.weights[source].dtype  # the floats of a checkpoint have one
            types[key] = plain[dtype]
        elif all(_keeps_values(model.decoder, form, *named) for named in zip(stored.names, stored.shapes, strict=True)):
            types[key] = block_type(weight_format)
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


def _source(model: Model, name: str) -> str:
    """Returns the name of the model's weight for one of the file's: a tied head may be written a second time."""
    return "embedding" if name == "head" and name not in model.weights else name


def _keeps_values(decoder: Decoder, form: Held, name: str, shape: tuple[int, ...]) -> bool:
    """Returns whether blocks of the file hold a weight of few bits as it is. shape: in the file."""
    if shape[1] % BLOCK or (form.factor != 1.0 and name.endswith(_scaled(form.decoder))):
        return False
    if ".attention." not in name:
        return True
    # Heads of zeros must fill whole blocks of `o`, and may change the values of q and k.
    index, part = int(name.split(".")[1]), name.rsplit(".", 1)[-1]
    own, wanted = decoder.layers[index].attention, form.decoder.layers[index].attention
    if _heads(own) == _heads(wanted):
        return True
    return own.head_dim % BLOCK == 0 if part == "o" else part == "v" or own.qk_norm != "all"


def _heads(attention: Attention) -> tuple[int, int]:
    return attention.num_attention_heads, attention.num_key_value_heads


def _file_type(types: Types, shapes: Mapping[str, tuple[int, ...]]) -> int:
    """Returns `general.file_type`: the type of most numbers in matrices."""
    from gguf import LlamaFileType

    numbers: Counter[str] = Counter()
    for key, kind in types.items():
        if not is_always_fp32(key):
            numbers[kind.name] += prod(shapes[key])
    most = numbers.most_common(1)[0][0]
    return int(LlamaFileType.ALL_F32 if most == "F32" else LlamaFileType[f"MOSTLY_{most}"])


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


def _weights(model: Model, form: Held, types: Types) -> Iterator[tuple[str, torch.Tensor]]:
    """Returns the weights that the file holds, by name, in the order of the decoder's shapes.

    Those of few bits come as blocks, (out_features, bytes of a row) uint8. All that follows moves whole rows, or whole
    heads of zero bytes, which are zeros.
    """
    plain, blocks = set(_plain_types().values()), set()
    for key, stored in form.tensors.items():
        if types[key] not in plain:
            blocks.update(stored.names)
    for name in form.decoder.shapes():
        source = _source(model, name)
        weight = packed(name, model.quantised[source]) if name in blocks else model.weights[source]
        # Heads of zeros, the scale of the scores, and the order of rotary pairs.
        weight = filled(model.decoder, form.decoder, name, weight)
        if form.factor != 1.0 and name.endswith(_scaled(form.decoder)):
            weight = weight.float() * form.factor
        yield name, reordered(form.decoder, name, weight) if form.architecture.interleaved else weight


def _scaled(decoder: Decoder) -> tuple[str, ...]:
    """Returns the ends of the names of the weights that scale the queries: their norm where they have one."""
    attention = decoder.layers[0].attention
    return (".attention.q_norm",) if attention.qk_norm is not None else (".attention.q", ".attention.q_bias")


def filled(decoder: Decoder, target: Decoder, name: str, weight: torch.Tensor) -> torch.Tensor:
    """Returns a weight, or its blocks as bytes, with the heads of the target; those that the decoder does not have are
    zeros.

    In each group the decoder's own query heads come first, and its own groups come before the new ones. A norm over all
    heads divides by their number, so the projection grows and the norm's weight shrinks by as much.
    """
    # Only the attention has heads; output biases and norms of single heads stay as they are.
    if ".attention." not in name:
        return weight
    index = int(name.split(".")[1])
    own, wanted = decoder.layers[index].attention, target.layers[index].attention
    part = name.rsplit(".", 1)[-1]
    matrix, is_norm = part.removesuffix("_bias").removesuffix("_norm"), part.endswith("_norm")
    if _heads(own) == _heads(wanted) or matrix not in ("q", "k", "v", "o") or part == "o_bias":
        return weight
    if is_norm and own.qk_norm != "all":
        return weight
    # Query heads of a group, or its one key/value head; groups are along the first axis.
    queries = matrix in ("q", "o")
    heads, target_heads = (attention.heads_per_group if queries else 1 for attention in (own, wanted))
    groups, target_groups = own.num_key_value_heads, wanted.num_key_value_heads
    rows = weight.t() if matrix == "o" else weight  # (groups * heads * head_dim, ...)
    shaped = rows.reshape(groups, heads, -1, *rows.shape[1:])  # (groups, heads, head_dim or bytes of a head, ...)
    # (target_groups, target_heads, head_dim, ...)
    padded = shaped.new_zeros(target_groups, target_heads, *shaped.shape[2:])
    padded[:groups, :heads] = shaped
    result = padded.flatten(0, 2)  # (target_groups * target_heads * head_dim, ...)
    # Keep the norm over all heads as it was before.
    if own.qk_norm == "all" and matrix in ("q", "k"):
        growth = ((target_groups * target_heads) / (groups * heads)) ** 0.5
        result = result.float() / growth if is_norm else result.float() * growth
    return (result.t() if matrix == "o" else result).contiguous()
