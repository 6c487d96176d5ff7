"""Files for other runtimes that `--export` puts into a bundle, beside the checkpoint that they are made from."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from edgeprune.errors import InputError
from edgeprune.model.model import Model

FORMATS = ("gguf",)


def check_exports(names: Sequence[str], model: Model, layout: str, reduced: bool) -> None:
    """Raises InputError for a format that is not known or cannot hold what will be pruned from the model.

    reduced: the vocabulary will be. What widths are left does not matter: each format holds all that layers of one
    width may have, where it holds the dense model.
    """
    for name in names:
        if name not in FORMATS:
            raise InputError(f"unknown export {name!r}", f"Give one of: {', '.join(FORMATS)}.")
        if layout != "uniform":
            raise InputError(f"--export {name} holds no layers of different widths", "Take --layout uniform.")
    if "gguf" in names:
        from edgeprune.model.gguf.export import check_exportable

        check_exportable(model, reduced)


def write_exports(names: Sequence[str], model: Model, folder: Path, stem: str) -> None:
    """Each format in a folder of its name. model: pruned, of uniform layers, as loaded from its checkpoint."""
    for name in dict.fromkeys(names):
        from edgeprune.model.gguf.export import export_gguf

        (folder / name).mkdir()
        export_gguf(model, folder / name / f"{stem}.{name}")
