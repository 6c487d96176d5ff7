"""What counts as right and as wrong of the answers of a device's checks."""

from __future__ import annotations

import pytest

from edgeprune.engine.checks import NotApplicable
from edgeprune.engine.checkup_judges import (
    judge_cache,
    judge_capture,
    judge_clock,
    judge_gpu_memory,
    judge_heat,
    judge_power,
    judge_process_memory,
)
from edgeprune.errors import EngineError

MIB = 2**20
CLOCK = {"one": 2.0, "least": 1.9, "sum": 40.0, "many": 16.0, "host": 41.0}
USED = {"before": 1000 * MIB, "after": 1700 * MIB, "activations": 10 * MIB, "cache": 10 * MIB, "buffers": MIB}
USED |= {"ballast": 128 * MIB}


def test_a_cache_in_place_is_written_everywhere_and_left_before():
    assert "each of 4 buffers" in judge_cache({"buffers": 4, "written": 4, "kept": 4})
    for answer in ({"buffers": 4, "written": 3, "kept": 4}, {"buffers": 4, "written": 4, "kept": 0}):
        with pytest.raises(EngineError, match="of 4 buffers"):
            judge_cache(answer)


def test_a_clock_agrees_with_the_hosts_and_grows_with_the_steps():
    assert "8 steps 16.0 ms" in judge_clock(CLOCK)
    for change, words in (
        ({"least": 0.0}, "which no step takes"),
        ({"host": 20.0}, "by the host's clock"),
        ({"many": 2.0}, "8 steps took 2.00 ms"),
    ):
        with pytest.raises(EngineError, match=words):
            judge_clock(CLOCK | change)


def test_a_replay_computes_what_the_step_does():
    answer = {"captured": True, "layer": "cuda-python 13", "error": 0.0}
    assert "replayed" in judge_capture(answer, 0.03)
    with pytest.raises(EngineError, match="replay's logits differ"):
        judge_capture(answer | {"error": 0.5}, 0.03)
    with pytest.raises(EngineError, match="cuda-python 13 or the engine refuses"):
        judge_capture({"captured": False, "layer": "cuda-python 13", "error": None}, 0.03)


def test_the_parts_of_memory_sum_up_to_what_the_device_lost():
    runtime = 450e6
    assert "the device lost 700.0 MiB, the parts sum up to 159.0 MiB" in judge_gpu_memory(USED, 10 * MIB, runtime)
    for change, words in (
        ({"after": 1100 * MIB}, "lost 100.0 MiB"),
        ({"after": 9000 * MIB}, "for the runtime"),
        ({"after": None}, "does not tell the memory"),
    ):
        with pytest.raises(EngineError, match=words):
            judge_gpu_memory(USED | change, 10 * MIB, runtime)


def test_a_process_grows_by_its_parts_and_not_by_much_more():
    assert "grew by 30.0 MiB" in judge_process_memory({"baseline": 100 * MIB, "peak": 130 * MIB}, 14 * MIB)
    for peak in (105 * MIB, 9000 * MIB):
        with pytest.raises(EngineError, match="the process grew by"):
            judge_process_memory({"baseline": 100 * MIB, "peak": peak}, 14 * MIB)


@pytest.mark.parametrize(
    ("conditions", "highest"),
    [
        ({"temperatures": "CPU-therm 47, GPU-therm 51, tj-thermal 52"}, "52"),
        ({"temperature gpu": "61"}, "61"),
        ({"temperatures": "cpu0 -5"}, "-5"),
    ],
)
def test_the_highest_temperature_is_told(conditions: dict[str, str], highest: str):
    assert judge_heat(conditions).startswith(f"{highest} degrees")


def test_a_hot_machine_fails_and_one_without_sensors_tells_nothing():
    for conditions in ({"power mode": "15W"}, {"temperatures": "zone "}):
        with pytest.raises(NotApplicable):
            judge_heat(conditions)
    with pytest.raises(EngineError, match="96 degrees"):
        judge_heat({"temperatures": "CPU-therm 47, GPU-therm 96"})


def test_power_and_clocks_are_told_as_they_are():
    assert judge_power({"power mode": "MAXN", "clocks sm": "", "swapped out": "0"}) == "power mode MAXN"
    with pytest.raises(NotApplicable, match="nvpmodel"):
        judge_power({"temperatures": "CPU 40"})
