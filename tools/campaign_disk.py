"""Disks that are full, limited or read-only, and standard output that is: a part of tools/campaign.py."""

from __future__ import annotations

import contextlib
import errno
import os
import resource
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from random import Random

from tests.support.file_events import at, from_then_on, watch
from tests.support.small_disks import SmallDisk, can_mount
from tools.campaign_faults import Fault, bundle_faults, contents, faults_of, lost
from tools.campaign_home import BUDGET, SAMPLES, SMALL, Home
from tools.campaign_runs import Ended

DISK = 256 << 20  # more than a run asks for at its start
LEFT = (0, 0, 1 << 10, 1 << 16, 1 << 20)  # bytes that are free still
ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES)
COMMANDS = ("fit", "fit", "fit", "frontier", "pick", "report", "measure", "compare")
SPOTS = ("output", "output", "cache", "log", "all")  # that lie on the disk
MEANS = ("full", "limited", "refused", "read-only", "output full")
STARTS = {"output": "out", "cache": "cache", "log": "run.log"}
UNHARMED = "notes.md"


@dataclass(frozen=True)
class Scene:
    """A command and where it writes: to the disk what was chosen for it, all else beside it."""

    command: str
    spot: str
    words: tuple[object, ...]
    output: Path
    cache: Path


def tries(home: Home, random: Random) -> Iterator[tuple[str, list[Fault]]]:
    """Yields a line about each try and its faults, for ever."""
    events: dict[str, dict[str, int]] = {}
    while True:
        command, spot = random.choice(COMMANDS), random.choice(SPOTS)
        means = random.choice(MEANS if can_mount() else ("limited", "refused", "output full"))
        if command not in events:
            with _stage(home) as (place, _):
                events[command] = _counted(home, place, _scene(home, place, command, "all"))
            home.end(place, False)
        with _stage(home) as (place, disk):
            scene = _scene(home, place, command, spot)
            story, faults = _try(home, place, scene, means, disk, events[command][spot], random)
        home.end(place, bool(faults))
        yield f"{place.name}: {command}, {spot} on the disk, {story}", faults


@contextlib.contextmanager
def _stage(home: Home) -> Iterator[tuple[Path, SmallDisk | None]]:
    """Yields the folder of a try, in which `disk` is a disk of its own where this user may mount."""
    place = home.begin()
    disk = SmallDisk(place / "disk", DISK) if can_mount() else None
    (place / "disk").mkdir(exist_ok=True)
    try:
        yield place, disk
    finally:
        if disk is not None:
            disk.close()


def _scene(home: Home, place: Path, command: str, spot: str) -> Scene:
    """Returns a command with all that it reads in its place."""
    on = {name: place / ("disk" if spot in (name, "all") else "") for name in SPOTS}
    output, cache = on["output"] / "out", on["cache"] / "cache"
    words: dict[str, tuple[object, ...]] = {
        "fit": ("fit", "model", "--device", "jetson-orin", *BUDGET["jetson-orin"], *SMALL, "--output", output),
        "frontier": ("frontier", "model", "--device", "jetson-orin", "--rungs", "2", *SMALL, "--output", output),
        "pick": ("fit", "--from", home.ladder, "--pick", "1", "--output", output),
        "report": ("report", output),
        "measure": ("measure", output),
        "compare": ("compare", "model", "--ratios", "30", "--methods", "magnitude", *SAMPLES, "--html", output),
    }
    if command in ("report", "measure"):
        shutil.copytree(home.bundle, output, symlinks=True)
        shutil.copytree(home.warm_cache, cache)
    (place / "disk" / UNHARMED).write_text("mine")
    return Scene(command, spot, ("--log-file", on["log"] / "run.log", *words[command]), output, cache)


def _counted(home: Home, place: Path, scene: Scene) -> dict[str, int]:
    """Returns how many file operations a run has, that nothing disturbs, in each spot."""
    notes, disk = place / "events", place / "disk"
    file = os.open(notes, os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def before() -> None:
        watch(disk, lambda kind, path: os.write(file, f"{path}\n".encode()) and None)

    ended = _run(home, place, scene, before)
    os.close(file)
    if ended.code not in (0, 3):
        raise SystemExit(f"{' '.join(ended.words)} failed:\n{ended.output}{ended.errors}")
    paths = notes.read_text(encoding="utf-8").splitlines()
    counts = {name: sum(path.startswith(str(disk / start)) for path in paths) for name, start in STARTS.items()}
    return {**counts, "all": len(paths)}


def _run(home: Home, place: Path, scene: Scene, before: Callable[[], None], *more: str) -> Ended:
    return home.run((*scene.words, *more), place, before=before, cache=scene.cache)


def _try(
    home: Home, place: Path, scene: Scene, means: str, disk: SmallDisk | None, events: int, random: Random
) -> tuple[str, list[Fault]]:
    """Lets a run meet the disk, then makes room and lets it go on."""
    number = random.randrange(max(events, 1))
    before, story, own = _meeting(means, place / "disk", disk, number, random), means, contents(place / "disk")
    own = {name: digest for name, digest in own.items() if name == UNHARMED}
    if means not in ("read-only", "output full"):
        story += f" from file operation {number} of {events} on"
    ended = _run(home, place, scene, before)
    faults = faults_of(ended) + lost(own, place / "disk")
    if scene.spot == "cache" and means in ("full", "refused", "read-only") and ended.code not in (0, 3):
        faults.append(Fault("cache", f"{scene.command}: exit code {ended.code} for a cache that cannot be written"))
    message = ended.errors.partition("error: cannot write")[2]
    if message and means != "output full" and "/" not in message:
        faults.append(Fault("message", f"{scene.command}: a failed write names no path"))
    if disk is not None:
        disk.make_room()
    faults += _left(place, scene)
    # There is room again.
    more = ["--resume"] if scene.command in ("fit", "frontier") else []
    if scene.command in ("pick", "compare") and scene.output.exists():
        more = ["--force"]
    again = _run(home, place, scene, lambda: None, *more)
    faults += [Fault(fault.kind, f"with room again: {fault.place}") for fault in faults_of(again, (0, 3))]
    faults += lost(own, place / "disk")
    if scene.output.is_dir():
        faults += bundle_faults(scene.output)
    return f"{story} -> {ended.code}, then {again.code}", faults


def _meeting(means: str, folder: Path, disk: SmallDisk | None, number: int, random: Random) -> Callable[[], None]:
    """Returns what makes the disk fail for a run, from the file operation of a number on."""
    left, error = random.choice(LEFT), random.choice(ERRORS)

    def limit(path: str) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (left, resource.RLIM_INFINITY))

    def refuse(path: str) -> None:
        raise OSError(error, os.strerror(error), path)

    def full_output() -> None:
        os.dup2(os.open("/dev/full", os.O_WRONLY), 1)

    return {
        "full": lambda: watch(folder, at(number, None, lambda path: disk.fill(left))),
        "limited": lambda: watch(folder, at(number, None, limit)),
        "refused": lambda: watch(folder, from_then_on(number, refuse)),
        "read-only": lambda: disk.make_read_only(),
        "output full": full_output,
    }[means]


def _left(place: Path, scene: Scene) -> list[Fault]:
    """Returns the faults of what a failed run left: half a bundle, temporary files."""
    parts = [path for path in place.rglob("*.part") if f"{scene.output.name}.work" not in path.parts]
    faults = [Fault("left behind", f"{scene.command}: {path.suffixes[-2:]} in {path.parent.name}") for path in parts]
    if scene.command == "compare":
        with contextlib.suppress(FileNotFoundError):
            if "</html>" not in scene.output.read_text(encoding="utf-8"):
                faults.append(Fault("half page", "compare --html"))
    elif scene.output.is_dir() and any(scene.output.iterdir()):
        faults += bundle_faults(scene.output)
    return faults
