"""Checks of the output folder before any long work starts: its place, what it holds, the room on its disk."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from edgeprune.errors import InputError
from edgeprune.files import writing
from edgeprune.pipeline.ownership import check_bundle, check_replaceable, check_work


def work_folder(output: Path) -> Path:
    """Returns the folder beside the output where a run keeps its work until the bundle is complete."""
    return output.with_name(f"{output.name}.work")


def check_output(output: Path, force: bool, resume: bool = False) -> None:
    """Refuses an output directory that cannot be written, or that holds something already.

    With force a bundle may be replaced that is wholly ours, or an empty folder; nothing else ever is. resume: a bundle
    may stand there, which the caller finds to be this run's or not.
    """
    with writing(output):
        _check_place(output, force, resume)


def _check_place(output: Path, force: bool, resume: bool) -> None:
    """Raises InputError where the output or the work folder beside it has no place."""
    if output.is_symlink():
        raise InputError(f"the output {output} is a link to {output.readlink()}", "Name the directory itself.")
    if output.exists() and not output.is_dir():
        raise InputError(f"the output {output} is a file", "Name a directory that does not exist yet.")
    if output.is_dir() and output.is_mount():
        raise InputError(f"the output {output} is a mount point", "Name a directory in it.")
    if output.is_dir() and any(output.iterdir()):
        if not force and not resume:
            raise InputError(
                f"the output directory {output} is not empty", "Name another with --output, or replace it with --force."
            )
        check_bundle(output)
        if force:
            check_replaceable(output)
    check_work(work_folder(output), force and not resume)
    if file := next((parent for parent in output.parents if parent.exists() and not parent.is_dir()), None):
        raise InputError(f"{file}, in which the output is to be, is a file", "Name another directory with --output.")
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
