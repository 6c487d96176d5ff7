"""Files for other runtimes that `--export` puts into a bundle, beside the checkpoint that they are made from.

It knows the formats by name, not what is in them. A new format is a new row of FORMATS and a module that writes it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from edgeprune.errors import InputError
from edgeprune.files import link_or_copy
from edgeprune.precision import WEIGHT_FORMATS, WeightFormat

if TYPE_CHECKING:
    from edgeprune.model.model import Model


@dataclass(frozen=True)
class Format:
    """check(model, reduced, by_layer): raises InputError where the format cannot hold the model, with a reduced
    vocabulary where `reduced`, with layers of different widths where `by_layer`; write(model, source, folder, stem,
    context): makes the folder and writes files of that name into it, for so many tokens; source: what the model was
    pruned from. purpose: for the bundle's README."""

    purpose: str
    check: Callable[[Model, bool, bool], None]
    write: Callable[[Model, Model, Path, str, int], None]


def _check_gguf(model: Model, reduced: bool, by_layer: bool) -> None:
    from edgeprune.model.gguf.export import check_exportable

    check_exportable(model, reduced, by_layer)


def _write_gguf(model: Model, source: Model, folder: Path, stem: str, context: int) -> None:
    from edgeprune.model.gguf.export import export_gguf
    from edgeprune.model.gguf.modelfile import write_modelfile
    from edgeprune.model.gguf.weights import MODEL_FILE, is_in_blocks

    folder.mkdir()
    path = folder / f"{stem}.gguf"
    if is_in_blocks(model.decoder):
        link_or_copy(model.directory / MODEL_FILE, path)  # the model is that file
    else:
        export_gguf(model, path)
    write_modelfile(model.directory, path, context)


def _check_gptq(model: Model, reduced: bool, by_layer: bool) -> None:
    from edgeprune.model.gptq import check_gptq

    check_gptq(model.decoder, by_layer)


def _write_gptq(model: Model, source: Model, folder: Path, stem: str, context: int) -> None:
    from edgeprune.model.gptq import export_gptq

    export_gptq(model, folder)


def _check_whole(model: Model, reduced: bool, by_layer: bool) -> None:
    from edgeprune.model.whole import check_whole

    check_whole(model, reduced, by_layer)


def _write_whole(model: Model, source: Model, folder: Path, stem: str, context: int) -> None:
    from edgeprune.model.whole import export_whole

    export_whole(model, source, folder)


GGUF, WHOLE = "gguf", "whole"
FORMATS = {
    GGUF: Format("the model for llama.cpp, and a Modelfile for `ollama create`", _check_gguf, _write_gguf),
    "gptq": Format("the checkpoint in GPTQ's layout, for vLLM and transformers", _check_gptq, _write_gptq),
    WHOLE: Format("the whole model of images and text, with the text part in its place", _check_whole, _write_whole),
}


def check_exports(
    names: Sequence[str], model: Model, layout: str, reduced: bool, formats: Sequence[WeightFormat | None] = (None,)
) -> None:
    """Raises InputError for a format that is not known or cannot hold what will be pruned from the model.

    reduced: whether the vocabulary will be reduced; formats: that the modules may have. The widths that are left do not
    matter: a format that holds the dense model holds every model of its layout.
    """
    for name in names:
        if name not in FORMATS:
            raise InputError(f"unknown export {name!r}", f"Give one of: {', '.join(FORMATS)}.")
    for name in dict.fromkeys(names):
        FORMATS[name].check(model, reduced, layout != "uniform")
    refused = {
        "offset": "the minima in llama.cpp's blocks are of fp16, which these are not",
        "floats": "llama.cpp rounds no activations so",
    }
    own = [form for form in formats if form is not None and form.storage in refused]
    if "gguf" in names and own:
        raise InputError(
            f"--export gguf cannot hold {own[0].name}: {refused[own[0].storage]}",
            "Use other --weights, of which int4 is held exactly, or leave --export gguf out.",
        )
    if WHOLE in names and any(form is not None for form in formats):
        raise InputError("--export whole holds floats, and the search would choose others", "Use --weights float.")
    if "gptq" not in names:
        return
    if blocks := [form.name for form in formats if form is not None and form.storage == "gguf"]:
        raise InputError(
            f"a GPTQ checkpoint has no format {blocks[0]}, which a GGUF file holds alone", "Give --export gguf."
        )
    symmetric = [
        name
        for name, form in WEIGHT_FORMATS.items()
        if form.storage == "packed" and not form.offset and not form.activation_bits
    ]
    if len(formats) != 1 or formats[0] is None or formats[0].name not in symmetric:
        raise InputError(
            "--export gptq holds the layers in one weight format, and the search would choose among others",
            f"Give one of: --weights {'|'.join(symmetric)}.",
        )


def write_exports(names: Sequence[str], model: Model, source: Model, folder: Path, stem: str, context: int) -> None:
    """Writes each format into a folder of its name.

    model: pruned from the source, as loaded from its checkpoint. stem: of the files' names; context: tokens that it is
    to hold at once.
    """
    for name in dict.fromkeys(names):
        FORMATS[name].write(model, source, folder / name, stem, context)
