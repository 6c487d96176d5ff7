"""One reader of small files, whoever wrote them, and one place where a failed write becomes an error of ours.

This file also runs on the device: Python 3.10, standard library alone. It does not know what the files mean.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import re
import resource
import shutil
import tempfile
from collections.abc import Iterator
from math import isfinite
from pathlib import Path
from typing import Any, NoReturn

from edgeprune.errors import EdgepruneError, InputError

MOST_BYTES = 64 << 20  # of a document; a tokenizer's are the largest
RESTORE = "Restore the file."
_FULL = (errno.ENOSPC, errno.EDQUOT)
_OF_WRITES = (*_FULL, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO, errno.ENAMETOOLONG)
_LIBRARY_ERROR = re.compile(r"os error (\d+)|\[Errno (\d+)\]|\d+ requested and \d+ written")  # Rust, shutil, numpy
_HALF = re.compile(r"\\u[dD][89a-fA-F]")
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
_KINDS = {dict: "object", list: "list", str: "text"}
_WORDS = {dict: "an object", list: "a list", str: "a text", bool: "true or false", int: "a whole number"}
_WORDS |= {float: "a finite number", type(None): "null", Any: "of finite numbers"}
_OF_MARK = 4096  # bytes in which a mark stands
_POINTER = b"version https://git-lfs.github.com/spec/"


class WriteError(InputError):
    """A file that cannot be written: a full disk, a quota, a folder that is read-only."""


def read_text(path: Path, remedy: str = RESTORE, most_bytes: int = MOST_BYTES) -> str:
    """Returns the text of a UTF-8 file, without a byte order mark.

    Raises InputError, which names the file, where it cannot be read, is no UTF-8, or holds more than most_bytes.
    """
    try:
        with path.open("rb") as file:
            data = file.read(most_bytes + 1)
        if len(data) > most_bytes:
            raise InputError(f"{path} is larger than {most_bytes >> 20} MiB", remedy)
        if data.startswith(_POINTER):
            raise pointer_error(path)
        return data.decode("utf-8-sig")
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror or error}", remedy) from None
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 text: byte {error.start} is no character", remedy) from None


def read_json(path: Path, kind: type = dict, remedy: str = RESTORE, most_bytes: int = MOST_BYTES) -> Any:
    """Returns the content of a JSON file whose top level is of a kind: dict, list, or object for any.

    Raises InputError, which names the file, for all that it could be instead.
    """
    return parse_json(read_text(path, remedy, most_bytes), str(path), kind, remedy)


def parse_json(text: str | bytes, name: str, kind: type = dict, remedy: str = RESTORE, finite: bool = False) -> Any:
    """Returns the content of a JSON text; name: of its origin, for the message. Raises InputError as read_json.

    finite: a bare NaN or Infinity, which Python takes and JSON does not know, is an error.
    """
    try:
        content = json.loads(text, parse_constant=_refuse if finite else None)
        if _HALF.search(text if isinstance(text, str) else text.decode("utf-8", "replace")):
            json.dumps(content, ensure_ascii=False).encode()  # half a character, which no file can hold
    except RecursionError:
        raise InputError(f"{name} is not JSON that can be read: it is nested too deeply", remedy) from None
    except ValueError as error:
        raise InputError(f"{name} is not JSON: {error}", remedy) from None
    if not isinstance(content, kind):
        raise InputError(f"{name} is not a JSON {_KINDS.get(kind, kind.__name__)}", remedy)
    return content


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"a number is {constant}")


def checked(value: Any, form: Any, name: str, remedy: str = RESTORE) -> Any:
    """Returns a JSON document of a form; name: of its origin, for the message.

    form: a type, a union of types (float: any finite number; Any: all but numbers that are not finite), a list of one
    form for all items, or a dict of forms by key, of which all must be there and no others but where a key is `...`.
    Raises InputError that names the field.
    """
    if reason := _difference(value, form, ""):
        raise InputError(f"{name}: {reason}", remedy)
    return value


def _difference(value: Any, form: Any, place: str) -> str | None:
    """Returns the first difference of a value from a form in words; None where there is none."""
    if isinstance(form, dict):
        keys = [key for key in form if key is not ...]
        if not isinstance(value, dict):
            return f"{place or 'it'} is not {_WORDS[dict]}"
        if missing := [key for key in keys if key not in value]:
            return f"{_joined(place, missing[0])} is missing"
        if ... not in form and (unknown := [key for key in value if key not in form]):
            return f"{_joined(place, unknown[0])} is not known to this version"
        inner = ((_joined(place, key), item, form.get(key, form.get(...))) for key, item in value.items())
    elif isinstance(form, list):
        if not isinstance(value, list):
            return f"{place or 'it'} is not {_WORDS[list]}"
        inner = ((f"{place}[{index}]", item, form[0]) for index, item in enumerate(value))
    else:
        return None if _is_one(value, form) else f"{place or 'it'} is not {_in_words(form)}"
    return next((reason for name, item, kind in inner if (reason := _difference(item, kind, name))), None)


def _joined(place: str, key: str) -> str:
    return f"{place}.{printable(key, 60)}" if place else printable(key, 60)


def _is_one(value: Any, form: Any) -> bool:
    """Returns whether a value is of a type or of one of a union; true is no number, and infinity none of ours."""
    if form is Any:
        return _is_finite(value)
    kinds = getattr(form, "__args__", (form,))
    if isinstance(value, bool):
        return bool in kinds
    if isinstance(value, int | float) and float in kinds:
        return isfinite(value)
    return isinstance(value, kinds)


def _is_finite(value: Any) -> bool:
    """Returns whether a document of any form holds no infinity and no NaN, which no file of ours may hold."""
    try:
        json.dumps(value, allow_nan=False)
    except (ValueError, RecursionError):
        return False
    return True


def _in_words(form: Any) -> str:
    return " or ".join(_WORDS[kind] for kind in getattr(form, "__args__", (form,)))


def is_pointer(path: Path) -> bool:
    """Returns whether a file is a pointer of Git LFS, which stands for the file until it is fetched."""
    try:
        with path.open("rb") as file:
            return file.read(len(_POINTER)) == _POINTER
    except OSError:
        return False


def pointer_error(path: Path) -> InputError:
    """Returns the error for a pointer of Git LFS where the file itself is needed."""
    return InputError(f"{path} is a pointer of Git LFS, not the file itself", "Run `git lfs pull` in its repository.")


def printable(text: object, most: int = 300) -> str:
    """Returns a stranger's text for a message: control characters become spaces, and the middle of a long one goes."""
    clean = _CONTROL.sub(" ", str(text))
    return clean if len(clean) <= most else f"{clean[: most // 2]} ... {clean[-most // 2 :]}"


def at_home(path: str | Path) -> str:
    """Returns a path with the user's home in place of a `~` that no shell has replaced, as within quotes."""
    return os.path.expanduser(path)  # noqa: PTH111 (Path's own raises for an unknown user)


def check_text(value: object, name: str) -> None:
    """Raises InputError for an option's text or path that no file and no report can hold: not UTF-8, or with NUL."""
    text = os.fsdecode(value) if isinstance(value, os.PathLike) else value
    if isinstance(text, str) and ("\0" in text or any("\ud800" <= character <= "\udfff" for character in text)):
        raise InputError(f"{name} {printable(ascii(text))} is not UTF-8 text", "Rename it, or write it in UTF-8.")


def check_output_file(path: Path, option: str, mark: str, force: bool) -> None:
    """Raises InputError where a file cannot become the one that an option names; called before any long work.

    A file that is there is replaced only where force is set and its beginning holds the mark of the files that we write
    there: nobody else's is lost.
    """
    if not path.absolute().parent.is_dir():
        raise InputError(f"there is no folder {path.absolute().parent}", f"Create it, or name another {option}.")
    if not (path.exists() or path.is_symlink()):
        return
    if not force:
        raise InputError(f"{path} exists already", f"Name another {option}, or replace it with --force.")
    is_ours = False  # as long as it cannot be read; a pipe would be waited for
    if path.is_file():
        with contextlib.suppress(OSError), path.open("rb") as file:
            is_ours = mark.encode() in file.read(_OF_MARK)
    if not is_ours:
        raise InputError(f"{path} was not written by edgeprune", f"Name another {option}: --force replaces ours alone.")


def write_text(path: Path, text: str) -> None:
    """Writes a file at once, in UTF-8: a reader finds the old text or the new one, never half. Raises WriteError."""
    write_bytes(path, text.encode("utf-8", "backslashreplace"))


def write_bytes(path: Path, data: bytes) -> None:
    """Writes a file at once: a reader finds the old bytes or the new ones, never half of them. Raises WriteError."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.part")
    with writing(path):
        try:
            temporary.write_bytes(data)
            temporary.replace(path)
        finally:
            with contextlib.suppress(OSError):
                temporary.unlink()


@contextlib.contextmanager
def held(path: Path) -> Iterator[None]:
    """Holds the lock beside a file or folder, for which it waits; it is free again when the block or the process ends.

    Where the file system has no locks, all go on at once.
    """
    with path.with_name(f"{path.name}.lock").open("w") as lock:
        with contextlib.suppress(OSError):
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def link_or_copy(source: Path | str, target: Path | str) -> None:
    """Makes a hard link to a file, or a copy where the file system has no links; a link is followed."""
    try:
        os.link(Path(source).resolve(), target)
    except FileExistsError:
        raise
    except OSError:
        shutil.copyfile(source, target)


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turns every failed write within it into a WriteError, of this package and of the libraries that it calls.

    path: what is written, or the folder of it, for the message where the failure names no file.
    """
    try:
        yield
    except EdgepruneError:
        raise
    except Exception as error:
        if (number := _number(error)) is None:
            raise
        raise _error(number, getattr(error, "filename", None) or path) from error


@contextlib.contextmanager
def scratch_folder(parent: Path | None = None, prefix: str = "edgeprune-") -> Iterator[Path]:
    """Yields a folder that goes with the block, in `parent`, else where the system keeps such files.

    Raises WriteError, which names that place, where it cannot be made, and for failed writes within the block.
    """
    try:
        place = parent or Path(tempfile.gettempdir())
    except FileNotFoundError:
        raise WriteError(
            "there is no folder for temporary files that can be written", "Name one with the variable TMPDIR."
        ) from None
    with writing(place), tempfile.TemporaryDirectory(dir=place, prefix=prefix) as name:
        yield Path(name)


def _number(error: BaseException) -> int | None:
    """Returns the system's number of a failed write; None for any other error."""
    number = getattr(error, "errno", None)
    if number is None and (match := _LIBRARY_ERROR.search(str(error))):
        is_limited = resource.getrlimit(resource.RLIMIT_FSIZE)[0] != resource.RLIM_INFINITY
        number = int(match[1] or match[2] or (errno.EFBIG if is_limited else errno.ENOSPC))
    return number if number in _OF_WRITES else None


def _error(number: int, path: object) -> WriteError:
    """Returns the error of a failed write with what is free there."""
    reason = os.strerror(number)
    if number == errno.EFBIG:
        return WriteError(f"cannot write {path}: {reason}", "Raise the limit on the size of files (ulimit -f).")
    if number in _FULL:
        with contextlib.suppress(OSError, ValueError):
            folder = next(parent for parent in Path(str(path)).absolute().parents if parent.is_dir())
            reason += f", {shutil.disk_usage(folder).free / 2**20:.1f} MiB are free"
        return WriteError(f"cannot write {path}: {reason}", "Free some space there, or name a place on another disk.")
    return WriteError(f"cannot write {path}: {reason}", "Make it writable, or name another place.")
