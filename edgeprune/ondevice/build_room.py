"""The room that a build needs, checked before anything is sent or begun: what is needed, what is free, what to do.

This file also runs on the device: Python 3.10, standard library only. It does not know how the need is estimated.
"""

from __future__ import annotations

from edgeprune.errors import EngineError
from edgeprune.ondevice.budget import format_bytes

ERROR = 0.15  # of the estimate, at the worst that was measured: a build that may just fit is tried
LEAST_WORKSPACE = 64 * 2**20  # bytes


def build_room(state: dict[str, int], limit: int | None = None) -> int | None:
    """Returns the bytes that a build may take: what is available, or the limit, and the free swap; None: unknown.

    state: of machine.memory_state; limit: the profile's memory for builds.
    """
    available = state.get("available")
    known = [value for value in (available, limit) if value]
    return min(known) + state.get("swap_free", 0) if known else None


def can_build(needed: float, room: int) -> bool:
    """Returns whether a build that needs so many bytes may succeed, as far as the estimate can tell."""
    return (1 - ERROR) * needed <= room


def check_build(needed: float, room: int | None, where: str, what: str) -> None:
    """Raises EngineError where a build needs more memory than there is room for, beyond the error of the estimate.

    where, what: the place of the build and the model, in words.
    """
    if room is None or can_build(needed, room):
        return
    raise EngineError(
        f"building {what} needs about {format_bytes(needed)} of memory (estimated, within {100 * ERROR:.0f} %), "
        f"{where} has {format_bytes(room)} for it",
        "Close what else runs there, or add swap; TensorRT 10.13 and later need less. Or build on another device of "
        "the same SM and release, with finish.pyz, and copy the bundle. Or take a smaller model: --weights int4, or a "
        "smaller --memory.",
    )


def workspace_within(workspace: int, needed: float, room: int | None) -> int:
    """Returns a builder's limit of scratch memory that leaves room for the rest of the build."""
    return workspace if room is None else max(LEAST_WORKSPACE, min(workspace, int(room - needed)))
