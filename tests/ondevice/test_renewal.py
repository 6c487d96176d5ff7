"""New files of a bundle: interrupted at any step they are all there or none, and the bundle stays ours."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from edgeprune.errors import InputError
from edgeprune.ondevice.bundle import check_files, open_bundle, sha256
from edgeprune.ondevice.renewal import put_into_place, renewing
from edgeprune.pipeline.ownership import foreign_in_bundle
from tests.support.bundle_files import write

NEW = {"README.md": "read again", "rungs/0/onnx/model.onnx": "another graph", "measurement.json": '{"rung": 0}'}


def renew(bundle: Path) -> None:
    with renewing(bundle) as staged:
        for name, text in NEW.items():
            (staged / name).parent.mkdir(parents=True, exist_ok=True)
            (staged / name).write_text(text)
        put_into_place(bundle)


def texts(bundle: Path) -> dict[str, str]:
    return {name: (bundle / name).read_text() for name in NEW if (bundle / name).exists()}


def test_files_and_hashes_are_new_and_nothing_else_is_there(tmp_path: Path) -> None:
    bundle = tmp_path / "out"
    write(tmp_path, bundle)
    renew(bundle)
    assert texts(bundle) == NEW
    hashes = open_bundle(bundle)["sha256"]
    assert {name: sha256(bundle / name) for name in hashes} == hashes
    assert set(NEW) <= set(hashes)
    assert not [path.name for path in bundle.iterdir() if path.name.startswith(".")]
    assert foreign_in_bundle(bundle) == []


def test_interrupted_at_any_step_it_is_ours_and_the_next_renewal_completes_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path, tmp_path / "out")
    before, steps, real = texts(tmp_path / "out"), 0, Path.replace
    while True:
        bundle, left = tmp_path / f"copy-{steps}", steps
        shutil.copytree(tmp_path / "out", bundle, symlinks=True)

        def cut(self: Path, target: Path) -> Path:
            nonlocal left
            if left == 0:
                raise OSError(30, "Read-only file system")
            left -= 1
            return real(self, target)

        with monkeypatch.context() as patch:
            patch.setattr(Path, "replace", cut)
            patch.setattr(Path, "rename", cut)
            try:
                renew(bundle)
                break
            except OSError:
                pass
        assert foreign_in_bundle(bundle) == []
        check_files(bundle, open_bundle(bundle), [bundle / "rungs" / "0" / "onnx"])
        with renewing(bundle):
            pass
        assert texts(bundle) == (NEW if steps else before)
        hashes = open_bundle(bundle)["sha256"]
        assert {name: sha256(bundle / name) for name in hashes} == hashes
        steps += 1
    assert steps > len(NEW)


def test_a_bundle_that_is_renewed_already_is_refused(tmp_path: Path) -> None:
    write(tmp_path, tmp_path / "out")
    with renewing(tmp_path / "out") as staged:
        with pytest.raises(InputError, match="is being measured already"):
            renew(tmp_path / "out")
        assert staged.is_dir()  # it is the first one's
    renew(tmp_path / "out")
