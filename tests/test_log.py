"""The log: what goes into a file, what to standard error, and what is silenced."""

from __future__ import annotations

import logging
import os
import warnings
from pathlib import Path

import pytest

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
    lines = (tmp_path / "run.log").read_text(encoding="utf-8").splitlines()
    assert [line for line in lines if line.endswith("edgeprune DEBUG a detail é")]
    assert [line for line in lines if line.endswith("another WARNING of a library")]
    assert [line for line in lines if "UserWarning: old" in line]
    assert "a detail" not in capsys.readouterr().err


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
