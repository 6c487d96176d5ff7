"""The figures of this machine and of a GPU, which is a double here: measured, cached, and told with their doubts."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType

import pytest

from edgeprune.engine import probe
from edgeprune.engine.probe import with_figures
from edgeprune.ondevice import machine as facts
from edgeprune.ondevice import probe_tasks
from edgeprune.ondevice.probe_tasks import Took
from edgeprune.profiles import list_profiles, load_profile, profile_of
from tests.support.doubles.double_device import Device
from tests.support.doubles.probed import probed

pytest_plugins = ("tests.support.doubles.fixtures",)
PROFILES = {profile.name: profile for profile in list_profiles()}


@pytest.fixture
def small_probe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The probe with small matrices and a cache of its own."""
    monkeypatch.setenv("EDGEPRUNE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(probe, "WIDTH", 128)
    monkeypatch.setattr(probe, "_matrices", lambda: 3)
    return probe


def test_the_cpu_ships_no_figures_and_is_measured(small_probe: ModuleType) -> None:
    assert PROFILES["cpu"].hardware == {}
    profile = with_figures(profile_of(None, None))
    assert profile.is_probed
    assert profile.model_copy(update=dict.fromkeys(profile.hardware)) == PROFILES["cpu"]
    assert 1e7 < profile.bandwidth.si < 1e13
    assert 1e7 < profile.fp32_compute.si < 1e15
    assert 1e7 < profile.runtime_memory.si < profile.memory.si
    assert "measured with onnxruntime" in profile.bandwidth.source
    assert f"{facts.threads()} threads" in profile.bandwidth.source


def test_it_is_measured_once(small_probe: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = with_figures(profile_of("cpu", None))
    assert [path.name for path in (tmp_path / "cache").iterdir()] == ["probe.json"]
    monkeypatch.setattr(small_probe, "measure", lambda source: pytest.fail("measured again"))
    assert with_figures(profile_of("cpu", None)) == first
    for name, changed in (("processor", "another processor"), ("total_memory", 2.0**40)):
        with monkeypatch.context() as machine, pytest.raises(pytest.fail.Exception, match="measured again"):
            machine.setattr(small_probe, name, lambda changed=changed: changed)
            with_figures(profile_of("cpu", None))


@pytest.mark.slow
@pytest.mark.parametrize(
    "spoil", [lambda text: text[:40], lambda text: "[]", lambda text: text.replace('"GB/s"', '"kg"')]
)
def test_a_spoilt_cache_is_made_again(small_probe: ModuleType, tmp_path: Path, spoil: object) -> None:
    with_figures(profile_of("cpu", None))
    path = tmp_path / "cache" / "probe.json"
    path.write_text(spoil(path.read_text()))
    assert with_figures(profile_of("cpu", None)).is_probed
    (figures,) = json.loads(path.read_text()).values()
    assert figures["bandwidth"]["unit"] == "GB/s"


def test_without_a_writable_cache_it_is_measured_all_the_same(
    small_probe: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("EDGEPRUNE_CACHE", str(tmp_path / "file" / "below"))
    assert with_figures(profile_of("cpu", None)).is_probed


def test_the_read_is_larger_than_the_caches() -> None:
    size = 4 * probe.WIDTH**2
    assert probe.SMALLEST_READ <= probe._matrices() * size < probe.LARGEST_READ + size


def test_the_runtimes_part_does_not_count_this_process() -> None:
    ballast = bytearray(300 * 2**20)
    ballast[:: 2**12] = b"x" * len(ballast[:: 2**12])
    assert probe.runtime_bytes() < 250 * 2**20


def test_what_does_not_settle_is_of_low_confidence() -> None:
    """Whoever reads the profile sees that the device was busy."""
    stacks = probe._stacks("fp32", 256, 1, 4)
    took = {"call": Took(1e-5, 3), "read": Took(0.01, 0.85), "product": Took(0.1, 0.1)}
    figures = probe._rates("measured with x on y", stacks, took)
    assert figures["bandwidth"] == {
        "value": 26.844,
        "unit": "GB/s",
        "confidence": "low",
        "source": "measured with x on y: 256 MiB of weights times one row; other runs took 85 % longer",
    }
    assert (figures["fp32_compute"]["value"], figures["fp32_compute"]["confidence"]) == (85.899, "medium")
    busy = probe._rates("measured with x on y", stacks, took, load=1.6)["fp32_compute"]
    assert busy["confidence"] == "low"
    assert busy["source"].endswith("4096 x 4096; the load before was 1.6 processes a thread")


def test_on_a_double_every_figure_is_what_the_gpus_clock_says(gpu: Device) -> None:
    figures = probed().figures
    weights, flops = 8 * 2 * 256**2, 2 * 512 * 8 * 256**2
    assert figures["bandwidth"]["value"] == pytest.approx(weights / (weights / 0.1 + 20e6), rel=1e-3)
    assert figures["fp16_compute"]["value"] == pytest.approx(flops / (flops / 10 + 20e6), rel=1e-3)
    assert figures["decode_overhead"]["value"] == pytest.approx(20, rel=0.1)
    assert figures["runtime_memory"]["value"] == 2**25
    assert figures["memory"]["value"] == figures["build_memory"]["value"] == gpu.memory
    assert "system_reserve" not in figures
    assert "fp32_compute" not in figures
    assert all(f["source"].startswith("measured with tensorrt 10.13.3.9 on a double") for f in figures.values())


def test_on_a_double_that_shares_its_memory_the_systems_part_is_measured(
    gpu: Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(probe, "SMALLEST_READ", 8 * 2 * 256**2)
    figures = probed("jetson-orin").figures
    assert figures["system_reserve"]["value"] == gpu.memory - 2**27
    assert figures["build_memory"]["value"] == 2**27
    assert figures["system_reserve"]["source"].startswith("measured")


def test_on_a_double_that_does_not_tell_the_likes_figures_keep_their_source(
    gpu: Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(probe_tasks, "_free_bytes", lambda shared: None)
    like = load_profile("l4")
    assert probed().figures["runtime_memory"] == like.runtime_memory.model_dump()
