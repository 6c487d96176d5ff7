"""Runs that are killed at random moments and file operations, then resumed: a part of tools/campaign.py."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from random import Random

from tests.support.file_events import at, watch
from tools.campaign_faults import (
    MOST_ON_DISK,
    Fault,
    bundle_faults,
    contents,
    differences,
    faults_of,
    lost,
    on_disk,
    strict_json,
)
from tools.campaign_home import BUDGET, SMALL, Home
from tools.campaign_runs import Ended, Signal

SIGNALS = (signal.SIGKILL, signal.SIGKILL, signal.SIGTERM, signal.SIGINT)
OUTPUT, WORK = "out", "out.work"
BESIDE = ("out.old/notes.md", "out.picking/notes.md", "out.txt", "notes.md")  # the user's own
DOCUMENTS = {"fit": "report.json", "frontier": "frontier.json"}
INTERRUPTED = tuple(128 + number for number in (signal.SIGINT, signal.SIGTERM))


@dataclass(frozen=True)
class Unbroken:
    """A run that nothing disturbs: its words, how long it takes, its bundle, and its file operations by kind."""

    words: tuple[object, ...]
    seconds: float
    bundle: Path
    events: dict[str, int]
    cache: Path | None  # that every try of it begins with, if any
    is_exact: bool  # every run ends in the same figures


def tries(home: Home, random: Random) -> Iterator[tuple[str, list[Fault]]]:
    """Yields a line about each try and its faults, for ever."""
    known: dict[tuple[str, str], Unbroken] = {}
    while True:
        name = random.choice(("fit", "frontier")), random.choice(("jetson-orin",) * 4 + ("cpu",))
        if name not in known:
            known[name] = _unbroken(home, *name)
        place = home.begin()
        story, faults = _try(home, known[name], place, random)
        home.end(place, bool(faults))
        yield f"{place.name}: {' '.join(name)}, {story}", faults


def _unbroken(home: Home, command: str, device: str) -> Unbroken:
    """Returns the run of a command for a device that the killed ones are compared to."""
    cache = home.warm_cache if device == "cpu" else None
    place = home.begin()
    if cache is not None:
        shutil.copytree(cache, place / "cache")
    shape = ("--rungs", "2") if command == "frontier" else BUDGET[device]
    words = (command, "model", "--device", device, *shape, *SMALL, "--output", OUTPUT)
    ended = home.run(words, place, before=_noting(place))
    if ended.code not in (0, 3):
        raise SystemExit(f"{' '.join(map(str, words))} failed:\n{ended.output}{ended.errors}")
    kinds = (place / "events").read_text().split()
    bundle = (place / OUTPUT).rename(home.folder / f"{command}-{device}")
    home.end(place, False)
    events = {kind: kinds.count(kind) for kind in dict.fromkeys(kinds)}
    return Unbroken(words, ended.seconds, bundle, events, cache, device != "cpu")


def _noting(place: Path) -> Callable[[], None]:
    """Returns what lets a run note the kinds of its file operations."""

    def before() -> None:
        notes = os.open(place / "events", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        watch(place, lambda kind, path: os.write(notes, f"{kind}\n".encode()) and None)

    return before


def _try(home: Home, unbroken: Unbroken, place: Path, random: Random) -> tuple[str, list[Fault]]:
    """Kills a run, maybe the one that goes on with it as well, and lets the last one end."""
    words, has_older = unbroken.words, random.random() < 0.3
    if unbroken.cache is not None:
        shutil.copytree(unbroken.cache, place / "cache")
    for name in BESIDE:
        (place / name).parent.mkdir(exist_ok=True)
        (place / name).write_text(f"mine: {name}")
    if has_older:
        shutil.copytree(home.estimated, place / OUTPUT, symlinks=True)
        words = (*words, "--force")
    own = contents(place)
    older = {name: own.pop(name) for name in list(own) if name.startswith(f"{OUTPUT}/")}
    # Kill it, once or twice.
    story, faults = "an older bundle" if has_older else "no older bundle", []
    for number in range(1 + (random.random() < 0.35)):
        how, what = _stopping(unbroken, place, random)
        ended = home.run((*words, *["--resume"] * (number > 0)), place, **how)
        story += f"; {what} -> {ended.code}"
        faults += _stopped(ended, place, number > 0) + lost(own, place) + _halves(place, older)
    # Go on with it; the user has put a file into the work folder meanwhile.
    if (place / WORK).is_dir() and random.random() < 0.3:
        (place / WORK / "mine.txt").write_text("mine")
        own[f"{WORK}/mine.txt"] = contents(place)[f"{WORK}/mine.txt"]
    ended = home.run((*words, "--resume"), place)
    faults += faults_of(ended, (0,) if unbroken.is_exact else (0, 3)) + lost(own, place)
    if not faults:
        faults += _unlike(place, unbroken, own)
    return story, faults


def _stopping(unbroken: Unbroken, place: Path, random: Random) -> tuple[dict[str, object], str]:
    """Returns how a run is stopped, and that in words."""
    number = random.choice(SIGNALS)
    if random.random() < 0.4:
        kill = Signal(number, random.uniform(0, unbroken.seconds), random.random() < 0.5)
        return {"kill": kill}, f"{number.name} after {kill.seconds:.2f} s"
    kind = random.choice(list(unbroken.events))
    index = random.randrange(unbroken.events[kind])

    def before() -> None:
        watch(place, at(index, kind, lambda path: os.kill(os.getpid(), number)))

    return {"before": before}, f"{number.name} at {kind} {index}"


def _stopped(ended: Ended, place: Path, is_resumed: bool) -> list[Fault]:
    """Returns the faults in how a run ended that may have been stopped. is_resumed: whether it went on itself."""
    faults = faults_of(ended, (0, 3, *INTERRUPTED), is_stopped=True)
    if ended.code in INTERRUPTED and (place / WORK).is_dir() and not is_resumed and "--resume" not in ended.errors:
        faults.append(Fault("message", f"{ended.words[0]}: interrupted, and --resume is not named"))
    return faults


def _halves(place: Path, older: dict[str, str]) -> list[Fault]:
    """Returns the faults of what stands under the output's name: whole or nothing, and an older bundle somewhere."""
    output, replaced = place / OUTPUT, place / WORK / "replaced"
    if output.is_dir() and any(output.iterdir()):
        return bundle_faults(output)
    if older and (
        not replaced.is_dir() or contents(replaced) != {name.partition("/")[2]: older[name] for name in older}
    ):
        return [Fault("user's file", "the older bundle is gone before the new one stands there")]
    return []


def _unlike(place: Path, unbroken: Unbroken, own: dict[str, str]) -> list[Fault]:
    """Returns the faults of a bundle that a resumed run wrote, against that of a run which nothing disturbed."""
    output = place / OUTPUT
    faults = bundle_faults(output)
    allowed = {OUTPUT, "cache", "model", *(name.partition("/")[0] for name in own)}
    faults += [Fault("left behind", path.name) for path in place.iterdir() if path.name not in allowed]
    if on_disk(place) > MOST_ON_DISK:
        faults.append(Fault("disk", f"{on_disk(place) >> 20} MiB"))
    if unbroken.is_exact and not faults:
        for name, digest in _weights(unbroken.bundle).items():
            if _weights(output).get(name) != digest:
                faults.append(Fault("resumed", f"{name} differs from that of an unbroken run"))
        document = DOCUMENTS[str(unbroken.words[0])]
        reports = (strict_json(folder / document) for folder in (unbroken.bundle, output))
        faults += [Fault("resumed", f"{line} differs from that of an unbroken run") for line in differences(*reports)]
    return faults


def _weights(folder: Path) -> dict[str, str]:
    """Returns the hashes of the files of weights in a bundle."""
    hashes = strict_json(folder / "manifest.json")["sha256"]
    return {name: digest for name, digest in hashes.items() if name.endswith((".safetensors", ".npz", ".data"))}
