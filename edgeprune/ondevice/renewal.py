"""New files of a finished bundle, all in their places or none, whatever ends the process.

They are written aside and hashed into a new manifest. One rename makes them complete; after it each moves to its place,
and what a kill or a full disk leaves there the next renewal moves. It does not know what the files say.
This file also runs on the device: Python 3.10, standard library only.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from edgeprune.errors import InputError
from edgeprune.files import read_json, writing
from edgeprune.ondevice.bundle import MANIFEST, MEASUREMENT, READY, open_bundle, point_to_rung, rungs_of, sha256

STAGED = ".finish"  # the folder in the bundle of files in the making


@contextlib.contextmanager
def renewing(bundle: Path) -> Iterator[Path]:
    """Locks a bundle, completes what an earlier renewal left, and yields the folder to write new files into.

    It lies in the bundle and is removed at the end. Raises InputError where the bundle is locked already or its folder
    cannot be written to.
    """
    if not os.access(bundle, os.W_OK | os.X_OK):
        raise InputError(f"cannot write to {bundle}", "Copy the bundle to a folder that you may write to.")
    # Lock the folder itself: nothing is left in it by a process that was killed.
    descriptor, staged = os.open(bundle, os.O_RDONLY), bundle / STAGED
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(
                f"the bundle {bundle} is being measured already", "Wait for the other measurement to end."
            ) from None
        except OSError:
            pass  # a file system without locks
        try:
            shutil.rmtree(staged, ignore_errors=True)
            with writing(bundle):
                _settle(bundle)
                staged.mkdir()
            yield staged
        finally:
            shutil.rmtree(staged, ignore_errors=True)
    finally:
        os.close(descriptor)


def put_into_place(bundle: Path) -> None:
    """Moves the files that were written aside to their places in the bundle, with a manifest that has their hashes."""
    staged = bundle / STAGED
    # A manifest holds their hashes. The rename makes all of them complete at once.
    manifest = open_bundle(bundle)
    manifest["sha256"].update((str(path.relative_to(staged)), sha256(path)) for path in _files(staged))
    (staged / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
    staged.rename(bundle / READY)
    _settle(bundle)


def _settle(bundle: Path) -> None:
    """Moves complete files into their places, the manifest last; the next call goes on where a kill interrupted it."""
    ready = bundle / READY
    if not ready.is_dir():
        return
    for path in sorted(_files(ready), key=lambda path: path.name == MANIFEST):
        if path.name == MANIFEST:
            _point_to_measured(bundle)
        target = bundle / path.relative_to(ready)
        target.parent.mkdir(parents=True, exist_ok=True)
        path.replace(target)
    shutil.rmtree(ready)


def _point_to_measured(bundle: Path) -> None:
    """Points the links at the bundle's top to the rung that was measured, if any was."""
    with contextlib.suppress(InputError, OSError):  # no measurement; a file system without links
        rung = read_json(bundle / MEASUREMENT).get("rung")
        if rung in rungs_of(bundle):
            point_to_rung(bundle, rung)


def _files(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]
