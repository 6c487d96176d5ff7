"""The campaign: it finds the faults that are planted, blames nothing else, and its parts run on the real product."""

from __future__ import annotations

import atexit
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from random import Random

import pytest

from tests.support import ROOT, bundle_files
from tests.support.file_events import at, from_then_on, watch
from tools import campaign, campaign_runs
from tools.campaign_faults import Fault, bundle_faults, contents, differences, faults_of, lost
from tools.campaign_mutations import GGUF, JSON, JSON_LINES, SAFETENSORS, TEXT, TOML
from tools.campaign_runs import Runs, Signal

MESSAGE = "error: the model is not there\nName another."


def raises() -> None:
    raise KeyError("planted")


def prints(output: str, errors: str, code: int) -> Callable[[], None]:
    def program() -> None:
        sys.stdout.write(output)
        sys.stderr.write(errors)
        sys.exit(code)

    return program


def leaves_a_process() -> None:
    subprocess.Popen(["sleep", "60"], start_new_session=True)


PLANTED = {
    "traceback": raises,
    "exit code": prints("", "", 7),
    "signal": lambda: os.kill(os.getpid(), signal.SIGUSR1),
    "hang": lambda: time.sleep(60),
    "message": prints("", "it did not work", 2),
    "control character": prints("\x1b[31mred", "", 0),
    "much printed": prints("", f"error: {'long ' * 50_000}\nTry again.", 2),
    "left running": leaves_a_process,
    "memory": lambda: prints("", "error: the memory of this machine does not suffice\nEnd other programs.", 4)(),
}


@pytest.mark.parametrize("kind", PLANTED)
def test_a_planted_fault_is_found(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(campaign_runs, "LEFT_SECONDS", 0.1)
    faults = faults_of(Runs(PLANTED[kind]).run(["fit"], tmp_path, seconds=0.5 if kind == "hang" else 60))
    assert [fault.kind for fault in faults] == [kind]
    if kind == "traceback":
        line = raises.__code__.co_firstlineno + 1
        assert faults[0].place == f"tests/tools/test_campaign.py:{line} raises: KeyError"


@pytest.mark.parametrize(
    "output, errors, code", [("", MESSAGE, 2), ("", MESSAGE, 4), ("missed", "", 3), ("done", "", 0)]
)
def test_what_is_documented_is_no_fault(output: str, errors: str, code: int, tmp_path: Path) -> None:
    assert not faults_of(Runs(prints(output, errors, code)).run([], tmp_path))


def test_a_signal_ends_a_run_and_is_no_fault_then(tmp_path: Path) -> None:
    ended = Runs(lambda: time.sleep(60)).run(["fit"], tmp_path, kill=Signal(signal.SIGKILL, 0.1))
    assert ended.code == -signal.SIGKILL
    assert not faults_of(ended, is_stopped=True)
    assert [fault.kind for fault in faults_of(ended)] == ["signal"]


def writes_files() -> None:
    for number in range(4):
        Path(f"{number}").write_text("x")
    Path("0").rename("moved")


def test_a_run_takes_nothing_of_its_caller_with_it(tmp_path: Path) -> None:
    """A forked process inherits what the caller is to remove at its own end."""
    with tempfile.TemporaryDirectory() as folder:
        removed_at_exit = tmp_path / "removed at exit"
        removed_at_exit.touch()
        atexit.register(removed_at_exit.unlink)
        try:
            assert Runs(prints("", "", 0)).run([], tmp_path).code == 0
            assert removed_at_exit.exists() and Path(folder).is_dir()
        finally:
            atexit.unregister(removed_at_exit.unlink)


def test_a_run_is_killed_at_the_chosen_file_operation(tmp_path: Path) -> None:
    kill = at(2, "write", lambda path: os.kill(os.getpid(), signal.SIGKILL))
    ended = Runs(writes_files).run([], tmp_path, before=lambda: watch(tmp_path, kill))
    assert ended.code == -signal.SIGKILL
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0", "1"]


def test_file_operations_are_refused_from_the_chosen_one_on(tmp_path: Path) -> None:
    def refuse(path: str) -> None:
        raise OSError(28, os.strerror(28), path)

    ended = Runs(writes_files).run([], tmp_path, before=lambda: watch(tmp_path, from_then_on(1, refuse)))
    assert "No space left on device: '1'" in ended.errors
    assert [path.name for path in tmp_path.iterdir()] == ["0"]


def test_half_a_bundle_is_found(tmp_path: Path) -> None:
    bundle_files.write(tmp_path, tmp_path / "out")
    assert not bundle_faults(tmp_path / "out")
    (tmp_path / "out" / "README.md").write_text("re")
    (tmp_path / "out" / "a.1.part").touch()
    (tmp_path / "out" / "tokenizer.json").unlink()
    (tmp_path / "out" / "own.json").write_text('{"loss": NaN}')
    assert {str(fault.place) for fault in bundle_faults(tmp_path / "out")} == {
        "README.md has another hash",
        "a.N.part",
        "own.json: a bare NaN",
        "tokenizer.json is missing",
    }


def test_a_lost_file_is_found(tmp_path: Path) -> None:
    for name in ("kept", "changed", "gone"):
        (tmp_path / name).write_text(name)
    before = contents(tmp_path)
    (tmp_path / "changed").write_text("other")
    (tmp_path / "gone").unlink()
    assert {fault.place for fault in lost(before, tmp_path)} == {"changed is changed", "gone is gone"}


def test_reports_differ_in_figures_and_not_in_durations() -> None:
    report = {"ratio": 0.1, "created": "today", "text": "built in 3 s", "modules": [{"kept": 3}]}
    assert not differences(report, report | {"created": "later", "text": "built in 12 s"})
    assert differences(report, report | {"ratio": 0.2, "modules": [{"kept": 2}]}) == [
        "report.modules[].kept",
        "report.ratio",
    ]


@pytest.mark.parametrize("mutation", dict.fromkeys((*TEXT, *JSON, *JSON_LINES, *TOML, *SAFETENSORS, *GGUF)))
def test_a_mutation_changes_a_file_and_is_the_same_for_a_seed(mutation: Callable[[bytes, Random], bytes]) -> None:
    header = json.dumps({"weight": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}).encode()
    text = json.dumps({"a": [1, 2], "name": "text"}, indent=1).encode()
    for data in (len(header).to_bytes(8, "little") + header + bytes(8), text + b"\nb = 1\n" + text, text):
        changed = [mutation(data, Random(seed)) for seed in range(20)]
        assert changed == [mutation(data, Random(seed)) for seed in range(20)]
        assert any(result != data for result in changed)
    mutation(b"", Random(0))


def test_the_summary_counts_tries_and_distinct_faults(capsys: pytest.CaptureFixture) -> None:
    fault = Fault("traceback", "edgeprune/files.py:1 f: KeyError")
    tried, mishandled = campaign.campaign(iter([("one", [fault]), ("two", []), ("three", [fault, fault])]), 60)
    campaign.print_summary("fuzz", tried, mishandled)
    assert "fuzz: 3 tried, 2 mishandled, 1 distinct faults" in capsys.readouterr().out


@pytest.mark.parametrize("faults, code", [([], 0), ([Fault("hang", "fit")], 1)])
def test_the_exit_code_says_whether_anything_was_mishandled(
    faults: list[Fault], code: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(campaign.PARTS, "kills", lambda home, random: iter([("one", faults)]))
    monkeypatch.setattr(Runs, "import_all", lambda runs: None)
    monkeypatch.setattr("sys.argv", ["campaign.py", "--part", "kills", "--minutes", "0"])
    assert campaign.main() == code


@pytest.mark.slow
def test_all_parts_run_on_the_product() -> None:
    words = [sys.executable, ROOT / "tools" / "campaign.py", "--minutes", "0.1", "--seed", "0"]
    ended = subprocess.run(words, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert all(f"\n{part}: " in ended.stdout for part in campaign.PARTS)
