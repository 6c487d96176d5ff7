"""The command line as a whole: one message and an exit code for each kind of end."""

from __future__ import annotations

import pytest

from edgeprune import __version__
from edgeprune.cli.app import main
from edgeprune.errors import BudgetError, EngineError, InputError


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


def test_an_interrupt_has_its_own_exit_code(monkeypatch, capsys, doctor):
    doctor(KeyboardInterrupt())
    code, out, err = ended(monkeypatch, capsys, "doctor")
    assert (code, out, err) == (130, "", "interrupted: fit and frontier go on with --resume\n")


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
