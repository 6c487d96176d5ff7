"""The bundle on disk: assembled aside, hashed, then renamed into place. Complete or absent, never half."""

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
