"""A model of images and text with another text part: what `--export whole` writes.

The other parts are copied as they are, under the names that the source's files have. It knows configurations and
tensors by name; what a text part computes it does not know.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgeprune.errors import InputError
from edgeprune.model.checkpoint.configuration import (
    checkpoint_tensors,
    config_for,
    loadable,
    read_config,
    read_whole_config,
)
from edgeprune.model.checkpoint.nested import FLAT, TEXT_PARTS
from edgeprune.model.checkpoint.padding import padded_heads
from edgeprune.model.checkpoint.places import stored_stream
from edgeprune.model.checkpoint.safetensors_file import NAMES, write_shards
from edgeprune.model.model import Model
from edgeprune.model.tokens.tokenizer import TOKENIZER_FILES

if TYPE_CHECKING:
    import torch

OF_FILES = ("architectures", "dtype", "torch_dtype", "transformers_version")  # fields that say nothing of the text part
PROCESSOR_FILES = (
    *("preprocessor_config.json", "video_preprocessor_config.json", "processor_config.json"),
    *("chat_template.json", "chat_template.jinja"),
)


def check_whole(model: Model, reduced: bool, by_layer: bool) -> None:
    """Raises InputError for a model that is no text part, and for one that the whole cannot hold.

    reduced: its vocabulary will be cut down; by_layer: its layers will differ in width.
    """
    if not model.part_of:
        raise InputError(f"{model.name} is no text part of a model of images and text", "Leave --export whole out.")
    if reduced:
        raise InputError("images have tokens of the whole vocabulary in a whole model", "Use --vocabulary full.")
    if by_layer:
        raise InputError("a whole model cannot hold layers of different widths", "Use --layout uniform.")


def export_whole(model: Model, source: Model, folder: Path) -> None:
    """Writes the model that the source is the text part of into a new folder, with this model in its place.

    model: pruned from the source, in floats, as its own checkpoint holds it. One tensor is in memory at a time.
    """
    import torch

    folder.mkdir()
    # The configuration: what was changed in the text part.
    whole, before = read_whole_config(source.directory), read_config(source.directory)
    fills = whole.get("model_type") in FLAT  # whose classes take hidden_size over the number of heads for head_dim
    after, target = config_for(model.decoder, before, fills), loadable(model.decoder, before, fills)
    changed = {name: value for name, value in after.items() if before.get(name) != value and name not in OF_FILES}
    config = _with_text(whole, changed)
    (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    # The tensors: of the text part the model's, then all others; under the source's names.
    places, others, dtype = source.weights.places, source.weights.beside, model.weights["embedding"].dtype
    own = checkpoint_tensors(target)
    entries = {places[key][1]: (dtype, tensor.shape) for key, tensor in own.items()}
    # Safetensors and PyTorch's own files name types differently.
    types = {name: getattr(torch, dtype) for dtype, stored in NAMES.items() for name in (dtype, stored)}
    entries |= {name: (types[dtype], shape) for name, (_, dtype, shape) in others.items()}

    def tensors() -> Iterator[tuple[str, torch.Tensor]]:
        weights = ((name, model.weights[name]) for name in model.decoder.shapes())
        for key, tensor in stored_stream(own, padded_heads(model.decoder, target, weights)):
            yield places[key][1], tensor
        for name, (file, *_) in others.items():
            yield name, source.weights.stored(file, name)

    write_shards(entries, tensors(), folder)
    # What makes texts and images into tokens.
    for name in dict.fromkeys((*TOKENIZER_FILES, *PROCESSOR_FILES)):
        if (source.directory / name).is_file():
            shutil.copyfile(source.directory / name, folder / name)


def _with_text(whole: dict[str, Any], changed: dict[str, Any]) -> dict[str, Any]:
    """Returns a whole's configuration with other fields of its text part, wherever it has these."""
    place = next((name for name in TEXT_PARTS if isinstance(whole.get(name), dict)), None)
    return whole | ({place: whole[place] | changed} if place else changed)
