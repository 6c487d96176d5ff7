"""The bundle on disk: assembled aside, hashed, then renamed into place. It is complete or absent, never half.

It does not know what the files hold.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from edgeprune.ondevice.bundle import MANIFEST, open_bundle, point_to_rung, sha256


def write_bundle(
    staging: Path,
    output: Path,
    rungs: Sequence[Path],
    shared: Mapping[str, Path],
    texts: Mapping[str, str | bytes],
    manifest: Mapping[str, Any],
    render: Callable[[dict[str, int]], Mapping[str, str]],
    chosen: int | None = 0,
) -> None:
    """Writes a bundle: links the rungs' folders, adds shared files and texts, hashes all and renames it into place.

    staging: the folder where it is assembled, on the same disk as output. rungs: their folders, the largest first;
    chosen: the index of the one that the links at the top lead to, None: there are no links. shared: files by their
    paths in the bundle, the tokenizer's or the codec's. texts: by their names in the bundle. manifest: all of it but
    the hashes. render(files): returns the texts that list the bundle's files with their bytes, such as the report. An
    older bundle at `output` is replaced at the very end, and only then removed.
    """
    # Assemble the rungs.
    shutil.rmtree(staging, ignore_errors=True)

    def link(source: str, target: str) -> None:
        """Makes a hard link, so that the rung stays whole in the work folder until the bundle is in place.

        Rungs share none with each other: onnx refuses weights in a file of two names.
        """
        os.link(Path(source).resolve(), target)  # a link is resolved: its target is linked

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
    # Add what the rungs share and the texts; those that list the files come last.
    for name, path in shared.items():
        (staging / name).parent.mkdir(exist_ok=True)
        shutil.copyfile(path, staging / name)
    for name, text in texts.items():
        (staging / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    for name, text in render(_sizes(staging)).items():
        (staging / name).write_text(text, encoding="utf-8")
    # Hash all files, then put the bundle into place.
    hashes = {name: sha256(staging / name) for name in _sizes(staging)}
    (staging / MANIFEST).write_text(json.dumps({**manifest, "sha256": hashes}, indent=2) + "\n", encoding="utf-8")
    old = output.with_name(output.name + ".old")
    if output.exists():
        shutil.rmtree(old, ignore_errors=True)
        output.rename(old)
    staging.rename(output)
    shutil.rmtree(old, ignore_errors=True)


def write_again(folder: Path, texts: Mapping[str, str], also: Iterable[str] = ()) -> None:
    """Writes texts of a finished bundle again, each at once, and records their hashes and those of `also`.

    Raises InputError where the folder is not a bundle.
    """
    manifest = open_bundle(folder)
    for name, text in texts.items():
        _replace(folder / name, text)
    for name in (*texts, *also):
        manifest["sha256"][name] = sha256(folder / name)
    _replace(folder / MANIFEST, json.dumps(manifest, indent=2) + "\n")


def _replace(path: Path, text: str) -> None:
    """Writes a file at once: a reader finds the old text or the new one, never half of it."""
    temporary = path.with_name(f"{path.name}.part")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)


def _sizes(folder: Path) -> dict[str, int]:
    """Returns the bytes of every file, by its path in the bundle; links to folders are not followed."""
    return {str(path.relative_to(folder)): path.stat().st_size for path in sorted(folder.rglob("*")) if path.is_file()}
