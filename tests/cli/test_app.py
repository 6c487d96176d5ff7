"""The command line as a whole: one message and an exit code for each kind of end."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest

from edgeprune import __version__
from edgeprune.cli.app import main
from edgeprune.errors import BudgetError, EngineError, InputError
from tests.support import ROOT


def ended(monkeypatch, capsys, *words: str) -> tuple[int, str, str]:
    """Exit code, standard output and standard error of a command line."""
    monkeypatch.setattr("sys.argv", ["edgeprune", *words])
    with pytest.raises(SystemExit) as end:
        main()
    return end.value.code, *capsys.readouterr()


@pytest.fixture
def doctor(monkeypatch):
    """Lets `edgeprune doctor` end in an error."""

    def ends_in(error: BaseException) -> None:
        def examine():
            raise error

        monkeypatch.setattr("edgeprune.commands.doctor.examine", examine)

    return ends_in


@pytest.mark.parametrize(("kind", "code"), [(InputError, 2), (BudgetError, 3), (EngineError, 4)])
def test_an_error_of_ours_is_one_message_with_a_remedy(monkeypatch, capsys, doctor, kind, code):
    doctor(kind("the graph is broken", "Write it again."))
    assert ended(monkeypatch, capsys, "doctor") == (code, "", "error: the graph is broken\nWrite it again.\n")


def test_an_interrupt_has_its_own_exit_code(monkeypatch, capsys):
    monkeypatch.setattr("edgeprune.commands.doctor.examine", lambda: os.kill(os.getpid(), signal.SIGINT))
    assert ended(monkeypatch, capsys, "doctor") == (130, "", "interrupted\n")


@pytest.mark.parametrize("command", ["fit", "frontier"])
@pytest.mark.parametrize(
    ("number", "code", "how"), [(signal.SIGINT, 130, "interrupted"), (signal.SIGTERM, 143, "ended by SIGTERM")]
)
def test_a_fit_that_a_signal_ends_goes_on_with_resume(monkeypatch, capsys, command, number, code, how):
    monkeypatch.setattr(f"edgeprune.commands.{command}.{command}", lambda **options: os.kill(os.getpid(), number))
    hint = f"{how}: the same command goes on with --resume\n"
    assert ended(monkeypatch, capsys, command, "--device", "cpu") == (code, "", hint)


def test_a_signal_is_no_bug_of_the_library_that_caught_it(monkeypatch, capsys):
    def examine():
        try:
            os.kill(os.getpid(), signal.SIGINT)
        except KeyboardInterrupt:
            raise SystemError("initialization of _C raised unreported exception") from None

    monkeypatch.setattr("edgeprune.commands.doctor.examine", examine)
    assert ended(monkeypatch, capsys, "doctor") == (130, "", "interrupted\n")


def test_the_end_of_a_file_is_no_interrupt(monkeypatch, doctor):
    doctor(EOFError("No data left in file"))
    monkeypatch.setattr("sys.argv", ["edgeprune", "doctor"])
    with pytest.raises(EOFError, match="No data left in file"):
        main()


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (OSError(28, "No space left on device", "/disk/file"), 2, "error: cannot write /disk/file: No space left"),
        (MemoryError(), 4, "error: the memory of this machine does not suffice"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), 4, "error: the memory of this machine"),
    ],
)
def test_what_the_machine_lacks_is_no_bug(monkeypatch, capsys, doctor, error, code, message):
    doctor(error)
    found, out, err = ended(monkeypatch, capsys, "doctor")
    assert (found, out) == (code, "")
    assert err.startswith(message)
    assert err.count("\n") == 2


def test_a_signal_while_it_starts_is_no_traceback(tmp_path):
    """Sent by the first module that the command line imports."""
    (tmp_path / "typer.py").write_text("import os, signal\nos.kill(os.getpid(), signal.SIGINT)\n")
    done = subprocess.run(
        [sys.executable, "-m", "edgeprune.cli", "doctor"],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": f"{tmp_path}:{ROOT}"},
    )
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "")


def test_a_bug_keeps_its_traceback(monkeypatch, doctor):
    doctor(ZeroDivisionError("a bug"))
    monkeypatch.setattr("sys.argv", ["edgeprune", "doctor"])
    with pytest.raises(ZeroDivisionError):
        main()


@pytest.mark.parametrize(
    ("words", "named"),
    [(("devise",), "devise"), (("doctor", "--colour"), "--colour"), (("fit", "--samples", "many"), "--samples")],
)
def test_a_slip_on_the_command_line_is_the_parsers(monkeypatch, capsys, words, named):
    code, out, error = ended(monkeypatch, capsys, *words)
    assert (code, out) == (2, "")
    assert named in error
    assert "Traceback" not in error


def test_the_version_is_printed_before_any_command(monkeypatch, capsys):
    assert ended(monkeypatch, capsys, "--version", "devise") == (0, f"edgeprune {__version__}\n", "")
