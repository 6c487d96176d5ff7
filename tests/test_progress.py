"""Progress as calls of a function, as bars on a terminal, or as notes alone."""

from __future__ import annotations

import logging

from edgeprune.progress import Forwarded, Silent, progress_of, rich_progress


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


def test_without_a_terminal_notes_alone_are_written(monkeypatch, capsys):
    for name in ("FORCE_COLOR", "TTY_COMPATIBLE"):
        monkeypatch.delenv(name, raising=False)
    with rich_progress() as progress:
        progress.stage("prune", 1)()
        progress.track("measure", 1, 2)
        progress.note("[b]kept as it is[/b] 1.5")
    assert capsys.readouterr() == ("", "[b]kept as it is[/b] 1.5\n")


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
