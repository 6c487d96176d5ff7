"""A standard checkpoint, written as its tensors arrive: nothing but the current one is held."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Iterator
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from edgeprune.errors import NumericalError
from edgeprune.model.checkpoint.configuration import checkpoint_tensors, config_for, loadable
from edgeprune.model.decoder import Decoder
from edgeprune.model.load import load_tokenizer, read_config
from edgeprune.model.model import Model
from edgeprune.model.checkpoint.padding import padded_heads
from edgeprune.model.checkpoint.places import stored_stream
from edgeprune.model.tokens.vocabulary import Vocabulary, reduced_config, write_tokenizer_files

if TYPE_CHECKING:
    import torch

SHARD_BYTES = 5 * 10**9
TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "tokenizer.model",
    "vocab.json", "merges.txt", "chat_template.jinja", "chat_template.json", "generation_config.json",
)  # fmt: skip
PICTURE_FILES = ("preprocessor_config.json",)  # how pictures become tokens
NAMES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}


def save_checkpoint(
    decoder: Decoder, tensors: Iterable[tuple[str, torch.Tensor]], source: Model, directory: Path,
    vocabulary: Vocabulary | None = None, dtype: torch.dtype | None = None,
) -> None:  # fmt: skip
    """Write config, weights, tokenizer and generation config so that `from_pretrained` loads them; an image generator
    has no tokenizer, and LlamaGen's is by its own names.

    tensors: by the names of decoder.py, in the order of decoder.shapes(); stored in dtype, by default that
    of the source's embedding. A wrong name or shape is a bug of the caller: ValueError. Raises NumericalError
    for a weight that this dtype cannot hold.

    vocabulary: the tokens to keep of the source's, as many as decoder.vocab_size. Embedding and head still
    come with a row for every token of the source; those kept are stored, tokenizer and configuration get
    the new ids. Raises InputError for a tokenizer that cannot be reduced.
    """
    if vocabulary is not None and (
        decoder.vocab_size != vocabulary.size or vocabulary.kept[-1] >= source.decoder.vocab_size
    ):
        raise ValueError(f"the vocabulary of {vocabulary.size} tokens is not that of the decoder, or not of the source")
    directory.mkdir(parents=True)
    dtype = dtype or source.weights["embedding"].dtype
    config = read_config(source.directory)
    stored = loadable(decoder, config)
    config = config_for(decoder, config)
    config.pop("torch_dtype", None)
    config["dtype"] = str(dtype).removeprefix("torch.")
    if vocabulary is not None:
        config = reduced_config(config, vocabulary)
        tensors = _kept_rows(tensors, vocabulary, source.decoder.vocab_size)
    (directory / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    if vocabulary is None:
        _write_whole_tokenizer(source, directory, config["model_type"])
    else:
        write_tokenizer_files(source.directory, directory, vocabulary)
    write_weights(stored, padded_heads(decoder, stored, tensors), directory, dtype)


def _kept_rows(
    tensors: Iterable[tuple[str, torch.Tensor]], vocabulary: Vocabulary, rows: int
) -> Iterator[tuple[str, torch.Tensor]]:
    import torch

    kept = torch.from_numpy(vocabulary.kept)
    for name, tensor in tensors:
        yield name, tensor[kept] if name in ("embedding", "head") and len(tensor) == rows else tensor


def _write_whole_tokenizer(source: Model, directory: Path, model_type: str) -> None:
    for name in TOKENIZER_FILES + PICTURE_FILES:
        if (source.directory / name).is_file():
            shutil.copyfile(source.directory / name, directory / name)
    if model_type != source.decoder.family:
        _write_loaded_tokenizer(source, directory)


def _write_loaded_tokenizer(source: Model, directory: Path) -> None:
    """Write the source's tokenizer as transformers loads it, under a class that no model_type changes.

    A `llama` directory may name LlamaTokenizer, which overrides parts of tokenizer.json; a `mistral`
    directory takes the file as it is, and would encode some texts differently.
    """
    backend = getattr(load_tokenizer(source.directory), "backend_tokenizer", None)
    if backend is None:
        return
    backend.save(str(directory / "tokenizer.json"))
    path = directory / "tokenizer_config.json"
    config = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    config["tokenizer_class"] = "PreTrainedTokenizerFast"
    path.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def write_weights(
    decoder: Decoder, weights: Iterable[tuple[str, torch.Tensor]], directory: Path, dtype: torch.dtype
) -> None:
    """Weights in the order of decoder.shapes() -> the family's tensors in safetensors files of at most SHARD_BYTES,
    with an index where there are several."""
    places = checkpoint_tensors(decoder)
    shapes, tensors = {key: place.shape for key, place in places.items()}, stored_stream(places, weights)
    size = dtype.itemsize
    shards: list[list[str]] = [[]]
    used = 0
    for name, shape in shapes.items():
        if shards[-1] and used + size * prod(shape) > SHARD_BYTES:
            shards.append([])
            used = 0
        shards[-1].append(name)
        used += size * prod(shape)
    stream = iter(tensors)
    weight_map = {}
    for number, shard in enumerate(shards, 1):
        file = "model.safetensors" if len(shards) == 1 else f"model-{number:05}-of-{len(shards):05}.safetensors"
        weight_map |= dict.fromkeys(shard, file)
        with (directory / file).open("wb") as out:
            _write_header(out, {name: shapes[name] for name in shard}, dtype)
            for name in shard:
                given, tensor = next(stream, ("nothing", None))
                if given != name or tuple(tensor.shape) != shapes[name]:
                    raise ValueError(f"expected {name} {shapes[name]}, got {given}")
                out.write(_bytes(as_stored(name, tensor, dtype)))
    if (extra := next(stream, None)) is not None:
        raise ValueError(f"{extra[0]} is no weight of this model")
    if len(shards) > 1:
        total = size * sum(map(prod, shapes.values()))
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (directory / "model.safetensors.index.json").write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")


def as_stored(name: str, tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The tensor in dtype. Raises NumericalError where a finite value becomes infinite, as beyond fp16's 65504."""
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


def _write_header(out: BinaryIO, shapes: dict[str, tuple[int, ...]], dtype: torch.dtype) -> None:
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in shapes.items():
        start, end = end, end + dtype.itemsize * prod(shape)
        header[name] = {"dtype": NAMES[str(dtype).removeprefix("torch.")], "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    out.write(len(text).to_bytes(8, "little") + text)


def _bytes(tensor: torch.Tensor) -> memoryview:
    import torch

    return memoryview(tensor.contiguous().view(torch.uint8).numpy()) if tensor.numel() else memoryview(b"")
