"""Whose is it? Nothing of the user's is removed or replaced, whatever its name and wherever it lies."""

from __future__ import annotations

import contextlib
import json
import shutil
from pathlib import Path

import pytest

from edgeprune.bundle.store import write_bundle
from edgeprune.errors import InputError
from edgeprune.pipeline.journal import open_journal
from edgeprune.pipeline.output import check_output
from edgeprune.pipeline.ownership import REPLACED, foreign_in_bundle, foreign_in_work, is_bundle, is_work, remove_ours
from tests.support.bundle_files import write

MANIFESTS = {
    "a web application's": '{"name": "shop", "icons": []}',
    "a list": "[]",
    "broken": "{",
    "with hashes but no name": '{"sha256": {}}',
    "with a name but no hashes": '{"edgeprune": "0.1"}',
}


@pytest.mark.parametrize("text", MANIFESTS.values(), ids=list(MANIFESTS))
def test_another_manifest_is_no_mark_of_ours(tmp_path: Path, text: str) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "manifest.json").write_text(text)
    assert not is_bundle(tmp_path / "out")
    for force, resume in ((True, False), (False, True), (True, True)):
        with pytest.raises(InputError, match="is not a bundle"):
            check_output(tmp_path / "out", force, resume)


def add(path: Path) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("years of work")
    return path.name


NOTES = ["notes.txt", "rungs/0/notes.txt", "rungs/0/onnx/own.onnx", "onnx.bak/model.onnx", ".git/config", "rungs/notes"]


@pytest.mark.parametrize("name", NOTES)
def test_a_users_file_in_a_bundle_is_found_and_keeps_it(tmp_path: Path, name: str) -> None:
    out = tmp_path / "out"
    write(tmp_path, out)
    assert foreign_in_bundle(out) == []
    check_output(out, force=True)
    add(out / name)
    assert foreign_in_bundle(out) == [name]
    with pytest.raises(InputError, match=Path(name).name):
        check_output(out, force=True)
    check_output(out, force=False, resume=True)  # a run that goes on replaces nothing
    with pytest.raises(InputError, match=Path(name).name):  # it came while the run was at work
        write(tmp_path, out, "two")
    assert (out / name).read_text() == "years of work"
    assert (out / "onnx" / "model.onnx").read_text() == "one"


def test_a_file_of_ours_that_the_user_changed_is_his(tmp_path: Path) -> None:
    write(tmp_path, tmp_path / "out")
    (tmp_path / "out" / "README.md").write_text("what we found out")
    assert foreign_in_bundle(tmp_path / "out") == ["README.md (changed)"]
    (tmp_path / "out" / "rungs" / "0" / "link").symlink_to("/etc/hostname")
    assert "rungs/0/link" in foreign_in_bundle(tmp_path / "out")


def test_copies_of_a_bundle_are_ours_whatever_became_of_its_links(tmp_path: Path) -> None:
    out = tmp_path / "out"
    write(tmp_path, out)
    shutil.copytree(out, tmp_path / "followed")
    for name in ("gone", "text", "empty"):
        shutil.copytree(out, tmp_path / name, symlinks=True)
        (tmp_path / name / "onnx").unlink()
    (tmp_path / "text" / "onnx").write_text("rungs/0/onnx")
    (tmp_path / "empty" / "onnx").mkdir()
    for name in ("followed", "gone", "text", "empty"):
        assert foreign_in_bundle(tmp_path / name) == [], name
    (tmp_path / "text" / "onnx").write_text("rungs/0/onnx, said the user")
    assert foreign_in_bundle(tmp_path / "text") == ["onnx"]


def test_what_a_kill_leaves_in_a_bundle_is_ours(tmp_path: Path) -> None:
    write(tmp_path, tmp_path / "out")
    for name in ("README.md.123.part", "manifest.json.9.part", ".finish/measurement.json"):
        add(tmp_path / "out" / name)
    assert foreign_in_bundle(tmp_path / "out") == []
    add(tmp_path / "out" / "thesis.part")
    assert foreign_in_bundle(tmp_path / "out") == ["thesis.part"]


def fill(folder: Path) -> None:
    (folder / "deep").mkdir()
    (folder / "deep" / "ids").write_text("1")


def test_a_work_folder_is_removed_but_for_what_no_run_made(tmp_path: Path) -> None:
    work = tmp_path / "out.work"
    with open_journal(work, {"model": "m"}, resume=False, force=False) as journal:
        journal.folder_stage("samples", fill)
        (journal.scratch / "graph").write_text("1")
        for name in ("engine/model.sm86.engine", "check-1x/check.engine"):  # of the measurement, after the stage
            add(work / "samples" / name)
        (work / "rungs" / "0").mkdir(parents=True)
        add(work / "rungs" / "0" / "report.json")
        assert foreign_in_work(work) == []
        for name in ("notes.txt", "samples/deep/notes.txt", "mine/notes.txt"):
            add(work / name)
        assert foreign_in_work(work) == ["mine/notes.txt", "notes.txt", "samples/deep/notes.txt"]
    with pytest.raises(InputError, match=r"mine/notes\.txt, notes\.txt"):
        open_journal(work, {"model": "m"}, resume=False, force=True)
    with pytest.raises(InputError, match=r"mine/notes\.txt, notes\.txt"):
        check_output(tmp_path / "out", force=True)
    with open_journal(work, {"model": "m"}, resume=True, force=False) as journal:
        assert journal.remove() == ["mine/notes.txt", "notes.txt", "samples/deep/notes.txt"]
    left = sorted(str(path.relative_to(work)) for path in work.rglob("*") if path.is_file())
    assert left == ["mine/notes.txt", "notes.txt", "samples/deep/notes.txt"]


@pytest.mark.parametrize("operation", ["unlink", "rmdir"])
@pytest.mark.parametrize("number", range(6))
def test_a_work_folder_whose_removal_was_killed_is_ours(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, operation: str, number: int
) -> None:
    work, operations = tmp_path / "out.work", []
    journal = open_journal(work, {}, resume=False, force=False)
    journal.folder_stage("samples", fill)
    write(tmp_path, work / REPLACED)
    real = getattr(Path, operation)

    def killed(path: Path, *words: object, **more: object) -> None:
        if len(operations) == number:
            raise KeyboardInterrupt
        operations.append(path)
        real(path, *words, **more)

    monkeypatch.setattr(Path, operation, killed)
    with journal, contextlib.suppress(KeyboardInterrupt):
        journal.remove()
    monkeypatch.undo()
    assert not work.exists() or (is_work(work) and not foreign_in_work(work))
    with open_journal(work, {}, resume=True, force=False) as journal:
        assert journal.remove() == []
    assert not work.exists()


@pytest.mark.parametrize("name", ["thesis.txt", "journal.jsonl", "samples/ids.npy"])
def test_a_folder_by_the_name_of_a_work_folder_is_not_ours(tmp_path: Path, name: str) -> None:
    add(tmp_path / "out.work" / name)
    assert not is_work(tmp_path / "out.work")
    for force, resume in ((False, False), (True, False), (False, True), (True, True)):
        with pytest.raises(InputError, match="is not a work folder"):
            check_output(tmp_path / "out", force, resume)
        with pytest.raises(InputError, match="is not a work folder"):
            open_journal(tmp_path / "out.work", {}, resume, force)
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == [Path(name).name]


def test_other_folders_beside_the_output_are_not_touched(tmp_path: Path) -> None:
    write(tmp_path, tmp_path / "out")
    for name in ("out.old", "out.picking", "out.part"):
        add(tmp_path / name / "thesis.txt")
    write(tmp_path, tmp_path / "out", "two")
    assert (tmp_path / "out" / "onnx" / "model.onnx").read_text() == "two"
    assert all((tmp_path / name / "thesis.txt").exists() for name in ("out.old", "out.picking", "out.part"))


def test_a_bundle_that_was_about_to_be_replaced_comes_back(tmp_path: Path) -> None:
    """A kill between the two renames, and a new run that is not to go on."""
    with open_journal(tmp_path / "out.work", {"model": "m"}, resume=False, force=False):
        write(tmp_path, tmp_path / "out.work" / "replaced")
    assert foreign_in_work(tmp_path / "out.work") == []
    with open_journal(tmp_path / "out.work", {"model": "n"}, resume=False, force=True):
        assert is_bundle(tmp_path / "out")


def test_a_bundle_is_removed_with_its_manifest_last(tmp_path: Path) -> None:
    out = tmp_path / "out"
    write(tmp_path, out)
    add(out / "notes.txt")
    remove_ours(out, foreign_in_bundle(out))
    assert [path.name for path in out.iterdir()] == ["notes.txt"]


def test_links_are_refused_at_the_start(tmp_path: Path) -> None:
    write(tmp_path, tmp_path / "bundle")
    (tmp_path / "link").symlink_to("bundle")
    (tmp_path / "dangling").symlink_to("nowhere")
    for name in ("link", "dangling"):
        with pytest.raises(InputError, match="is a link to"):
            check_output(tmp_path / name, force=True)
    (tmp_path / "a.work").symlink_to("bundle")
    (tmp_path / "b.work").write_text("years of work")
    for name, kind in (("a", "link"), ("b", "file")):
        with pytest.raises(InputError, match=f"is a {kind}"):
            check_output(tmp_path / name, force=True)
    with pytest.raises(InputError, match="is a file"):
        check_output(tmp_path / "b.work" / "out", force=False)


def test_a_failure_to_put_it_into_place_keeps_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, tmp_path / "out")
    rename = Path.rename

    def broken(self: Path, target: Path) -> Path:
        if self.name == "staging":
            raise OSError(13, "denied")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", broken)
    with pytest.raises(InputError, match="cannot write"):
        write(tmp_path, tmp_path / "out", "two")
    assert (tmp_path / "out" / "onnx" / "model.onnx").read_text() == "one"
    assert json.loads((tmp_path / "out" / "manifest.json").read_text())["edgeprune"] == "0.1"


def test_a_file_system_without_links_gets_a_bundle_of_copies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr("os.link", refused)
    (tmp_path / "rung" / "onnx").mkdir(parents=True)
    (tmp_path / "rung" / "onnx" / "model.onnx").write_text("one")
    write_bundle(tmp_path / "staging", tmp_path / "out", [tmp_path / "rung"], {}, {}, {}, lambda files: {})
    assert (tmp_path / "out" / "onnx" / "model.onnx").read_text() == "one"
