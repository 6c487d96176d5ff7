"""The tasks of a device's check, in ONNX Runtime and on doubles of TensorRT and a GPU. No GPU runs in these tests."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from edgeprune.engine.checkup_model import write_small_model
from edgeprune.ondevice import machine
from edgeprune.ondevice.onnxruntime import GraphRunner
from edgeprune.ondevice.tasks import answer
from edgeprune.ondevice.worker import quiet


@pytest.fixture(scope="module")
def graph(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_small_model(tmp_path_factory.mktemp("model"), "fp32", ["onnxruntime"], None, None).graphs[
        "onnxruntime"
    ]


def asked(step: str, graph: Path) -> dict:
    return answer({"do": "checkup", "step": step, "engine": "onnxruntime", "files": {"graph": str(graph)}}, quiet)


def test_the_cache_is_updated_in_place_and_copies_would_be_seen(graph: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert asked("cache", graph) == {"buffers": 4, "written": 4, "kept": 4}
    whole = GraphRunner.logits

    def elsewhere(runner: GraphRunner, ids: np.ndarray, mask: np.ndarray | None = None) -> np.ndarray:
        """A runner whose steps write into copies of the cache."""
        mine = dict(runner._cache)
        runner._cache = {name: buffer.copy() for name, buffer in mine.items()}
        logits = whole(runner, ids, mask)
        runner._cache = mine
        return logits

    monkeypatch.setattr(GraphRunner, "logits", elsewhere)
    assert asked("cache", graph)["written"] == 0


def test_the_clock_counts_every_step(graph: Path) -> None:
    clock = asked("clock", graph)
    assert 0 < clock["least"] <= clock["one"]
    assert clock["sum"] <= clock["host"]
    assert clock["many"] > 2 * clock["least"]


def test_the_state_is_that_of_a_folder_that_need_not_be_there(
    graph: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EDGEPRUNE_CACHE", str(tmp_path / "not" / "yet"))
    monkeypatch.setenv("PATH", str(tmp_path))
    state = asked("state", graph)
    assert (state["folder"], state["gpu_free"]) == (str(tmp_path), None)
    assert state["free"] > 0
    assert set(state["conditions"]) == set(machine.conditions())
