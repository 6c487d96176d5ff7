"""The room that a run takes on this machine, counted before it starts: bytes on the disk and in memory.

It counts shapes, and refuses what this machine cannot hold.
"""

from __future__ import annotations

from dataclasses import replace
from math import prod
from typing import TYPE_CHECKING

from edgeprune.engine.onnx.graph import graph_weight_bytes
from edgeprune.errors import InputError
from edgeprune.generate.text import BATCH, CACHE_BYTES
from edgeprune.model.decoder import Decoder
from edgeprune.ondevice.budget import format_bytes
from edgeprune.ondevice.machine import memory_state
from edgeprune.ondevice.reference import STEPS
from edgeprune.search.latency_table import CHUNK_BYTES

if TYPE_CHECKING:
    from edgeprune.model.decoder import Layer

TIMED_MODELS = 30  # of random weights, about, whose graphs stand on the disk at a time
SLACK_BYTES = 32 << 20  # reports, pages, the journal
PROCESS_BYTES = 300 << 20  # of Python with torch, about
FLOAT, DOUBLE = 4, 8  # bytes


def disk_bytes(
    decoder: Decoder,
    precision: str,
    candidates: int,
    builds: bool,
    measures: bool,
    exports: int = 0,
    evaluated: int = 0,
    tokenizer_bytes: int = 0,
) -> int:
    """Returns an upper bound of the bytes that a run holds on the disk at its end.

    A candidate is at most as large as the dense model: checkpoint, graphs for the device and in fp32 for this machine,
    engine, reference, tokenizer. The bundle shares their files. builds: an engine is compiled; measures: costs are
    timed on graphs; evaluated: tokens.
    """
    plain, graphs = (graph_weight_bytes(decoder, name) for name in ("fp32", precision))
    built = graphs if builds else 0
    reference = 4 * STEPS * decoder.vocab_size
    candidate = plain + (plain + graphs if precision != "fp32" else plain) + built + reference + 2 * tokenizer_bytes
    costs = min(CHUNK_BYTES, TIMED_MODELS * graphs) if measures else 0
    return 2 * plain + graphs + built + costs + candidates * candidate + exports * plain + 24 * evaluated + SLACK_BYTES


def memory_bytes(decoder: Decoder, tokens: int, length: int) -> dict[str, int]:
    """Returns about the bytes that the two largest parts of a run hold, by their names; the larger is its peak.

    tokens: that are pruned on; length: of a sample. The dense model draws samples and answers in fp32 with all its
    weights in memory, a pruning holds one module at a time.
    """
    cache = min(CACHE_BYTES, BATCH * decoder.cache_bytes(1, length, FLOAT))
    generation = graph_weight_bytes(decoder, "fp32") + cache + 2 * FLOAT * BATCH * decoder.vocab_size
    walk = max(_walk_bytes(decoder, layer, tokens) for layer in set(decoder.layers))
    return {"generation": PROCESS_BYTES + generation, "pruning": PROCESS_BYTES + walk}


def memory_room() -> int | None:
    """Returns the bytes of this machine's memory and free swap; None where it does not tell."""
    state = memory_state()
    return state["total"] + state.get("swap_free", 0) if state else None


def check_memory(decoder: Decoder, tokens: int, length: int) -> None:
    """Raises InputError where a part of a run, as of `memory_bytes`, holds more than this machine and its free swap."""
    parts, room = memory_bytes(decoder, tokens, length), memory_room()
    part = max(parts, key=parts.__getitem__)
    if room is not None and parts[part] > room:
        raise InputError(
            f"its {part} holds about {format_bytes(parts[part])} in memory, this machine has {format_bytes(room)}",
            "Take a machine with more memory, or add swap; `edgeprune plan MODEL --device NAME --work` tells the rest.",
        )


def _walk_bytes(decoder: Decoder, layer: Layer, tokens: int) -> int:
    """Returns about the bytes of both streams and of the module that holds most while it is pruned, all of it kept.

    Of the module its weights twice, what its output projection reads, the lost output and the target, and of its
    moments those of all and of held-out tokens, a factor, and one more while features are chosen.
    """
    shapes = replace(decoder, layers=(layer,)).layer_shapes(0)
    streams = FLOAT * tokens * decoder.hidden_size * (4 if decoder.parallel else 2)
    attention, mlp = layer.attention, layer.mlp
    experts = mlp.experts if mlp else None
    share = experts.num_experts_per_tok / experts.num_experts if experts else 1.0
    modules = []
    for kind, width in (
        ("attention", attention.query_size if attention else 0),
        ("mlp", mlp.intermediate_size if mlp else 0),
    ):
        weights = sum(prod(shape) for name, shape in shapes.items() if f".{kind}." in name)
        read = (share if kind == "mlp" else 1.0) * tokens * width
        moments = (3 * DOUBLE + FLOAT) * width**2
        modules.append(FLOAT * (2 * weights + read + 2 * tokens * decoder.hidden_size) + moments)
    return int(streams + max(modules))
