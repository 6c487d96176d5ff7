"""Tries to make edgeprune fail and counts what was mishandled; exit code 1 where anything was.

    python tools/campaign.py --minutes 15 --seed 0                  # all parts in turn
    python tools/campaign.py --part kills --minutes 15 --seed 0     # runs that are killed and resumed
    python tools/campaign.py --part disk --minutes 15 --seed 0      # full disks, quotas, read-only folders
    python tools/campaign.py --part fuzz --minutes 15 --seed 0      # damaged files of every format
    python tools/campaign.py --part device --minutes 15 --seed 0    # a device that lies

It makes its own small random models. Mishandled is: a traceback, an exit code that is not documented, a hang, a crash;
half a bundle, a file of the user's that is lost or changed, a document that cannot be read; a control character
printed; exit code 0 without what it promises. The same seed tries the same things; where it is stopped by time, the
number of tries differs. --keep leaves the folders of mishandled tries.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from random import Random

from tools import campaign_device, campaign_disk, campaign_fuzz, campaign_kills
from tools.campaign_faults import Fault
from tools.campaign_home import Home
from tools.campaign_runs import Runs

Tries = Iterator[tuple[str, list[Fault]]]
PARTS: dict[str, Callable[[Home, Random], Tries]] = {
    "kills": campaign_kills.tries,
    "disk": campaign_disk.tries,
    "fuzz": campaign_fuzz.tries,
    "device": campaign_device.tries,
}


def campaign(tries: Tries, seconds: float, most: int | None = None) -> tuple[int, dict[Fault, list[str]]]:
    """Returns how many tries were made until the time was over, and those that were mishandled, by their faults."""
    end, tried = time.monotonic() + seconds, 0
    mishandled: dict[Fault, list[str]] = {}
    for line, faults in islice(tries, most):
        tried += 1
        for fault in dict.fromkeys(faults):
            if fault not in mishandled:
                print(f"{fault.kind}: {fault.place}\n    {line}", flush=True)
            mishandled.setdefault(fault, []).append(line)
        if time.monotonic() > end:
            break
    return tried, mishandled


def print_summary(part: str, tried: int, mishandled: dict[Fault, list[str]]) -> None:
    """Prints how many tries there were, and every distinct fault with how often it came and where first."""
    lines = {line for lines in mishandled.values() for line in lines}
    print(f"\n{part}: {tried} tried, {len(lines)} mishandled, {len(mishandled)} distinct faults")
    for kind, count in Counter(fault.kind for fault in mishandled).most_common():
        print(f"  {count} of the kind {kind}")
    for fault, lines in sorted(mishandled.items(), key=lambda item: -len(item[1])):
        print(f"| {len(lines)} | {fault.kind} | {fault.place} | {lines[0]} |")


def main() -> int:
    """Runs the parts and returns 1 where anything was mishandled, else 0."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=PARTS, action="append", help="all of them unless some are named")
    parser.add_argument("--minutes", type=float, default=15, help="of each part")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep", action="store_true", help="leave the folders of mishandled tries")
    given = parser.parse_args()
    runs = Runs()
    runs.import_all()
    home, all_mishandled = Home(Path(tempfile.mkdtemp(prefix="campaign-")), runs, given.keep), 0
    try:
        for part in given.part or PARTS:
            tried, mishandled = campaign(PARTS[part](home, Random(given.seed)), 60 * given.minutes)
            print_summary(part, tried, mishandled)
            all_mishandled += len(mishandled)
    finally:
        home.close()
    return 1 if all_mishandled else 0


if __name__ == "__main__":
    sys.exit(main())
