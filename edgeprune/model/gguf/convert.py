"""A standard checkpoint directory from a GGUF file, converted once and cached under the file's sha256.

Tensors are dequantised one at a time; the tokenizer is built from the file's own metadata.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from edgeprune.cache import cache_folder, cached_folder
from edgeprune.errors import InputError
from edgeprune.files import printable
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

FORMAT = 5  # of the converted directory; a new one converts again
PLAIN = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}


def converted(path: Path) -> Path:
    """Returns the directory with the checkpoint, tokenizer and configuration of a GGUF file, converted on first use.

    Raises InputError for a file that is broken or not supported, and where there is no room to convert it.
    """
    # The folder is named by the file's content.
    source = read_gguf(path)
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    folder = cache_folder() / "models" / f"{digest[:32]}-{FORMAT}"
    return cached_folder(folder, lambda part: _convert(source, path, part))


def config_of_gguf(path: Path) -> dict[str, Any]:
    """Returns the config.json that a file's metadata describes, without converting anything. Raises InputError."""
    return config_of(metadata_of(read_gguf(path)), path)


def metadata_of(source: GgufFile) -> Metadata:
    """Returns the metadata of a file that was read, with its rope factors dequantised."""
    factors = {name: source.tensors[name].values() for name in ROPE_TENSORS if name in source.tensors}
    return Metadata(source.fields, source.tensors.keys(), factors)


def _convert(source: GgufFile, path: Path, folder: Path) -> None:
    """Writes tokenizer, weights, config.json and generation_config.json into a folder. Raises InputError."""
    # Check that the file holds exactly the tensors of its architecture.
    metadata = metadata_of(source)
    config = config_of(metadata, path)
    decoder, architecture = decoder_of(config), metadata.architecture
    places = stored_tensors(decoder, places_of(architecture, decoder, has_fused_qkv(source.tensors)))
    _check(source, places, config["model_type"], path)
    # Then write everything.
    dtype = _dtype([source.tensors[name] for name in places if not is_always_fp32(name)])
    config["dtype"] = str(dtype).removeprefix("torch.")
    write_tokenizer(source.fields, decoder.max_position_embeddings, folder)
    write_weights(decoder, _weights(decoder, architecture, places, source), folder, dtype)
    (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    generation = json.dumps(_generation(source.fields, config), indent=2, sort_keys=True) + "\n"
    (folder / "generation_config.json").write_text(generation, encoding="utf-8")


def _check(source: GgufFile, places: dict[str, Place], family: str, path: Path) -> None:
    """Raises InputError for a tensor that is missing, unexpected or of a type that cannot be dequantised."""
    for name, place in places.items():
        tensor = source.tensors.get(name)
        if tensor is None or flat(tensor.shape) != place.shape:
            raise InputError(f"{path} has no tensor {name} of shape {place.shape}", RESTORE)
        tensor.rows(0, 1)
    if unknown := source.tensors.keys() - places.keys() - set(ROPE_TENSORS):
        raise InputError(
            f"{path} has the tensor {printable(min(unknown), 60)}, which a model of the family {family} does not have",
            "Give the original Hugging Face directory.",
        )


def flat(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Returns the shape of stacked experts as one matrix, (experts * out_features, in_features)."""
    return (shape[0] * shape[1], shape[2]) if len(shape) == 3 else shape


def _generation(fields: dict[str, Any], config: dict[str, Any]) -> dict[str, Any]:
    """Returns the special tokens for generation; a chat model may end its turn with another token than its text."""
    names = ("bos_token_id", "eos_token_id", "pad_token_id")
    ids = {name: config[name] for name in names if config.get(name) is not None}
    turn = fields.get("tokenizer.ggml.eot_token_id")
    if turn is not None and type(turn) is not int:
        raise InputError(f"tokenizer.ggml.eot_token_id {printable(repr(turn), 60)} is no token id", RESTORE)
    if turn is not None and turn != ids.get("eos_token_id"):
        ids["eos_token_id"] = [*([ids["eos_token_id"]] if "eos_token_id" in ids else []), turn]
    return ids


def _dtype(tensors: list[GgufTensor]) -> torch.dtype:
    """Returns the dtype of the matrices where all have the same plain one, else fp32; norms are fp32 in every file."""
    import torch

    types = {tensor.type.name for tensor in tensors}
    return getattr(torch, PLAIN.get(types.pop(), "float32")) if len(types) == 1 else torch.float32


def _weights(
    decoder: Decoder, architecture: Architecture, places: dict[str, Place], source: GgufFile
) -> Iterator[tuple[str, torch.Tensor]]:
    """Returns the weights of the decoder by name, each dequantised when its turn comes."""
    import torch

    place_of = {name: place for place in places.values() for name in place.names}
    for name in decoder.shapes():
        place = place_of[name]
        # The rows of this weight among those that share its tensor.
        index = place.names.index(name)
        start = sum(shape[0] for shape in place.shapes[:index])
        values = source.tensors[place.key].rows(start, start + place.shapes[index][0])  # (out_features, in_features)
        weight = torch.from_numpy(np.require(values, np.float32, ["C", "W"]))
        if place.factor != 1.0:
            weight *= place.factor
        yield name, reordered(decoder, name, weight, inverse=True) if architecture.interleaved else weight


def reordered(decoder: Decoder, name: str, weight: torch.Tensor, inverse: bool = False) -> torch.Tensor:
    """Returns q and k, or their biases, with the halves of every rotary pair side by side; other weights unchanged.

    This is the order of llama.cpp's converter. inverse: from that order back to the one of decoder.py.
    """
    part = name.rsplit(".", 1)[-1].removesuffix("_bias")
    if ".attention." not in name or part not in ("q", "k") or name.endswith("_norm"):
        return weight
    head_dim = decoder.layers[int(name.split(".")[1])].attention.head_dim
    # (heads * head_dim, ...) -> (heads, 2, head_dim / 2, ...), or (heads, head_dim / 2, 2, ...) for the inverse
    heads = weight.unflatten(0, (-1, head_dim // 2, 2) if inverse else (-1, 2, head_dim // 2))
    return heads.transpose(1, 2).flatten(0, 2)  # (heads * head_dim, ...)
