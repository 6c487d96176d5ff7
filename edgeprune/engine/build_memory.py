"""The estimate of the memory that building an engine takes, from the graph's bytes and the model's layers.

    host = BASE + EACH_LAYER x layers + WEIGHTS x bytes of the graph + TIED_TABLE x bytes of a tied table of floats

It is the peak of the builder's process, least squares of the relative errors over builds of TensorRT for RTX 1.7.1 for
SM 86 without a GPU, of 1 to 1282 MiB in fp16, int8 and int4, in two dialects: 10 % off at the worst, 4 % in the mean,
and 15 % at the worst for two shapes that it was not fitted to (tools/bench_build_memory.py). A tied table of floats
counts again, because its engine is built a second time. On a device the builder runs the engine's kernels to time them:
where the GPU shares the system's memory, the engine's own weights and activations are added, which makes 3.3 times the
weights of a large model; TensorRT-Edge-LLM's issue 30 tells of 3 to 4 times.
"""

from __future__ import annotations

from dataclasses import dataclass

from edgeprune.dialects import version_of
from edgeprune.engine.estimate import estimate_memory
from edgeprune.engine.onnx.graph import graph_weight_bytes
from edgeprune.engine.work import table_bytes
from edgeprune.model.decoder import Decoder
from edgeprune.ondevice.budget import format_bytes
from edgeprune.ondevice.build_room import can_build
from edgeprune.ondevice.figures import Workload
from edgeprune.precision import GraphPrecision
from edgeprune.profiles import DeviceProfile

BASE, EACH_LAYER = 271 * 2**20, 12.3 * 2**20  # bytes
WEIGHTS, TIED_TABLE = 2.34, 1.48  # times the bytes
STREAMING = (10, 13)  # the first TensorRT that writes an engine while it serialises it
WHOLE = 0.5  # times the graph's bytes: what an engine that is held as a whole adds (measured once, at 2.1 GiB)


@dataclass(frozen=True)
class BuildMemory:
    """The bytes that a build takes at its peak: of the builder's process, and of the engine where a GPU shares them."""

    host: float
    engine: float

    @property
    def total(self) -> float:
        """Returns the bytes of both."""
        return self.host + self.engine


def build_memory(
    decoder: Decoder, profile: DeviceProfile, workload: Workload, precision: GraphPrecision
) -> BuildMemory:
    """Returns the memory that building the engine of a model takes on its device. Raises InputError as estimates do."""
    dialect = profile.for_cache(decoder.cache_format).dialect
    graph = graph_weight_bytes(decoder, precision, dialect, workload.context)
    is_tied = decoder.tie_word_embeddings and decoder.embedding_format is None
    host = BASE + EACH_LAYER * len(decoder.layers) + WEIGHTS * graph
    host += TIED_TABLE * table_bytes(decoder, precision) if is_tied else 0.0
    if profile.tensorrt is not None and version_of(profile.tensorrt) < STREAMING:
        host += WHOLE * graph
    if not profile.memory_shared_with_system:
        return BuildMemory(host, 0.0)
    memory = estimate_memory(decoder, profile, workload, precision)
    return BuildMemory(host, memory.weights.value + memory.activations.value)


def build_limit(profile: DeviceProfile) -> int | None:
    """Returns the bytes that the profile has for builds; None where the host has a memory of its own, which no profile
    knows."""
    return int(profile.build_memory.si) if profile.memory_shared_with_system else None


def note_of_build(
    decoder: Decoder, profile: DeviceProfile, workload: Workload, precision: GraphPrecision
) -> str | None:
    """Returns a note where the device itself may not build a model's engine for lack of memory, else None."""
    limit = build_limit(profile)
    needed = build_memory(decoder, profile, workload, precision).total if limit else 0.0
    if limit is None or can_build(needed, limit):
        return None
    return (
        f"building the engine on {profile.name} needs about {format_bytes(needed)} of memory (estimated), the profile "
        f"has {format_bytes(limit)} for it: add swap there, or build on another device of SM {profile.sm}"
    )
