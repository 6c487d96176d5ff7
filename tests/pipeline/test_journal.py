"""The journal of a run: what is finished stays so, whatever ends the run, and one process at a time works on it."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from edgeprune.errors import InputError
from edgeprune.pipeline.journal import BESIDE, Journal, open_journal
from edgeprune.pipeline.ownership import JOURNAL

RUN = {"model": "m", "seed": 0}


def begun(work: Path, run: dict[str, Any] = RUN, resume: bool = False, force: bool = False) -> Journal:
    return open_journal(work, run, resume, force)


def test_a_finished_stage_is_not_computed_again(tmp_path):
    with begun(tmp_path / "work") as journal:
        assert journal.stage("one", lambda: {"x": (1, 2)}) == {"x": [1, 2]}
    with begun(tmp_path / "work", resume=True) as again:
        assert again.id == journal.id
        assert again.stage("one", lambda: pytest.fail("computed again")) == {"x": [1, 2]}
        assert list(again.seconds) == ["one", BESIDE]


def test_stages_add_up_to_the_run_with_stages_within_stages(tmp_path, monkeypatch):
    clock = iter(range(100))
    with begun(tmp_path / "work") as journal:
        monkeypatch.setattr("edgeprune.pipeline.journal.time.monotonic", lambda: next(clock))
        journal._begun = next(clock)  # 0
        journal.stage("outer", lambda: journal.stage("inner", lambda: 1))  # from 1 to 4, the inner one from 2 to 3
        journal.stage("next", lambda: 2)  # from 5 to 6
        seconds = journal.seconds  # at 7
        assert seconds == {"inner": 1, "outer": 2, "next": 1, BESIDE: 3}
        assert sum(seconds.values()) == 7


def test_a_folder_stage_that_was_cut_off_is_filled_again(tmp_path):
    work = tmp_path / "work"

    def broken(folder):
        (folder / "half").write_text("half")
        raise KeyboardInterrupt

    with begun(work) as journal, pytest.raises(KeyboardInterrupt):
        journal.folder_stage("files", broken)
    assert {path.name for path in work.iterdir()} == {JOURNAL, "lock"}
    with begun(work, resume=True) as resumed:
        folder = resumed.folder_stage("files", lambda f: (f / "whole").write_text("whole") and None)
    assert {path.name for path in folder.iterdir()} == {"whole", "made.json"}


def test_a_stage_whose_files_are_gone_is_told(tmp_path):
    with begun(tmp_path / "work") as journal:
        folder = journal.folder_stage("files", lambda folder: None)
        (folder / "made.json").unlink()
        folder.rmdir()
        with pytest.raises(InputError, match="are not those of the stage"):
            journal.folder_stage("files", lambda folder: None)


@pytest.mark.parametrize("text", ["", "whol", "whole and more", "Whole"])
def test_a_stage_whose_file_changed_is_told(tmp_path, text):
    """As a power cut leaves files that were complete but not yet on the disk."""
    with begun(tmp_path / "work") as journal:
        folder = journal.folder_stage("files", lambda folder: (folder / "one").write_text("whole") and None)
        (folder / "engine").mkdir()
        (folder / "engine" / "later").write_text("built afterwards")
        assert journal.folder_stage("files", lambda folder: None) == folder
        (folder / "one").write_text(text)
        with pytest.raises(InputError, match="are not those of the stage"):
            journal.folder_stage("files", lambda folder: None)


def test_another_run_is_refused_and_the_field_named(tmp_path):
    begun(tmp_path / "work").close()
    with pytest.raises(InputError, match="its seed is 0, this one's is 1"):
        begun(tmp_path / "work", {**RUN, "seed": 1}, resume=True)


def test_an_unfinished_run_is_kept_unless_forced(tmp_path):
    with begun(tmp_path / "work") as journal:
        journal.stage("one", lambda: 1)
    with pytest.raises(InputError, match="unfinished run") as caught:
        begun(tmp_path / "work")
    assert "--resume" in caught.value.remedy
    with begun(tmp_path / "work", force=True) as fresh:
        assert not fresh.has("one")
        assert fresh.id != journal.id


def test_a_line_that_was_cut_off_is_taken_away(tmp_path):
    work = tmp_path / "work"
    with begun(work) as journal:
        journal.stage("one", lambda: 1)
    with (work / JOURNAL).open("a") as file:
        file.write('{"stage": "two", "sec')
    with begun(work, resume=True) as journal:
        assert not journal.has("two")
        journal.stage("two", lambda: 2)
    assert [json.loads(line).get("stage") for line in (work / JOURNAL).read_text().splitlines()] == [None, "one", "two"]


def test_a_header_that_could_not_be_written_leaves_the_folder_ours(tmp_path, monkeypatch):
    """The whole header or none: half of one would make the folder a stranger's."""
    work = tmp_path / "work"

    def full(path: Path, data: bytes) -> None:
        with path.open("wb") as file:
            file.write(data[:9])
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("pathlib.Path.write_bytes", full)
        with pytest.raises(InputError, match="cannot write .*journal.jsonl: No space left"):
            begun(work)
    assert [path.name for path in work.iterdir()] == ["lock"]
    (work / f"{JOURNAL}.17.part").write_text('{"run": ')  # as a kill leaves it
    with begun(work, resume=True) as journal:
        assert not journal.has("one")
    assert sorted(path.name for path in work.iterdir()) == [JOURNAL, "lock"]


def test_a_run_that_was_killed_before_its_header_is_ours_and_keeps_what_a_user_put_there(tmp_path):
    work = tmp_path / "work"
    begun(work).close()
    (work / JOURNAL).unlink()
    (work / "thesis").mkdir()
    for name in ("mine.txt", "thesis/one.txt"):
        (work / name).write_text("mine")
    with pytest.raises(InputError, match="holds files that no run made: mine.txt, thesis/one.txt"):
        begun(work, force=True)
    with begun(work, resume=True) as journal:
        journal.stage("one", lambda: 1)
        assert journal.remove() == ["mine.txt", "thesis/one.txt"]
    assert sorted(path.name for path in work.rglob("*.txt")) == ["mine.txt", "one.txt"]
    assert not (work / JOURNAL).exists()


def test_a_stage_that_cannot_be_written_names_its_folder(tmp_path):
    def fill(folder: Path) -> None:
        raise OSError(errno.EFBIG, "File too large")  # as of a file that is open already

    with begun(tmp_path / "work") as journal, pytest.raises(InputError, match="files.part: File too large"):
        journal.folder_stage("files", fill)


@pytest.mark.parametrize("line", ["[]", "{", '{"stage": 1}', '{"stage": "x", "seconds": "y", "result": 1}', "\xff"])
def test_a_line_that_no_journal_has_is_told_and_force_starts_afresh(tmp_path, line):
    work = tmp_path / "work"
    begun(work).close()
    with (work / JOURNAL).open("ab") as file:
        file.write(line.encode("latin-1") + b"\n")
    with pytest.raises(InputError, match=r"journal\.jsonl, line 2") as caught:
        begun(work, resume=True)
    assert "--force" in caught.value.remedy
    begun(work, force=True).close()


def test_a_result_that_changed_meanwhile_is_not_taken(tmp_path):
    work = tmp_path / "out.work"
    with open_journal(work, RUN, resume=False, force=False) as journal:
        journal.stage("one", lambda: {"loss": 2.5})
    text = (work / JOURNAL).read_text()
    (work / JOURNAL).write_text(text.replace("2.5", "1.5"))
    with pytest.raises(InputError, match="line 2, is damaged") as caught:
        open_journal(work, RUN, resume=True, force=False)
    assert caught.value.remedy == "Start afresh with --force."
    (work / JOURNAL).write_text(text)
    with open_journal(work, RUN, resume=True, force=False) as journal:
        assert journal.stage("one", lambda: None) == {"loss": 2.5}


def test_resume_of_nothing_begins(tmp_path):
    with begun(tmp_path / "work", resume=True) as journal:
        assert journal.is_new
        assert list(journal.seconds) == [BESIDE]


@pytest.mark.parametrize(("resume", "force"), [(False, False), (True, False), (False, True), (True, True)])
def test_a_second_run_is_refused_and_names_the_first(tmp_path, resume, force):
    with begun(tmp_path / "work") as journal:
        journal.stage("one", lambda: 1)
        with pytest.raises(InputError, match=f"another run, process {os.getpid()}, works in"):
            begun(tmp_path / "work", resume=resume, force=force)
        assert journal.stage("two", lambda: 2) == 2
    with begun(tmp_path / "work", resume=True) as journal:
        assert list(journal.seconds) == ["one", "two", BESIDE]


def test_the_lock_ends_with_its_process(tmp_path):
    words = (
        f"import os; from edgeprune.pipeline.journal import open_journal; from pathlib import Path; "
        f"open_journal(Path({str(tmp_path / 'work')!r}), {RUN}, False, False); os.kill(os.getpid(), 9)"
    )
    assert subprocess.run([sys.executable, "-c", words]).returncode == -9
    begun(tmp_path / "work", resume=True).close()


def test_a_run_that_waited_for_the_folder_makes_it_again(tmp_path):
    with begun(tmp_path / "work") as journal:
        descriptor = os.open(tmp_path / "work" / "lock", os.O_RDWR)  # as the second run has it when the first one ends
        assert journal.remove() == []
    assert not (tmp_path / "work").exists()
    os.close(descriptor)
    begun(tmp_path / "work").close()
