"""Every way in which a child process can end is an answer or one EngineError that says what happened."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from edgeprune.errors import EngineError
from edgeprune.ondevice.worker import ask

DOUBLE = "tests.support.doubles.child_double"


def end(how: str, timeout_seconds: float = 30) -> dict:
    return ask(DOUBLE, {"task": "the test", "end": how}, timeout_seconds)


def test_the_last_line_is_the_answer() -> None:
    assert end("answer") == {"numpy": np.__file__}


def test_files_of_the_current_folder_are_not_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A user's own numpy.py or json.py beside the model must not stand for the library."""
    for name in ("numpy.py", "json.py", "runpy.py"):
        (tmp_path / name).write_text("raise SystemExit('shadowed')")
    monkeypatch.chdir(tmp_path)
    assert end("answer") == {"numpy": np.__file__}


def test_an_error_of_the_child_is_raised_here() -> None:
    with pytest.raises(EngineError, match="the device is on fire") as caught:
        end("error")
    assert caught.value.remedy == "Put it out."


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("crash", "the test failed: .*a bug of ours"),
        ("noise", "the test failed: a library's .* message"),
        ("silence", "the test failed: it printed no reason"),
        ("half a document", "the test failed"),
        ("no object", "the test failed"),
        ("an error that is none", "None"),
        ("lines without an end", "the test failed: y+$"),
        ("SIGKILL", "the test was ended by SIGKILL: these are my last words"),
        ("SIGSEGV", "the test was ended by SIGSEGV: these are my last words"),
        ("real-time signal", r"the test was ended by signal \d+"),
    ],
)
def test_every_other_end_is_told(how: str, message: str) -> None:
    with pytest.raises(EngineError, match=message) as caught:
        end(how)
    assert caught.value.remedy
    assert ("memory" in caught.value.remedy) == (how == "SIGKILL")


def test_no_text_of_a_child_steers_a_terminal() -> None:
    assert end("escapes") == {"name [2J": ["a board of two lines", 1]}


def test_progress_that_is_none_is_passed_over() -> None:
    states: list[tuple[str, int, int]] = []
    request = {"task": "the test", "end": "another progress"}
    assert ask(DOUBLE, request, 30, lambda *state: states.append(state)) == {"done": True}
    assert states == [("s", 1, 2)]


@pytest.mark.slow
def test_a_child_that_hangs_is_ended() -> None:
    start = time.monotonic()
    with pytest.raises(EngineError, match="did not end within 2 s"):
        end("hang", 2)
    assert time.monotonic() - start < 30  # not the child's 60


@pytest.mark.parametrize(
    ("do", "message", "remedy"),
    [
        ("full", "the disk is full at plan", "Free some space"),
        ("import", "the Python module a_module_that_nobody_has is missing", "pip install a_module_that_nobody_has"),
    ],
)
def test_what_a_machine_lacks_is_said_plainly(do: str, message: str, remedy: str) -> None:
    with pytest.raises(EngineError) as caught:
        ask("tests.support.doubles.task_double", {"task": "the test", "do": do, "files": {}, "outputs": {}}, 30)
    assert caught.value.message == message
    assert remedy in caught.value.remedy


def test_progress_is_told_in_order_and_none_of_it_lost() -> None:
    states: list[tuple[str, int, int]] = []
    request = {"task": "the test", "do": "flood", "times": 5000, "files": {}, "outputs": {}}
    ask("tests.support.doubles.task_double", request, 60, lambda *state: states.append(state))
    assert states == [("flood", 0, 0), *(("flood", index, 5000) for index in range(5000))]


def test_a_child_does_not_outlive_its_parent() -> None:
    """Even where the parent has no time to say so."""
    code = (
        "from edgeprune.ondevice.worker import ask\n"
        "ask('tests.support.doubles.task_double', {'task': 'the test', 'do': 'sleep', 'seconds': 60, 'files': {}, "
        "'outputs': {}}, 90, lambda *state: print(*state, flush=True))"
    )
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert parent.stdout.readline() == "sleep 0 0\n"
    (child,) = Path(f"/proc/{parent.pid}/task/{parent.pid}/children").read_text().split()
    parent.send_signal(signal.SIGKILL)
    parent.communicate()
    end = time.monotonic() + 10
    while Path(f"/proc/{child}/exe").exists() and time.monotonic() < end:
        time.sleep(0.02)
    assert not Path(f"/proc/{child}/exe").exists()
