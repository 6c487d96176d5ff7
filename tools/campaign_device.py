"""A device that lies, in its figures or in how it talks: a part of tools/campaign.py."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from random import Random

import pytest

from tests.support.bundles import contents
from tests.support.lying_device import JETSON, LyingBoard, faults, lying_plan, shorten
from tools.campaign_faults import Fault, faults_of
from tools.campaign_home import Home
from tools.campaign_runs import Ended


def tries(home: Home, random: Random) -> Iterator[tuple[str, list[Fault]]]:
    """Yields a line about each try and its faults, for ever."""
    board = LyingBoard(home.folder / "board")
    place = home.begin()
    board.follow({"answers": JETSON, "lies": {}})
    ended, _ = _measured(home, place, board)
    if ended.code not in (0, 3):
        raise SystemExit(f"a device that does not lie is refused:\n{ended.output}{ended.errors}")
    home.end(place, False)
    while True:
        place = home.begin()
        name, plan = lying_plan(random.randrange(1 << 32))
        board.follow(plan)
        ended, wrong = _measured(home, place, board)
        home.end(place, bool(wrong))
        yield f"{place.name}: {name} -> {ended.code}", wrong


def _measured(home: Home, place: Path, board: LyingBoard) -> tuple[Ended, list[Fault]]:
    """Returns how a bundle was measured on the device, and what is wrong about that."""
    bundle = shutil.copytree(home.estimated, place / "bundle", symlinks=True)
    before = contents(bundle)
    words = ("measure", "bundle", "--target", board.target)
    ended = home.run(words, place, path=board.path, before=lambda: shorten(pytest.MonkeyPatch()))
    wrong = faults_of(ended, (0, 3, 4))
    if not wrong:
        done = subprocess.CompletedProcess(words, ended.code, ended.output, ended.errors)
        wrong = [Fault("device", text) for text in faults(bundle, before, done)]
    return ended, wrong
