"""The bundle on disk: assembled aside, hashed, then renamed into place. Complete or absent, never half.

This file also runs on the device: Python 3.10, standard library only.
"""

from __future__ import annotations

import hashlib
import json
import os
import shlex
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from edgeprune.errors import InputError

MANIFEST = "manifest.json"
REPORT = "report.json"
TOKENIZER = "tokenizer"
CODEC = "codec"  # of an image generator: codes to pixels
LINKS = ("model", "onnx", "engine", "gguf")
FRONTIER = "frontier"  # the kind of a bundle whose rungs wait to be picked from; others have a chosen one


def check_output(output: Path, force: bool) -> None:
    """Refuse an output directory that cannot be written, or that holds something already.

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
                f"the output directory {output} is not empty and no bundle: --force replaces bundles only",
                "Name another directory with --output.",
            )
    parent = existing_parent(output)
    if not os.access(parent, os.W_OK | os.X_OK):
        raise InputError(f"cannot write to {parent}", "Name a directory that you may write to with --output.")


def existing_parent(path: Path) -> Path:
    """The nearest folder above `path` that exists."""
    return next(parent for parent in path.absolute().parents if parent.is_dir())


def check_space(output: Path, needed_bytes: int) -> None:
    """Refuse to begin where the sum of what will be written does not fit on the disk."""
    parent = existing_parent(output)
    free = shutil.disk_usage(parent).free
    if free < needed_bytes:
        raise InputError(
            f"the run writes up to {needed_bytes / 2**30:.1f} GiB, {parent} has {free / 2**30:.1f} GiB free",
            "Free some space, or name a directory on another disk with --output.",
        )


def sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def write_bundle(
    staging: Path, output: Path, rungs: Sequence[Path], shared: Mapping[str, Path],
    texts: Mapping[str, str | bytes], manifest: Mapping[str, Any],
    render: Callable[[dict[str, int]], Mapping[str, str]], chosen: int | None = 0,
) -> None:  # fmt: skip
    """Link the rungs' folders into a bundle with what they share and texts, hash all files, put it into place.

    shared: files by their paths in the bundle, the tokenizer's or the codec's. rungs: the largest first; chosen: the
    one that the links at the top lead to, none: there are no links. staging: where it is assembled, on the same disk
    as output. render(files) gives the texts that list the bundle's files with their bytes (the report). An older
    bundle at `output` is replaced at the very end, and only then removed.
    """
    shutil.rmtree(staging, ignore_errors=True)

    def link(source: str, target: str) -> None:
        """Hard links: the rung stays whole in the work folder until the bundle is in place. Rungs share none with
        each other: onnx refuses weights in a file of two names."""
        os.link(Path(source).resolve(), target)  # of a link, what it leads to

    for index, rung in enumerate(rungs):
        folder = staging / "rungs" / str(index)
        folder.mkdir(parents=True)
        for path in sorted(rung.iterdir()):
            if path.is_dir():
                shutil.copytree(path, folder / path.name, copy_function=link)
            else:
                link(str(path), str(folder / path.name))
    if chosen is not None:
        point_to_rung(staging, chosen)
    for name, path in shared.items():
        (staging / name).parent.mkdir(exist_ok=True)
        shutil.copyfile(path, staging / name)
    for name, text in texts.items():
        (staging / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    for name, text in render(_sizes(staging)).items():
        (staging / name).write_text(text, encoding="utf-8")
    hashes = {name: sha256(staging / name) for name in _sizes(staging)}
    (staging / MANIFEST).write_text(json.dumps({**manifest, "sha256": hashes}, indent=2) + "\n", encoding="utf-8")
    old = output.with_name(output.name + ".old")
    if output.exists():
        shutil.rmtree(old, ignore_errors=True)
        output.rename(old)
    staging.rename(output)
    shutil.rmtree(old, ignore_errors=True)


def point_to_rung(folder: Path, index: int) -> None:
    """Let the links at the bundle's top lead to a rung; where a copy made folders of them, those stay."""
    for name in LINKS:
        link, rung = folder / name, Path("rungs") / str(index) / name
        if (link.exists() and not link.is_symlink()) or not (folder / rung).is_dir():
            continue
        temporary = folder / f"{name}.part"
        temporary.unlink(missing_ok=True)
        temporary.symlink_to(rung)
        temporary.replace(link)


def write_again(folder: Path, texts: Mapping[str, str], also: Iterable[str] = ()) -> None:
    """Write texts of a finished bundle again, each at once, and record their hashes and those of `also`."""
    manifest = open_bundle(folder)
    for name, text in texts.items():
        _replace(folder / name, text)
    for name in (*texts, *also):
        manifest["sha256"][name] = sha256(folder / name)
    _replace(folder / MANIFEST, json.dumps(manifest, indent=2) + "\n")


def _replace(path: Path, text: str) -> None:
    temporary = path.with_name(f"{path.name}.part")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)


def _sizes(folder: Path) -> dict[str, int]:
    """Bytes of every file, by its path in the bundle; links to folders are not followed."""
    return {str(path.relative_to(folder)): path.stat().st_size for path in sorted(folder.rglob("*")) if path.is_file()}


def tokenizer_of(folder: Path, rung: int) -> Path:
    """The folder of a rung's tokenizer: its own, where it has a vocabulary of its own, else the bundle's."""
    own = folder / "rungs" / str(rung) / TOKENIZER
    return own if own.is_dir() else folder / TOKENIZER


def rungs_of(folder: Path) -> list[int]:
    """The rungs that a bundle holds."""
    return sorted(int(path.name) for path in (folder / "rungs").glob("*") if path.name.isdecimal())


def open_chosen(folder: Path) -> dict[str, Any]:
    """The manifest of a bundle that has a chosen rung: to run, measure or deploy.

    Raises InputError as open_bundle does, and where the rungs wait to be picked from.
    """
    manifest = open_bundle(folder)
    if manifest.get("kind") == FRONTIER:
        name, rungs = shlex.quote(str(folder)), rungs_of(folder)
        raise InputError(
            f"{folder} holds {len(rungs)} rungs to pick from, none is chosen yet",
            f"Pick one, K is {rungs[0]} to {rungs[-1]}: edgeprune fit --from {name} --pick K",
        )
    return manifest


def open_bundle(folder: Path) -> dict[str, Any]:
    """The manifest of a bundle, its files checked to be there.

    Raises InputError where the folder is no bundle or misses a file.
    """
    path = folder / MANIFEST
    remedy = "Give the output directory of `edgeprune fit`."
    if not path.is_file():
        raise InputError(f"{folder} is no bundle: it has no {MANIFEST}", remedy)
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        names = list(manifest["sha256"])
    except (ValueError, KeyError, TypeError):
        raise InputError(f"{path} cannot be read: it is not a bundle's manifest", remedy) from None
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise InputError(
            f"the bundle {folder} misses {len(missing)} of its files, the first is {missing[0]}",
            "Copy the whole folder again, or run the fit again (manifest.json has the command).",
        )
    return manifest
