"""The weight formats that a builder dequantises: on a double that does so, and with TensorRT for RTX itself."""

from __future__ import annotations

from pathlib import Path

import onnx
import pytest

from edgeprune.engine.engines import BuiltAhead, TensorRT
from edgeprune.ondevice.figures import Workload
from edgeprune.ondevice.tensorrt import available
from edgeprune.ondevice.worker import quiet
from edgeprune.precision import WEIGHT_FORMATS
from edgeprune.profiles import load_profile
from edgeprune.search.dequantised import Dequantised, dequantised_formats
from tests.support.doubles.double_device import Device
from tests.support.doubles.install import IN_PLACE_VERSION, InProcess, install
from tests.support.shapes import uniform

pytest_plugins = ("tests.support.doubles.fixtures",)

needs_rtx = pytest.mark.skipif(not available("tensorrt-rtx")[0], reason="TensorRT for RTX is not installed")
WIDE = uniform(512, 4, (8, 4, 64), 1024, 8192)
INT8, INT4 = (WEIGHT_FORMATS[name] for name in ("int8", "int4-64"))
FORMATS = ((None, INT8, INT4), (None, INT8))
ORIN = load_profile("jetson-orin")
INTS = {"int8": onnx.TensorProto.INT8, "int4-64": onnx.TensorProto.INT4}


def found(engine: BuiltAhead | TensorRT, workload: Workload, folder: Path) -> list[Dequantised]:
    made = dequantised_formats(engine, WIDE, FORMATS, ORIN, workload, "fp16", folder, quiet)
    assert not list(folder.iterdir())
    return made


@pytest.mark.parametrize("layer", ["pycuda"])
@pytest.mark.parametrize(
    ("form", "places"), [("int8", [True, False]), ("int4-64", [True]), (None, [])], ids=["int8", "int4", "neither"]
)
def test_on_a_double_that_dequantises_a_format_it_is_named_with_both_figures(
    device: Device, layer: str, form: str | None, places: list[bool], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    install(monkeypatch, device, (layer,), IN_PLACE_VERSION)  # of ORIN's graphs
    device.dequantised = {INTS[form]} if form else set()
    workload, session = Workload(1, 64, 4096), InProcess()
    made = found(TensorRT(ORIN, workload, "fp16", "", "tensorrt", session), workload, tmp_path)
    assert [(one.form, one.in_layers) for one in made] == [(form, place) for place in places]
    copies = {True: 2 * 512 * 2 * 1024, False: 2 * 512 * 8192}  # gate and up; the head
    assert [one.context_bytes - one.float_context_bytes for one in made] == [copies[place] for place in places]
    assert session.done == ["build"] * 4


@pytest.mark.slow
@needs_rtx
@pytest.mark.parametrize(("sm", "batch", "places"), [(86, 1, []), (86, 2, []), (75, 2, [("int8", False)])])
def test_what_the_compiler_holds_packed_stays_and_a_head_that_it_dequantises_is_named(
    sm: int, batch: int, places: list[tuple[str, bool]], tmp_path: Path
) -> None:
    """On SM 75 it dequantises a head of int8 in a batch of two; int4, which it refuses there, it does not hold."""
    workload = Workload(batch, 2048, 4096)  # of which the activations are larger than a copy
    made = found(BuiltAhead(ORIN, workload, "fp16", "", sm), workload, tmp_path)
    assert [(one.form, one.in_layers) for one in made] == places
