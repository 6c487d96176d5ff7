"""Every shipped profile is complete and true to its rules; bad ones are refused with field and reason."""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgeprune.engine.llamacpp import on_llamacpp
from edgeprune.engine.probe import with_figures
from edgeprune.errors import InputError
from edgeprune.ondevice.budget import parse_budget
from edgeprune.precision import WEIGHT_FORMATS, WeightFormat
from edgeprune.profiles import (
    UNITS,
    DeviceProfile,
    HardwareFigure,
    list_profiles,
    load_profile,
    load_profile_file,
    profile_of,
    profile_toml,
    profiles_folder,
    read_toml,
)

PROFILES = {profile.name: profile for profile in list_profiles()}
GPUS = [name for name in PROFILES if name != "cpu"]
L4 = (profiles_folder() / "l4.toml").read_text(encoding="utf-8")
RTX_SM = {75, 80, 86, 89, 120, 121}  # what TensorRT for RTX compiles for


def test_every_device_is_there() -> None:
    orin = {
        f"jetson-orin-{size}{mode}" for size in ("nano-4gb", "nano-8gb", "nx-8gb", "nx-16gb") for mode in ("", "-super")
    }
    jetson = orin | {"jetson-orin", "jetson-agx-orin-32gb", "jetson-agx-orin-64gb", "jetson-thor", "jetson-thor-t4000"}
    cards = {"a2", "a10", "rtx-a2000", "rtx-a4000", "l4", "l40s", "rtx-4090", "rtx-5090", "dgx-spark"}
    servers = {"a100-40gb", "a100-80gb", "h100-sxm", "h100-pcie"}
    assert set(PROFILES) == jetson | cards | servers | {"cpu"}


@pytest.mark.parametrize("name", PROFILES)
def test_a_profile_is_named_as_its_file_and_round_trips(name: str, tmp_path: Path) -> None:
    profile = load_profile(name)
    assert tomllib.loads((profiles_folder() / f"{name}.toml").read_text(encoding="utf-8"))["name"] == name
    copy = tmp_path / "copy.toml"
    copy.write_text(profile_toml(profile), encoding="utf-8")
    assert load_profile_file(copy) == profile


@pytest.mark.parametrize("name", PROFILES)
def test_the_default_budget_parses_and_fits_the_device(name: str) -> None:
    profile = PROFILES[name]
    budget = parse_budget(**profile.budget.model_dump())
    assert not any(limit.relative for limit in budget.limits.values())
    if profile.is_probed:
        assert profile.runtime_memory.si < budget.memory.value <= profile.available_bytes
        assert profile.build_memory.si <= profile.available_bytes


@pytest.mark.parametrize("name", GPUS)
def test_the_engine_exists_for_the_device(name: str) -> None:
    profile = PROFILES[name]
    if profile.engine == "tensorrt-rtx":
        assert profile.sm in RTX_SM
    assert (profile.sm in {87, 110}) == name.startswith("jetson")
    if name.startswith("jetson"):
        assert (profile.engine, profile.dialect, profile.memory_shared_with_system) == ("tensorrt", "opset24", True)
        assert profile.tensorrt == "10.16"


def test_only_devices_with_published_points_are_trusted() -> None:
    """Those of NVIDIA's runtimes on the device, or of a compiled one among three and more on a discrete GPU."""
    edge = ("agx-orin", "orin-nx", "jetson-orin.", "jetson-thor.", "dgx-spark", "rtx-4090", "a100-80gb")
    for profile in PROFILES.values():
        for figure in ("decode_efficiency", "layer_overhead") if profile.is_probed else ():
            trusted = getattr(profile, figure).confidence != "low"
            assert trusted == any(name in f"{profile.name}." for name in edge)


def test_usable_memory_is_what_system_and_runtime_leave() -> None:
    nano = PROFILES["jetson-orin-nano-8gb"]
    assert nano.available_bytes == pytest.approx(6.8e9)
    assert nano.usable_bytes == pytest.approx(6.35e9)  # 6.3 to 6.8 GB headless


def test_jetson_orin_is_the_64gb_developer_kit() -> None:
    assert PROFILES["jetson-orin"].hardware == PROFILES["jetson-agx-orin-64gb"].hardware


def test_si_values() -> None:
    orin = PROFILES["jetson-orin"]
    assert (orin.bandwidth.si, orin.fp16_compute.si, orin.memory.si) == pytest.approx((204.8e9, 42e12, 64e9))
    assert orin.layer_overhead.si == pytest.approx(1e-6 * orin.layer_overhead.value)
    assert orin.token_overhead.si == pytest.approx(1e-9 * orin.token_overhead.value)
    for units in UNITS.values():
        for unit, factor in units.items():
            assert HardwareFigure(value=2, unit=unit, source="s", confidence="low").si == 2 * factor


@given(st.text(min_size=1, max_size=20), st.floats(1e-3, 1e6))
def test_any_text_and_number_survive_the_bundles_copy(text: str, value: float) -> None:
    text = text.encode("utf-8", "ignore").decode("utf-8") or "x"
    figure = HardwareFigure(value=value, unit="GB/s", source=text, confidence="low")
    profile = PROFILES["l4"].model_copy(update={"description": text, "bandwidth": figure, "power_modes": (text, "15W")})
    assert DeviceProfile.model_validate(tomllib.loads(profile_toml(profile))) == profile


def test_a_format_has_figures_of_its_own_where_the_profile_says_so() -> None:
    """Its efficiency in decode, its share in prefill; another format, and floats, have the profile's."""
    orin, thor, int4 = PROFILES["jetson-orin"], PROFILES["jetson-thor"], WEIGHT_FORMATS["int4-64"]
    own = orin.formats["int4"].decode_efficiency.value
    assert orin.decode_factor(int4) == pytest.approx(orin.decode_efficiency.value / own)
    assert orin.decode_factor(None) == orin.decode_factor(WEIGHT_FORMATS["int8"]) == 1
    nvfp4 = WeightFormat("nvfp4", 4, 16)
    share = thor.formats["nvfp4"].prefill_efficiency.value
    assert thor.prefill_factor(nvfp4) == pytest.approx(thor.prefill_efficiency.value / share)
    assert share > 1
    assert thor.decode_factor(nvfp4) == thor.prefill_factor(None) == 1
    for profile in (orin, thor):
        assert DeviceProfile.model_validate(tomllib.loads(profile_toml(profile))) == profile


@pytest.mark.parametrize("name", ["RTX-4090", "Jetson-Orin", "CPU"])
def test_a_name_is_known_in_any_case(name: str) -> None:
    assert load_profile(name).name == name.lower()


@pytest.mark.parametrize(("name", "near"), [("jetson-orrin", "jetson-orin"), ("toaster", "`edgeprune devices`")])
def test_an_unknown_device_names_the_nearest_or_where_all_are(name: str, near: str) -> None:
    with pytest.raises(InputError, match=re.escape(f"unknown device {name!r}")) as caught:
        load_profile(name)
    assert near in caught.value.remedy


@pytest.mark.parametrize(("name", "count"), [("orin", 11), ("Orin NX", 4), ("jetson-orin-nano", 4), ("h100", 2)])
def test_a_part_of_a_name_tells_apart_what_it_may_be(name: str, count: int) -> None:
    with pytest.raises(InputError, match=f"any of {count}") as caught:
        load_profile(name)
    told = caught.value.remedy.splitlines()[1:]
    assert len(told) == len({line.split(maxsplit=1)[1] for line in told}) == count
    assert all(line.split()[0] in PROFILES for line in told)


NVFP4 = """
[formats.nvfp4.decode_efficiency]
value = 0.9
unit = "1"
source = "test"
confidence = "low"
"""
BAD = {
    "not TOML": ("name = \n", "is not TOML: Invalid value (at line 1"),
    "negative": (L4.replace("value = 300", "value = -1"), "bandwidth.value: must be greater than"),
    "zero": (L4.replace("value = 300", "value = 0"), "bandwidth.value: must be greater than"),
    "not finite": (L4.replace("value = 300", "value = inf"), "bandwidth.value: must be a finite number"),
    "a word": (L4.replace("value = 300", 'value = "fast"'), "bandwidth.value: must be a valid number"),
    "unknown unit": (L4.replace('"GB/s"', '"GBps"'), "bandwidth.unit: 'GBps' is not one of MB/s, GB/s, TB/s"),
    "another quantity's unit": (L4.replace('"GB/s"', '"GB"'), "bandwidth.unit: 'GB' is not one of"),
    "more than all": (
        re.sub(r"(?<=\[decode_efficiency\]\nvalue = ).*", "1.2", L4),
        "decode_efficiency.value: 1.2 must be at most 1",
    ),
    "no confidence": (L4.replace('confidence = "high"\n', "", 1), "memory.confidence: is missing"),
    "unknown confidence": (L4.replace('"high"', '"sure"', 1), "memory.confidence: must be 'high', 'medium' or 'low'"),
    "unknown field": ("colour = 'red'\n" + L4, "colour: is not a field of a profile"),
    "unknown engine": (L4.replace('"tensorrt-rtx"', '"openvino"'), "engine: must be 'tensorrt'"),
    "no sm": (L4.replace("sm = 89\n", ""), "sm is missing"),
    "missing figure": (re.sub(r"\[layer_overhead\]\n(\w+ = .*\n)+", "", L4), "missing decode_overhead"),
    "a format's unit": (
        L4 + NVFP4.replace('"1"', '"ms"'),
        "formats.nvfp4: decode_efficiency.unit: 'ms' is not one of 1",
    ),
    "a format's share": (L4 + NVFP4.replace("0.9", "1.1"), "decode_efficiency.value: 1.1 must be at most 1"),
    "an unknown format": (L4 + NVFP4.replace("nvfp4", "int3"), "formats.int3"),
    "no reserve": (L4.replace("shared_with_system = false", "shared_with_system = true"), "missing system_reserve"),
    "nothing left": (L4.replace("value = 24\n", "value = 0.4\n"), "leave nothing of memory"),
    "a name that leads elsewhere": (
        L4.replace('name = "l4"', 'name = "../../l4"'),
        "name: must be of letters, digits, dots",
    ),
    "a name with a folder": (L4.replace('name = "l4"', 'name = "l/4"'), "name: must be of letters"),
    "a hidden name": (L4.replace('name = "l4"', 'name = ".l4"'), "name: must be of letters"),
    "a name of two lines": (L4.replace('name = "l4"', 'name = "l4\\n"'), "name: must be of letters"),
    "an endless name": (L4.replace('name = "l4"', f'name = "{"l4" * 99}"'), "name: String should have at most 64"),
    "a figure beyond floating point": (
        L4.replace("value = 300", "value = 1e308"),
        "bandwidth.value: must be less than",
    ),
    "a figure that is nothing": (L4.replace("value = 300", "value = 1e-320"), "bandwidth.value: must be greater than"),
    "more tokens than can be": (
        L4.replace("prompt = 512", "prompt = 9999999999"),
        "workload.prompt: must be less than",
    ),
    "prompt too long": (L4.replace("prompt = 512", "prompt = 5000"), "workload: prompt 5000 must be less than"),
}


@pytest.mark.parametrize(("text", "reason"), BAD.values(), ids=BAD)
def test_a_bad_profile_names_field_and_reason(tmp_path: Path, text: str, reason: str) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(text, encoding="utf-8")
    assert text != L4
    with pytest.raises(InputError, match=re.escape(reason)) as caught:
        load_profile_file(path)
    assert str(path) in caught.value.message
    assert caught.value.remedy


def test_a_file_that_cannot_be_read_is_said(tmp_path: Path) -> None:
    (tmp_path / "binary.toml").write_bytes(b"\xff\xfe\x00")
    for name, reason in (("none.toml", "No such file"), (".", "Is a directory"), ("binary.toml", "not UTF-8")):
        with pytest.raises(InputError, match=reason):
            load_profile_file(tmp_path / name)


def test_a_device_and_a_file_at_once_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="both"):
        with_figures(profile_of("l4", tmp_path / "mine.toml"))
    assert with_figures(profile_of("l4", None)) == PROFILES["l4"]


def loaded_from(site: Path) -> tuple[str, int]:
    """Where a fresh process in this folder finds the module, and how many profiles it lists."""
    code = "import edgeprune.profiles as p; print(p.__file__); print(len(p.list_profiles()))"
    result = subprocess.run([sys.executable, "-c", code], cwd=site, check=True, capture_output=True, text=True)
    file, count = result.stdout.split()
    return file, int(count)


def test_profiles_are_found_in_a_checkout_and_in_a_wheel(tmp_path: Path) -> None:
    root = profiles_folder().parent
    assert loaded_from(root) == (str(root / "edgeprune" / "profiles.py"), len(PROFILES))
    if importlib.util.find_spec("hatchling") is None:
        pytest.skip("hatchling is not installed")
    source = tmp_path / "source"
    source.mkdir()
    for name in ("edgeprune", "profiles"):
        shutil.copytree(root / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(root / "pyproject.toml", source)
    (source / "README.md").write_text("edgeprune")
    build = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path / "dist")]
    subprocess.run(build, cwd=source, check=True, capture_output=True)
    (wheel,) = (tmp_path / "dist").glob("*.whl")
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    assert loaded_from(tmp_path / "site") == (str(tmp_path / "site" / "edgeprune" / "profiles.py"), len(PROFILES))


@pytest.mark.parametrize("content", [b"a =", b"\xff", b"a = " + b"[" * 200_000], ids=["cut off", "no UTF-8", "nested"])
def test_toml_that_cannot_be_read_is_one_message_with_the_files_name(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "x.toml"
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"x\.toml"):
        read_toml(path, "Restore it.")
    path.write_bytes(b"a = 1")
    assert read_toml(path, "Restore it.") == {"a": 1}


@pytest.mark.parametrize(("device", "form"), [("jetson-orin", "q4_k"), ("cpu", "q8_0")])
def test_formats_of_a_gguf_file_are_llama_cpps_alone(device, form):
    profile = load_profile(device)
    offer = profile.weights["int8"].model_copy(update={"formats": (form,)})
    for weights in ({"q4_k": offer}, {**profile.weights, "q4_k": offer}):
        text = profile_toml(profile.model_copy(update={"weights": weights}))
        with pytest.raises(ValueError, match="llama.cpp runs the formats of a GGUF file, and other engines all others"):
            DeviceProfile.model_validate(tomllib.loads(text))
    other = profile_toml(on_llamacpp(profile).model_copy(update={"weights": profile.weights}))
    with pytest.raises(ValueError, match="and other engines all others"):
        DeviceProfile.model_validate(tomllib.loads(other))
