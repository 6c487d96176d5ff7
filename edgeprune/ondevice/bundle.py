"""The bundle on disk: its files, its rungs and its manifest. It does not know how a bundle is written or measured.

Whoever reads a rung's files reads them in rungs/K: the links at the top are for people, and many a copy loses them.
This file also runs on the device: Python 3.10, standard library only.
"""

from __future__ import annotations

import contextlib
import hashlib
import re
import shlex
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from edgeprune.errors import InputError
from edgeprune.files import checked, is_pointer, pointer_error, read_json
from edgeprune.ondevice.figures import Workload

MANIFEST = "manifest.json"
REPORT = "report.json"
MEASUREMENT = "measurement.json"
READY = ".finished"  # the folder in the bundle of new files that are about to be moved to their places
TOKENIZER = "tokenizer"
CHECKPOINT = "model"  # a rung's folder of it
CODEC = "codec"  # of an image generator: turns codes into pixels
FRONTIER = "frontier"  # the kind of a bundle of which no rung is chosen yet; others have a chosen one
COPY_AGAIN = "Copy the whole bundle again, or run the fit again (the command is in manifest.json)."
OTHER_VERSION = "Copy the whole bundle again, or use the version of edgeprune that manifest.json names."
_SIZES = {"batch": int, "prompt": int, "context": int}


@dataclass(frozen=True)
class Chosen:
    """A bundle's chosen rung, ready to run: the one that was measured on the device, before that the first.

    engine: the kind of engine that it was built with.
    """

    bundle: Path
    manifest: dict[str, Any]
    rung: int
    engine: str
    workload: Workload

    @property
    def folder(self) -> Path:
        return rung_folder(self.bundle, self.rung)

    @property
    def tokenizer(self) -> Path:
        return tokenizer_of(self.bundle, self.rung)

    def check(self, *folders: Path) -> None:
        """Raises InputError where a file in one of these folders is not the one that the manifest lists."""
        check_files(self.bundle, self.manifest, folders)


def sha256(path: Path) -> str:
    """Returns the sha256 of a file in hexadecimal digits."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def rung_folder(folder: Path, index: int) -> Path:
    """Returns the folder of a rung's files."""
    return folder / "rungs" / str(index)


def linked_folders(folder: Path, index: int) -> list[str]:
    """Returns the folders of a rung that links at the bundle's top lead to: model, onnx, engine, exports."""
    return sorted(
        path.name for path in rung_folder(folder, index).iterdir() if path.is_dir() and path.name != TOKENIZER
    )


def point_to_rung(folder: Path, index: int) -> None:
    """Points the links at the bundle's top to a rung, those too that became a text or an empty folder in a copy.

    Links that became folders with files stay as they are.
    """
    for name in linked_folders(folder, index):
        link, rung = folder / name, Path("rungs") / str(index) / name
        if link.is_dir() and not link.is_symlink():
            with contextlib.suppress(OSError):  # it holds files
                link.rmdir()
        if link.exists() and not link.is_symlink() and not _is_text_of_link(link):
            continue
        temporary = folder / f"{name}.part"
        temporary.unlink(missing_ok=True)
        temporary.symlink_to(rung)
        try:
            temporary.replace(link)
        except OSError:
            temporary.unlink(missing_ok=True)
            raise


def _is_text_of_link(path: Path) -> bool:
    """Returns whether a file is what git writes for a link where the file system has none: its target."""
    return (
        path.is_file()
        and path.stat().st_size < 100
        and re.fullmatch(rb"rungs/\d+/\w+\s*", path.read_bytes()) is not None
    )


def tokenizer_of(folder: Path, rung: int) -> Path:
    """Returns the folder of a rung's tokenizer: its own where it has a vocabulary of its own, else the bundle's."""
    own = rung_folder(folder, rung) / TOKENIZER
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


def open_to_run(folder: Path) -> Chosen:
    """Returns the chosen rung of a bundle. Raises InputError as open_chosen does, and for a report of another form."""
    manifest = open_chosen(folder)
    path = folder / REPORT
    report = checked(read_json(path, remedy=OTHER_VERSION), {"workload": _SIZES, ...: Any}, str(path), OTHER_VERSION)
    measured = report.get("measurement")
    made = checked(
        manifest if measured is None else measured,
        {"engine": str, ...: Any} if measured is None else {"engine": str, "rung": int, ...: Any},
        str(folder / MANIFEST) if measured is None else f"{path}: measurement",
        OTHER_VERSION,
    )
    rung = 0 if measured is None else made["rung"]
    if rung not in rungs_of(folder):
        raise InputError(f"{folder} holds no rung {rung}", COPY_AGAIN)
    if min(report["workload"].values()) < 1:
        raise InputError(f"{path}: workload is not of positive numbers", OTHER_VERSION)
    return Chosen(folder, manifest, rung, made["engine"], Workload(**report["workload"]))


def open_bundle(folder: Path) -> dict[str, Any]:
    """Returns the manifest of a bundle, after a check that all its files are there.

    Raises InputError where the folder is not a bundle or is missing a file.
    """
    # Read the manifest.
    path = folder / MANIFEST
    remedy = "Give the output directory of `edgeprune fit`."
    if not path.is_file():
        raise _no_bundle(folder, remedy)
    manifest = checked(read_json(path, remedy=remedy), {"sha256": dict, ...: Any}, str(path), remedy)
    for name, digest in manifest["sha256"].items():
        place = PurePosixPath(name)
        if place.is_absolute() or ".." in place.parts or not isinstance(digest, str):
            raise InputError(f"{path} is not a bundle's manifest: its sha256 lists {name!r}", COPY_AGAIN)
    # Check that its files are there; their hashes are not computed.
    missing = [name for name in manifest["sha256"] if not (folder / name).is_file()]
    if missing:
        raise InputError(
            f"the bundle {folder} is missing {len(missing)} of its files, the first is {missing[0]}", COPY_AGAIN
        )
    return manifest


def _no_bundle(folder: Path, remedy: str) -> InputError:
    """Returns the error for a folder that is not a bundle: it may be a part of one, or a model."""
    whole = (parent for parent in folder.parents if (parent / MANIFEST).is_file() and (parent / "rungs").is_dir())
    if bundle := next(whole, None):
        return InputError(f"{folder} is a part of the bundle {bundle}", f"Give the bundle itself: {bundle}")
    is_file = folder.is_file() and folder.suffix in (".gguf", ".safetensors", ".pt", ".pth")
    if is_file or (folder / "config.json").is_file() or str(folder) == "demo":
        name = shlex.quote(str(folder))
        return InputError(
            f"{folder} is a model, not a bundle",
            f"Make a bundle of it: edgeprune fit {name} --device NAME    (`edgeprune devices` lists the names)",
        )
    missing = f"it has no {MANIFEST}" if folder.exists() else "there is no such folder"
    return InputError(f"{folder} is not a bundle: {missing}", remedy)


def check_files(folder: Path, manifest: dict[str, Any], places: Iterable[Path]) -> None:
    """Raises InputError where a file is not the one that the manifest lists; places: files, or folders of them."""
    wanted = [str(place.relative_to(folder)) for place in places]
    to_come = hashes_to_come(folder)
    for name, digest in manifest["sha256"].items():
        if any(name == place or name.startswith(f"{place}/") for place in wanted):
            check_file(folder / name, {digest, to_come.get(name)})


def hashes_to_come(folder: Path) -> dict[str, Any]:
    """Returns the sha256 of files by their places, where a process ended while it moved new ones there; else none."""
    with contextlib.suppress(InputError):
        hashes = read_json(folder / READY / MANIFEST).get("sha256")
        return hashes if isinstance(hashes, dict) else {}
    return {}


def check_file(path: Path, digests: Collection[str | None], source: Path | None = None) -> None:
    """Raises InputError where a file is of no such sha256, such as one that was cut off or is a pointer of Git LFS.

    source: where it was copied from, for the message.
    """
    named = source or path
    if is_pointer(path):
        raise pointer_error(named)
    try:
        found = sha256(path)
    except OSError as error:
        raise InputError(f"cannot read {named}: {error.strerror}", COPY_AGAIN) from None
    if found not in digests:
        raise InputError(f"{named} is not the file that {MANIFEST} lists: its sha256 differs", COPY_AGAIN)
