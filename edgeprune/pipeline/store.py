"""The folder where the runs of a fleet leave the stages that they share.

A stage is found by the sha256 of all that it depends on. Who comes second waits for the first, and makes the stage
where the first was killed. It knows neither runs nor what the stages hold.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from edgeprune import __version__
from edgeprune.files import held, link_or_copy, read_json, write_text
from edgeprune.pipeline.ownership import MADE

Parts = Mapping[str, Any]  # by name, as JSON has it


class Store:
    """A folder of finished stages, each a file or a folder by the hash of its name and of what it depends on.

    It lies where all who share it see the same files. A stage is complete or absent, never half.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def value(self, stage: str, parts: Parts, compute: Callable[[], Any]) -> Any:
        """Returns a stage's result (a JSON value) from the store, else computes and keeps it."""
        place = self._place(stage, parts).with_suffix(".json")
        with held(place):
            if place.exists():
                return read_json(place)["result"]
            result = compute()
            write_text(place, json.dumps({"stage": stage, "parts": parts, "result": result}))
            return result

    def fill(self, stage: str, parts: Parts, folder: Path, fill: Callable[[Path], Any]) -> None:
        """Fills a stage's folder with links to the store's files, else by `fill`, and keeps links to what that wrote.

        The stage's own mark is of its run and stays there.
        """
        place = self._place(stage, parts)
        with held(place):
            if not place.is_dir():
                fill(folder)
                part = place.with_name(f"{place.name}.{uuid.uuid4().hex}.part")
                shutil.copytree(folder, part, ignore=shutil.ignore_patterns(MADE), copy_function=link_or_copy)
                try:
                    part.rename(place)
                except OSError:
                    shutil.rmtree(part)
                    if not place.is_dir():  # else another run was faster, where the file system has no locks
                        raise
                return
        shutil.copytree(place, folder, copy_function=link_or_copy, dirs_exist_ok=True)

    def _place(self, stage: str, parts: Parts) -> Path:
        self._folder.mkdir(parents=True, exist_ok=True)
        text = json.dumps({"edgeprune": __version__, "stage": stage, "parts": parts}, sort_keys=True)
        return self._folder / hashlib.sha256(text.encode()).hexdigest()
