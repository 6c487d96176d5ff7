"""A checkpoint -> one GGUF file that llama.cpp runs: fields, tokenizer, and tensors one after the other."""

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
    """How the file will hold the model. Raises InputError, before any work, where llama.cpp cannot compute it or
    has no pre-tokenizer for its texts. reduced: its vocabulary will be cut down."""
    return _checked(model, reduced)[0]


def _checked(model: Model, reduced: bool = False) -> tuple[Held, dict[str, Any]]:
    found = held(model.decoder, read_config(model.directory))
    return found, tokenizer_fields(model.directory, model.decoder.vocab_size, reduced)


def export_gguf(model: Model, path: Path) -> Path:
    """Write a model of uniform layers as GGUF, in the dtype of its checkpoint; norms, biases and routers are fp32.

    At most one layer's tensors are held at a time. The file is complete or absent. Returns path. Raises InputError
    for a model that llama.cpp cannot compute and for a file that cannot be written, NumericalError for a weight
    that the dtype cannot hold.
    """
    found, tokenizer = _checked(model)
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        _write(model, found, tokenizer, part, path.stem)
        part.replace(path)
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror or error}", "Free some space there.") from None
    finally:
        part.unlink(missing_ok=True)
    return path


def _write(model: Model, found: Held, tokenizer: Mapping[str, Any], path: Path, name: str) -> None:
    import torch
    from gguf import GGMLQuantizationType, GGUFWriter

    dtype = model.weights["embedding"].dtype
    types = {
        torch.float32: GGMLQuantizationType.F32,
        torch.float16: GGMLQuantizationType.F16,
        torch.bfloat16: GGMLQuantizationType.BF16,
    }
    writer = GGUFWriter(path, found.architecture.name)
    try:
        general = {
            "general.name": name,
            "general.type": "model",
            "general.quantization_version": QUANTISATION_VERSION,
            "general.file_type": FILE_TYPES[str(dtype).removeprefix("torch.")],
        }
        for key, value in {**general, **found.fields, **tokenizer}.items():
            if key != "general.architecture":  # the writer says it
                _add(writer, key, value)
        for key, values in found.factors.items():
            writer.add_tensor_info(key, values.shape, values.dtype, values.nbytes)
        tensors = found.tensors
        for key, stored in tensors.items():
            as_dtype = torch.float32 if is_always_fp32(key) else dtype
            shape = _stacked(stored.shape, len(stored.names)) if _is_experts(key) else stored.shape
            writer.add_tensor_info(
                key, shape, np.dtype(np.float32), as_dtype.itemsize * int(np.prod(shape)), types[as_dtype]
            )
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for values in found.factors.values():
            writer.write_tensor_data(values)
        for key, tensor in stored_stream(tensors, _weights(model, found)):
            stored = as_stored(key, tensor, torch.float32 if is_always_fp32(key) else dtype)
            writer.write_tensor_data(stored.contiguous().view(torch.uint8).numpy())
    finally:
        writer.close()


def _is_experts(key: str) -> bool:
    return "_exps." in key


def _stacked(shape: tuple[int, ...], count: int) -> tuple[int, ...]:
    return (count, shape[0] // count, shape[1])


def _add(writer: GGUFWriter, key: str, value: Any) -> None:
    """bool before int, whose kind it is; arrays of the kind of their values."""
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


def _weights(model: Model, found: Held) -> Iterator[tuple[str, torch.Tensor]]:
    """The weights that the file holds, by their places, in the order of the decoder."""
    for name in found.decoder.shapes():
        weight = model.weights["embedding" if name == "head" and name not in model.weights else name]
        weight = filled(model.decoder, found.decoder, name, weight)
        if found.factor != 1.0 and name.endswith(_scaled(found.decoder)):
            weight = weight.float() * found.factor
        yield name, reordered(found.decoder, name, weight) if found.architecture.interleaved else weight


def _scaled(decoder: Decoder) -> tuple[str, ...]:
    """The weights that make the queries: their norm's, where they have one."""
    attention = decoder.layers[0].attention
    return (".attention.q_norm",) if attention.qk_norm is not None else (".attention.q", ".attention.q_bias")


def filled(decoder: Decoder, target: Decoder, name: str, weight: torch.Tensor) -> torch.Tensor:
    """A weight with the target's heads, zeros where the decoder has none; of queries each group's own come first.

    A norm over all heads divides by their number: the projection grows and the norm's weight shrinks by as much.
    """
    if ".attention." not in name:
        return weight
    index = int(name.split(".")[1])
    own, wanted = decoder.layers[index].attention, target.layers[index].attention
    part = name.rsplit(".", 1)[-1]
    what, is_norm = part.removesuffix("_bias").removesuffix("_norm"), part.endswith("_norm")
    if own == wanted or what not in ("q", "k", "v", "o") or part == "o_bias" or (is_norm and own.qk_norm != "all"):
        return weight
    queries = what in ("q", "o")
    heads, more = (attention.heads_per_group if queries else 1 for attention in (own, wanted))
    groups, total = own.num_key_value_heads, wanted.num_key_value_heads
    rows = weight.t() if what == "o" else weight
    shaped = rows.reshape(groups, heads, own.head_dim, *rows.shape[1:])
    padded = shaped.new_zeros(total, more, *shaped.shape[2:])
    padded[:groups, :heads] = shaped
    result = padded.flatten(0, 2)
    if own.qk_norm == "all" and what in ("q", "k"):
        growth = ((total * more) / (groups * heads)) ** 0.5
        result = result.float() / growth if is_norm else result.float() * growth
    return (result.t() if what == "o" else result).contiguous()
