"""Whose is it? What may be removed or replaced of a folder: the files that our own mark there lists, and no other.

A bundle's mark is its manifest with hashes, a work folder's the first line of its journal; each stage in it has a list.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from edgeprune import __version__
from edgeprune.errors import InputError
from edgeprune.files import parse_json, read_json, write_text
from edgeprune.ondevice.bundle import MANIFEST, READY, hashes_to_come, linked_folders, rungs_of, sha256
from edgeprune.ondevice.renewal import STAGED

JOURNAL, LOCK = "journal.jsonl", "lock"
LOCK_MARK = "edgeprune, process "  # the lock's content begins with it
MADE = "made.json"  # in the folder of a stage: its files with their sha256, or null while it is being filled
REPLACED = "replaced"  # the older bundle, until the new one stands in its place
SCRATCH = "scratch"  # of a stage that keeps no files
TRANSIENT = (SCRATCH, "rungs", "bundle")  # and what a bundle is put together in
BUILT_LATER = ("engine/", "check-")  # in the folder of a stage that is complete
SHOWN = 5  # foreign files in a message
_PART = re.compile(r"(\.\d+)?\.part$")


def is_bundle(folder: Path) -> bool:
    """Returns whether the folder bears a bundle's mark: a manifest of edgeprune's with hashes."""
    try:
        manifest = read_json(folder / MANIFEST)
    except InputError:
        return False
    return isinstance(manifest.get("edgeprune"), str) and isinstance(manifest.get("sha256"), dict)


def foreign_in_bundle(folder: Path) -> list[str]:
    """Returns the files in a bundle that are not ours, or no longer: not in the manifest, or of another hash.

    The links at its top are ours, and what copies of a bundle make of them.
    """
    hashes, to_come = read_json(folder / MANIFEST)["sha256"], hashes_to_come(folder)
    linked = {name for rung in rungs_of(folder) for name in linked_folders(folder, rung)}
    foreign = []
    for path in _files(folder):
        name = str(path.relative_to(folder))
        listed, top = _PART.sub("", name), name.partition("/")[0]
        if name == MANIFEST or top in (READY, STAGED) or (listed != name and listed in {*hashes, MANIFEST}):
            continue
        if listed in linked and _leads_to_rung(path, listed):
            continue
        if not path.is_symlink():
            known = [hashes.get(name), to_come.get(name)]
            if sha256(path) in [*known, *(hashes.get(f"rungs/{rung}/{name}") for rung in rungs_of(folder))]:
                continue
        foreign.append(f"{name} (changed)" if name in hashes else name)
    return foreign


def _leads_to_rung(path: Path, name: str) -> bool:
    """Returns whether a link, or the text that some copies make of it, leads to that folder of a rung."""
    with contextlib.suppress(OSError, UnicodeDecodeError):
        target = str(path.readlink()) if path.is_symlink() else path.read_text(encoding="utf-8")[:100]
        return re.fullmatch(rf"rungs/\d+/{re.escape(name)}\s*", target) is not None
    return False


def is_work(folder: Path) -> bool:
    """Returns whether the folder bears a work folder's mark: the journal's header, before that its lock alone."""
    try:
        with (folder / JOURNAL).open("rb") as file:
            header = parse_json(file.readline(1 << 20), JOURNAL)
        return isinstance(header.get("edgeprune"), str)
    except InputError:
        return False
    except OSError:
        names = {path.name for path in folder.iterdir()}
        return JOURNAL not in names and (_is_our_lock(folder / LOCK) or all(map(_is_mark, names)))


def _is_our_lock(path: Path) -> bool:
    with contextlib.suppress(OSError), path.open("rb") as file:
        return file.read(len(LOCK_MARK)) == LOCK_MARK.encode()
    return False


def _is_mark(name: str) -> bool:
    """Returns whether a file of a work folder is its lock or journal, or what a kill left of a new one."""
    return _PART.sub("", name) in (JOURNAL, LOCK)


def foreign_in_work(folder: Path) -> list[str]:
    """Returns the files in a work folder that no run made."""
    foreign: list[str] = []
    for path in sorted(folder.iterdir()):
        if path.is_symlink() or not path.is_dir():
            foreign += [] if _is_mark(path.name) else [path.name]
        elif path.name == REPLACED and is_bundle(path):
            foreign += [f"{REPLACED}/{name}" for name in foreign_in_bundle(path)]
        elif path.name not in TRANSIENT:
            made = _made(path)
            names = {str(file.relative_to(path)) for file in _files(path)}
            if made:  # what an engine is built into afterwards
                names = {name for name in names if not name.startswith(BUILT_LATER)}
            foreign += [f"{path.name}/{name}" for name in sorted(names - (names if made is None else made))]
    return foreign


def _made(folder: Path) -> set[str] | None:
    """Returns the files of a stage's folder, none where it is not ours; None: all, it is being filled."""
    with contextlib.suppress(InputError, KeyError, TypeError):
        files = read_json(folder / MADE)["files"]
        return None if files is None else {MADE, *map(str, files)}
    return set()


def mark_stage(folder: Path, is_complete: bool) -> None:
    """Marks the folder of a stage as ours: with the sha256 of its files where it is complete."""
    hashes = {str(path.relative_to(folder)): sha256(path) for path in _files(folder) if path.name != MADE}
    files = hashes if is_complete else None
    write_text(folder / MADE, json.dumps({"edgeprune": __version__, "files": files}))


def is_whole_stage(folder: Path) -> bool:
    """Returns whether the folder of a complete stage still has all its files as they were."""
    try:
        files = read_json(folder / MADE)["files"]
        return all(sha256(folder / name) == digest for name, digest in files.items())
    except (InputError, KeyError, AttributeError, OSError):
        return False


def remove_ours(folder: Path, foreign: Sequence[str] = ()) -> None:
    """Removes a folder of ours but for the foreign files.

    Marks go last, its own and those of the folders in it, so that a kill leaves ours what is left.
    """
    marks = [folder / name for name in (MANIFEST, JOURNAL, LOCK)]
    kept = {*marks, *(folder / name.removesuffix(" (changed)") for name in foreign)}
    for path in sorted(_files(folder), key=lambda path: path.name in (MADE, MANIFEST)):
        if path not in kept:
            path.unlink(missing_ok=True)
    for path in sorted((path for path in folder.rglob("*") if path.is_dir() and not path.is_symlink()), reverse=True):
        with contextlib.suppress(OSError):  # it holds what is kept
            path.rmdir()
    for mark in marks:
        mark.unlink(missing_ok=True)
    with contextlib.suppress(OSError):
        folder.rmdir()


def check_bundle(output: Path) -> None:
    """Raises InputError where an output that is not empty is not a bundle."""
    if not is_bundle(output):
        raise InputError(
            f"the output directory {output} is not empty and is not a bundle: nothing else is ever replaced",
            "Name another directory with --output.",
        )


def check_replaceable(output: Path) -> None:
    """Raises InputError, with the list, where an output that is not empty is not wholly ours to replace."""
    check_bundle(output)
    if foreign := foreign_in_bundle(output):
        raise InputError(
            f"the bundle {output} holds files that are not of it: {listed(foreign)}",
            "Move them elsewhere, or name another directory with --output; nothing was changed.",
        )


def check_work(work: Path, force: bool) -> None:
    """Raises InputError where the place of the work folder is taken by what is not ours.

    force: whether the work folder is to be emptied, so that foreign files in it count too.
    """
    remedy = "Move it elsewhere, or name another directory with --output; nothing was changed."
    if work.is_symlink() or (work.exists() and not work.is_dir()):
        raise InputError(
            f"{work}, where the run keeps its work, is a {'link' if work.is_symlink() else 'file'}", remedy
        )
    if not work.is_dir():
        return
    if not is_work(work):
        raise InputError(f"{work}, where the run keeps its work, is not a work folder of edgeprune", remedy)
    if force and (foreign := foreign_in_work(work)):
        raise InputError(f"the work folder {work} holds files that no run made: {listed(foreign)}", remedy)


def listed(names: list[str]) -> str:
    """Returns the first of some names for a message, and how many more there are."""
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more


def _files(folder: Path) -> Iterator[Path]:
    """Yields everything in a folder that is no folder, in order; links are not followed."""
    return (path for path in sorted(folder.rglob("*")) if path.is_symlink() or not path.is_dir())
