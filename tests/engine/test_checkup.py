"""The check of a device from its description alone: the profile that is taken, and that every check has an outcome."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest

from edgeprune.engine.checkup import Checkup, check_device
from edgeprune.engine.checkup_room import Need
from edgeprune.errors import EngineError, Unreachable
from edgeprune.ondevice.worker import quiet
from edgeprune.profiles import load_profile
from tests.support.lying_device import TRUE

DESCRIBED = TRUE["describe"][1]
GIB = 2**30


@dataclass
class Told:
    """A double of a session that describes a device and fails at everything else."""

    description: dict[str, Any] | EngineError
    asked: list[str] = field(default_factory=list)

    def run(self, request: dict[str, Any], timeout_seconds: float, on_progress: Any) -> dict[str, Any]:
        self.asked.append(request["do"])
        if request["do"] != "describe" or isinstance(self.description, EngineError):
            error = self.description
            raise error if isinstance(error, EngineError) else EngineError("it is on fire", "Put it out.")
        return self.description


def checked(session: Told, name: str | None = None, need: Need | None = None) -> Checkup:
    profile = load_profile(name) if name else None
    return check_device(session, "ssh://board", True, profile, (lambda _: need) if need else None, quiet)


def outcome(checkup: Checkup, name: str) -> tuple[str, str]:
    return next((check.state, check.detail) for check in checkup.checks if check.name == name)


def with_gpu(**changes: Any) -> dict[str, Any]:
    return DESCRIBED | {"gpu": DESCRIBED["gpu"] | changes}


@pytest.mark.parametrize(
    ("gpu", "profile"),
    [
        ({"memory": 64_000_000_000}, "jetson-orin"),
        ({"memory": 15_600_000_000}, "jetson-orin-nx-16gb"),
        ({"sm": 110, "memory": 125_000_000_000}, "jetson-thor"),
        ({"sm": 99}, "cpu"),
    ],
)
def test_the_profile_is_of_the_sm_with_the_nearest_memory(gpu: dict[str, Any], profile: str) -> None:
    assert checked(Told(with_gpu(**gpu))).profile == profile


def test_without_a_gpu_it_is_the_processors_and_a_board_with_tensorrt_fails() -> None:
    board = DESCRIBED | {"gpu": None, "no_gpu": "no CUDA module works here"}
    found = checked(Told(board))
    assert (found.profile, found.engine) == ("jetson-orin", "tensorrt")
    assert outcome(found, "GPU") == ("failed", "no CUDA module works here")
    modules = DESCRIBED["modules"] | {"tensorrt": None}
    plain = board | {"modules": modules, "missing": DESCRIBED["missing"] | {"tensorrt": "ModuleNotFoundError: x"}}
    assert checked(Told(plain)).profile == "cpu"
    assert outcome(checked(Told(plain)), "GPU")[0] == "not applicable"


def test_a_device_on_which_everything_fails_has_every_outcome() -> None:
    found = checked(Told(DESCRIBED))
    states = {check.name: check.state for check in found.checks}
    assert [states[name] for name in ("device", "numpy", "tensorrt", "GPU")] == ["passed"] * 4
    assert {states[name] for name in ("build primitive float", "disk", "temperatures")} == {"failed"}
    assert states["graph capture"] == states["memory accounting"] == "not applicable"  # no engine was built
    assert found.count("passed") + found.count("failed") + found.count("not applicable") == len(found.checks)


def test_an_older_tensorrt_on_the_device_decides_the_dialect() -> None:
    found = checked(Told(DESCRIBED), "jetson-orin")
    assert "dialect primitive" in outcome(found, "profile")[1]
    assert outcome(found, "build primitive int4-64") == (
        "not applicable",
        "TensorRT 10.3 does not run int4-64, which takes 10.15",
    )


def test_a_device_that_is_away_is_asked_once() -> None:
    session = Told(Unreachable("it is away", "Switch it on."))
    found = checked(session, "jetson-orin")
    assert session.asked == ["describe"]
    assert found.count("failed") == 1
    assert found.description is None
    assert len(found.checks) > 10


def test_a_hung_description_leaves_the_state_of_the_machine() -> None:
    session = Told(EngineError("the inspection did not end within 120 s", "Wait."))
    found = checked(session, "jetson-orin")
    assert outcome(found, "device")[0] == "failed"
    assert outcome(found, "build opset23 float") == ("not applicable", "the device did not describe itself")
    assert session.asked == ["describe", *["checkup"] * 4]


@pytest.mark.parametrize(("building", "state"), [(5 * GIB, "passed"), (9 * GIB, "failed"), (None, "not applicable")])
def test_the_memory_to_build_is_that_of_the_model(building: float | None, state: str) -> None:
    found = checked(Told(DESCRIBED), "jetson-orin", Need("my model", GIB, GIB, building))
    assert outcome(found, "memory to build")[0] == state
