"""Checks of the output folder before any long work starts: its place, what it holds, the room on its disk."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from edgeprune.errors import InputError
from edgeprune.ondevice.bundle import MANIFEST


def check_output(output: Path, force: bool) -> None:
    """Refuses an output directory that cannot be written, or that holds something already.

    With force a bundle of ours, or an empty folder, may be replaced; nothing else ever is.
    """
    if output.exists() and not output.is_dir():
        raise InputError(f"the output {output} is a file", "Name a directory that does not exist yet.")
    if output.is_dir() and any(output.iterdir()):
        if not force:
            raise InputError(
                f"the output directory {output} is not empty", "Name another with --output, or replace it with --force."
            )
        if not (output / MANIFEST).is_file():
            raise InputError(
                f"the output directory {output} is not empty and is not a bundle: --force replaces bundles only",
                "Name another directory with --output.",
            )
    parent = existing_parent(output)
    if not os.access(parent, os.W_OK | os.X_OK):
        raise InputError(f"cannot write to {parent}", "Name a directory that you may write to with --output.")


def existing_parent(path: Path) -> Path:
    """Returns the nearest folder above `path` that exists."""
    return next(parent for parent in path.absolute().parents if parent.is_dir())


def check_space(output: Path, needed_bytes: int) -> None:
    """Refuses to begin where the sum of what will be written does not fit on the disk."""
    parent = existing_parent(output)
    free = shutil.disk_usage(parent).free
    if free < needed_bytes:
        raise InputError(
            f"the run writes up to {needed_bytes / 2**30:.1f} GiB, {parent} has {free / 2**30:.1f} GiB free",
            "Free some space, or name a directory on another disk with --output.",
        )
