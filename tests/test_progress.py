"""Progress as calls of a function, as bars on a terminal, or as lines."""

from __future__ import annotations

import logging
import time

import pytest

from edgeprune import progress as progress_module
from edgeprune.progress import Forwarded, Lines, Silent, progress_of, rich_progress


def test_a_progress_is_made_of_what_the_caller_gave():
    given = Silent()
    assert progress_of(given) is given
    assert isinstance(progress_of(None), Silent)
    assert isinstance(progress_of(print), Forwarded)


def test_a_function_is_called_with_every_step_and_not_with_notes(caplog):
    calls = []
    progress = progress_of(lambda *call: calls.append(call))
    advance, other = progress.stage("prune", 2), progress.stage("search")
    advance()
    other()
    advance()
    progress.track("measure", 3, 10)
    with caplog.at_level(logging.INFO, "edgeprune"):
        progress.note("a 100 % note")
    assert calls == [
        ("prune", 0, 2),
        ("search", 0, 0),
        ("prune", 1, 2),
        ("search", 1, 0),
        ("prune", 2, 2),
        ("measure", 3, 10),
    ]
    assert caplog.messages == ["a 100 % note"]


def test_silence_takes_every_call(capsys):
    progress = Silent()
    progress.stage("prune", 2)()
    progress.track("prune", 1, 2)
    progress.note("nobody reads it")
    assert capsys.readouterr() == ("", "")


@pytest.fixture
def clock(monkeypatch):
    """No terminal, and a clock that a test sets."""
    for name in ("FORCE_COLOR", "TTY_COMPATIBLE"):
        monkeypatch.delenv(name, raising=False)
    now = [100.0]
    monkeypatch.setattr(progress_module.time, "monotonic", lambda: now[0])
    return now


def test_without_a_terminal_a_stage_is_a_line_when_it_ends(clock, capsys):
    with rich_progress() as progress:
        advance = progress.stage("prune", 2)
        clock[0] += 3
        advance()
        assert capsys.readouterr() == ("", "")
        advance()
        assert capsys.readouterr() == ("", "prune: done in 3.0 s\n")
        clock[0] += 50  # belongs to no stage
        progress.note("[b]kept as it is[/b] 1.5")
        progress.stage("search")
        clock[0] += 200
        progress.stage("write the bundle")
        clock[0] += 12
    assert capsys.readouterr() == (
        "",
        "[b]kept as it is[/b] 1.5\nsearch: done in 3 min 20 s\nwrite the bundle: done in 12 s\n",
    )


def test_a_long_stage_is_a_line_for_each_tenth(clock, capsys):
    with rich_progress() as progress:
        advance = progress.stage("prune", 40)
        for _ in range(40):
            clock[0] += 0.5
            advance()
    lines = capsys.readouterr().err.splitlines()
    assert lines == [f"prune: {share} % after {share // 5} s" for share in (50, 60, 70, 80, 90)] + [
        "prune: done in 20 s"
    ]


def test_what_counts_its_own_steps_is_part_of_a_stage_and_a_line_where_it_is_not_short(clock, capsys):
    with rich_progress() as progress:
        progress.stage("build and measure")
        for name, seconds in (("tactics", 0.01), ("layers", 0.01), ("tactics", 0.01), ("measure", 30), ("check", 0.1)):
            progress.track(name, 0, 10)
            clock[0] += seconds
            progress.track(name, 5, 10)
    assert capsys.readouterr().err.splitlines() == [
        "measure: 50 % after 30 s",
        "measure: done in 30 s",
        "build and measure: done in 30 s",
    ]


def test_on_a_terminal_a_stage_ends_where_the_next_begins(monkeypatch, capsys):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "100")
    with rich_progress() as progress:
        progress.stage("prune", 4)()
        progress.track("measure", 1, 2)
        progress.track("measure", 1, 4)
    shown = capsys.readouterr().err
    lines = shown[shown.rindex("prune") :].splitlines()  # the last time that all bars were drawn
    assert "100%" in lines[0]
    (bar,) = [line for line in lines if "measure" in line]  # one for a stage that counts its own steps
    assert "25%" in bar


def test_on_a_terminal_a_name_is_no_markup_and_only_the_last_stages_have_bars(monkeypatch, capsys):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setattr("edgeprune.progress.MOST_BARS", 3)
    with rich_progress() as progress:
        first = progress.stage("the first of them")
        for index in range(4):
            progress.track(f"[/] build [red]{index}", 1, 2)
        first()
    shown = capsys.readouterr().err
    last = shown[shown.rindex("[/] build [red]1") :]
    assert "[red]3" in last
    assert "the first" not in last


def test_a_long_silence_ends_with_what_is_under_way(clock, capsys):
    lines = Lines()
    lines.stage("export the dense model")
    clock[0] += 29.0
    lines.beat()
    lines.beat()  # it has just said so
    assert capsys.readouterr().err == "export the dense model: under way for 29 s\n"
    advance = lines.stage("prune", 30)
    advance()
    capsys.readouterr()
    clock[0] += 95.0
    lines.beat()
    assert capsys.readouterr().err == "prune: 3 % after 1 min 35 s\n"
    lines.track("build", 1, 4)
    clock[0] += 26.0
    lines.beat()
    assert capsys.readouterr().err == "build: 25 % after 26 s\n"


def test_no_half_minute_is_silent_without_a_terminal(monkeypatch, capsys):
    """Hundredths of a second stand for the half minute."""
    for name, value in (("ALIVE_SECONDS", 0.02), ("BEAT_SECONDS", 0.01)):
        monkeypatch.setattr(progress_module, name, value)
    with rich_progress() as progress:
        progress.stage("solve")
        time.sleep(0.2)
    lines = capsys.readouterr().err.splitlines()
    assert lines.pop().startswith("solve: done in ")
    assert lines
    assert all(line.startswith("solve: under way for ") for line in lines)
