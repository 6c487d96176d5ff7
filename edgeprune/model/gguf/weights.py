"""A model's folder whose weights are one GGUF file: of the formats of ggml, which no other checkpoint holds.

llama.cpp runs the file as it is; config.json and tokenizer beside it are the model's own. Written tensor by tensor, and
read at each access, codes as codes. It does not know how the codes were chosen.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from edgeprune.errors import InputError
from edgeprune.model.checkpoint.configuration import decoder_of, read_config
from edgeprune.model.checkpoint.places import StoredTensor
from edgeprune.model.checkpoint.stored import fingerprint
from edgeprune.model.checkpoint.unread import DO_NOT_MATCH
from edgeprune.model.decoder import Decoder
from edgeprune.model.gguf.blocks import unpacked
from edgeprune.model.gguf.convert import flat, reordered
from edgeprune.model.gguf.export import plain_types, types_of, write_gguf
from edgeprune.model.gguf.file import RESTORE, GgufFile, read_gguf
from edgeprune.model.gguf.metadata import BY_FAMILY, Held, held
from edgeprune.model.gguf.names import ARCHITECTURES
from edgeprune.model.gguf.tokenizer_write import tokenizer_fields
from edgeprune.model.heads import heads_differ, without_filling
from edgeprune.model.model import Model
from edgeprune.precision import WeightFormat

if TYPE_CHECKING:
    import torch

    from edgeprune.model.model import Stored
    from edgeprune.model.quantised import QuantisedWeight

MODEL_FILE = "model.gguf"


def is_in_blocks(decoder: Decoder) -> bool:
    """Returns whether a model has formats of ggml, so that its folder holds a GGUF file."""
    return any(form.storage == "gguf" for form in decoder.weight_formats.values())


def refusal_in_blocks(form: WeightFormat, decoder: Decoder) -> str | None:
    """Returns why no file holds a model in a format of ggml, whichever heads are removed, in words; else None."""
    if decoder.family not in BY_FAMILY:
        return f"llama.cpp has no architecture for the family {decoder.family}"
    architectures = [ARCHITECTURES[name] for name in BY_FAMILY[decoder.family]]
    attention = decoder.layers[0].attention
    if attention is None or not all(architecture.whole for architecture in architectures):
        return None
    # Heads of zeros stand for those that are removed.
    filling = f"llama.cpp's {architectures[0].name} has heads of zeros for those that are removed"
    if attention.qk_norm == "all":
        return f"{filling}, and a norm over all heads, which changes weights of few bits"
    if attention.head_dim % form.multiple:
        return f"{filling}, and blocks of {form.multiple} inputs do not divide those of {attention.head_dim}"
    return None


def check_in_blocks(model: Model) -> None:
    """Raises InputError for a model that no file holds in formats of ggml."""
    _check_unchanged(model.decoder, held(model.decoder.with_format(None), read_config(model.directory)))


def form_in_blocks(decoder: Decoder, config: Mapping[str, Any]) -> Held:
    """Returns the form in which the file of a folder holds a decoder, from which it is read back exactly.

    config: the folder's config.json, which describes the same model. Raises InputError where llama.cpp cannot compute
    the model, or the file would hold other numbers than those of its weights.
    """
    form = held(decoder_of(dict(config)), config)
    _check_unchanged(decoder, form)
    if any(other.storage != "gguf" for other in decoder.weight_formats.values()):
        names = ", ".join(dict.fromkeys(other.name for other in decoder.weight_formats.values()))
        raise InputError(f"no file holds the weight formats {names} together", "Use those of one kind.")
    return form


def _check_unchanged(decoder: Decoder, form: Held) -> None:
    """Raises InputError where a file holds other numbers than those of a model's weights."""
    attention = decoder.first_attention
    is_changed = attention.qk_norm == "all" and heads_differ(attention, form.decoder.first_attention)
    if is_changed or form.factor != 1.0:
        what = "a norm over more heads" if is_changed else "another scale of the scores"
        raise InputError(
            f"a GGUF file holds {decoder.family} with {what}, which changes weights of few bits", "Use --weights float."
        )


def write_blocks(
    decoder: Decoder, weights: Iterable[tuple[str, Stored]], folder: Path, form: Held, dtype: torch.dtype, name: str
) -> None:
    """Writes the file of a folder that has its tokenizer already.

    weights: in the order of decoder.shapes(); form: by form_in_blocks; dtype: of the matrices that are floats; name: of
    the model. Raises InputError for a tokenizer that the file cannot describe, and as export_gguf.
    """
    tokenizer = tokenizer_fields(folder, decoder.vocab_size, name=name)
    write_gguf(folder / MODEL_FILE, decoder, form, tokenizer, dtype, weights)


def weights_in_blocks(folder: Path, decoder: Decoder, config: Mapping[str, Any]) -> tuple[GgufWeights, str]:
    """Returns the weights of a folder's GGUF file, none of which is read, and the model's fingerprint.

    decoder: with the formats that config.json names. Raises InputError where the file is missing or damaged, or does
    not hold what config.json describes.
    """
    path = folder / MODEL_FILE
    if not path.is_file():
        raise InputError(f"{folder} has no {MODEL_FILE}, which its config.json asks for", RESTORE)
    source, form = read_gguf(path), form_in_blocks(decoder, config)
    _check(path, source, decoder, form)
    return GgufWeights(source, decoder, form), fingerprint(folder / "config.json", {path})


def _check(path: Path, source: GgufFile, decoder: Decoder, form: Held) -> None:
    """Raises InputError where the file has other tensors than the form says."""
    import torch

    plain = set(plain_types().values())
    tensors, types = form.tensors, types_of(decoder, form, torch.float32)
    if odd := sorted(source.tensors.keys() ^ (tensors.keys() | form.factors.keys())):
        raise InputError(f"{path} and config.json differ in the tensor {odd[0]}", DO_NOT_MATCH)
    for key, place in tensors.items():
        found, expected = source.tensors[key], types[key]
        is_alike = found.type in plain if expected in plain else found.type == expected
        if not is_alike or flat(found.shape) != place.shape:
            raise InputError(
                f"{path}: {key} is of type {found.type.name} and shape {flat(found.shape)}, but config.json asks for "
                f"{expected.name} and {place.shape}",
                DO_NOT_MATCH,
            )


class GgufWeights(Mapping[str, "torch.Tensor"]):
    """Tensors by the names of decoder.py, read from a folder's GGUF file at each access.

    What has a format is fp32; `quantised` has its codes.
    """

    def __init__(self, source: GgufFile, decoder: Decoder, form: Held) -> None:
        self._source, self._decoder, self._form = source, decoder, form
        self._names = tuple(decoder.shapes())
        self._places: dict[str, StoredTensor] = {name: place for place in form.tensors.values() for name in place.names}
        self.quantised = GgufCodes(self, decoder)

    def __getitem__(self, name: str) -> torch.Tensor:
        if name in self.quantised:
            return self.quantised[name].dequantised()
        return self.rows(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def __contains__(self, name: object) -> bool:
        return name in self._names

    def rows(self, name: str) -> torch.Tensor:
        """Returns a weight as it is stored: floats, or the blocks of its rows (out_features, bytes) uint8."""
        import torch

        place = self._places[name]
        tensor = self._source.tensors[place.key]
        index = place.names.index(name)
        start = sum(shape[0] for shape in place.shapes[:index])
        stored = tensor.data.reshape(-1, tensor.data.shape[-1])  # (rows, bytes), one row of a vector
        dtype = {kind: plain for plain, kind in plain_types().items()}.get(tensor.type)
        rows = slice(start, start + place.shapes[index][0])
        if len(tensor.shape) == 1:
            weight = torch.from_numpy(np.require(stored[0], None, ["C", "W"])).view(dtype)[rows]
        else:
            weight = torch.from_numpy(np.require(stored[rows], None, ["C", "W"]))
            weight = weight if dtype is None else weight.view(dtype)
        if self._form.architecture.interleaved:
            weight = reordered(self._form.decoder, name, weight, inverse=True)
        return without_filling(self._decoder, self._form.decoder, name, weight)


class GgufCodes(Mapping[str, "QuantisedWeight"]):
    """The weights that have a format, by the names of decoder.py, read at each access."""

    def __init__(self, weights: GgufWeights, decoder: Decoder) -> None:
        self._weights, self._formats = weights, decoder.weight_formats

    def __getitem__(self, name: str) -> QuantisedWeight:
        return unpacked(self._formats[name], self._weights.rows(name))

    def __iter__(self) -> Iterator[str]:
        return iter(self._formats)

    def __len__(self) -> int:
        return len(self._formats)

    def __contains__(self, name: object) -> bool:
        return name in self._formats
