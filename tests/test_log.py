"""The log: what goes into a file, what to standard error, and what is silenced."""

from __future__ import annotations

import json
import logging
import os
import warnings
from datetime import datetime
from pathlib import Path

import pytest

from edgeprune.cli.ending import shown_progress
from edgeprune.errors import InputError
from edgeprune.log import set_up

VARIABLES = ("TRANSFORMERS_VERBOSITY", "HF_HUB_DISABLE_PROGRESS_BARS", "TOKENIZERS_PARALLELISM")


@pytest.fixture
def logger(monkeypatch):
    """The log of edgeprune; all that is set up is undone."""
    for name in VARIABLES:
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    loggers = [logging.getLogger("edgeprune"), logging.getLogger()]
    before = [(one.level, one.propagate, list(one.handlers)) for one in loggers]
    with warnings.catch_warnings():
        yield loggers[0]
    logging.captureWarnings(False)
    for one, (level, propagate, handlers) in zip(loggers, before, strict=True):
        for handler in set(one.handlers) - set(handlers):
            one.removeHandler(handler)
            handler.close()
        one.setLevel(level)
        one.propagate = propagate


def test_the_file_holds_every_message_and_the_warnings_of_the_libraries(logger, tmp_path, capsys):
    set_up(verbose=False, log_file=tmp_path / "run.log")
    logger.debug("a detail é")
    logging.getLogger("another").warning("of a library")
    warnings.warn("old", UserWarning, stacklevel=1)
    told = {(line["logger"], line["level"]): line["message"] for line in read(tmp_path / "run.log")}
    assert told["edgeprune", "DEBUG"] == "a detail é"
    assert told["another", "WARNING"] == "of a library"
    assert "UserWarning: old" in told["py.warnings", "WARNING"]
    assert "a detail" not in capsys.readouterr().err


def read(path: Path) -> list[dict]:
    """The lines of a log, each of them JSON with a time of its own zone."""
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    assert all(datetime.fromisoformat(line["time"]).tzinfo is not None for line in lines)
    return lines


def test_stages_and_notes_are_events_with_their_seconds_and_are_shown_once(logger, tmp_path, capsys):
    set_up(verbose=True, log_file=tmp_path / "run.log")
    with shown_progress() as progress:
        progress.stage("prune", 2)()
        progress.note("weights: int8 (asked for)")
        progress.stage("measure")
    events = [line for line in read(tmp_path / "run.log") if "event" in line]
    assert [(line["event"], line["message"]) for line in events] == [
        ("begin", "prune"),
        ("note", "weights: int8 (asked for)"),
        ("stage", "prune"),
        ("begin", "measure"),
        ("stage", "measure"),
    ]
    assert all(line["seconds"] >= 0 for line in events if line["event"] == "stage")
    assert capsys.readouterr().err.count("asked for") == 1


def test_an_error_that_is_a_bug_keeps_its_traceback(logger, tmp_path):
    set_up(verbose=False, log_file=tmp_path / "run.log")
    try:
        raise ValueError("a bug")
    except ValueError:
        logger.debug("traceback", exc_info=True)
    (line,) = read(tmp_path / "run.log")
    assert "ValueError: a bug" in line["traceback"]


def test_verbose_writes_to_standard_error(logger, capsys):
    set_up(verbose=True, log_file=None)
    logger.debug("a detail")
    assert capsys.readouterr().err == "a detail\n"


def test_a_warning_is_shown_once_beside_the_file_and_without_it(logger, tmp_path, capsys):
    for log_file in (None, tmp_path / "run.log"):
        set_up(verbose=False, log_file=log_file)
        logger.warning("mind")
        logger.info("a detail")
        assert capsys.readouterr().err == "mind\n"


def test_libraries_are_silenced_where_the_user_did_not_decide(logger, monkeypatch):
    monkeypatch.setenv("TRANSFORMERS_VERBOSITY", "debug")
    set_up(verbose=False, log_file=None)
    assert [os.environ[name] for name in VARIABLES] == ["debug", "1", "false"]
    with warnings.catch_warnings(record=True) as caught:
        warnings.warn("soon", FutureWarning, stacklevel=1)
    assert not caught


def test_a_file_that_cannot_be_written_is_refused(logger, tmp_path):
    with pytest.raises(InputError, match="cannot write the log .*x.log: No such file or directory") as caught:
        set_up(verbose=False, log_file=tmp_path / "none" / "x.log")
    assert caught.value.remedy == "Name another file."


def test_a_full_disk_ends_the_file_with_one_warning(logger, capsys):
    set_up(verbose=False, log_file=Path("/dev/full"))
    for number in range(3):
        logger.debug("a detail %d", number)
    assert capsys.readouterr().err == "the log /dev/full ends here: No space left on device\n"
