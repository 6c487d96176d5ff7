"""Bytes and FLOPs of a Decoder -> memory and latency on a device, from the profile's figures.

Pure. Everything it returns is an Estimate that names the points it rests on.

    decode  = bytes per token / (decode_efficiency * bandwidth) + overhead
    prefill = max(FLOPs / (prefill_efficiency * compute), bytes / (decode_efficiency * bandwidth)) + overhead
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

from edgeprune.engine.base import Estimate, Memory, Performance, Workload
from edgeprune.engine.graph import graph_weight_bytes
from edgeprune.engine.graph_data import Precision
from edgeprune.errors import InputError
from edgeprune.model.decoder import Decoder
from edgeprune.profiles import DeviceProfile

ELEMENT_BYTES = {"fp32": 4, "fp16": 2}
ID_BYTES = 8


@dataclass(frozen=True)
class DecodeBytes:
    """Bytes that one decode step moves at past = context - 1, for the whole batch."""

    layers: int  # matrices and norms of all layers
    head: int  # the output head; the rows gathered from the embedding are negligible
    cache: int  # keys and values read by attention
    cache_copies: int  # reading and writing them once more, where past is concatenated with present

    @property
    def total(self) -> int:
        return self.layers + self.head + self.cache + self.cache_copies


def decode_bytes(decoder: Decoder, precision: Precision, workload: Workload, in_place: bool) -> DecodeBytes:
    """in_place: the engine appends to one cache buffer instead of concatenating past and present."""
    size = ELEMENT_BYTES[precision]
    cache = size * decoder.cache_elements(workload.batch, workload.context)
    layers = sum(prod(s) for i in range(len(decoder.layers)) for s in decoder.layer_shapes(i).values())
    head = decoder.vocab_size * decoder.hidden_size + decoder.hidden_size
    return DecodeBytes(size * layers, size * head, cache, 0 if in_place else 2 * cache)


def prefill_flops(decoder: Decoder, workload: Workload) -> float:
    """Multiply-adds count two: layer matrices, causal attention, and the head at the last position."""
    matrices = 2.0 * decoder.layer_parameters * workload.batch * workload.prompt
    heads = sum(layer.attention.query_size for layer in decoder.layers if layer.attention)
    attention = 2.0 * heads * workload.batch * workload.prompt**2  # scores and values, half masked
    return matrices + attention + 2.0 * workload.batch * decoder.vocab_size * decoder.hidden_size


def activation_bytes(decoder: Decoder, precision: Precision, workload: Workload) -> int:
    """Largest set of tensors alive at once in prefill, at the maximum shapes of one merged profile.

    The residual stream, its normed copy and the additive mask, with either packed q, k, v, the
    attention scores (prompt x total) and the context, or gate, up and their product.
    """
    tokens = workload.batch * workload.prompt
    total = workload.context - 1 + workload.prompt
    largest = 0
    for layer in decoder.layers:
        if (attention := layer.attention) is not None:
            packed = attention.query_size + 2 * attention.key_value_size
            scores = attention.num_attention_heads * total
            largest = max(largest, tokens * (packed + scores + attention.query_size))
        if layer.mlp is not None:
            largest = max(largest, 3 * tokens * layer.mlp.intermediate_size)
    stream = 2 * tokens * decoder.hidden_size + tokens * total
    return ELEMENT_BYTES[precision] * (stream + largest)


def buffer_bytes(decoder: Decoder, precision: Precision, workload: Workload) -> int:
    """Inputs and outputs other than the cache: ids, positions, mask, logits of the last position."""
    total = workload.context - 1 + workload.prompt
    ids = ID_BYTES * workload.batch * (2 * workload.prompt + total)
    return ids + ELEMENT_BYTES[precision] * workload.batch * decoder.vocab_size


def bytes_per_second(profile: DeviceProfile) -> float:
    return profile.bandwidth.si * profile.decode_efficiency.si


def flops_per_second(profile: DeviceProfile, precision: Precision) -> float:
    """Raises InputError where the profile has no rate for this precision."""
    rate = profile.fp16_compute if precision == "fp16" else profile.fp32_compute
    if rate is None and profile.fp16_compute is not None:
        return profile.fp16_compute.si * profile.prefill_efficiency.si / 8  # no tensor cores: stated in the basis
    if rate is None:
        raise InputError(
            f"the profile {profile.name} has no {precision} rate", "Choose another --precision, or add the figure."
        )
    return rate.si * profile.prefill_efficiency.si


def is_in_place(profile: DeviceProfile) -> bool:
    return profile.engine == "onnxruntime"


def estimate_performance(
    decoder: Decoder, profile: DeviceProfile, workload: Workload, precision: Precision
) -> Performance:
    """Memory by part and both latencies of a model on the profile's device."""
    moved = decode_bytes(decoder, precision, workload, is_in_place(profile))
    overhead = profile.decode_overhead.si
    decode = moved.total / bytes_per_second(profile) + overhead
    weights_time = (moved.layers + moved.head) / bytes_per_second(profile)
    compute_time = prefill_flops(decoder, workload) / flops_per_second(profile, precision)
    rate = f"{profile.bandwidth.value:g} {profile.bandwidth.unit} x {profile.decode_efficiency.value:g}"
    basis = (
        f"{moved.total / 1e6:.0f} MB per step / ({rate}) + {profile.decode_overhead.value:g} "
        f"{profile.decode_overhead.unit}; rests on: {profile.decode_efficiency.source}"
    )
    fp32 = ", fp32 taken as an eighth of fp16" if precision == "fp32" and profile.fp32_compute is None else ""
    prefill_basis = f"FLOPs at the profile's rate; rests on: {profile.prefill_efficiency.source}{fp32}"
    return Performance(
        memory=estimate_memory(decoder, profile, workload, precision),
        prefill=Estimate(1e3 * (max(compute_time, weights_time) + overhead), "ms", profile.name, prefill_basis),
        decode=Estimate(1e3 * decode, "ms", profile.name, basis),
    )


def estimate_memory(decoder: Decoder, profile: DeviceProfile, workload: Workload, precision: Precision) -> Memory:
    """The five parts; weights, cache and buffers are exact for our graph, activations a model."""

    def part(value: float, basis: str) -> Estimate:
        return Estimate(value, "bytes", profile.name, basis)

    dialect = "onnxruntime" if is_in_place(profile) else "opset23"
    copies = 1 if is_in_place(profile) else 2
    cache = ELEMENT_BYTES[precision] * decoder.cache_elements(workload.batch, workload.context)
    return Memory(
        weights=part(
            graph_weight_bytes(decoder, precision, dialect, workload.context), "bytes of the graph's initializers"
        ),
        cache=part(copies * cache, "one buffer, updated in place" if copies == 1 else "past and present, both held"),
        activations=part(
            activation_bytes(decoder, precision, workload), "largest set of tensors alive at once in prefill"
        ),
        buffers=part(buffer_bytes(decoder, precision, workload), "ids, mask and the last position's logits"),
        runtime=part(profile.runtime_memory.si, profile.runtime_memory.source),
    )


def decode_shares(
    decoder: Decoder, profile: DeviceProfile, workload: Workload, precision: Precision
) -> dict[str, float]:
    """Estimated decode ms by part; `overhead` and `head` are what no pruning of layers removes."""
    moved = decode_bytes(decoder, precision, workload, is_in_place(profile))
    scale = 1e3 / bytes_per_second(profile)
    return {
        "layers": moved.layers * scale,
        "cache": (moved.cache + moved.cache_copies) * scale,
        "head": moved.head * scale,
        "overhead": 1e3 * profile.decode_overhead.si,
    }


def floor_decoder(dense: Decoder, channel_multiple: int) -> Decoder:
    """The smallest uniform candidate: one group of one head and one multiple of channels in every layer."""
    smallest = min(layer.mlp.intermediate_size for layer in dense.layers if layer.mlp)
    return dense.with_widths(1, 1, min(channel_multiple, smallest))
