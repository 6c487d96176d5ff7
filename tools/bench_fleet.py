"""The time of a fleet against its cells one by one, and the memory of the program that drives many cells.

    python tools/bench_fleet.py FLEET.toml [--output DIR]
    python tools/bench_fleet.py --cells 1000 [--seconds 120]

The first fits every cell of a file twice on this machine's cores: one after the other by `edgeprune fit`, with as many
threads as there are cores, and all by `edgeprune fleet`, with one thread a cell. Each begins with an empty cache, in
which single fits of one model find its sensitivities again, too. The second drives cells that only sleep, for so many
seconds, and says what the driver holds at its peak.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from edgeprune.errors import BudgetError
from edgeprune.ondevice.machine import peak_bytes
from edgeprune.pipeline.fleet_file import Cell, read_fleet
from edgeprune.pipeline.run_file import toml_of

PROGRAM = (sys.executable, "-m", "edgeprune.cli")
SLEEP = 0.5  # seconds of a cell that only sleeps
AT_ONCE = 8  # such cells


def seconds_of(words: list[str], threads: int, cache: Path) -> float:
    """Returns the wall time of a command with so many threads. Raises RuntimeError where it fails."""
    begun = time.monotonic()
    environment = os.environ | {"OMP_NUM_THREADS": str(threads), "EDGEPRUNE_CACHE": str(cache)}
    done = subprocess.run([*PROGRAM, *words], env=environment, capture_output=True, text=True)
    if done.returncode not in (0, BudgetError.exit_code):
        raise RuntimeError(f"edgeprune {words[0]} ended with {done.returncode}: {done.stderr[-500:]}")
    return time.monotonic() - begun


def one_by_one(cells: list[Cell], folder: Path, cores: int) -> float:
    """Returns the wall time of all cells by `edgeprune fit`, one after the other."""
    total = 0.0
    for index, cell in enumerate(cells):
        config = folder / f"{index}.toml"
        config.write_text(toml_of({name: value for name, value in cell.options.items() if name != "model"}))
        model = str(cell.options.get("model", "demo"))
        total += seconds_of(
            ["fit", model, "--config", str(config), "--output", str(folder / f"cell-{index}")], cores, folder / "alone"
        )
        print(f"{cell.model} on {cell.target}: {total:.0f} s so far", flush=True)
    return total


def sleep(names: Mapping[str, str], on_stage: Any, **_: object) -> dict[str, Any]:
    """Stands for a cell: sleeps, and returns the row of one that met its budget."""
    from edgeprune.report.fleet import Row

    on_stage("sleeps", 0, 1)
    time.sleep(SLEEP)
    return Row(status="met", grade="intact", exit_code=0, rise_percent=0.0, headline="", **names).model_dump(
        mode="json"
    )


def drive(count: int, seconds: float, folder: Path) -> None:
    """Drives cells that only sleep, and prints what the driver holds."""
    from edgeprune.commands import fleet as module
    from edgeprune.report.fleet_terminal import fleet_table

    lines = ["[[models]]", 'model = "demo"']
    for index in range(count):
        lines += ["[[targets]]", 'device = "jetson-orin"', f'name = "target-{index}"']
    (folder / "fleet.toml").write_text("\n".join(lines))
    module.run_cell = sleep
    begun, tables = time.monotonic(), []

    class Enough(Exception):
        """The time is over."""

    def on_change(document: Any, running: Mapping[int, str]) -> None:
        start = time.monotonic()
        fleet_table(document, running, 30)
        tables.append(time.monotonic() - start)
        if time.monotonic() - begun > seconds:
            ended = sum(row.has_ended for row in document.cells)
            raise Enough(f"{ended} of {count} cells had ended")

    try:
        module.fleet(folder / "fleet.toml", output=folder / "out", on_change=on_change)
        how = "all have ended"
    except Enough as end:
        how = str(end)
    print(
        f"{count} cells that sleep, {how} after {time.monotonic() - begun:.0f} s: the driver's peak is "
        f"{peak_bytes() / 2**20:.0f} MiB; a table of 30 rows is made in {1000 * max(tables):.0f} ms at most"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path, nargs="?")
    parser.add_argument("--output", type=Path, help="a folder for both runs; default: a temporary one")
    parser.add_argument("--cells", type=int, help="drive so many cells that only sleep")
    parser.add_argument("--seconds", type=float, default=120.0)
    options = parser.parse_args()
    if (options.file is None) == (options.cells is None):
        parser.error("give FLEET.toml or --cells")
    folder = options.output or Path(tempfile.mkdtemp(prefix="bench-fleet-"))
    folder.mkdir(parents=True, exist_ok=True)
    try:
        if options.cells is not None:
            drive(options.cells, options.seconds, folder)
            return
        cores = len(os.sched_getaffinity(0))
        cells = read_fleet(options.file)
        together = seconds_of(["fleet", str(options.file), "--output", str(folder / "fleet")], 1, folder / "together")
        print(f"{len(cells)} cells as a fleet: {together:.0f} s", flush=True)
        alone = one_by_one(cells, folder, cores)
        print(f"one by one: {alone:.0f} s; the fleet takes {together / alone:.2f} of it on {cores} cores")
    finally:
        if options.output is None:
            shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
