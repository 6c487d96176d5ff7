"""The room for a build: what counts as free, what is refused, and what is left for the scratch memory."""

from __future__ import annotations

import pytest

from edgeprune.errors import EngineError
from edgeprune.ondevice.build_room import LEAST_WORKSPACE, build_room, can_build, check_build, workspace_within

GIB = 2**30


@pytest.mark.parametrize(
    ("state", "limit", "room"),
    [
        ({"available": 5 * GIB, "swap_free": GIB}, 4 * GIB, 5 * GIB),
        ({"available": 3 * GIB, "swap_free": GIB}, 4 * GIB, 4 * GIB),
        ({"available": 3 * GIB}, None, 3 * GIB),
        ({}, 4 * GIB, 4 * GIB),
        ({}, None, None),
    ],
)
def test_the_less_of_what_is_free_and_the_limit_and_the_free_swap(state, limit, room) -> None:
    assert build_room(state, limit) == room


def test_a_build_that_may_just_fit_is_tried_and_one_beyond_is_refused_with_figures() -> None:
    check_build(1.15 * GIB, GIB, "there", "it")
    check_build(100 * GIB, None, "there", "it")
    assert not can_build(1.2 * GIB, GIB)
    with pytest.raises(EngineError) as error:
        check_build(2 * GIB, GIB, "ssh://orin", "the engine")
    assert error.value.message == (
        "building the engine needs about 2.00 GiB of memory (estimated, within 15 %), ssh://orin has 1.00 GiB for it"
    )
    for word in ("Close", "swap", "another device of the same SM", "--weights int4", "--memory"):
        assert word in error.value.remedy
    assert error.value.exit_code == 4


def test_the_scratch_memory_leaves_room_for_the_rest() -> None:
    assert workspace_within(4 * GIB, 2 * GIB, 5 * GIB) == 3 * GIB
    assert workspace_within(GIB, 2 * GIB, 5 * GIB) == GIB
    assert workspace_within(GIB, 5 * GIB, 5 * GIB) == LEAST_WORKSPACE
    assert workspace_within(GIB, 5 * GIB, None) == GIB
