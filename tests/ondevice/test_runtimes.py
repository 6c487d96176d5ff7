"""The table of engines, against what the package itself declares."""

from __future__ import annotations

import re
import tomllib

import pytest

from edgeprune.ondevice.runtimes import GPU_RUNTIMES, RUNTIMES, preferred
from tests.support import ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def names(requirements: list[str]) -> set[str]:
    return {re.match(r"[\w-]+", requirement)[0] for requirement in requirements}


@pytest.mark.parametrize("name", RUNTIMES)
def test_the_command_for_the_workstation_brings_the_package(name):
    runtime = RUNTIMES[name]
    if runtime.extra:
        assert runtime.package in names(PROJECT["optional-dependencies"][runtime.extra])
        assert runtime.install_here == f'pip install "edgeprune[{runtime.extra}]"'
    else:
        assert runtime.package in names(PROJECT["dependencies"])
        assert runtime.install_here == f"pip install {runtime.package}"


def test_a_device_installs_the_package_alone_or_gets_it_with_its_system():
    assert RUNTIMES["tensorrt-rtx"].install_there == "python3 -m pip install tensorrt-rtx"
    assert RUNTIMES["onnxruntime"].install_there == "python3 -m pip install onnxruntime"
    assert "JetPack" in RUNTIMES["tensorrt"].install_there


@pytest.mark.parametrize("name", GPU_RUNTIMES)
def test_the_named_engine_is_searched_for_first_and_no_other_is_left_out(name):
    order = preferred(name)
    assert order[0] == name
    assert sorted(order) == sorted(GPU_RUNTIMES)
    assert "onnxruntime" not in order
