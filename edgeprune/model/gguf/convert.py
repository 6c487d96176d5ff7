"""GGUF file -> standard checkpoint directory, converted once and cached by the file's sha256.

Tensors are dequantised one at a time; the tokenizer is built from the file's own metadata.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from edgeprune.cache import cache_folder
from edgeprune.errors import InputError
from edgeprune.model.checkpoint.configuration import decoder_of
from edgeprune.model.checkpoint.places import StoredTensor as Place
from edgeprune.model.checkpoint.places import stored_tensors
from edgeprune.model.checkpoint.safetensors_file import write_weights
from edgeprune.model.decoder import Decoder
from edgeprune.model.gguf.config import config_of
from edgeprune.model.gguf.file import RESTORE, GgufFile, GgufTensor, Metadata, read_gguf
from edgeprune.model.gguf.names import ROPE_TENSORS, Architecture, has_fused_qkv, is_always_fp32, places_of
from edgeprune.model.gguf.tokenizer_read import write_tokenizer

if TYPE_CHECKING:
    import torch

FORMAT = 4  # of the converted directory; a new one converts again
PLAIN = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}


def converted(path: Path) -> Path:
    """The directory with the file's checkpoint, tokenizer and configuration.

    Raises InputError for a file that is broken or not supported, or a cache that cannot be written.
    """
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    folder = cache_folder() / "models" / f"{digest[:32]}-{FORMAT}"
    if folder.is_dir():
        return folder
    source = read_gguf(path)
    part = folder.with_name(f"{folder.name}.{os.getpid()}.part")
    try:
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
        _convert(source, path, part)
        _publish(part, folder)
    except OSError as error:
        raise InputError(
            f"cannot convert {path.name} into {folder.parent}: {error.strerror or error}",
            "Free some space there, or set EDGEPRUNE_CACHE to another folder.",
        ) from None
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return folder


def decoder_of_gguf(path: Path) -> Decoder:
    """The architecture that a file's metadata describes; nothing is converted. Raises InputError."""
    return decoder_of(config_of(metadata_of(read_gguf(path)), path))


def metadata_of(source: GgufFile) -> Metadata:
    factors = {name: source.tensors[name].values() for name in ROPE_TENSORS if name in source.tensors}
    return Metadata(source.fields, source.tensors.keys(), factors)


def _publish(part: Path, folder: Path) -> None:
    try:
        part.rename(folder)
    except OSError:
        if not folder.is_dir():  # else another process was faster
            raise


def _convert(source: GgufFile, path: Path, folder: Path) -> None:
    metadata = metadata_of(source)
    config = config_of(metadata, path)
    decoder, architecture = decoder_of(config), metadata.architecture
    places = stored_tensors(decoder, places_of(architecture, decoder, has_fused_qkv(source.tensors)))
    _check(source, places, config["model_type"], path)
    dtype = _dtype([source.tensors[name] for name in places if not is_always_fp32(name)])
    config["dtype"] = str(dtype).removeprefix("torch.")
    write_tokenizer(source.fields, decoder.max_position_embeddings, folder)
    write_weights(decoder, _weights(decoder, architecture, places, source), folder, dtype)
    (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    generation = json.dumps(_generation(source.fields, config), indent=2, sort_keys=True) + "\n"
    (folder / "generation_config.json").write_text(generation, encoding="utf-8")


def _check(source: GgufFile, places: dict[str, Place], family: str, path: Path) -> None:
    """Raises InputError for a tensor that is missing, superfluous or of a type that cannot be dequantised."""
    for name, place in places.items():
        found = source.tensors.get(name)
        if found is None or _flat(found.shape) != place.shape:
            raise InputError(f"{path} has no tensor {name} of shape {place.shape}", RESTORE)
        found.rows(0, 1)
    if unknown := source.tensors.keys() - places.keys() - set(ROPE_TENSORS):
        raise InputError(
            f"{path} has the tensor {min(unknown)}, which a model of the family {family} has not",
            "Give the original Hugging Face directory.",
        )


def _flat(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Stacked experts, one after the other."""
    return (shape[0] * shape[1], shape[2]) if len(shape) == 3 else shape


def _generation(fields: dict[str, Any], config: dict[str, Any]) -> dict[str, Any]:
    """Special tokens; a chat model may end its turn with another token than its text."""
    ids = {n: config[n] for n in ("bos_token_id", "eos_token_id", "pad_token_id") if config.get(n) is not None}
    turn = fields.get("tokenizer.ggml.eot_token_id")
    if turn is not None and turn != ids.get("eos_token_id"):
        ids["eos_token_id"] = [*([ids["eos_token_id"]] if "eos_token_id" in ids else []), int(turn)]
    return ids


def _dtype(tensors: list[GgufTensor]) -> torch.dtype:
    """The type of the matrices where all have the same plain one, else fp32; norms are fp32 in every file."""
    import torch

    types = {tensor.type.name for tensor in tensors}
    return getattr(torch, PLAIN.get(types.pop(), "float32")) if len(types) == 1 else torch.float32


def _weights(
    decoder: Decoder, architecture: Architecture, places: dict[str, Place], source: GgufFile
) -> Iterator[tuple[str, torch.Tensor]]:
    import torch

    stands = {name: place for place in places.values() for name in place.names}
    for name in decoder.shapes():
        place = stands[name]
        which = place.names.index(name)
        start = sum(shape[0] for shape in place.shapes[:which])
        values = source.tensors[place.key].rows(start, start + place.shapes[which][0])
        weight = torch.from_numpy(np.require(values, np.float32, ["C", "W"]))
        if place.factor != 1.0:
            weight *= place.factor
        yield name, reordered(decoder, name, weight, inverse=True) if architecture.interleaved else weight


def reordered(decoder: Decoder, name: str, weight: torch.Tensor, inverse: bool = False) -> torch.Tensor:
    """q and k, or their biases, with the halves of every rotary pair side by side, as llama.cpp's converter does."""
    part = name.rsplit(".", 1)[-1].removesuffix("_bias")
    if ".attention." not in name or part not in ("q", "k") or name.endswith("_norm"):
        return weight
    head_dim = decoder.layers[int(name.split(".")[1])].attention.head_dim
    heads = weight.unflatten(0, (-1, head_dim // 2, 2) if inverse else (-1, 2, head_dim // 2))
    return heads.transpose(1, 2).flatten(0, 2)
