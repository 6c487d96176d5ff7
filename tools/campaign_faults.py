"""Judges what a run of tools/campaign.py did: how it ended, what it printed, and what stands on the disk after it."""

from __future__ import annotations

import json
import re
import signal
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgeprune.ondevice.bundle import MANIFEST, READY, sha256
from tools.campaign_runs import Ended

MOST_PRINTED = 100_000  # bytes: a message does not echo a file
MOST_ON_DISK = 768 << 20  # the demo, which a run without a model takes, is 517 MiB in the cache
OUT_OF_MEMORY = "the memory of this machine does not suffice"
TRACEBACK = "Traceback (most recent call last)"
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
_FRAME = re.compile(r'File "[^"]*?/((?:edgeprune|tests|tools)/[^"]+)", line (\d+), in (\S+)')
_ERROR = re.compile(r"^error: .+\n.+", re.MULTILINE)
_USAGE = re.compile(r"^Usage: ", re.MULTILINE)
_MEASURED = re.compile(r"\d+(\.\d+)? (s|MiB)\b")  # in a text
_VARYING = ("created", "command", "seconds", "stages", "cross_check", "files", "log_file")


@dataclass(frozen=True, order=True)
class Fault:
    """A way in which a run was mishandled. place: the line that raised, or what was found where."""

    kind: str
    place: str


def faults_of(ended: Ended, codes: Iterable[int] = (0, 2, 3, 4), is_stopped: bool = False) -> list[Fault]:
    """Returns the faults in how a run ended and in what it printed. is_stopped: a signal may have ended it."""
    text = ended.output + ended.errors
    faults = []
    if TRACEBACK in text or "Exception ignored" in text:
        faults.append(Fault("traceback", raising_line(text)))
    elif ended.code is None:
        faults.append(Fault("hang", f"{ended.words[0]}: no end within {ended.seconds:.0f} s"))
    elif ended.code < 0 and not is_stopped:
        faults.append(Fault("signal", f"{ended.words[0]}: {signal.Signals(-ended.code).name}"))
    elif ended.code >= 0 and ended.code not in codes:
        faults.append(Fault("exit code", f"{ended.words[0]}: {ended.code}, {_first_line(ended.errors)}"))
    elif ended.code in (2, 4) or (ended.code == 3 and not ended.output.strip()):
        errors = len(_ERROR.findall(ended.errors)) + len(_USAGE.findall(ended.errors))
        if errors != 1 and not (
            ended.code == 4 and ended.output.strip()
        ):  # 4: estimates where measurements are required
            faults.append(
                Fault("message", f"{ended.words[0]}, exit code {ended.code}: {errors} messages with a remedy")
            )
    if OUT_OF_MEMORY in text:
        faults.append(Fault("memory", f"{ended.words[0]}: more than this machine has for a tiny model"))
    if match := _CONTROL.search(text):
        around = text[max(0, match.start() - 30) : match.end() + 30]
        faults.append(Fault("control character", f"{ended.words[0]}: {around!r}"))
    if ended.written > MOST_PRINTED:
        faults.append(Fault("much printed", f"{ended.words[0]}: {ended.written} bytes, {_first_line(text)[:80]}"))
    return faults + [Fault("left running", f"{ended.words[0]}: {line}") for line in ended.left]


def raising_line(text: str) -> str:
    """Returns the last line of ours in the last traceback of a text, and the name of its exception."""
    last = text[text.rfind(TRACEBACK) :]
    frames = _FRAME.findall(last)
    place = "{}:{} {}".format(*frames[-1]) if frames else "elsewhere"
    name = re.search(r"^(\w[\w.]*)(?=:|$)", last.partition("\n")[2], re.MULTILINE)
    return f"{place}: {name[0] if name else 'no name'}"


def bundle_faults(folder: Path) -> list[Fault]:
    """Returns the faults of a bundle: a file that is missing, half or of another hash, a document that is not JSON.

    Where new files are about to be moved to their places, those are the bundle's.
    """

    def place(name: str) -> Path:
        moving = folder / READY / name
        return moving if (folder / READY / MANIFEST).is_file() and moving.is_file() else folder / name

    try:
        manifest = strict_json(place(MANIFEST))
    except (OSError, ValueError) as error:
        return [Fault("half bundle", f"manifest.json: {type(error).__name__}")]
    faults = []
    for name, digest in manifest["sha256"].items():
        if not place(name).is_file():
            faults.append(Fault("half bundle", f"{_general(name)} is missing"))
        elif sha256(place(name)) != digest:
            faults.append(Fault("half bundle", f"{_general(name)} has another hash"))
    for path in folder.rglob("*"):
        name = str(path.relative_to(folder))
        if path.name.endswith(".part"):
            faults.append(Fault("left behind", _general(name)))
        elif path.suffix == ".json" and not path.is_symlink():
            faults += document_faults(path, _general(name))
    return faults


def document_faults(path: Path, name: str) -> list[Fault]:
    """Returns the fault of a file that is not JSON, or holds a number that JSON does not know."""
    try:
        strict_json(path)
    except (OSError, ValueError) as error:
        return [Fault("document", f"{name}: {error}"[:120])]
    return []


def strict_json(path: Path) -> Any:
    """Returns the content of a JSON file, maybe with a byte order mark. Raises ValueError, for NaN and Infinity too."""
    return parse_strictly(path.read_text(encoding="utf-8-sig"))


def parse_strictly(text: str) -> Any:
    """Returns the content of a JSON text. Raises ValueError, for NaN and Infinity too."""

    def refuse(name: str) -> None:
        raise ValueError(f"a bare {name}")

    return json.loads(text, parse_constant=refuse)


def contents(folder: Path) -> dict[str, str]:
    """Returns the hash of every file below a folder by its path, or where a link leads."""
    return {
        str(path.relative_to(folder)): f"-> {path.readlink()}" if path.is_symlink() else sha256(path)
        for path in sorted(folder.rglob("*"))
        if path.is_symlink() or path.is_file()
    }


def lost(before: Mapping[str, str], folder: Path) -> list[Fault]:
    """Returns a fault for every file of the user's that is gone or changed since contents() listed it."""
    after = contents(folder)
    return [
        Fault("user's file", f"{name} is {'changed' if name in after else 'gone'}")
        for name, digest in before.items()
        if after.get(name) != digest
    ]


def differences(expected: Any, found: Any, place: str = "report") -> list[str]:
    """Returns where two documents differ, but for times and durations."""
    if isinstance(expected, dict) and isinstance(found, dict):
        names = [name for name in sorted({*expected, *found}) if name not in _VARYING]
        return [line for name in names for line in differences(expected.get(name), found.get(name), f"{place}.{name}")]
    if isinstance(expected, list) and isinstance(found, list) and len(expected) == len(found):
        return [line for pair in zip(expected, found, strict=True) for line in differences(*pair, f"{place}[]")]
    if isinstance(expected, str) and isinstance(found, str):
        expected, found = (_MEASURED.sub("N", text) for text in (expected, found))
    return [] if expected == found else [place]


def on_disk(folder: Path) -> int:
    """Returns the bytes of all files below a folder."""
    return sum(path.lstat().st_size for path in folder.rglob("*") if not path.is_dir())


def _general(name: str) -> str:
    """Returns the name of a file without what differs from run to run."""
    return re.sub(r"\d+", "N", name)


def _first_line(text: str) -> str:
    """Returns the message of an error, or the first line that was printed, without a run's own folder."""
    lines = [line for line in text.splitlines() if line.strip()] or ["nothing printed"]
    line = next((line for line in lines if line.startswith("error: ")), lines[0])
    return re.sub(r"/\S*/try-\d+/", "", line)[:160]
