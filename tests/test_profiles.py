import subprocess
import sys
import tomllib

import pytest

from edgeprune.budget import parse_budget
from edgeprune.errors import InputError
from edgeprune.profiles import (
    DeviceProfile, list_profiles, load_profile, load_profile_file, profile_source, profiles_folder, resolve_profile,
)

NAMES = [profile.name for profile in list_profiles()]


def test_every_device_of_the_table_is_there():
    assert len(NAMES) == 27
    assert {"jetson-orin", "jetson-thor", "rtx-4090", "l4", "a100-80gb", "h100-sxm", "dgx-spark", "cpu"} <= set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_a_profile_loads_round_trips_and_its_budget_parses(name):
    profile = load_profile(name)
    assert profile.name == name == tomllib.loads(profile_source(name))["name"]
    assert DeviceProfile.model_validate(profile.model_dump()) == profile
    budget = parse_budget(profile.budget.memory, profile.budget.prefill, profile.budget.decode)
    if name != "cpu":
        assert budget.memory.value + profile.system_reserve.si <= profile.memory.si
        assert all(figure.source and figure.confidence for figure in profile.hardware.values())


def test_the_cpu_profile_ships_no_hardware_figures():
    assert load_profile("cpu").hardware == {}


def test_the_cpu_is_probed_once_and_cached(tmp_path, monkeypatch):
    from edgeprune.engine import probe

    monkeypatch.setenv("EDGEPRUNE_CACHE", str(tmp_path))
    monkeypatch.setattr(probe, "WIDTH", 256)
    first = resolve_profile("cpu", None)
    assert first.bandwidth.si > 1e8
    assert first.fp32_compute.si > 1e8
    assert first.runtime_memory.si > 1e7
    monkeypatch.setattr(probe, "_measure", lambda source: pytest.fail("measured again"))
    assert resolve_profile("cpu", None) == first
    (tmp_path / "probe.json").write_text("{")
    monkeypatch.undo()
    monkeypatch.setenv("EDGEPRUNE_CACHE", str(tmp_path))
    monkeypatch.setattr(probe, "WIDTH", 256)
    assert resolve_profile("cpu", None).is_probed


def test_an_unknown_device_names_the_nearest():
    with pytest.raises(InputError) as caught:
        load_profile("jetson-orrin")
    assert "jetson-orin" in caught.value.remedy


BAD = {
    "not TOML": ("name = ", "not TOML"),
    "negative": (profile_source("l4").replace("value = 300", "value = -1"), "bandwidth.value"),
    "zero bandwidth": (profile_source("l4").replace("value = 300", "value = 0"), "bandwidth.value must be greater"),
    "unknown unit": (profile_source("l4").replace('"GB/s"', '"GBps"'), "unknown unit 'GBps'"),
    "unknown field": ("colour = 'red'\n" + profile_source("l4"), "colour"),
    "missing figure": (profile_source("l4").replace("[decode_overhead]", "[fp32_compute]"), "missing decode_overhead"),
    "prompt too long": (profile_source("l4").replace("prompt = 512", "prompt = 5000"), "prompt 5000"),
}


@pytest.mark.parametrize(("text", "reason"), BAD.values(), ids=BAD)
def test_a_bad_profile_names_field_and_reason(tmp_path, text, reason):
    path = tmp_path / "mine.toml"
    path.write_text(text)
    with pytest.raises(InputError) as caught:
        load_profile_file(path)
    assert reason in caught.value.message


def test_a_missing_profile_file_is_said(tmp_path):
    with pytest.raises(InputError, match="No such file"):
        load_profile_file(tmp_path / "none.toml")


def test_profiles_are_found_in_a_wheel(tmp_path):
    root = profiles_folder().parent
    subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir", tmp_path, root], check=True
    )
    (wheel,) = tmp_path.glob("*.whl")
    subprocess.run([sys.executable, "-m", "zipfile", "-e", wheel, tmp_path / "site"], check=True)
    code = "import edgeprune.profiles as p; print(p.__file__, len(p.list_profiles()))"
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path / "site", check=True, capture_output=True, text=True
    )
    assert result.stdout.split() == [str(tmp_path / "site" / "edgeprune" / "profiles.py"), str(len(NAMES))]
