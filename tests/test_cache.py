"""The cache: the environment's folder, else the user's, else none; damaged or not to be written, it is no hindrance."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest

from edgeprune import cache
from edgeprune.cache import cache_folder, cached, cached_folder, read_cached, temporary_folder, write_cached
from tests.support import ROOT


@pytest.fixture(autouse=True)
def _said_nothing():
    cache._warn.cache_clear()


def kept(path: Path, calls: list[str]) -> list[int]:
    """A result that is a list of numbers."""

    def decode(data: bytes) -> list[int]:
        return [int(number) for number in json.loads(data)]

    def make() -> list[int]:
        calls.append("made")
        return [1, 2]

    return cached(path, decode, make, lambda numbers: json.dumps(numbers).encode())


def test_the_environment_names_the_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("EDGEPRUNE_CACHE", str(tmp_path / "mine"))
    assert cache_folder() == tmp_path / "mine"
    assert not (tmp_path / "mine").exists()  # whoever writes there makes it


@pytest.mark.skipif(sys.platform != "linux", reason="XDG_CACHE_HOME is Linux's")
@pytest.mark.parametrize("named", [None, ""])
def test_else_it_is_the_users(tmp_path, monkeypatch, named):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("EDGEPRUNE_CACHE", raising=False)
    if named is not None:
        monkeypatch.setenv("EDGEPRUNE_CACHE", named)
    assert cache_folder() == tmp_path / "edgeprune"


def test_a_user_without_a_home_has_a_folder_that_goes(monkeypatch, caplog):
    def no_entry(name: str) -> str:
        raise KeyError("getpwuid(): uid not found: 12345")

    monkeypatch.delenv("EDGEPRUNE_CACHE", raising=False)
    for folder in (no_entry, lambda name: "~/.cache/edgeprune"):
        monkeypatch.setattr("platformdirs.user_cache_dir", folder)
        assert cache_folder() == temporary_folder()
    assert [record.message for record in caplog.records] == [
        "this user has no folder for a cache, going on without (EDGEPRUNE_CACHE names another)"
    ]


def test_the_temporary_folder_goes_with_the_process():
    program = "from edgeprune.cache import temporary_folder as folder; (folder() / 'file').touch(); print(folder())"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert "edgeprune-" in done.stdout
    assert not Path(done.stdout.strip()).exists()


def test_what_is_kept_is_made_once(tmp_path):
    calls: list[str] = []
    assert [kept(tmp_path / "deep" / "kept.json", calls) for _ in range(2)] == [[1, 2], [1, 2]]
    assert calls == ["made"]


@pytest.mark.parametrize("data", [b"", b"{", b"[" * 100_000, b'{"of": 3}', b"[1, {}]", b"\xff"])
def test_what_is_damaged_is_made_again(tmp_path, data):
    (tmp_path / "kept.json").write_bytes(data)
    calls: list[str] = []
    assert kept(tmp_path / "kept.json", calls) == [1, 2]
    assert kept(tmp_path / "kept.json", calls) == [1, 2]
    assert calls == ["made"]


def test_what_cannot_be_written_is_said_once(tmp_path, monkeypatch, caplog):
    (tmp_path / "occupied").write_text("")
    monkeypatch.setenv("EDGEPRUNE_CACHE", str(tmp_path / "occupied"))
    calls: list[str] = []
    with caplog.at_level(logging.WARNING):
        assert [kept(cache_folder() / name / "kept.json", calls) for name in ("a", "b")] == [[1, 2], [1, 2]]
    assert [record.message for record in caplog.records] == [
        f"the cache {tmp_path / 'occupied'} cannot be written: Not a directory, going on without "
        "(EDGEPRUNE_CACHE names another)"
    ]


def test_a_full_disk_leaves_nothing_half(tmp_path, monkeypatch, caplog):
    def full(path: Path, data: bytes) -> int:
        raise OSError(28, os.strerror(28), str(path))

    monkeypatch.setattr(Path, "write_bytes", full)
    write_cached(tmp_path / "kept", b"data")
    assert read_cached(tmp_path / "kept") is None
    assert "No space left on device" in caplog.text
    assert not list(tmp_path.iterdir())


def test_a_folder_is_filled_once_and_again_where_a_file_is_not_whole(tmp_path):
    calls = []

    def fill(folder: Path) -> None:
        calls.append(folder)
        (folder / "weights").write_bytes(b"weights")

    folder = tmp_path / "models" / "one"
    assert [cached_folder(folder, fill) for _ in range(2)] == [folder, folder]
    (folder / "weights").write_bytes(b"wei")
    cached_folder(folder, fill)
    assert (folder / "weights").read_bytes() == b"weights"
    (tmp_path / "models" / "one.files").write_text("[]")
    cached_folder(folder, fill)
    assert len(calls) == 3
    assert sorted(path.name for path in folder.parent.iterdir()) == ["one", "one.files"]


def test_a_folder_of_no_cache_is_temporary(tmp_path):
    (tmp_path / "occupied").write_text("")
    folder = cached_folder(tmp_path / "occupied" / "one", lambda part: (part / "weights").touch())
    assert folder == temporary_folder() / "one"
    assert [path.name for path in folder.iterdir()] == ["weights"]
