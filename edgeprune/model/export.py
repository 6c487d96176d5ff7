"""Files for other runtimes that `--export` puts into a bundle, beside the checkpoint that they are made from.

It knows the formats by name, not what is in them.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from edgeprune.errors import InputError
from edgeprune.model.model import Model

FORMATS = ("gguf",)


def check_exports(names: Sequence[str], model: Model, layout: str, reduced: bool) -> None:
    """Raises InputError for a format that is not known or cannot hold what will be pruned from the model.

    reduced: whether the vocabulary will be reduced. The widths that are left do not matter: a format that holds the
    dense model holds every model whose layers are alike.
    """
    for name in names:
        if name not in FORMATS:
            raise InputError(f"unknown export {name!r}", f"Give one of: {', '.join(FORMATS)}.")
        if layout != "uniform":
            raise InputError(f"--export {name} cannot hold layers of different widths", "Use --layout uniform.")
    if "gguf" in names:
        from edgeprune.model.gguf.export import check_exportable

        check_exportable(model, reduced)


def write_exports(names: Sequence[str], model: Model, folder: Path, stem: str) -> None:
    """Writes each format into a folder of its name.

    model: pruned, with layers of one width, as loaded from its checkpoint. stem: of the files' names.
    """
    for name in dict.fromkeys(names):
        from edgeprune.model.gguf.export import export_gguf

        (folder / name).mkdir()
        export_gguf(model, folder / name / f"{stem}.{name}")
