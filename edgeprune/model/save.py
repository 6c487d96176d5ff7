"""A standard checkpoint, written as its tensors arrive: only the current one is in memory.

It does not know how the tensors were made.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from edgeprune.files import write_text
from edgeprune.model.checkpoint.configuration import config_for, loadable, read_config, with_final_outputs
from edgeprune.model.checkpoint.padding import padded_heads
from edgeprune.model.checkpoint.quantization import (
    check_packable,
    has_embedding_codes,
    own_fields,
    packing_of,
    without_quantization,
)
from edgeprune.model.checkpoint.safetensors_file import Packing, write_weights
from edgeprune.model.checkpoint.values import with_values
from edgeprune.model.decoder import Decoder
from edgeprune.model.gguf.weights import form_in_blocks, is_in_blocks, write_blocks
from edgeprune.model.model import Model
from edgeprune.model.tokens.bpe import read_object
from edgeprune.model.tokens.tokenizer import TOKENIZER_FILES, load_tokenizer
from edgeprune.model.tokens.vocabulary import Vocabulary, reduced_config, write_tokenizer_files

if TYPE_CHECKING:
    import torch

    from edgeprune.model.model import Stored

PICTURE_FILES = ("preprocessor_config.json",)  # how images become tokens


def save_checkpoint(
    decoder: Decoder,
    tensors: Iterable[tuple[str, Stored]],
    source: Model,
    directory: Path,
    vocabulary: Vocabulary | None = None,
    dtype: torch.dtype | None = None,
    packing: Packing | None = None,
) -> None:
    """Writes config, weights, tokenizer and generation config so that `from_pretrained` loads them.

    An image generator has no tokenizer, and LlamaGen's checkpoints keep their own names. tensors: by the names of
    decoder.py, in the order of decoder.shapes(), with codes for those of decoder.weight_formats; floats are stored in
    dtype, by default the source's. packing: of the codes; by default compressed-tensors', which load_model reads.
    Raises ValueError for a wrong name or shape, which is a bug of the caller, NumericalError for a weight that the
    dtype cannot hold, and InputError for formats that a checkpoint of the family cannot hold.

    config.json names the dtype as that of the model, in which readers compute unless they are asked for another. In
    fp32 transformers takes exactly codes times scales for the weights, in 16 bits it rounds the products.

    vocabulary: the tokens to keep of the source's, as many as decoder.vocab_size. Embedding and head still come with a
    row for every token of the source; the rows of the kept tokens are stored, and tokenizer and configuration get the
    new ids. Raises InputError for a tokenizer that cannot be reduced.
    """
    if vocabulary is not None and (
        decoder.vocab_size != vocabulary.size or vocabulary.kept[-1] >= source.decoder.vocab_size
    ):
        raise ValueError(f"the vocabulary of {vocabulary.size} tokens is not that of the decoder, or not of the source")
    dtype = dtype or _dtype_of(source)
    config = without_quantization(read_config(source.directory))
    in_blocks = packing is None and is_in_blocks(decoder)
    if packing is None and decoder.weight_formats:
        config |= own_fields(decoder)
        if not in_blocks:
            check_packable(decoder)
            packing = packing_of(decoder, dtype)
    # The configuration of the decoder as it is stored, which may have more heads than the decoder itself.
    directory.mkdir(parents=True)
    if packing is not None:
        config |= {"quantization_config": packing.config}
    if in_blocks or decoder.weight_formats.keys() - {"embedding"}:
        decoder, config = with_final_outputs(decoder, config)
    stored = loadable(decoder, config)
    config = config_for(decoder, config)
    config.pop("torch_dtype", None)
    config["dtype"] = str(dtype).removeprefix("torch.")
    # New ids and rows where the vocabulary is reduced.
    if vocabulary is not None:
        config = reduced_config(config, vocabulary)
        tensors = _kept_rows(tensors, vocabulary, source.decoder.vocab_size)
    form = form_in_blocks(decoder, config) if in_blocks else None
    # Configuration and tokenizer first, then the weights as they come.
    (directory / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    if vocabulary is None:
        _write_whole_tokenizer(source, directory, config["model_type"])
    else:
        write_tokenizer_files(source.directory, directory, vocabulary)
    if form is not None:
        write_blocks(decoder, tensors, directory, form, dtype, source.name)
        return
    tensors = padded_heads(decoder, stored, with_values(decoder, tensors, directory))
    write_weights(stored, tensors, directory, dtype, packing)


def _dtype_of(model: Model) -> torch.dtype:
    """Returns the dtype of a checkpoint's floats: the embedding's, unless its values are those of codes."""
    import torch

    config = read_config(model.directory)
    if has_embedding_codes(config):
        return getattr(torch, config["dtype"])
    return model.weights["embedding"].dtype


def _kept_rows(
    tensors: Iterable[tuple[str, Stored]], vocabulary: Vocabulary, rows: int
) -> Iterator[tuple[str, Stored]]:
    """Yields the tensors, embedding and head (rows, c) reduced to the rows of the kept tokens."""
    import torch

    from edgeprune.model.quantised import QuantisedWeight

    kept = torch.from_numpy(vocabulary.kept)
    for name, tensor in tensors:
        if name in ("embedding", "head") and tensor.shape[0] == rows:
            tensor = tensor.rows(kept) if isinstance(tensor, QuantisedWeight) else tensor[kept]
        yield name, tensor
        del tensor  # freed before the next one is made


def _write_whole_tokenizer(source: Model, directory: Path, model_type: str) -> None:
    """Copies the source's tokenizer files, and adapts them where the checkpoint's family is another."""
    for name in TOKENIZER_FILES + PICTURE_FILES:
        if (source.directory / name).is_file():
            shutil.copyfile(source.directory / name, directory / name)
    if model_type != source.decoder.family:
        _write_loaded_tokenizer(source, directory)


def _write_loaded_tokenizer(source: Model, directory: Path) -> None:
    """Writes the source's tokenizer as transformers loads it, under a class that does not depend on model_type.

    A `llama` directory may name LlamaTokenizer, which overrides parts of tokenizer.json; a `mistral` directory uses the
    file as it is, and would encode some texts differently.
    """
    backend = getattr(load_tokenizer(source.directory), "backend_tokenizer", None)
    if backend is None:
        return
    backend.save(str(directory / "tokenizer.json"))
    path = directory / "tokenizer_config.json"
    config = read_object(path)
    config["tokenizer_class"] = "PreTrainedTokenizerFast"
    write_text(path, json.dumps(config, indent=2, ensure_ascii=False) + "\n")
