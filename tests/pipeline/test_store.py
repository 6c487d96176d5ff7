"""The folder of shared stages: each is made once, whoever asks, and never seen half."""

from __future__ import annotations

import fcntl
import multiprocessing
import os
import signal
import time
from pathlib import Path

import pytest

from edgeprune.pipeline.journal import open_journal
from edgeprune.pipeline.store import Store

PARTS = {"model": "abc", "positions": 64}
SPAWN = multiprocessing.get_context("spawn")


def write(text: str):
    def fill(folder: Path) -> None:
        (folder / "sub").mkdir()
        (folder / "sub" / "a.txt").write_text(text)

    return fill


def test_a_stage_is_made_once_for_all_that_depend_on_the_same(tmp_path):
    store, made = Store(tmp_path / "store"), []
    for parts in (PARTS, PARTS, PARTS | {"model": "other"}):
        assert store.value("numbers", parts, lambda: made.append(1) or {"count": len(made)})["count"] == len(made)
    assert len(made) == 2
    assert Store(tmp_path / "store").value("numbers", PARTS, pytest.fail) == {"count": 1}
    assert store.value("letters", PARTS, lambda: "of another stage") == "of another stage"


def test_a_folder_of_a_stage_is_linked_and_the_marks_stay_apart(tmp_path):
    for name, fill in (("first", write("made")), ("second", pytest.fail)):
        with open_journal(tmp_path / name, {}, False, False) as journal:
            journal.store = Store(tmp_path / "store")
            folder = journal.folder_stage("samples", fill, PARTS)
            assert (folder / "sub" / "a.txt").read_text() == "made"
    files = [path.name for path in (tmp_path / "store").rglob("*") if path.is_file()]
    assert sorted(name for name in files if not name.endswith(".lock")) == ["a.txt"]
    assert (tmp_path / "first/samples/sub/a.txt").samefile(tmp_path / "second/samples/sub/a.txt")


def test_without_parts_or_a_store_nothing_is_shared(tmp_path):
    for name, parts, store in (("one", None, Store(tmp_path / "store")), ("two", PARTS, None)):
        with open_journal(tmp_path / name, {}, False, False) as journal:
            journal.store = store
            journal.folder_stage("samples", write(name), parts)
            assert journal.stage("value", lambda: name, parts) == name  # noqa: B023
    assert not (tmp_path / "store").exists()


def test_a_stage_that_failed_is_not_kept(tmp_path):
    store = Store(tmp_path / "store")
    (tmp_path / "out").mkdir()
    with pytest.raises(ZeroDivisionError):
        store.value("numbers", PARTS, lambda: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        store.fill("files", PARTS, tmp_path / "out", lambda folder: write("half")(folder) or 1 / 0)
    assert store.value("numbers", PARTS, lambda: 7) == 7
    (tmp_path / "again").mkdir()
    store.fill("files", PARTS, tmp_path / "again", write("whole"))
    assert (tmp_path / "again/sub/a.txt").read_text() == "whole"


def test_without_locks_the_first_that_ends_is_kept_and_nobody_fails(tmp_path, monkeypatch):
    def refuse(*_: object) -> None:
        raise OSError("this file system has no locks")

    monkeypatch.setattr(fcntl, "flock", refuse)
    store = Store(tmp_path / "store")
    for name in ("outer", "inner", "later"):
        (tmp_path / name).mkdir()

    def both(folder: Path) -> None:
        store.fill("files", PARTS, tmp_path / "inner", write("inner"))
        write("outer")(folder)

    store.fill("files", PARTS, tmp_path / "outer", both)
    store.fill("files", PARTS, tmp_path / "later", pytest.fail)
    texts = [(tmp_path / name / "sub/a.txt").read_text() for name in ("outer", "inner", "later")]
    assert texts == ["outer", "inner", "inner"]
    assert not [path for path in (tmp_path / "store").iterdir() if path.name.endswith(".part")]


def slow_value(folder: Path, name: str) -> None:
    def compute() -> str:
        (folder / f"begun-{name}").touch()
        time.sleep(0.5 if name == "first" else 0)
        return name

    result = Store(folder / "store").value("numbers", PARTS, compute)
    (folder / f"result-{name}").write_text(result)


def endless_value(folder: Path) -> None:
    Store(folder / "store").value("numbers", PARTS, lambda: (folder / "begun").touch() or time.sleep(600))


def wait_for(path: Path) -> None:
    end = time.monotonic() + 60
    while not path.exists():
        assert time.monotonic() < end, path
        time.sleep(0.01)


def test_who_comes_second_waits_for_the_first(tmp_path):
    first, second = (SPAWN.Process(target=slow_value, args=(tmp_path, name)) for name in ("first", "second"))
    first.start()
    wait_for(tmp_path / "begun-first")
    second.start()
    for process in (first, second):
        process.join()
    assert (tmp_path / "result-second").read_text() == "first"
    assert not (tmp_path / "begun-second").exists()


def test_who_waits_for_one_that_is_killed_makes_the_stage(tmp_path):
    killed = SPAWN.Process(target=endless_value, args=(tmp_path,))
    killed.start()
    wait_for(tmp_path / "begun")
    second = SPAWN.Process(target=slow_value, args=(tmp_path, "second"))
    second.start()
    os.kill(killed.pid, signal.SIGKILL)
    second.join()
    assert (tmp_path / "result-second").read_text() == "second"
    killed.join()
