"""Standard output and standard error that are of few characters, full, closed, or that nobody reads."""

from __future__ import annotations

import io
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import typer
from rich.table import Table

from edgeprune.cli.streams import BROKEN_PIPE, console, guarded_streams, made, note, show
from edgeprune.files import WriteError
from edgeprune.report.terminal import print_report
from tests.support import ROOT
from tests.support.sample_reports import measured_content, report_of

FULL = Path("/dev/full")
needs_full = pytest.mark.skipif(not FULL.exists(), reason="/dev/full is Linux's")


def unread_pipe():
    """A stream whose reader is gone."""
    reader, writer = os.pipe()
    os.close(reader)
    return os.fdopen(writer, "w")


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_what_an_encoding_lacks_is_escaped(monkeypatch, encoding):
    output, errors = (io.TextIOWrapper(io.BytesIO(), encoding=encoding) for _ in range(2))
    monkeypatch.setattr("sys.stdout", output)
    monkeypatch.setattr("sys.stderr", errors)
    with guarded_streams():
        show("naïve \U0001f600 \udcff")
        table = Table("a", "b")
        table.add_row("\u2026", "\u4e2d")
        console().print(table)
        note("\u2026")
    text = output.buffer.getvalue().decode(encoding)
    assert text.startswith("na\\xefve" if encoding == "ascii" else "naïve")
    assert "\\U0001f600 \\udcff\n" in text
    assert "\\u4e2d" in text
    assert errors.buffer.getvalue() == b"\\u2026\n"


def test_a_narrow_terminal_loses_no_digits(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "20")
    with guarded_streams():
        print_report(report_of(measured_content()), console())
    narrow = capsys.readouterr().out
    monkeypatch.setenv("COLUMNS", "80")
    with guarded_streams():
        print_report(report_of(measured_content()), console())
    assert narrow == capsys.readouterr().out


@needs_full
@pytest.mark.parametrize("write", [lambda: show("text"), lambda: console().print("text")])
def test_a_full_output_is_one_error_and_what_was_made_is_named(monkeypatch, capsys, write):
    monkeypatch.setattr("sys.stdout", FULL.open("w"))
    with guarded_streams(), pytest.raises(WriteError) as caught, made("bundle", Path("out")):
        write()
    assert caught.value.message == "cannot write standard output: No space left on device"
    assert capsys.readouterr().err == "bundle  out is complete\n"


def test_a_closed_output_is_the_same_error(monkeypatch):
    monkeypatch.setattr("sys.stdout", None)
    with guarded_streams(), pytest.raises(WriteError, match="Bad file descriptor"):
        show("text")


def test_nobody_who_reads_is_an_exit_code_alone(monkeypatch, capsys):
    monkeypatch.setattr("sys.stdout", unread_pipe())
    with guarded_streams(), pytest.raises(typer.Exit) as caught:
        console().print("text")
    assert caught.value.exit_code == BROKEN_PIPE == 128 + signal.SIGPIPE
    assert capsys.readouterr().err == ""


@needs_full
def test_standard_error_is_never_needed(monkeypatch):
    for errors in (FULL.open("w"), unread_pipe(), None):
        monkeypatch.setattr("sys.stderr", errors)
        with guarded_streams():
            note("text")
    with guarded_streams():
        assert not sys.stderr.isatty()


def test_controls_of_strangers_are_not_written_and_no_megabytes(capsys):
    with guarded_streams():
        note("\x1b[2J" + "x" * 10**6)
    error = capsys.readouterr().err
    assert "\x1b" not in error
    assert len(error) < 5000


@needs_full
@pytest.mark.parametrize(
    ("redirection", "code", "error"),
    [
        (">/dev/full", 2, "error: cannot write standard output: No space left on device\n"),
        (">&-", 2, "error: cannot write standard output: Bad file descriptor\n"),
        ("| true", BROKEN_PIPE, ""),
        ("2>&-", 0, ""),
    ],
)
def test_the_program_ends_with_one_message(redirection, code, error):
    command = f"{sys.executable} -m edgeprune.cli fit --help {redirection}; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == code
    assert done.stderr.startswith(error)
    assert done.stderr.count("\n") == (2 if error else 0)
