"""fleet(): fits of several models for several targets on a cluster, whose cells share what they have in common.

A cell is an ordinary fit: the same journal, bundle and exit code. Where its node dies it goes on elsewhere from the
journal, so all nodes see the fleet's folder. A cell that is measured on the processor of its node has the node to
itself.
"""

from __future__ import annotations

import fcntl
import json
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgeprune import __version__
from edgeprune.commands.cells import run_cell
from edgeprune.commands.cluster import Cluster, Task
from edgeprune.commands.result import Result
from edgeprune.errors import InputError
from edgeprune.files import at_home, read_json, write_text, writing
from edgeprune.model.decoder import Decoder
from edgeprune.model.load import load_outline
from edgeprune.ondevice.runtimes import RUNTIMES
from edgeprune.pipeline.fleet_file import Cell, read_fleet
from edgeprune.pipeline.outlook import Outlook, default_memory, outlook
from edgeprune.pipeline.provenance import now
from edgeprune.pipeline.rates import Rates
from edgeprune.pipeline.request import Request, request_of
from edgeprune.profiles import DeviceProfile, in_precision, profile_of
from edgeprune.report.fleet import FAILED, FLEET_FILE, FLEET_PAGE, Fleet, Row
from edgeprune.report.fleet_page import render_fleet

SHARED, LOCK, OPTIONS = "shared", "lock", "options.json"
POLL_SECONDS = 0.5
PAGE_SECONDS = 10.0  # between two pages of a fleet that goes on
OnChange = Callable[[Fleet, Mapping[int, str]], None]
"""on_change(document, running): called again and again; running: what the cells do that run, by their places in it."""


@dataclass(frozen=True)
class PlannedCell:
    """A cell, and what it takes of the machine that runs it: estimated, with default options."""

    cell: Cell
    outlook: Outlook

    @property
    def memory(self) -> int:
        """Returns the bytes of its peak."""
        return max(self.outlook.memory.values())

    def as_json(self) -> dict[str, Any]:
        """Returns names, options and what it takes."""
        return {
            "model": self.cell.model,
            "target": self.cell.target,
            "options": dict(self.cell.options),
            "source": "estimated",
            "seconds": self.outlook.seconds,
            "memory_bytes": self.memory,
            "disk_bytes": self.outlook.disk,
        }


def plan_fleet(file: str | Path) -> Result[list[PlannedCell]]:
    """Returns the cells of a file with what each takes; nothing is started and no weight read. Raises InputError."""
    rates: Rates | None = None
    planned = []
    for cell, request, profile, decoder in _resolved(read_fleet(Path(at_home(file)))):
        precision = request.precision or profile.precision
        told = outlook(decoder, in_precision(profile, precision), precision, rates)
        rates = told.rates
        planned.append(PlannedCell(cell, told))
    return Result(None, planned)


def fleet(
    file: str | Path,
    *,
    output: str | Path | None = None,
    address: str | None = None,
    cpus: int = 1,
    resume: bool = False,
    on_change: OnChange | None = None,
) -> Result[Fleet]:
    """Fits every cell of a file, and writes fleet.json, a page and a bundle for each cell.

    output: the fleet's folder, on a file system that all nodes share; by default FILE-fleet beside the caller. address:
    of a running cluster, `auto` for the one of this machine; None: this machine alone. cpus: cores of a cell. resume:
    go on with a fleet in that folder; cells that ended with a verdict stay. A cell that fails is a row with its reason.
    Raises InputError, and EngineError for a cluster that does not answer.
    """
    path = Path(at_home(file))
    cells = read_fleet(path)
    if cpus < 1:
        raise InputError(f"--cpus {cpus} is less than 1", "Give the cores that a cell may use.")
    folder = (Path(at_home(output)) if output is not None else Path(f"{path.stem}-fleet")).absolute()
    _check_place(folder, resume)
    tasks = [_task(*one, folder, cpus) for one in _resolved(cells)]
    with Cluster(address) as cluster, writing(folder), _holding(folder):
        begun, created, drawn = time.monotonic(), now(), 0.0
        rows = [_earlier(folder, cell) or Row(model=cell.model, target=cell.target) for cell in cells]
        todo = [index for index, row in enumerate(rows) if not row.has_ended]

        def document() -> Fleet:
            return Fleet(edgeprune=__version__, created=created, seconds=time.monotonic() - begun, cells=rows)

        _write(folder, document())
        cluster.check(folder / FLEET_FILE)
        for ended, stages in cluster.run([tasks[index] for index in todo], POLL_SECONDS):
            for one in ended:
                index = todo[one.index]
                rows[index] = _row(cells[index], one.result, one.reason)
                _keep(folder, cells[index], rows[index])
            if ended:
                _write(folder, document())
                if time.monotonic() - drawn > PAGE_SECONDS:
                    _draw(folder, document())
                    drawn = time.monotonic()
            if on_change is not None:
                on_change(document(), {todo[index]: str(stage) for index, stage in stages.items()})
        if all(row.status is not None for row in rows):
            shutil.rmtree(folder / SHARED, ignore_errors=True)  # else --resume may use it
        _write(folder, document())
        _draw(folder, document())
    return Result(folder, document())


def _resolved(cells: list[Cell]) -> Iterator[tuple[Cell, Request, DeviceProfile, Decoder]]:
    """Yields each cell with its request, its device and its model's shape. Raises InputError."""
    shapes: dict[Any, Decoder] = {}
    for cell in cells:
        request = request_of(**cell.options)
        key = request.model, request.hints
        if key not in shapes:
            shapes[key] = load_outline(*key)[1].with_format(None)
        yield cell, request, profile_of(request.device, request.profile), shapes[key]


def _task(cell: Cell, request: Request, profile: DeviceProfile, decoder: Decoder, folder: Path, cpus: int) -> Task:
    """Returns a cell as a task: with the memory that it is counted to hold, and all cores where it times a
    processor."""
    arguments = {
        "names": {"model": cell.model, "target": cell.target},
        "options": dict(cell.options),
        "folder": folder,
        "shared": folder / SHARED,
    }
    is_here, on_gpu = request.target is None, RUNTIMES[profile.engine].on_gpu
    memory = max(default_memory(decoder).values())
    return Task(run_cell, arguments, None if is_here and not on_gpu else cpus, memory, gpu=is_here and on_gpu)


def _check_place(folder: Path, resume: bool) -> None:
    """Raises InputError where the fleet's folder is taken, but for a fleet's that is to be gone on with."""
    if folder.exists() and not folder.is_dir():
        raise InputError(f"the output {folder} is a file", "Name a directory that does not exist yet.")
    is_fleet = (folder / FLEET_FILE).is_file()
    if folder.is_dir() and any(folder.iterdir()) and not (resume and is_fleet):
        remedy = "Go on with --resume, or name another with --output." if is_fleet else "Name another with --output."
        raise InputError(f"the output directory {folder} is not empty", remedy)


@contextmanager
def _holding(folder: Path) -> Iterator[None]:
    """Makes the fleet's folder and keeps other fleets out of it. Raises InputError where one works there."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / LOCK).open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(
                f"another fleet works in {folder}", "Wait until it ends, or name another with --output."
            ) from None
        yield


def _row(cell: Cell, result: Mapping[str, Any] | None, reason: str | None) -> Row:
    """Returns the row of a cell that ended: what its fit made of it, or why no node ran it to its end."""
    if reason is None:
        return Row.model_validate(result)
    return Row(model=cell.model, target=cell.target, exit_code=FAILED, reason=reason)


def _keep(folder: Path, cell: Cell, row: Row) -> None:
    """Keeps the row of a cell that ended with a bundle beside that, with its options, for --resume."""
    if row.bundle is not None:
        text = json.dumps({"options": dict(cell.options), "row": row.model_dump(mode="json")}, indent=2)
        write_text(_kept(folder, cell), text + "\n")


def _earlier(folder: Path, cell: Cell) -> Row | None:
    """Returns the row of a cell that an earlier run of the fleet ended with the same options; None: there is none, or
    it is damaged and the cell itself finds what it has."""
    if not _kept(folder, cell).is_file() or not (folder / cell.folder).is_dir():
        return None
    with suppress(InputError, KeyError, ValueError):
        kept = read_json(_kept(folder, cell))
        if kept["options"] == json.loads(json.dumps(dict(cell.options))):
            return Row.model_validate(kept["row"])
    return None


def _kept(folder: Path, cell: Cell) -> Path:
    return (folder / cell.folder).with_name(f"{cell.target}.{OPTIONS}")


def _write(folder: Path, document: Fleet) -> None:
    write_text(folder / FLEET_FILE, document.model_dump_json(indent=2) + "\n")


def _draw(folder: Path, document: Fleet) -> None:
    write_text(folder / FLEET_PAGE, render_fleet(document, folder.name))
