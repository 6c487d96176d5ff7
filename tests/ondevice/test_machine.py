"""The facts about this machine, against the system's own figures; the vendor's commands are doubles."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap

import numpy as np
import pytest

from edgeprune.ondevice import machine
from tests.support.device import script

LINUX = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
ANSWER = "1800 MHz, 2100 MHz, 9000 MHz, 41, 150.00 W, Enabled"


def run_alone(program: str) -> list[int]:
    """Returns the numbers that a program prints in a process of its own."""
    command = [sys.executable, "-c", textwrap.dedent(program)]
    return [int(line) for line in subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()]


@pytest.fixture
def commands(tmp_path, monkeypatch):
    """Writes a command that a vendor's system has; no other is found."""
    monkeypatch.setenv("PATH", str(tmp_path))
    return lambda name, body: script(tmp_path / name, body)


def test_the_processor_is_named_with_the_threads_that_this_process_may_use():
    assert machine.processor().endswith(f", {machine.threads()} threads")
    if hasattr(os, "sched_setaffinity"):
        allowed = os.sched_getaffinity(0)
        os.sched_setaffinity(0, {min(allowed)})
        try:
            assert machine.threads() == 1
        finally:
            os.sched_setaffinity(0, allowed)
    assert machine.machine()


@LINUX
def test_memory_is_what_the_system_has():
    state = machine.memory_state()
    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    assert state["total"] == pytest.approx(pages, rel=0.01)
    assert 0 < state["available"] <= state["total"]
    assert state["swapped"] >= 0


@LINUX
def test_a_peak_is_of_what_was_touched_and_begins_again():
    # A process of its own: what the tests before this one left resident is given back at any time.
    of_a_block, after = run_alone("""
        import numpy as np
        from edgeprune.ondevice import machine
        machine.reset_peak_bytes()
        before = machine.peak_bytes()
        block = np.ones(2**28, np.uint8)
        print(machine.peak_bytes() - before)
        del block
        machine.reset_peak_bytes()
        print(machine.peak_bytes() - before)
    """)
    assert 0.9 * 2**28 < of_a_block < 1.2 * 2**28
    assert after < 2**25


@LINUX
@pytest.mark.parametrize("body", ["echo '[N/A]'", "exit 3", "echo", None])
def test_used_memory_is_the_gpus_or_where_it_tells_none_the_systems(commands, tmp_path, body):
    commands("nvidia-smi", "echo '700'\necho '24000'")
    assert machine.used_memory() == 700 * 2**20
    if body is None:
        (tmp_path / "nvidia-smi").unlink()
    else:
        commands("nvidia-smi", body)
    state = machine.memory_state()
    assert machine.used_memory() == pytest.approx(state["total"] - state["available"], abs=2**28)


def test_conditions_are_in_words_and_leave_out_what_no_command_tells(commands):
    assert not {"power mode", "clocks sm"} & set(machine.conditions())
    commands("nvpmodel", "echo 'NV Power Mode: MAXN'\necho 0")
    commands("nvidia-smi", f"echo '{ANSWER}'")
    found = machine.conditions()
    assert found["power mode"] == "NV Power Mode: MAXN 0"
    assert (found["clocks sm"], found["temperature gpu"], found["persistence mode"]) == ("1800 MHz", "41", "Enabled")


def test_a_module_that_does_not_load_has_its_reason(monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    found = machine.describe()
    assert found["modules"]["numpy"] == np.__version__
    assert found["modules"]["tensorrt"] is None
    assert found["missing"]["tensorrt"].startswith("ModuleNotFoundError: ")
    assert set(found["missing"]) == {name for name, version in found["modules"].items() if version is None}
    assert (found["gpu"] is None) == bool(found["no_gpu"])
    assert found["processor"] == machine.processor()
