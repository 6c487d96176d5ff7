"""The GGUF file of a checkpoint, as llama.cpp runs it: fields, tokenizer, and tensors one after the other.

Whether and how a file can hold the model is decided in metadata.py.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from edgeprune.errors import InputError
from edgeprune.model.checkpoint.configuration import read_config
from edgeprune.model.checkpoint.places import stored_stream
from edgeprune.model.checkpoint.safetensors_file import as_stored
from edgeprune.model.decoder import Decoder
from edgeprune.model.gguf.convert import reordered
from edgeprune.model.gguf.metadata import Held, held
from edgeprune.model.gguf.names import is_always_fp32
from edgeprune.model.gguf.tokenizer_write import tokenizer_fields
from edgeprune.model.model import Model

if TYPE_CHECKING:
    import torch
    from gguf import GGUFWriter

FILE_TYPES = {"float32": 0, "float16": 1, "bfloat16": 32}  # `general.file_type` of llama.cpp
QUANTISATION_VERSION = 2


def check_exportable(model: Model, reduced: bool = False) -> Held:
    """Returns the form in which a GGUF file will hold the model. reduced: its vocabulary will be cut down.

    Raises InputError, before any work, where llama.cpp cannot compute the model or has no pre-tokenizer for its texts.
    """
    return _checked(model, model.name, reduced)[0]


def _checked(model: Model, name: str, reduced: bool = False) -> tuple[Held, dict[str, Any]]:
    """Returns the form of the model in the file, and the fields of its tokenizer. Raises InputError."""
    form = held(model.decoder, read_config(model.directory))
    return form, tokenizer_fields(model.directory, model.decoder.vocab_size, reduced, name)


def export_gguf(model: Model, path: Path) -> Path:
    """Writes a model of uniform layers as GGUF and returns the path.

    Tensors have the dtype of the checkpoint; norms, biases and routers are fp32. At most one layer's tensors are in
    memory at a time. The file is complete or absent. Raises InputError for a model that llama.cpp cannot compute and
    for a file that cannot be written, NumericalError for a weight that the dtype cannot hold.
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
    from gguf import GGMLQuantizationType, GGUFWriter

    dtype = model.weights["embedding"].dtype
    types = {
        torch.float32: GGMLQuantizationType.F32,
        torch.float16: GGMLQuantizationType.F16,
        torch.bfloat16: GGMLQuantizationType.BF16,
    }
    writer = GGUFWriter(path, form.architecture.name)
    try:
        # Fields: of the file, of the model, of the tokenizer and with it the name.
        general = {
            "general.type": "model",
            "general.quantization_version": QUANTISATION_VERSION,
            "general.file_type": FILE_TYPES[str(dtype).removeprefix("torch.")],
        }
        for key, value in {**general, **form.fields, **tokenizer}.items():
            if key != "general.architecture":  # which the writer adds itself
                _add(writer, key, value)
        # Descriptions of all tensors, rope factors first.
        for key, values in form.factors.items():
            writer.add_tensor_info(key, values.shape, values.dtype, values.nbytes)
        tensors = form.tensors
        for key, stored in tensors.items():
            as_dtype = torch.float32 if is_always_fp32(key) else dtype
            shape = _stacked(stored.shape, len(stored.names)) if _is_experts(key) else stored.shape
            writer.add_tensor_info(
                key, shape, np.dtype(np.float32), as_dtype.itemsize * int(np.prod(shape)), types[as_dtype]
            )
        # The data, tensor by tensor; weights are read when their turn comes.
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for values in form.factors.values():
            writer.write_tensor_data(values)
        for key, tensor in stored_stream(tensors, _weights(model, form)):
            stored = as_stored(key, tensor, torch.float32 if is_always_fp32(key) else dtype)
            writer.write_tensor_data(stored.contiguous().view(torch.uint8).numpy())
    finally:
        writer.close()


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


def _weights(model: Model, form: Held) -> Iterator[tuple[str, torch.Tensor]]:
    """Returns the weights that the file holds, by name, in the order of the decoder's shapes."""
    for name in form.decoder.shapes():
        # A tied head is written from the embedding where the architecture needs one of its own.
        weight = model.weights["embedding" if name == "head" and name not in model.weights else name]
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
    """Returns a weight with the heads of the target; those that the decoder does not have are zeros.

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
    if own == wanted or matrix not in ("q", "k", "v", "o") or part == "o_bias" or (is_norm and own.qk_norm != "all"):
        return weight
    # Query heads of a group, or its one key/value head; groups are along the first axis.
    queries = matrix in ("q", "o")
    heads, target_heads = (attention.heads_per_group if queries else 1 for attention in (own, wanted))
    groups, target_groups = own.num_key_value_heads, wanted.num_key_value_heads
    rows = weight.t() if matrix == "o" else weight  # (groups * heads * head_dim, ...)
    shaped = rows.reshape(groups, heads, own.head_dim, *rows.shape[1:])  # (groups, heads, head_dim, ...)
    # (target_groups, target_heads, head_dim, ...)
    padded = shaped.new_zeros(target_groups, target_heads, *shaped.shape[2:])
    padded[:groups, :heads] = shaped
    result = padded.flatten(0, 2)  # (target_groups * target_heads * head_dim, ...)
    # Keep the norm over all heads as it was before.
    if own.qk_norm == "all" and matrix in ("q", "k"):
        growth = ((target_groups * target_heads) / (groups * heads)) ** 0.5
        result = result.float() / growth if is_norm else result.float() * growth
    return (result.t() if matrix == "o" else result).contiguous()
