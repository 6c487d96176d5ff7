"""The weights of a checkpoint's files: their headers checked against a decoder, the values read at each access.

It does not know where the files came from.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from edgeprune.errors import InputError
from edgeprune.files import is_pointer, pointer_error, printable, read_json
from edgeprune.model.checkpoint.configuration import checkpoint_tensors, valued_formats
from edgeprune.model.checkpoint.families import FAMILIES
from edgeprune.model.checkpoint.folder import no_weights
from edgeprune.model.checkpoint.foreign import Foreign, is_of_activations
from edgeprune.model.checkpoint.layouts import FLOATS, Layout, Part
from edgeprune.model.checkpoint.llamagen import COMPILED
from edgeprune.model.checkpoint.packed import SHAPE, unpacked
from edgeprune.model.checkpoint.places import Shape, StoredTensor
from edgeprune.model.checkpoint.quantization import packing_of
from edgeprune.model.checkpoint.safetensors_file import NAMES, entries_of
from edgeprune.model.checkpoint.torch_file import AGAIN, TorchFiles, archive_members, torch_header
from edgeprune.model.checkpoint.unread import DO_NOT_MATCH, check_unread
from edgeprune.model.checkpoint.values import SCALES_FILE, codes_of, parts_of, scale_entries
from edgeprune.model.decoder import Decoder
from edgeprune.model.heads import without_filling

if TYPE_CHECKING:
    import torch

    from edgeprune.model.quantised import QuantisedWeight

SAMPLED_BLOCKS, BLOCK_BYTES = 64, 1 << 16  # of a weights file, in its fingerprint
SAFETENSORS = ".safetensors"
LONGEST = 200  # characters of a file's name
WEIGHTS = ("model.safetensors", "pytorch_model.bin")  # or as shards, with an index; the first that is there
TORCH_ENDINGS = (".bin", ".pt", ".pth")
Stored = dict[str, tuple[Path, str, tuple[int, ...]]]  # by name in the checkpoint: file, dtype, shape


@dataclass(frozen=True)
class Stand:
    """A tensor in the files: the file and the name there of each of its parts, by the parts' full names.

    layout: of the codes that another program wrote.
    """

    tensor: StoredTensor
    parts: dict[str, tuple[Path, str]]
    layout: Layout | None = None

    def place(self, part: str) -> tuple[Path, str]:
        """Returns the file and the name there of the part that stands in place of `weight`."""
        return self.parts[_part_name(self.tensor, part)]


TEXT = "language_model."  # before what a text model of its own would have, in some models of images and text
TEXT_PREFIXES = ("model.language_model.", "model.text_model.")  # in the place of `model.`, in others


class LazyWeights(Mapping[str, "torch.Tensor"]):
    """Tensors by the names of decoder.py, read from safetensors or PyTorch's own files at each access.

    The files are mapped: of a tensor that holds several weights, only the rows of the requested one are read. What is
    stored as codes is fp32; `quantised` has the codes themselves where edgeprune wrote them. `beside` has the file,
    type and shape of every tensor of a model's other parts, by its name there.
    """

    def __init__(
        self,
        stands: dict[str, list[Stand]],
        decoder: Decoder,
        stored_decoder: Decoder,
        scales: Path | None,
        beside: Stored,
    ) -> None:
        self._stands, self._decoder, self._stored_decoder = stands, decoder, stored_decoder
        self.beside = beside
        self._torch_files = TorchFiles()
        self.quantised = LazyCodes(self, decoder, scales)

    def __getitem__(self, name: str) -> torch.Tensor:
        stands = self._stands[name]
        if stands[0].tensor.form is not None:
            return self.quantised[name].dequantised()
        tensors = [stand.tensor.read(self._values(stand, stand.tensor.expert_of(name)), name) for stand in stands]
        return without_filling(self._decoder, self._stored_decoder, name, _joined(tensors)).contiguous()

    def __iter__(self) -> Iterator[str]:
        return iter(self._stands)

    def __len__(self) -> int:
        return len(self._stands)

    def __contains__(self, name: object) -> bool:
        return name in self._stands

    @property
    def places(self) -> dict[str, tuple[Path, str]]:
        """Returns the file of every stored tensor, and its name there, by its name in the family's own checkpoints."""
        return {
            key: place for stands in self._stands.values() for stand in stands for key, place in stand.parts.items()
        }

    def codes(self, name: str) -> QuantisedWeight:
        """Returns a weight that is stored as codes."""
        stand = self._stands[name][0]
        weight = unpacked(stand.tensor, lambda part: self.stored(*stand.place(part)), name)
        return without_filling(self._decoder, self._stored_decoder, name, weight)

    def _values(self, stand: Stand, expert: int | None) -> torch.Tensor:
        """Returns a tensor of the files in floats; expert: of which the part is read, None for all."""
        if stand.layout is None:
            return self.stored(*stand.parts[stand.tensor.key], expert)
        names = [
            name for name in stand.layout.parts(stand.tensor.matrix) if _part_name(stand.tensor, name) in stand.parts
        ]
        parts = {name: self.stored(*stand.place(name), expert) for name in names}
        values = stand.layout.values(parts, stand.tensor.matrix)
        return values.t() if stand.tensor.place.transposed else values

    def stored(self, path: Path, key: str, part: int | None = None) -> torch.Tensor:
        """Returns a tensor of a file as it is stored there; part: of its first axis, None for all."""
        if not _is_safetensors(path):
            tensor = self._torch_files.read(path, key)
            return tensor if part is None else tensor[part]
        from safetensors import safe_open

        with safe_open(path, "pt") as file:
            return file.get_tensor(key) if part is None else file.get_slice(key)[part]


class LazyCodes(Mapping[str, "QuantisedWeight"]):
    """Codes, scales and zeros of the weights that have a format, by the names of decoder.py, read at each access."""

    def __init__(self, weights: LazyWeights, decoder: Decoder, scales: Path | None) -> None:
        self._weights, self._formats, self._scales = weights, decoder.weight_formats, scales
        self._valued = valued_formats(decoder)

    def __getitem__(self, name: str) -> QuantisedWeight:
        form = self._formats[name]
        if name not in self._valued:
            return self._weights.codes(name)
        parts = {part: self._weights.stored(self._scales, f"{name}.{part}") for part in parts_of(form)}
        return codes_of(form, self._weights[name], **parts)

    def __iter__(self) -> Iterator[str]:
        return iter(self._formats)

    def __len__(self) -> int:
        return len(self._formats)

    def __contains__(self, name: object) -> bool:
        return name in self._formats


def _is_safetensors(file: Path) -> bool:
    return file.suffix == SAFETENSORS or file.name == SCALES_FILE


def _joined(tensors: list[torch.Tensor]) -> torch.Tensor:
    import torch

    return tensors[0] if len(tensors) == 1 else torch.cat(tensors)


def stored_weights(
    path: Path, decoder: Decoder, stored_decoder: Decoder, foreign: Foreign | None = None, is_part: bool = False
) -> tuple[LazyWeights, str]:
    """Returns the weights of a folder's files, none of which is read, and the model's fingerprint.

    decoder: the model's; stored_decoder: that of the tensors, which may have heads of zeros. foreign: how another
    program quantised them; is_part: the files hold other parts beside this model. Raises InputError for what is
    missing, damaged, or not as the decoders say.
    """
    files = _weight_files(path)
    if foreign is not None and not all(map(_is_safetensors, files)):
        raise InputError(
            f"{files[0]} holds quantised weights, which are read from safetensors alone",
            "Save them so where they were made: save_pretrained(..., safe_serialization=True).",
        )
    stored = {name: (file, *entry) for file in files for name, entry in header_of(file).items()}
    stands, files = _checked(stored_decoder, stored, foreign, is_part), {place[0] for place in stored.values()}
    scales = None
    if entries := scale_entries(decoder):
        scales = path / SCALES_FILE
        _check_scales(scales, entries)
        files.add(scales)
    used = {name for of_weight in stands.values() for stand in of_weight for _, name in stand.parts.values()}
    used |= {_present(_head(decoder), stored)} if decoder.tie_word_embeddings else set()
    beside = {name: place for name, place in stored.items() if name not in used} if is_part else {}
    weights = LazyWeights(stands, decoder, stored_decoder, scales, beside)
    if decoder.tie_word_embeddings:
        _check_tied(decoder, weights, stored)
    return weights, fingerprint(path / "config.json", files)


def _check_scales(file: Path, entries: Mapping[str, tuple[torch.dtype, Shape]]) -> None:
    """Raises InputError where the file with the scales of values does not hold these types and shapes."""
    if not file.is_file():
        raise InputError(f"{file.parent} has no {file.name}, which config.json asks for", AGAIN)
    found = header_of(file)
    expected = {name: (NAMES[str(dtype).removeprefix("torch.")], shape) for name, (dtype, shape) in entries.items()}
    if odd := {**found, **expected}.keys() - {name for name in expected if found.get(name) == expected[name]}:
        name = min(odd)
        held, asked = found.get(name, "nothing"), expected.get(name, "nothing")
        raise InputError(
            f"{file} holds {printable(held)} as {printable(name)}, but config.json asks for {asked}", DO_NOT_MATCH
        )


def _weight_files(path: Path) -> list[Path]:
    """Returns the files with a directory's weights. Raises InputError where there are none."""
    for name in WEIGHTS:
        single, index = path / name, path / f"{name}.index.json"
        if single.is_file():
            return [single]
        if index.is_file():
            return _shards(index)
    raise no_weights(path, " or ".join(WEIGHTS))


def _shards(index: Path) -> list[Path]:
    """Returns the files of a shard index. Raises InputError where one is missing."""
    names = read_json(index, remedy=AGAIN).get("weight_map")
    if not isinstance(names, dict) or not all(isinstance(name, str) for name in names.values()) or not names:
        raise InputError(f"{index} is not a shard index", "Restore the checkpoint's own file.")
    if foreign := [name for name in names.values() if Path(name).name != name or "\0" in name or len(name) > LONGEST]:
        raise InputError(f"{index} names {printable(repr(foreign[0]))}, which is no file beside it", AGAIN)
    files = sorted({index.parent / name for name in names.values()})
    for file in files:
        if not file.is_file():
            raise InputError(f"the shard {printable(file.name)} is missing in {index.parent}", AGAIN)
    return files


def header_of(file: Path) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Returns dtype and shape of every tensor of a file, by name.

    Raises InputError where the header is damaged or the file incomplete.
    """
    if not _is_safetensors(file):
        return torch_header(file)
    if is_pointer(file):
        raise pointer_error(file)
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, "np") as opened:
            slices = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118
            return {
                name: (tensor_slice.get_dtype(), tuple(tensor_slice.get_shape()))
                for name, tensor_slice in slices.items()
            }
    except (SafetensorError, OSError, ValueError, OverflowError, MemoryError) as error:
        raise InputError(f"{file} is not a safetensors file or is truncated: {printable(error)}", AGAIN) from None


def _checked(
    decoder: Decoder, stored: Stored, foreign: Foreign | None, is_part: bool = False
) -> dict[str, list[Stand]]:
    """Returns the stored tensors that hold each weight. Raises InputError for one that is missing or does not fit, and
    for stored ones that the model does not explain; of a part, for those beside its own.
    """
    tensors, head = checkpoint_tensors(decoder), _present(_head(decoder), stored)
    layouts = _layouts(tensors, stored, foreign)
    entries = _entries(decoder, tensors, layouts, stored)
    keys = {name: _present(name, stored) for parts in entries.values() for name in parts}
    # A tied head may stand for the embedding.
    embedding = FAMILIES[decoder.family].places["embedding"].key
    if decoder.tie_word_embeddings and embedding in keys and keys[embedding] is None:
        keys[embedding] = head
    explained = {*keys.values(), *([head] if decoder.tie_word_embeddings else [])}
    if foreign is not None:
        explained |= {name for name in stored if is_of_activations(name)}
        explained |= _zero_biases(stored.keys() - explained, stored, layouts)
    missing = [name for name, key in keys.items() if key is None]
    unread = stored.keys() - explained
    if is_part and (table := keys.get(embedding)):
        beside = table.removesuffix(embedding.partition(".")[2])
        unread = {name for name in unread if name.startswith(beside)}
    check_unread(decoder.family, len(decoder.layers), unread, missing)
    # Shapes and types.
    stands: dict[str, list[Stand]] = {}
    for key, tensor in tensors.items():
        for name, part in entries[key].items():
            _check_part(keys[name], stored[keys[name]], part)
        places = {name: (stored[keys[name]][0], keys[name]) for name in entries[key]}
        stand = Stand(tensor, places, layouts.get(key))
        for weight in tensor.names:
            stands.setdefault(weight, []).append(stand)
    _check_shapes([stand for of_weight in stands.values() for stand in of_weight])
    return stands


def _layouts(tensors: Mapping[str, StoredTensor], stored: Stored, foreign: Foreign | None) -> dict[str, Layout]:
    """Returns the layouts of the tensors that another program quantised, by key."""
    if foreign is None:
        return {}

    def type_of(tensor: StoredTensor, part: str) -> str | None:
        name = _present(_part_name(tensor, part), stored)
        return None if name is None else stored[name][1]

    layouts = {key: foreign.layout(tensor, partial(type_of, tensor)) for key, tensor in tensors.items()}
    return {key: layout for key, layout in layouts.items() if layout is not None}


def _zero_biases(unread: Collection[str], stored: Stored, layouts: Mapping[str, Layout]) -> set[str]:
    """Returns the unread biases of quantised matrices that are zero: older writers of GPTQ give one to every matrix."""
    from safetensors import safe_open

    biases = {_present(key.removesuffix("weight") + "bias", stored) for key in layouts} & set(unread)
    zeros = set()
    for name in biases:
        with safe_open(stored[name][0], "pt") as opened:
            if not opened.get_tensor(name).any():
                zeros.add(name)
    return zeros


def _entries(
    decoder: Decoder, tensors: Mapping[str, StoredTensor], layouts: Mapping[str, Layout], stored: Stored
) -> dict[str, dict[str, Part]]:
    """Returns by key what the files hold of each tensor: the types and shapes that are taken, by the parts' names."""
    import torch

    packing, entries = packing_of(decoder, torch.float32), {}
    for key, tensor in tensors.items():
        if (layout := layouts.get(key)) is None:
            entries[key] = {
                name: (
                    FLOATS if (stored_as := NAMES[str(dtype).removeprefix("torch.")]) in FLOATS else (stored_as,),
                    (shape,),
                )
                for name, (dtype, shape) in entries_of(tensor, torch.float32, packing).items()
            }
            continue
        parts = {_part_name(tensor, part): entry for part, entry in layout.parts(tensor.matrix).items()}
        optional = _part_name(tensor, layout.optional)
        if optional in parts and _present(optional, stored) is None:
            del parts[optional]
        entries[key] = parts
    return entries


def _part_name(tensor: StoredTensor, part: str) -> str:
    """Returns the full name of the part that stands in place of `weight`."""
    return tensor.key.removesuffix("weight") + part


def _check_part(key: str, found: tuple[Path, str, Shape], part: Part) -> None:
    """Raises InputError where a stored tensor has another shape or type than those that are taken."""
    (_, dtype, shape), (dtypes, shapes) = found, part
    if shape not in shapes:
        raise InputError(f"tensor {key} has shape {shape}, but config.json asks for {shapes[0]}", DO_NOT_MATCH)
    if dtype not in dtypes:
        raise InputError(
            f"tensor {key} is of type {dtype}", _of_another_type(dtype) if dtypes == FLOATS else DO_NOT_MATCH
        )


def _check_shapes(stands: list[Stand]) -> None:
    """Raises InputError for packed codes whose stored shape is not that of their tensor; readers differ in which they
    take.
    """
    from safetensors import safe_open

    places: dict[Path, dict[str, StoredTensor]] = {}
    for stand in stands:
        if _part_name(stand.tensor, SHAPE) in stand.parts:
            file, key = stand.place(SHAPE)
            places.setdefault(file, {})[key] = stand.tensor
    for file, tensors in places.items():
        with safe_open(file, "pt") as opened:
            for key, tensor in tensors.items():
                if (shape := tuple(opened.get_tensor(key).tolist())) != tensor.shape:
                    raise InputError(f"{key} says {shape}, but config.json asks for {tensor.shape}", DO_NOT_MATCH)


def _of_another_type(dtype: str) -> str:
    """Returns the remedy for a weight of a type that is not read."""
    if dtype in ("F64", "float64"):
        return (
            'Write it in fp32: python -c "from transformers import AutoModelForCausalLM as Model; '
            "Model.from_pretrained('FOLDER', dtype='float32').save_pretrained('NEW')\"."
        )
    return f"Supported are: {', '.join(FLOATS)}. Give the checkpoint before it was quantised."


def _head(decoder: Decoder) -> str:
    return FAMILIES[decoder.family].places["head"].key


def _present(key: str, stored: Stored) -> str | None:
    """Returns the key as it is in the file, or None.

    Checkpoints of a base model leave out the base model's own name, those of a compiled model add a prefix, and those
    of images and text have one for the text.
    """
    first, _, rest = key.partition(".")
    names = [key, rest, COMPILED + key, *(prefix + rest for prefix in TEXT_PREFIXES if first == "model"), TEXT + key]
    return next((name for name in names if name in stored), None)


def _check_tied(decoder: Decoder, weights: LazyWeights, stored: Stored) -> None:
    """Raises InputError for a head that is stored although it is tied to the embedding, and differs from it.

    An equal one is ignored. Where the two differ, transformers unties them with no more than a warning; ignoring the
    head would change the model.
    """
    if (key := _present(_head(decoder), stored)) is None:
        return
    import torch

    if not torch.equal(weights.stored(stored[key][0], key), weights["embedding"]):
        raise InputError(
            f"config.json ties the head to the embedding, but {key} is stored and differs",
            'Set "tie_word_embeddings": false in config.json, or remove the tensor, whichever is meant.',
        )


def fingerprint(config: Path, files: set[Path]) -> str:
    """Returns a sha256 over the configuration and, of each weights file, its size, its header and evenly spaced blocks.

    So files of many gigabytes are distinguished without being read whole.
    """
    digest = hashlib.sha256(config.read_bytes())
    for file in sorted(files):
        size = file.stat().st_size
        digest.update(f"{file.name} {size}".encode())
        if file.suffix in TORCH_ENDINGS:  # its list of members holds a checksum of each
            digest.update(repr(archive_members(file)).encode())
        with file.open("rb") as stream:
            if _is_safetensors(file):
                head = stream.read(8)
                digest.update(head + stream.read(int.from_bytes(head, "little")))
            for block in range(SAMPLED_BLOCKS):
                stream.seek(size * block // SAMPLED_BLOCKS)
                digest.update(stream.read(BLOCK_BYTES))
    return digest.hexdigest()
