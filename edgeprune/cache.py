"""The folder of what edgeprune can make again: converted models, probed figures, statistics, kernel timings.

It is never needed: what cannot be read is made again, and where nothing can be written the work goes on without. This
file also runs on the device: Python 3.10, standard library alone. It does not know what is kept there.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import TypeVar

from edgeprune.files import WriteError, write_bytes, writing

_LOG = logging.getLogger("edgeprune")
Kept = TypeVar("Kept")


def cache_folder() -> Path:
    """Returns the user's cache folder, which the environment variable EDGEPRUNE_CACHE overrides.

    For a user who has none it is a folder that goes when the process ends.
    """
    if folder := os.environ.get("EDGEPRUNE_CACHE"):
        return Path(folder)
    # A user without an entry, or without a home; a device, which lacks the module.
    with contextlib.suppress(KeyError, RuntimeError, OSError, ImportError):
        import platformdirs

        folder = Path(platformdirs.user_cache_dir("edgeprune"))
        if folder.is_absolute():
            return folder
    _warn("this user has no folder for a cache")
    return temporary_folder()


def cached(
    path: Path, decode: Callable[[bytes], Kept], make: Callable[[], Kept], encode: Callable[[Kept], bytes]
) -> Kept:
    """Returns what a file of the cache holds, else makes it and keeps it there.

    decode: raises any exception for bytes that are not what make would return.
    """
    if (data := read_cached(path)) is not None:
        try:
            return decode(data)
        except Exception as error:  # whatever a reader makes of damaged bytes
            _LOG.debug("%s is damaged and made again: %s", path, error)
    made = make()
    write_cached(path, encode(made))
    return made


def read_cached(path: Path) -> bytes | None:
    """Returns the bytes of a file of the cache; None where it is not there or cannot be read."""
    try:
        return path.read_bytes()
    except OSError:
        return None


def write_cached(path: Path, data: bytes) -> None:
    """Writes a file of the cache at once; where that cannot be done, a warning says so once and nothing is written."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_bytes(path, data)
    except (OSError, WriteError) as error:
        _warn_of(path.parent, error)


def cached_folder(path: Path, fill: Callable[[Path], None]) -> Path:
    """Returns a folder of the cache that `fill` filled with files; where they are not all there, it does so now.

    It is complete or absent, never half. Where the cache cannot be written it is a temporary folder, which goes when
    the process ends. Raises what fill raises, and WriteError where not even that can be written.
    """
    if _is_whole(path):
        return path
    try:
        return _filled(path, fill)
    except (OSError, WriteError) as error:
        _warn_of(path.parent, error)
    return _filled(temporary_folder() / path.name, fill)


@lru_cache(maxsize=1)
def temporary_folder() -> Path:
    """Returns a folder that goes when the process ends."""
    folder = tempfile.mkdtemp(prefix="edgeprune-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return Path(folder)


def _filled(path: Path, fill: Callable[[Path], None]) -> Path:
    """Fills a folder beside its place and renames it; another process may have been faster."""
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        with writing(path):
            shutil.rmtree(part, ignore_errors=True)
            part.mkdir(parents=True)
            fill(part)
            sizes = {file.name: file.stat().st_size for file in part.iterdir()}
            write_bytes(_list_of(path), json.dumps(sizes).encode())
            if path.is_dir() and not _is_whole(path):
                shutil.rmtree(path)
            try:
                part.rename(path)
            except OSError:
                if not _is_whole(path):
                    raise
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return path


def _list_of(folder: Path) -> Path:
    """Returns the file beside a folder that lists the bytes of its files."""
    return folder.with_name(f"{folder.name}.files")


def _is_whole(folder: Path) -> bool:
    """Returns whether a folder was filled and still has all its files."""
    try:
        sizes = json.loads(_list_of(folder).read_bytes())
        return bool(sizes) and all((folder / name).stat().st_size == size for name, size in sizes.items())
    except (OSError, ValueError, AttributeError, RecursionError):
        return False


def _warn_of(folder: Path, error: OSError | WriteError) -> None:
    reason = error.message.rpartition(": ")[2] if isinstance(error, WriteError) else error.strerror or error
    named = cache_folder() if folder.is_relative_to(cache_folder()) else folder
    _warn(f"the cache {named} cannot be written: {reason}")


@lru_cache
def _warn(text: str) -> None:
    """Says once that there is no cache."""
    _LOG.warning("%s, going on without (EDGEPRUNE_CACHE names another)", text)
