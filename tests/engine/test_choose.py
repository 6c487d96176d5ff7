"""The choice of the engine, by what the device and this machine have."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest

from edgeprune.engine.answers import read_answer
from edgeprune.engine.choose import choose_engine
from edgeprune.engine.engines import BuiltAhead, Engine, Estimated, OnnxRuntime, TensorRT
from edgeprune.engine.llamacpp import on_llamacpp
from edgeprune.errors import EngineError, InputError
from edgeprune.ondevice import measure, tensorrt
from edgeprune.ondevice.figures import Workload
from edgeprune.ondevice.measure import LocalSession
from edgeprune.profiles import load_profile

WORKLOAD = Workload(batch=1, prompt=16, context=64)
ORIN = {"name": "Orin", "sm": 87, "memory": 2**36, "driver": 12060, "layer": "pycuda 2024.1"}
MODULES = {"numpy": "1.26.4", "onnxruntime": None, "tensorrt": "10.3.0", "tensorrt_rtx": None, "xllamacpp": None}


@dataclass
class Board:
    """A session that answers what a device would."""

    modules: dict[str, str | None] = field(default_factory=lambda: dict(MODULES))
    gpu: dict[str, Any] | None = field(default_factory=lambda: dict(ORIN))
    no_gpu: str = ""

    def run(self, request: dict[str, Any], timeout_seconds: float, tell: object) -> dict[str, Any]:
        assert request["do"] == "describe"
        own = {"machine": "Jetson AGX Orin", "processor": "ARMv8, 12 threads", "python": "3.10.12"}
        missing = {name: "ModuleNotFoundError" for name, version in self.modules.items() if version is None}
        own |= {"modules": self.modules, "missing": missing, "gpu": self.gpu, "no_gpu": self.no_gpu}
        return read_answer(request, own | {"memory": {}, "platform": "linux"}, str(self))

    def __str__(self) -> str:
        return "ssh://me@orin"


def chosen(device: str, asked: str = "auto", target: Board | None = None, precision: str = "fp16") -> Engine:
    return choose_engine(asked, load_profile(device), WORKLOAD, precision, target)


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch):
    """Makes some engines importable on this machine, which has the GPU that is named or none."""

    def put(*names: str, gpu: dict[str, Any] | None = None) -> None:
        versions = {name: (True, f"{name} 1.7 is installed") for name in names}
        missing = (False, "no module is installed")
        monkeypatch.setattr(tensorrt, "available", lambda name: versions.get(name, missing))
        monkeypatch.setattr(tensorrt, "offered_sms", lambda: [75, 80, 86, 89, 120])
        monkeypatch.setattr(measure.LocalSession, "run", lambda self, *_: Board(gpu=gpu).run(*_))

    return put


@pytest.mark.parametrize(
    ("device", "asked", "reason", "remedy"),
    [
        ("l4", "openvino", "unknown engine 'openvino'", "auto, tensorrt, tensorrt-rtx, onnxruntime"),
        ("l4", "onnxruntime", "l4 runs tensorrt-rtx, not onnxruntime", "edgeprune devices"),
        ("cpu", "tensorrt", "cpu runs onnxruntime, not tensorrt", "Leave --engine out"),
        ("jetson-orin", "tensorrt-rtx", "jetson-orin runs tensorrt, not", "Leave --engine out"),
        ("l4", "tensorrt-rtx", "not usable here: no module is installed", 'pip install "edgeprune[rtx]"'),
    ],
)
def test_an_engine_that_cannot_serve_is_refused(installed, device: str, asked: str, reason: str, remedy: str) -> None:
    installed()
    with pytest.raises(InputError) as caught:
        chosen(device, asked)
    assert reason in caught.value.message
    assert remedy in caught.value.remedy


def test_the_processor_is_measured_here_or_on_the_target() -> None:
    here = chosen("cpu")
    assert isinstance(here, OnnxRuntime)
    assert isinstance(here.session, LocalSession)
    board = Board(MODULES | {"onnxruntime": "1.20"}, gpu=None)
    there = chosen("cpu", target=board)
    assert isinstance(there, OnnxRuntime)
    assert (there.session, there.reason) == (board, "ssh://me@orin is a ARMv8, 12 threads with onnxruntime 1.20")


@pytest.mark.parametrize(
    ("names", "sm", "kind"),
    [
        (["tensorrt-rtx"], 89, TensorRT),
        (["tensorrt-rtx"], 86, BuiltAhead),
        (["tensorrt-rtx"], None, BuiltAhead),
        ([], 89, Estimated),
    ],
)
def test_a_gpu_of_this_machine_counts_where_it_is_the_profiles(
    installed, names: list, sm: int | None, kind: type
) -> None:
    installed(*names, gpu=sm and ORIN | {"name": "NVIDIA L4", "sm": sm})
    engine = chosen("l4")
    assert type(engine) is kind
    assert engine.name == "tensorrt-rtx"
    assert engine.measures == (kind is TensorRT)
    if kind is BuiltAhead:
        assert (engine.sm, engine.reason) == (
            89,
            "TensorRT for RTX builds for SM 89 without the GPU; nothing ran on it",
        )
    if kind is Estimated:
        assert engine.reason == "nothing could be built: no module is installed"


def test_a_jetson_that_is_not_reachable_is_estimated_and_compiled_for_its_nearest(installed) -> None:
    installed()
    alone = chosen("jetson-orin")
    assert (type(alone), alone.name) == (Estimated, "tensorrt")
    assert "--target ssh://USER@DEVICE" in alone.reason
    installed("tensorrt-rtx")
    checked = chosen("jetson-orin")
    assert (type(checked), checked.sm, checked.name) == (BuiltAhead, 86, "tensorrt")  # of 75, 80, 86, 89 and 120 to 87
    assert checked.reason == f"{alone.reason}; TensorRT for RTX checks that the graph compiles for SM 86"


@pytest.mark.parametrize(
    ("asked", "modules", "name"),
    [
        ("auto", {}, "tensorrt"),
        ("auto", {"tensorrt_rtx": "1.7"}, "tensorrt"),
        ("auto", {"tensorrt": None, "tensorrt_rtx": "1.7"}, "tensorrt-rtx"),
        ("tensorrt-rtx", {"tensorrt_rtx": "1.7"}, "tensorrt-rtx"),
    ],
)
def test_a_target_runs_the_engine_that_it_has_or_that_was_asked_for(asked: str, modules: dict, name: str) -> None:
    board = Board(MODULES | modules)
    engine = chosen("jetson-orin", asked, board)
    assert (type(engine), engine.name, engine.session) == (TensorRT, name, board)
    version = board.modules[name.replace("-", "_")]
    assert engine.reason == f"ssh://me@orin is a Jetson AGX Orin with Orin, {name} {version} and pycuda 2024.1"


@pytest.mark.parametrize(
    ("version", "precision", "dialect"),
    [
        ("10.3.0", "fp16", "primitive"),
        ("10.14.1.48", "fp16", "primitive"),
        ("10.15.1.29", "fp16", "opset24"),
        ("11.4.0", "bf16", "opset24"),
        ("10.16.1", "fp32", "primitive"),
    ],
)
def test_the_version_of_the_device_decides_whether_the_cache_is_updated_in_place(
    installed, version: str, precision: str, dialect: str
) -> None:
    """On a target, and on this machine where it has the GPU."""
    there = chosen("jetson-orin", target=Board(MODULES | {"tensorrt": version}), precision=precision)
    assert (there.profile.tensorrt, there.profile.dialect) == (version, dialect)
    installed("tensorrt", gpu=ORIN)
    here = chosen("jetson-orin", precision=precision)
    assert isinstance(here, TensorRT)
    assert here.profile.tensorrt == MODULES["tensorrt"]
    assert here.profile.dialect == "primitive"


def test_a_profile_that_joins_past_and_new_tokens_stays_so_where_tensorrt_knows_its_operators() -> None:
    joining = load_profile("jetson-orin").model_copy(update={"dialect": "opset23"})
    for version, dialect in (("10.16.1", "opset23"), ("10.3", "primitive")):
        board = Board(MODULES | {"tensorrt": version})
        assert choose_engine("auto", joining, WORKLOAD, "fp16", board).profile.dialect == dialect


@pytest.mark.parametrize(
    ("device", "asked", "board", "reason", "remedy"),
    [
        ("jetson-orin", "auto", Board(MODULES | {"numpy": None}), "has no numpy", "pip install numpy"),
        ("cpu", "auto", Board(), "no Python module onnxruntime", "pip install onnxruntime"),
        ("jetson-orin", "auto", Board(MODULES | {"tensorrt": None}), "no Python module tensorrt", "JetPack"),
        ("jetson-orin", "tensorrt-rtx", Board(), "no Python module tensorrt_rtx", "pip install tensorrt-rtx"),
        ("jetson-orin", "auto", Board(gpu=None, no_gpu="no driver"), "ssh://me@orin: no driver", "cuda-python"),
    ],
)
def test_what_a_target_lacks_is_named_with_its_command(device, asked, board, reason, remedy) -> None:
    with pytest.raises(EngineError) as caught:
        chosen(device, asked, board)
    assert reason in caught.value.message
    assert remedy in caught.value.remedy


def test_a_target_of_another_gpu_needs_its_own_profile() -> None:
    with pytest.raises(InputError, match="has a Orin of SM 87, but the profile jetson-thor is for SM 110") as caught:
        chosen("jetson-thor", target=Board())
    assert "tools/probe_profile.py --target ssh://me@orin" in caught.value.remedy


PROGRAM = {"path": "/usr/local/bin/llama-bench", "release": "2026-01-01, 1 bytes", "gpus": "CUDA0: Orin", "problem": ""}


@dataclass
class LlamaBoard(Board):
    """One with llama.cpp's program, or without; this machine's modules have the package."""

    program: dict[str, str] | None = None

    def run(self, request: dict[str, Any], timeout_seconds: float, tell: object) -> dict[str, Any]:
        return {**super().run(request, timeout_seconds, tell), "llama_bench": self.program}


def llamacpp(
    monkeypatch: pytest.MonkeyPatch, device: str, here: LlamaBoard, target: LlamaBoard | None = None
) -> Engine:
    monkeypatch.setattr(measure.LocalSession, "run", lambda self, *_: LlamaBoard.run(here, *_))
    return choose_engine("llama.cpp", on_llamacpp(load_profile(device)), WORKLOAD, "fp16", target)


def test_llama_cpp_measures_where_the_device_is_and_else_is_estimated(monkeypatch: pytest.MonkeyPatch) -> None:
    modules = MODULES | {"xllamacpp": "2026.10"}
    here = LlamaBoard(modules, gpu=None, program=PROGRAM)
    found = llamacpp(monkeypatch, "cpu", here)
    assert (found.tool, found.version) == ("llama.cpp", "2026.10")
    there = llamacpp(monkeypatch, "jetson-orin", here, LlamaBoard(program=PROGRAM))
    assert (there.name, there.tool) == ("llama.cpp", "llama-bench")
    assert "Jetson AGX Orin with llama-bench /usr/local/bin/llama-bench" in there.reason
    # A llama-bench of this machine says nothing of a Jetson; one beside that GPU does.
    assert isinstance(llamacpp(monkeypatch, "jetson-orin", here), Estimated)
    assert llamacpp(monkeypatch, "jetson-orin", LlamaBoard(modules, program=PROGRAM)).tool == "llama-bench"
    with pytest.raises(InputError, match="cannot measure with llama.cpp: it has no llama-bench on its PATH"):
        llamacpp(monkeypatch, "jetson-orin", here, LlamaBoard())
    with pytest.raises(InputError, match="the engine llama.cpp is not usable here") as error:
        llamacpp(monkeypatch, "jetson-orin", LlamaBoard(), LlamaBoard(program=PROGRAM))
    assert "edgeprune[llama]" in error.value.remedy
