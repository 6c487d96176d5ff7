import json

import pytest

from edgeprune.errors import InputError
from edgeprune.pipeline.journal import FILE, open_journal

RUN = {"model": "m", "seed": 0}


def test_a_finished_stage_is_not_computed_again(tmp_path):
    journal = open_journal(tmp_path / "work", RUN, resume=False, force=False)
    assert journal.stage("one", lambda: {"x": (1, 2)}) == {"x": [1, 2]}
    again = open_journal(tmp_path / "work", RUN, resume=True, force=False)
    assert again.stage("one", lambda: pytest.fail("computed again")) == {"x": [1, 2]}
    assert list(again.seconds) == ["one"]


def test_a_folder_stage_that_was_cut_off_is_filled_again(tmp_path):
    work = tmp_path / "work"
    journal = open_journal(work, RUN, resume=False, force=False)

    def broken(folder):
        (folder / "half").write_text("half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        journal.folder_stage("files", broken)
    assert not (work / "files").exists()
    resumed = open_journal(work, RUN, resume=True, force=False)
    folder = resumed.folder_stage("files", lambda f: (f / "whole").write_text("whole") and None)
    assert [path.name for path in folder.iterdir()] == ["whole"]


def test_another_run_is_refused_and_the_field_named(tmp_path):
    open_journal(tmp_path / "work", RUN, resume=False, force=False)
    with pytest.raises(InputError, match="its seed is 0, this one's is 1"):
        open_journal(tmp_path / "work", {**RUN, "seed": 1}, resume=True, force=False)


def test_an_unfinished_run_is_kept_unless_forced(tmp_path):
    open_journal(tmp_path / "work", RUN, resume=False, force=False).stage("one", lambda: 1)
    with pytest.raises(InputError, match="unfinished run") as caught:
        open_journal(tmp_path / "work", RUN, resume=False, force=False)
    assert "--resume" in caught.value.remedy
    fresh = open_journal(tmp_path / "work", RUN, resume=False, force=True)
    assert not fresh.has("one")


def test_a_line_that_was_cut_off_is_taken_away(tmp_path):
    work = tmp_path / "work"
    open_journal(work, RUN, resume=False, force=False).stage("one", lambda: 1)
    with (work / FILE).open("a") as file:
        file.write('{"stage": "two", "sec')
    journal = open_journal(work, RUN, resume=True, force=False)
    assert not journal.has("two")
    journal.stage("two", lambda: 2)
    assert [json.loads(line).get("stage") for line in (work / FILE).read_text().splitlines()] == [None, "one", "two"]


def test_resume_of_nothing_begins(tmp_path):
    assert open_journal(tmp_path / "work", RUN, resume=True, force=False).seconds == {}
