"""A device, its graphs' dialects, and a measured performance of a known total."""

from __future__ import annotations

from dataclasses import replace

from edgeprune.ondevice.figures import Measured, Memory, Performance, Workload
from edgeprune.profiles import load_profile
from tests.support.shapes import SMOLLM2

ORIN = load_profile("jetson-orin")
PROFILES = {
    dialect: ORIN.model_copy(update={"dialect": dialect})
    for dialect in ("opset24", "opset23", "primitive", "onnxruntime")
}
WORKLOAD = Workload(2, 64, 256)
SMALL = replace(SMOLLM2, max_position_embeddings=600)


def obtained(total: float, decode: float = 20.0) -> Performance:
    """Measured on a device: a total that no estimate gives."""
    parts = (total - 4.0, 1.0, 1.0, 1.0, 1.0)
    return Performance(
        Memory(*(Measured(part, "bytes", "board", part, part) for part in parts)),
        prefill=Measured(90.0, "ms", "board", 85.0, 99.0),
        decode=Measured(decode, "ms", "board", 0.9 * decode, 1.25 * decode),
    )
