"""The figures of a double of a GPU."""

from __future__ import annotations

from edgeprune.engine import probe
from edgeprune.ondevice.worker import quiet
from edgeprune.profiles import load_profile
from tests.support.doubles.install import InProcess


def probed(name: str = "l4") -> probe.Probed:
    return probe.probe_gpu(InProcess(), "tensorrt", "a double", load_profile(name), quiet)
