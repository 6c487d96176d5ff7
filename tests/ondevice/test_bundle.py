"""The folder of a bundle as the device opens it: whole, or refused."""

import json
import shutil

import pytest

from edgeprune.errors import InputError
from edgeprune.ondevice.bundle import check_files, open_bundle, open_to_run, point_to_rung
from tests.support.bundle_files import write


@pytest.mark.parametrize(
    "break_it",
    [
        lambda out: (out / "manifest.json").unlink(),
        lambda out: (out / "manifest.json").write_text("{"),
        lambda out: (out / "manifest.json").write_text("[]"),
        lambda out: (out / "manifest.json").write_text('{"sha256": []}'),
        lambda out: (out / "manifest.json").write_text('{"sha256": {"../model": "00"}}'),
        lambda out: (out / "manifest.json").write_text('{"sha256": {"README.md": 1}}'),
        lambda out: (out / "manifest.json").write_text("[" * 10**5),
        lambda out: (out / "rungs" / "0" / "onnx" / "model.onnx").unlink(),
    ],
)
def test_what_is_no_whole_bundle_is_refused(tmp_path, break_it):
    write(tmp_path, tmp_path / "out")
    break_it(tmp_path / "out")
    with pytest.raises(InputError):
        open_bundle(tmp_path / "out")


@pytest.mark.parametrize(
    "travel",
    [
        lambda link: link.write_text("rungs/0/onnx"),
        lambda link: link.write_text("rungs/0/onnx\n"),
        lambda link: link.mkdir(),
        lambda link: None,
    ],
    ids=["git without links", "an editor too", "an archive", "an upload"],
)
def test_links_that_a_copy_lost_are_made_again(tmp_path, travel):
    write(tmp_path, tmp_path / "out")
    link = tmp_path / "out" / "onnx"
    link.unlink()
    travel(link)
    point_to_rung(tmp_path / "out", 0)
    assert link.is_symlink()
    assert (link / "model.onnx").read_text() == "one"


@pytest.mark.parametrize("kept", ["a folder", "a file"])
def test_what_is_no_lost_link_stays(tmp_path, kept):
    write(tmp_path, tmp_path / "out")
    link = tmp_path / "out" / "onnx"
    link.unlink()
    if kept == "a folder":
        shutil.copytree(tmp_path / "out" / "rungs" / "0" / "onnx", link)
    else:
        link.write_text("notes of mine on rungs/0/onnx")
    point_to_rung(tmp_path / "out", 0)
    assert not link.is_symlink()


def test_files_are_compared_with_the_manifest(tmp_path):
    write(tmp_path, tmp_path / "out")
    out = tmp_path / "out"
    graph, manifest = out / "rungs" / "0" / "onnx" / "model.onnx", open_bundle(out)
    graph.unlink()  # it may be shared
    graph.write_text("other")
    check_files(out, manifest, [out / "tokenizer.json", out / "rungs" / "0" / "on"])
    for place in (graph, graph.parent, out / "rungs"):
        with pytest.raises(InputError, match="model.onnx is not the file that manifest.json lists"):
            check_files(out, manifest, [place])


REPORT = {"workload": {"batch": 1, "prompt": 8, "context": 64}, "measurement": None}


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({}, None),
        ({"measurement": {"rung": 0, "engine": "tensorrt"}}, None),
        ({"measurement": {"rung": 7, "engine": "tensorrt"}}, "holds no rung 7"),
        ({"measurement": {"rung": True, "engine": "tensorrt"}}, "rung is not a whole number"),
        ({"measurement": []}, "measurement: it is not an object"),
        ({"workload": {"batch": 1, "prompt": 8}}, "workload.context is missing"),
        ({"workload": {"batch": 1, "prompt": 8, "context": "64"}}, "workload.context is not a whole number"),
        ({"workload": {"batch": 0, "prompt": 8, "context": 64}}, "not of positive numbers"),
    ],
)
def test_a_report_is_checked_before_a_rung_runs(tmp_path, change, reason):
    write(tmp_path, tmp_path / "out", render=lambda files: {"report.json": json.dumps(REPORT | change)})
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text()) | {"engine": "onnxruntime"}
    (tmp_path / "out" / "manifest.json").write_text(json.dumps(manifest))
    if reason is None:
        chosen = open_to_run(tmp_path / "out")
        assert (chosen.rung, chosen.workload.context) == (0, 64)
        assert chosen.engine == ("tensorrt" if change else "onnxruntime")
        return
    with pytest.raises(InputError, match=reason):
        open_to_run(tmp_path / "out")
