"""The reader of small files and the writer, against files of every kind and disks that fail."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import shutil
import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgeprune.errors import InputError
from edgeprune.files import (
    WriteError,
    check_output_file,
    checked,
    is_pointer,
    link_or_copy,
    parse_json,
    printable,
    read_json,
    read_text,
    scratch_folder,
    write_text,
    writing,
)

BROKEN = {
    "absent": None,
    "a list": b"[]",
    "a number": b"1",
    "cut off": b'{"a": ',
    "with a comma too many": b'{"a": 1,}',
    "empty": b"",
    "no UTF-8": b'{"a": "\xff"}',
    "nested": b'{"a":' * 200_000,
    "a huge number": b'{"a": ' + b"9" * 10_000 + b"}",
}


@pytest.mark.parametrize("content", BROKEN.values(), ids=list(BROKEN))
def test_every_broken_document_is_one_message_with_the_files_name(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "x.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(InputError, match=r"x\.json") as caught:
        read_json(path, remedy="Copy it again.")
    assert caught.value.remedy == "Copy it again."
    assert "\n" not in caught.value.message


def test_a_folder_is_no_file(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot read"):
        read_json(tmp_path)


def test_a_byte_order_mark_is_passed_over(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b'\xef\xbb\xbf{"a": 1}')
    assert read_json(tmp_path / "x") == {"a": 1}


def test_the_kind_and_the_size_are_checked(tmp_path: Path) -> None:
    (tmp_path / "x").write_text("[1, 2]")
    assert read_json(tmp_path / "x", list) == read_json(tmp_path / "x", object) == [1, 2]
    with pytest.raises(InputError, match="larger than"):
        read_text(tmp_path / "x", most_bytes=5)


@given(st.binary(max_size=60))
def test_any_bytes_are_a_document_or_an_error_of_ours(data: bytes) -> None:
    with contextlib.suppress(InputError):
        assert isinstance(parse_json(data, "x"), dict)


def test_half_a_character_is_refused_and_a_whole_one_read() -> None:
    assert parse_json('{"a": "\\ud83d\\ude00"}', "it") == {"a": "\U0001f600"}
    for text in ('{"a": "\\ud800"}', b'{"\\uDFFF": 1}'):
        with pytest.raises(InputError, match="it is not JSON: .* surrogates not allowed"):
            parse_json(text, "it")


def test_what_a_stranger_says_cannot_steer_a_terminal() -> None:
    said = printable("\x1b[2Jgone\x07\u202e\ud83d\x9b31m" + "x" * 5000)
    assert said.isprintable()
    assert "gone" in said
    assert len(said) < 320


class Library(Exception):
    """As safetensors tells it."""


FAILURES = [OSError(number, "no") for number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES)]
FAILURES += [
    Library("I/O error: No space left on device (os error 28)"),
    shutil.Error([("a", "b", "[Errno 28] No space left on device: 'b'")]),
    OSError("12288 requested and 0 written"),  # numpy's
]


@pytest.mark.parametrize("failure", FAILURES, ids=str)
def test_a_failed_write_names_the_place_and_what_to_do(tmp_path: Path, failure: Exception) -> None:
    with pytest.raises(WriteError, match=f"cannot write {tmp_path}") as caught, writing(tmp_path / "bundle"):
        raise failure
    assert caught.value.remedy
    assert caught.value.exit_code == 2


def test_numpys_failed_write_is_the_limit_on_files_where_there_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("resource.getrlimit", lambda which: (4096, -1))
    with pytest.raises(WriteError, match="File too large"), writing(Path("bundle")):
        raise OSError("12288 requested and 0 written")


def test_a_scratch_folder_goes_and_names_itself_where_it_cannot_be_written(tmp_path: Path) -> None:
    with scratch_folder(tmp_path, "parts-") as folder:
        (folder / "one").write_bytes(bytes(10))
        assert folder.name.startswith("parts-")
    named = pytest.raises(WriteError, match=f"cannot write {re.escape(str(tmp_path))}: File too large")
    with named, scratch_folder(tmp_path):
        raise OSError(errno.EFBIG, "File too large")
    assert not list(tmp_path.iterdir())
    with scratch_folder() as folder:
        assert folder.parent == Path(tempfile.gettempdir())


def test_without_a_folder_for_temporary_files_the_message_says_how_to_name_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", None)
    monkeypatch.setattr("tempfile._candidate_tempdir_list", lambda: ["/nowhere"])
    with pytest.raises(WriteError, match="no folder for temporary files") as caught, scratch_folder():
        pass
    assert "TMPDIR" in caught.value.remedy


@pytest.mark.parametrize("bug", [ValueError("x"), OSError(errno.EBADF, "x"), KeyError("x")], ids=repr)
def test_a_bug_stays_one(tmp_path: Path, bug: Exception) -> None:
    with pytest.raises(type(bug)), writing(tmp_path):
        raise bug


def test_a_write_is_whole_or_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x"
    write_text(path, "old")
    monkeypatch.setattr(Path, "write_bytes", lambda self, data: self.touch() or _full())
    with pytest.raises(WriteError, match="MiB are free"):
        write_text(path, "new")
    assert path.read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["x"]


def _full() -> None:
    raise OSError(errno.ENOSPC, "full")


def test_a_file_system_without_links_gets_copies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a").write_text("x")
    (tmp_path / "link").symlink_to("a")
    link_or_copy(tmp_path / "link", tmp_path / "b")
    assert (tmp_path / "b").samefile(tmp_path / "a")
    monkeypatch.setattr(os, "link", lambda *_: (_ for _ in ()).throw(PermissionError(errno.EPERM, "no")))
    link_or_copy(tmp_path / "link", tmp_path / "c")
    assert not (tmp_path / "c").samefile(tmp_path / "a")
    assert (tmp_path / "c").read_text() == "x"


FORM = {"name": str, "sizes": [int], "share": float | None, "parts": {"flag": bool, ...: Any}}
VALUE = {"name": "a", "sizes": [1, 2], "share": 1, "parts": {"flag": True, "more": 1}}


def test_a_document_of_the_form_is_returned_as_it_is():
    assert checked(VALUE, FORM, "a file") is VALUE


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"name": 1}, "name is not a text"),
        ({"sizes": [1, 2.5]}, r"sizes\[1\] is not a whole number"),
        ({"sizes": [True]}, r"sizes\[0\] is not a whole number"),
        ({"sizes": {}}, "sizes is not a list"),
        ({"share": float("nan")}, "share is not a finite number or null"),
        ({"share": True}, "share is not a finite number or null"),
        ({"parts": {}}, "parts.flag is missing"),
        ({"parts": None}, "parts is not an object"),
        ({"parts": {"flag": True, "more": [{"x": float("inf")}]}}, "parts.more is not of finite numbers"),
        ({"late": 1}, "late is not known to this version"),
    ],
)
def test_the_first_field_of_another_form_is_named(change, reason):
    with pytest.raises(InputError, match=f"a file: {reason}"):
        checked(VALUE | change, FORM, "a file")


def test_a_pointer_of_git_lfs_is_named(tmp_path):
    path = tmp_path / "report.json"
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n")
    assert is_pointer(path)
    with pytest.raises(InputError, match="is a pointer of Git LFS") as caught:
        read_json(path)
    assert "git lfs pull" in caught.value.remedy
    path.write_text("version 2")
    assert not is_pointer(path)
    assert not is_pointer(tmp_path / "none")


def test_an_output_replaces_our_own_files_alone(tmp_path):
    ours, users, linked = (tmp_path / name for name in ("ours.txt", "users.txt", "linked.txt"))
    check_output_file(ours, "--page", "mark", force=False)
    ours.write_text("a mark in it")
    users.write_text("x" * 5000 + "mark")
    linked.symlink_to("nowhere")
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(InputError, match="exists already"):
        check_output_file(ours, "--page", "mark", force=False)
    check_output_file(ours, "--page", "mark", force=True)
    for path in (users, linked, tmp_path, tmp_path / "pipe"):
        with pytest.raises(InputError, match="not written by edgeprune"):
            check_output_file(path, "--page", "mark", force=True)
    with pytest.raises(InputError, match="no folder"):
        check_output_file(tmp_path / "none" / "page", "--page", "mark", force=True)
