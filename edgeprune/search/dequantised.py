"""The weight formats that an engine's builder dequantises, found by building small models of random weights.

It does not know a model's weights, nor what was asked for.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from edgeprune.engine.engines import Compiling, Exported, dequantises
from edgeprune.engine.onnx.graph import GraphVariant, write_graphs
from edgeprune.files import scratch_folder
from edgeprune.model.decoder import Decoder
from edgeprune.ondevice.figures import Workload
from edgeprune.ondevice.worker import OnProgress
from edgeprune.precision import GraphPrecision
from edgeprune.profiles import DeviceProfile
from edgeprune.search.latency_table import RandomWeights
from edgeprune.search.widths import Format

# In tokens, at most: activations of long prompts would hide a copy, whose size they do not change.
PROMPT, CONTEXT = 32, 96


@dataclass(frozen=True)
class Dequantised:
    """A format whose weights a builder holds in floats too, by name, and the memory of two small models that shows it.

    in_layers: in the layers, else in embedding and head; context_bytes: activations and scratch memory with this
    format; float_context_bytes: in floats alone.
    """

    form: str
    in_layers: bool
    context_bytes: float
    float_context_bytes: float


def dequantised_formats(
    engine: Compiling,
    dense: Decoder,
    formats: tuple[tuple[Format, ...], tuple[Format, ...]],
    profile: DeviceProfile,
    workload: Workload,
    precision: GraphPrecision,
    folder: Path,
    on_progress: OnProgress,
) -> list[Dequantised]:
    """Returns the formats that the engine's builder dequantises for the shapes of a model.

    A layer of the model is built in floats and in each format, and so are embedding and head. formats: of the layers,
    and of embedding and head; folder: where graphs are written for as long as they are built. Raises EngineError.
    """
    short = replace(workload, prompt=min(workload.prompt, PROMPT), context=min(workload.context, CONTEXT))

    def built(decoder: Decoder) -> float | None:
        """Returns the activations and scratch memory of a model's engine, None where none is to be had."""
        with scratch_folder(folder, "formats-") as part:
            graphs = part / "graphs"
            variant = GraphVariant(profile.dialect, "last")
            write_graphs(decoder, RandomWeights(decoder), graphs, precision, [variant], short.context)
            return engine.context_bytes(Exported(decoder, graphs, part / "engine", part / "none"), short, on_progress)

    plain = replace(dense, layers=dense.layers[:1])
    in_floats = built(plain)
    found = []
    for decoder, form, in_layers in _in_formats(plain, *formats):
        context = None if in_floats is None else built(decoder)
        if context is not None and dequantises(context, in_floats, decoder, short, precision):
            found.append(Dequantised(form, in_layers, context, in_floats))
    return found


def _in_formats(
    plain: Decoder, layers: tuple[Format, ...], tables: tuple[Format, ...]
) -> Iterator[tuple[Decoder, str, bool]]:
    """Yields a model in each format of its layers, and in each of embedding and head, with the format's name.

    A copy of a layer's matrix would not show beside one of the head.
    """
    for form in layers:
        if form is not None:
            yield plain.with_formats([(form, form)] * len(plain.layers), None, None), form.name, True
    for form in tables:
        if form is not None:
            yield plain.with_formats([(None, None)] * len(plain.layers), form, form), form.name, False
