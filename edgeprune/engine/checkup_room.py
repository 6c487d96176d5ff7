"""The room that a device has for a stated model: on its disk, in its memory, and in its memory while it builds.

Each function returns both figures in words. It raises EngineError where there is too little room, NotApplicable where
nothing is known to compare.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from edgeprune.engine.build_memory import build_limit
from edgeprune.engine.checks import NotApplicable
from edgeprune.errors import EngineError
from edgeprune.ondevice.budget import format_bytes
from edgeprune.ondevice.build_room import build_room, check_build
from edgeprune.ondevice.runtimes import RUNTIMES
from edgeprune.profiles import DeviceProfile

LEAST_DISK = 64 * 2**20  # bytes, more than the checks themselves write
ASKED_SHARE = 0.95  # of the free memory, as a budget that leaves some


@dataclass(frozen=True)
class Need:
    """The bytes that a stated model asks of a device. what: the model in words; building: None where it is unknown."""

    what: str
    running: float
    disk: float
    building: float | None = None


def disk_room(state: dict[str, Any], profile: DeviceProfile, need: Need | None) -> str:
    """Judges the free space of the folder to which the device writes. state: as ondevice/checkup.py tells it."""
    on_gpu = RUNTIMES[profile.engine].on_gpu
    files = "its graphs, an engine, and one more while it is built" if on_gpu else "its graphs"
    what = f"for {need.what}: {files}" if need else "for the checks"
    return _judged(
        f"{what}, in {state['folder']}",
        max(LEAST_DISK, need.disk if need else 0),
        state["free"],
        "Free some space there; EDGEPRUNE_CACHE names another folder.",
    )


def memory_room(state: dict[str, Any], described: dict[str, Any], profile: DeviceProfile, need: Need | None) -> str:
    """Judges the free memory: that of a GPU which has its own, else the system's. described: the device."""
    own = RUNTIMES[profile.engine].on_gpu and not profile.memory_shared_with_system
    free = state["gpu_free"] if own else described.get("memory", {}).get("available")
    if free is None:
        raise NotApplicable("no free memory is told" + (", nvidia-smi is missing" if own else ""))
    if need is None:
        return f"{format_bytes(free)} free; --model tells whether that is enough"
    budget = format_bytes(ASKED_SHARE * free).replace(" ", "")
    return _judged(
        f"to run {need.what}",
        need.running,
        free,
        f"Close what else runs there, or fit the model into what is free: edgeprune fit MODEL --memory {budget}",
    )


def building_room(described: dict[str, Any], profile: DeviceProfile, need: Need | None) -> str:
    """Judges the memory for building an engine there: what is available, within the profile's, and the free swap."""
    if not RUNTIMES[profile.engine].on_gpu:
        raise NotApplicable("ONNX Runtime builds no engine")
    if need is None or need.building is None:
        raise NotApplicable("--model with a model, not a size, tells whether it is enough")
    room = build_room(described.get("memory", {}), build_limit(profile))
    if room is None:
        raise NotApplicable("no free memory is told")
    check_build(need.building, room, "the device", f"the engine of {need.what}")
    return f"{format_bytes(room)} free with the swap, about {format_bytes(need.building)} needed (estimated)"


def _judged(what: str, needed: float, free: float, remedy: str) -> str:
    """Returns how many bytes are free and needed, what for. Raises EngineError where fewer are free."""
    words = f"{format_bytes(free)} free, {format_bytes(needed)} needed {what}"
    if free < needed:
        raise EngineError(words, remedy)
    return words
