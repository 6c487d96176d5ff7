"""The bundle on disk: its files, its rungs and its manifest. It does not know how a bundle is written or measured.

This file also runs on the device: Python 3.10, standard library only.
"""

from __future__ import annotations

import hashlib
import json
import shlex
from pathlib import Path
from typing import Any

from edgeprune.errors import InputError

MANIFEST = "manifest.json"
REPORT = "report.json"
TOKENIZER = "tokenizer"
CODEC = "codec"  # of an image generator: turns codes into pixels
FRONTIER = "frontier"  # the kind of a bundle of which no rung is chosen yet; others have a chosen one


def sha256(path: Path) -> str:
    """Returns the sha256 of a file in hexadecimal digits."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def linked_folders(folder: Path, index: int) -> list[str]:
    """Returns the folders of a rung that links at the bundle's top lead to: model, onnx, engine, exports."""
    rung = folder / "rungs" / str(index)
    return sorted(path.name for path in rung.iterdir() if path.is_dir() and path.name != TOKENIZER)


def point_to_rung(folder: Path, index: int) -> None:
    """Points the links at the bundle's top to a rung. Links that became folders in a copy stay as they are."""
    for name in linked_folders(folder, index):
        link, rung = folder / name, Path("rungs") / str(index) / name
        if link.exists() and not link.is_symlink():
            continue
        temporary = folder / f"{name}.part"
        temporary.unlink(missing_ok=True)
        temporary.symlink_to(rung)
        temporary.replace(link)


def tokenizer_of(folder: Path, rung: int) -> Path:
    """Returns the folder of a rung's tokenizer: its own where it has a vocabulary of its own, else the bundle's."""
    own = folder / "rungs" / str(rung) / TOKENIZER
    return own if own.is_dir() else folder / TOKENIZER


def rungs_of(folder: Path) -> list[int]:
    """Returns the indices of the rungs that a bundle holds, in ascending order."""
    return sorted(int(path.name) for path in (folder / "rungs").glob("*") if path.name.isdecimal())


def open_chosen(folder: Path) -> dict[str, Any]:
    """Returns the manifest of a bundle that has a chosen rung, which can be run, measured or deployed.

    Raises InputError as open_bundle does, and where no rung is chosen yet.
    """
    manifest = open_bundle(folder)
    if manifest.get("kind") == FRONTIER:
        name, rungs = shlex.quote(str(folder)), rungs_of(folder)
        raise InputError(
            f"{folder} holds {len(rungs)} rungs to pick from, none is chosen yet",
            f"Pick one, K is {rungs[0]} to {rungs[-1]}: edgeprune fit --from {name} --pick K",
        )
    return manifest


def open_bundle(folder: Path) -> dict[str, Any]:
    """Returns the manifest of a bundle, after a check that all its files are there.

    Raises InputError where the folder is not a bundle or is missing a file.
    """
    # Read the manifest.
    path = folder / MANIFEST
    remedy = "Give the output directory of `edgeprune fit`."
    if not path.is_file():
        raise InputError(f"{folder} is not a bundle: it has no {MANIFEST}", remedy)
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        names = list(manifest["sha256"])
    except (ValueError, KeyError, TypeError):
        raise InputError(f"{path} cannot be read: it is not a bundle's manifest", remedy) from None
    # Check that its files are there; their hashes are not computed.
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise InputError(
            f"the bundle {folder} is missing {len(missing)} of its files, the first is {missing[0]}",
            "Copy the whole folder again, or run the fit again (the command is in manifest.json).",
        )
    return manifest
