"""Room on the disk, in the memory and for a build: which figures are compared, and what is told without them."""

from __future__ import annotations

from typing import Any

import pytest

from edgeprune.engine.checks import NotApplicable
from edgeprune.engine.checkup_room import Need, building_room, disk_room, memory_room
from edgeprune.errors import EngineError
from edgeprune.profiles import load_profile

GIB = 2**30
STATE = {"folder": "/cache", "free": 2 * GIB, "gpu_free": GIB}
DESCRIBED: dict[str, Any] = {"memory": {"available": 4 * GIB, "swap_free": GIB}}
BOARD, CARD, PROCESSOR = load_profile("jetson-orin"), load_profile("l4"), load_profile("cpu")


def test_the_disk_holds_the_model_and_at_least_the_checks() -> None:
    assert disk_room(STATE, BOARD, None) == "2.00 GiB free, 64.0 MiB needed for the checks, in /cache"
    assert "its graphs, an engine, and one more" in disk_room(STATE, BOARD, Need("it", 0, GIB))
    with pytest.raises(EngineError, match="2.00 GiB free, 3.00 GiB needed for it: its graphs, in /cache"):
        disk_room(STATE, PROCESSOR, Need("it", 0, 3 * GIB))


@pytest.mark.parametrize(("profile", "free"), [(BOARD, 4), (CARD, 1), (PROCESSOR, 4)], ids=lambda one: str(one)[:8])
def test_a_card_has_a_memory_of_its_own(profile, free: int) -> None:
    need = Need("it", free * GIB, 0)
    assert memory_room(STATE, DESCRIBED, profile, need).startswith(f"{free}.00 GiB free")
    with pytest.raises(EngineError, match="needed to run it") as error:
        memory_room(STATE, DESCRIBED, profile, Need("it", free * GIB + 1, 0))
    assert "--memory" in error.value.remedy
    with pytest.raises(NotApplicable):
        memory_room(STATE | {"gpu_free": None}, {}, profile, need)


def test_a_build_takes_the_swap_too() -> None:
    assert "5.00 GiB free with the swap" in building_room(DESCRIBED, BOARD, Need("it", 0, 0, 5 * GIB))
    with pytest.raises(EngineError, match="the engine of it needs about 9.00 GiB"):
        building_room(DESCRIBED, BOARD, Need("it", 0, 0, 9 * GIB))
    for profile, need in ((PROCESSOR, Need("it", 0, 0, GIB)), (BOARD, None), (BOARD, Need("it", 0, 0))):
        with pytest.raises(NotApplicable):
            building_room(DESCRIBED, profile, need)
