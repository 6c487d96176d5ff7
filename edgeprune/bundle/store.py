"""The bundle on disk: assembled aside, hashed, then renamed into place. It is complete or absent, never half.

It does not know what the files hold.
"""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from edgeprune.files import link_or_copy, writing
from edgeprune.ondevice.bundle import MANIFEST, open_bundle, point_to_rung, sha256
from edgeprune.ondevice.renewal import put_into_place, renewing
from edgeprune.pipeline.ownership import REPLACED, check_replaceable, remove_ours


def write_bundle(
    staging: Path,
    output: Path,
    rungs: Sequence[Path],
    shared: Mapping[str, Path],
    texts: Mapping[str, str | bytes],
    manifest: Mapping[str, Any],
    render: Callable[[dict[str, int]], Mapping[str, str]],
    chosen: int | None = 0,
) -> None:
    """Writes a bundle: links the rungs' folders, adds shared files and texts, hashes all and renames it into place.

    staging: the folder where it is assembled, on the same disk as output. rungs: their folders, the largest first;
    chosen: the index of the one that the links at the top lead to, None: there are no links. shared: files by their
    paths in the bundle, the tokenizer's or the codec's. texts: by their names in the bundle. manifest: all of it but
    the hashes. render(files): returns the texts that list the bundle's files with their bytes, such as the report. An
    older bundle at `output` is replaced at the very end, and only then removed. Raises WriteError, and InputError where
    what is there by then is not wholly ours.
    """
    with writing(output):
        _assemble(staging, rungs, shared, texts, manifest, render, chosen)
        _put_into_place(staging, output)


def _assemble(
    staging: Path,
    rungs: Sequence[Path],
    shared: Mapping[str, Path],
    texts: Mapping[str, str | bytes],
    manifest: Mapping[str, Any],
    render: Callable[[dict[str, int]], Mapping[str, str]],
    chosen: int | None,
) -> None:
    """Fills the staging folder with a bundle, its manifest last."""
    # Assemble the rungs.
    shutil.rmtree(staging, ignore_errors=True)

    # Files are linked, so that a rung stays whole in the work folder until the bundle is in place. Rungs share none
    # with each other: onnx refuses weights in a file of two names.
    for index, rung in enumerate(rungs):
        folder = staging / "rungs" / str(index)
        folder.mkdir(parents=True)
        for path in sorted(rung.iterdir()):
            if path.is_dir():
                shutil.copytree(path, folder / path.name, copy_function=link_or_copy)
            else:
                link_or_copy(path, folder / path.name)
    if chosen is not None:
        point_to_rung(staging, chosen)
    # Add what the rungs share and the texts; those that list the files come last.
    for name, path in shared.items():
        (staging / name).parent.mkdir(exist_ok=True)
        shutil.copyfile(path, staging / name)
    for name, text in texts.items():
        (staging / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    for name, text in render(_sizes(staging)).items():
        (staging / name).write_text(text, encoding="utf-8")
    # Hash all files.
    hashes = {name: sha256(staging / name) for name in _sizes(staging)}
    (staging / MANIFEST).write_text(json.dumps({**manifest, "sha256": hashes}, indent=2) + "\n", encoding="utf-8")


def _put_into_place(staging: Path, output: Path) -> None:
    """Renames the bundle to its place. Raises InputError where what stands there meanwhile is not ours to replace."""
    if not output.is_dir() or not any(output.iterdir()):
        staging.rename(output)
        return
    check_replaceable(output)
    old = staging.with_name(REPLACED)
    remove_ours(old)
    output.rename(old)
    try:
        staging.rename(output)
    except OSError:
        old.rename(output)
        raise
    with contextlib.suppress(OSError):  # the bundle is there; who removes the work folder tries again
        remove_ours(old)


def write_again(folder: Path, texts: Mapping[str, str]) -> None:
    """Writes texts of a finished bundle again, and their hashes: all of it or nothing. Raises as write_more."""

    def fill(staged: Path) -> None:
        for name, text in texts.items():
            (staged / name).write_text(text, encoding="utf-8")

    write_more(folder, fill)


def write_more(folder: Path, fill: Callable[[Path], None]) -> None:
    """Writes files of a finished bundle, new ones and in place of old ones, and their hashes: all of it or nothing.

    fill: writes them into a folder as they are to lie in the bundle. Raises InputError where the folder is not a bundle
    or is being measured, WriteError.
    """
    open_bundle(folder)
    with writing(folder), renewing(folder) as staged:
        fill(staged)
        put_into_place(folder)


def _sizes(folder: Path) -> dict[str, int]:
    """Returns the bytes of every file, by its path in the bundle; links to folders are not followed."""
    return {str(path.relative_to(folder)): path.stat().st_size for path in sorted(folder.rglob("*")) if path.is_file()}
