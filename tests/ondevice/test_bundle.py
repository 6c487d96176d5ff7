import json
import shutil

import pytest

from edgeprune.bundle.store import write_again, write_bundle
from edgeprune.errors import InputError
from edgeprune.ondevice.bundle import open_bundle, point_to_rung, sha256
from edgeprune.pipeline.output import check_output, check_space


def write(tmp_path, output, text="one", render=lambda files: {"report.json": json.dumps(files)}):
    rung = tmp_path / "rung"
    (rung / "onnx").mkdir(parents=True, exist_ok=True)
    (rung / "onnx" / "model.onnx").unlink(missing_ok=True)  # a bundle may share the file
    (rung / "onnx" / "model.onnx").write_text(text)
    (tmp_path / "tokenizer.json").write_text("{}")
    write_bundle(
        tmp_path / "staging",
        output,
        [rung],
        {"tokenizer.json": tmp_path / "tokenizer.json"},
        {"README.md": "read"},
        {"seed": 0},
        render,
    )


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
    assert not (tmp_path / "out.old").exists()


def test_an_output_that_is_not_ours_is_never_replaced(tmp_path):
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    check_output(theirs, force=False)
    (theirs / "thesis.txt").write_text("years of work")
    with pytest.raises(InputError, match="not empty"):
        check_output(theirs, force=False)
    with pytest.raises(InputError, match="no bundle"):
        check_output(theirs, force=True)
    with pytest.raises(InputError, match="is a file"):
        check_output(theirs / "thesis.txt", force=True)


def test_too_little_space_is_said_before_anything_is_written(tmp_path):
    with pytest.raises(InputError, match="writes up to"):
        check_space(tmp_path / "deep" / "out", 2**60)
    assert not (tmp_path / "deep").exists()


@pytest.mark.parametrize(
    "break_it",
    [
        lambda out: (out / "manifest.json").unlink(),
        lambda out: (out / "manifest.json").write_text("{"),
        lambda out: (out / "manifest.json").write_text("[]"),
        lambda out: (out / "rungs" / "0" / "onnx" / "model.onnx").unlink(),
    ],
)
def test_what_is_no_whole_bundle_is_refused(tmp_path, break_it):
    write(tmp_path, tmp_path / "out")
    break_it(tmp_path / "out")
    with pytest.raises(InputError):
        open_bundle(tmp_path / "out")
