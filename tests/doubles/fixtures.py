"""Fixtures of the tests that run on doubles: a module asks with `pytest_plugins = ("tests.doubles.fixtures",)`."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from pathlib import Path

import pytest

from edgeprune.engine.onnx.graph import GraphFiles, write_graphs
from tests.doubles.double_device import Device
from tests.doubles.install import LAYERS, MODEL, PRIMITIVE, RUNTIME, built, install
from tests.reference import decoder_of, weights_of


@pytest.fixture(params=LAYERS)
def layer(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(params=["fp32", "fp16"])
def precision(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch, layer: str) -> Iterator[Device]:
    """A double of a GPU behind one of the two modules; at the test's end nothing may be left on it."""
    made = Device()
    install(monkeypatch, made, (layer,))
    yield made
    if made.retained:
        gc.collect()  # an error's traceback may hold what pycuda frees with its last reference
    assert made.faults == []
    assert made.left() == []
    assert made.retained == 0


@pytest.fixture(scope="session")
def graphs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, GraphFiles]:
    """Both variants that are needed, in fp32 and fp16."""
    decoder, weights = decoder_of(MODEL.config), weights_of(MODEL)
    return {
        precision: write_graphs(decoder, weights, tmp_path_factory.mktemp(precision), precision, [PRIMITIVE, RUNTIME])
        for precision in ("fp32", "fp16")
    }


@pytest.fixture
def plan(device: Device, graphs: dict[str, GraphFiles], tmp_path: Path) -> Path:
    """An fp32 engine of the double."""
    return built(graphs["fp32"].graphs[PRIMITIVE], tmp_path / "model.engine")
