"""The tasks of a process on the device, each answered by what it names; the GPU is a double here."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from edgeprune.engine.onnx.graph import GraphFiles
from edgeprune.ondevice import machine, tasks
from edgeprune.ondevice.worker import quiet
from tests.support.doubles.double_device import Device
from tests.support.doubles.double_tensorrt import CONTEXT_BYTES
from tests.support.doubles.install import RUNTIME

pytest_plugins = ("tests.support.doubles.fixtures",)


def test_what_is_described_is_this_machine() -> None:
    found, expected = json.loads(json.dumps(tasks.answer({"do": "describe"}, quiet))), machine.describe()
    assert found.pop("memory")["total"] == expected.pop("memory")["total"]  # the rest of it changes all the time
    assert found == expected


def test_a_task_that_does_not_exist_is_a_bug() -> None:
    with pytest.raises(KeyError, match="dance"):
        tasks.answer({"do": "dance"}, quiet)


def test_on_a_double_a_figure_that_does_not_settle_is_measured_again_and_noted(
    device: Device, plan: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No interval is as narrow as 0."""
    monkeypatch.setattr(tasks, "SETTLED", -1.0)
    request = {
        "do": "measure",
        "engine": "tensorrt",
        "workload": {"batch": 2, "prompt": 8, "context": 48},
        "files": {"plan": str(plan)},
        "seconds": 0.1,
    }
    notes = tasks.answer(request, quiet)["notes"]
    assert [note.split(" did not settle in two measurements")[0] for note in notes] == ["decode", "prefill"]
    assert device.launches.count("step") > 2 * tasks.MIN_RUNS


def test_on_a_double_the_task_measures_latency_and_memory(
    device: Device, layer: str, plan: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine, "used_memory", lambda: 10**9 + device.used)
    request = {
        "do": "measure",
        "engine": "tensorrt",
        "workload": {"batch": 2, "prompt": 8, "context": 48},
        "files": {"plan": str(plan)},
        "seconds": 0.4,
    }
    found = tasks.answer(request, quiet)
    assert found["decode"]["candidate"]["median"]["value"] == pytest.approx(20.97, rel=0.02)
    assert found["prefill"]["candidate"]["median"]["value"] == pytest.approx(24, rel=0.02)
    weights = json.loads(plan.read_bytes().split(b"\n", 2)[1])["weights"]
    known = {"activations": CONTEXT_BYTES, "cache": 147456, "buffers": 2624}
    assert found["memory"] == {**known, "used": sum(known.values()) + weights}  # and nothing that was there before
    assert found["gpu"]["layer"].startswith(f"{layer} ")
    assert (found["device"], found["notes"]) == ("Double of a GPU", [])
    assert device.launches.count("step") > tasks.MIN_RUNS


def test_on_a_double_the_task_says_the_same(
    device: Device, graphs: dict[str, GraphFiles], plan: Path, reference: Path
) -> None:
    files = {"plan": str(plan), "reference": str(reference)}
    found = tasks.answer({"do": "check", "engine": "tensorrt", "files": files}, quiet)
    assert (found["equal"], found["positions"]) == (1.0, 9)
    files = {"graph": str(graphs["fp32"].graphs[RUNTIME]), "reference": str(reference)}
    found = tasks.answer({"do": "check", "engine": "onnxruntime", "files": files}, quiet)
    assert (found["equal"], found["error"]) == (1.0, 0.0)
