"""Signals that end a command: cleaned up, one line, an exit code of their own, and the hint where it can go on."""

from __future__ import annotations

import contextlib
import os
import signal
import time

import pytest

from edgeprune.cli.ending import ending, interrupted_by_signals, resumable, shown_progress


@pytest.mark.parametrize(
    ("number", "code", "message"),
    [(signal.SIGINT, 130, "interrupted"), (signal.SIGTERM, 143, "ended by SIGTERM"), (signal.SIGHUP, 129, "SIGHUP")],
)
def test_a_signal_is_an_interrupt(number, code, message):
    before = signal.getsignal(number)
    with interrupted_by_signals():
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), number)
        assert (ending.signal, ending.exit_code) == (number, code)
        assert ending.message.endswith(message)
        with pytest.raises(KeyboardInterrupt), resumable():
            os.kill(os.getpid(), number)
        assert ending.message.endswith(f"{message}: the same command goes on with --resume")
    assert signal.getsignal(number) is before


def test_what_was_done_cannot_go_on():
    with interrupted_by_signals():
        with resumable():
            pass
        assert not ending.can_resume


def test_a_signal_that_is_ignored_stays_so():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
    try:
        with interrupted_by_signals():
            os.kill(os.getpid(), signal.SIGHUP)
            assert ending.signal is None
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.fixture(autouse=True)
def _as_before():
    """The commands that other tests run in this process have not been ended."""
    yield
    ending.__init__()


class EndsWhenItGoes:
    """An object in whose __del__ the signal comes, where Python ignores exceptions."""

    def __del__(self) -> None:
        signal.raise_signal(signal.SIGTERM)


def test_an_interrupt_that_python_ignores_comes_again(capfd):
    start = time.monotonic()
    with pytest.raises(KeyboardInterrupt), interrupted_by_signals():
        EndsWhenItGoes()
        time.sleep(60)
    assert time.monotonic() - start < 30
    assert ending.signal == signal.SIGTERM
    assert capfd.readouterr().err == ""


def test_an_interrupt_that_a_library_swallows_ends_the_next_stage(capsys):
    with interrupted_by_signals(), shown_progress() as progress:
        progress.stage("one")
        with contextlib.suppress(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(KeyboardInterrupt):
            progress.stage("two")
    assert ending.exit_code == 143
