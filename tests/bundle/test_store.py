"""A bundle on disk: complete or absent, every file listed and hashed."""

import json
import shutil

import pytest

from edgeprune.bundle.store import write_again, write_bundle
from edgeprune.ondevice.bundle import open_bundle, point_to_rung, sha256
from tests.support.bundle_files import write


def test_a_bundle_lists_and_hashes_every_file(tmp_path):
    write(tmp_path, tmp_path / "out")
    manifest = open_bundle(tmp_path / "out")
    files = {str(p.relative_to(tmp_path / "out")) for p in (tmp_path / "out").rglob("*") if p.is_file()}
    assert set(manifest["sha256"]) == files - {"manifest.json"}
    assert all(sha256(tmp_path / "out" / name) == digest for name, digest in manifest["sha256"].items())
    assert (tmp_path / "out" / "onnx" / "model.onnx").read_text() == "one"
    assert json.loads((tmp_path / "out" / "report.json").read_text())["rungs/0/onnx/model.onnx"] == 3


def test_rungs_stand_beside_each_other_and_the_links_lead_to_one_of_them(tmp_path):
    rungs = []
    for index, text in enumerate(("wide", "narrow")):
        rung = tmp_path / "work" / str(index)
        (rung / "onnx").mkdir(parents=True)
        (rung / "onnx" / "model.data").write_text(text)
        (rung / "onnx" / "embedding.data").write_text("the same")
        (tmp_path / f"{index}.npz").write_text(text)
        (rung / "reference.npz").symlink_to(tmp_path / f"{index}.npz")
        rungs.append(rung)
    out = tmp_path / "out"
    write_bundle(tmp_path / "staging", out, rungs, {}, {"finish.pyz": b"\0zip"}, {}, lambda files: {})
    shutil.rmtree(tmp_path / "work")  # the bundle needs nothing of it
    for index in range(2):
        (tmp_path / f"{index}.npz").unlink()
    # onnx refuses external data in a file that has another name as well.
    assert all(path.stat().st_nlink == 1 for path in out.glob("rungs/*/onnx/*.data"))
    assert (out / "rungs" / "1" / "reference.npz").read_text() == "narrow"
    assert (out / "onnx" / "model.data").read_text() == "wide"
    open_bundle(out)
    point_to_rung(out, 1)
    assert (out / "onnx" / "model.data").read_text() == "narrow"
    assert not list(out.glob("*.part"))
    (out / "onnx").unlink()
    shutil.copytree(out / "rungs" / "1" / "onnx", out / "onnx")  # what a copy that follows links makes of it
    point_to_rung(out, 0)
    assert (out / "onnx" / "model.data").read_text() == "narrow"


def test_a_text_that_is_written_again_is_hashed_again(tmp_path):
    write(tmp_path, tmp_path / "out")
    write_again(tmp_path / "out", {"README.md": "read again", "measurement.json": "{}"})
    hashes = open_bundle(tmp_path / "out")["sha256"]
    assert all(hashes[name] == sha256(tmp_path / "out" / name) for name in ("README.md", "measurement.json"))


def test_a_failure_while_it_is_assembled_leaves_nothing_and_keeps_the_old_one(tmp_path):
    def broken(files):
        raise RuntimeError

    with pytest.raises(RuntimeError):
        write(tmp_path, tmp_path / "out", render=broken)
    assert not (tmp_path / "out").exists()
    write(tmp_path, tmp_path / "out")
    with pytest.raises(RuntimeError):
        write(tmp_path, tmp_path / "out", "two", broken)
    assert (tmp_path / "out" / "onnx" / "model.onnx").read_text() == "one"
    write(tmp_path, tmp_path / "out", "two")
    assert (tmp_path / "out" / "onnx" / "model.onnx").read_text() == "two"
    assert not (tmp_path / "replaced").exists()
