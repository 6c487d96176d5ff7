"""Bytes and FLOPs of a Decoder -> memory and latency on a device, from the profile's figures.

    time = max(bytes / (decode_efficiency x bandwidth), FLOPs / (prefill_efficiency x compute)) + decode_overhead

of one decode step, which bytes bind but for large batches, and of a prefill, which FLOPs bind but for short prompts.

Pure: it reads no file and measures nothing. All that it returns is an Estimate that names its points.
Efficiency and overhead are fits of published points (calibrate.py), whose runtime keeps its cache in place;
that our graphs copy the cache is added explicitly, and named in the basis.
int8 and int4 are weight-only: the layers' matrices are quantised, all else is fp16.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import prod

from edgeprune.engine.onnx.graph import graph_weight_bytes
from edgeprune.engine.onnx.nodes import HEAD_MULTIPLE, head_width
from edgeprune.errors import InputError
from edgeprune.model.decoder import Decoder
from edgeprune.ondevice.figures import Estimate, Memory, Performance, Workload
from edgeprune.ondevice.measure import Counted
from edgeprune.precision import PRECISIONS, PrecisionName
from edgeprune.profiles import DeviceProfile

ID_BYTES = 8
TENSORRT_WORKSPACE = 8 * 2**20  # for matrix products, as TensorRT for RTX's compiler reports it


@dataclass(frozen=True)
class TokenBytes:
    """Bytes that one decode step moves at past = context - 1, for the whole batch."""

    layers: float  # matrices and norms of all layers
    head: float  # final norm and head; the embedding's gathered rows are negligible
    cache: float  # keys and values that attention reads
    cache_copies: float  # the cache read and written once more where past and present are concatenated

    @property
    def total(self) -> float:
        return self.layers + self.head + self.cache + self.cache_copies


def bytes_per_token(
    decoder: Decoder, precision: PrecisionName, workload: Workload, in_place: bool = False
) -> TokenBytes:
    """in_place: the engine appends to one cache buffer, so that nothing is copied (our graphs for TensorRT copy)."""
    size = PRECISIONS[precision].element_bytes
    norms = sum(
        prod(shape)
        for index in range(len(decoder.layers))
        for shape in decoder.layer_shapes(index).values()
        if len(shape) == 1
    )
    cache = cache_bytes(decoder, precision, workload, in_place)
    return TokenBytes(
        layers=PRECISIONS[precision].matrix_bytes * decoder.layer_parameters + size * norms,
        head=size * (decoder.vocab_size + 1) * decoder.hidden_size,
        cache=cache,
        cache_copies=0 if in_place else 2 * cache,
    )


def cache_bytes(decoder: Decoder, precision: PrecisionName, workload: Workload, in_place: bool) -> int:
    """One buffer of keys and values at full context. in_place: as ONNX Runtime holds it, zeros behind odd heads."""
    multiple = HEAD_MULTIPLE if in_place else 1
    return PRECISIONS[precision].element_bytes * decoder.cache_elements(workload.batch, workload.context, multiple)


def prefill_flops(decoder: Decoder, workload: Workload) -> float:
    """A multiply-add is two: the layers' matrices, causal attention, and the head at the last position."""
    tokens = workload.batch * workload.prompt
    query_size = sum(layer.attention.query_size for layer in decoder.layers if layer.attention)
    attention = 2.0 * tokens * workload.prompt * query_size  # scores and values, half of each masked
    head = 2.0 * workload.batch * decoder.vocab_size * decoder.hidden_size
    return 2.0 * tokens * decoder.layer_parameters + attention + head


def decode_flops(decoder: Decoder, workload: Workload) -> float:
    """A multiply-add is two: matrices, head, and attention over `context` keys, of one step of the whole batch."""
    query_size = sum(layer.attention.query_size for layer in decoder.layers if layer.attention)
    matrices = decoder.layer_parameters + decoder.vocab_size * decoder.hidden_size
    return 2.0 * workload.batch * (matrices + 2 * workload.context * query_size)


def activation_bytes(decoder: Decoder, precision: PrecisionName, workload: Workload, dialect: str) -> int:
    """The largest set of tensors alive at once in a prefill of `prompt` tokens.

    With T = batch x prompt and `total` keys: the residual stream and its normed copy (2 T hidden), for
    TensorRT the mask (T total), and the largest of
        mlp          gate, up, product                            3 T intermediate + workspace
        opset23      attention fused: packed q, k, v, rotated q, k
                     and the result, each twice                   2 T (3 q + 3 k) + workspace
        primitive    scores before and after the softmax,
                     q, k, v, and all keys transposed             T (2 heads total + q + 2 k) + batch total k
        onnxruntime  scores, softmax in place, q, k, v, result    T (heads total + 2 q + 2 k)
    TensorRT reserves for the longest past that its engine admits (total = context - 1 + prompt), ONNX
    Runtime allocates what it meets (total = prompt) and has no workspace. The logits are among the buffers.

    Against the `Total Activation Memory` of TensorRT for RTX's compiler (SM86, fp16), on 24 random shapes
    that these formulas were not fitted to: median error 6 %, 22 within 21 %, the worst 48 % low. Where each
    query head has its own key head that compiler fuses a primitive graph too, and this is 3 times too high.
    """
    tokens = workload.batch * workload.prompt
    total = _total_tokens(workload, dialect)
    size, in_place = PRECISIONS[precision].element_bytes, dialect == "onnxruntime"
    workspace = 0 if in_place else TENSORRT_WORKSPACE
    largest = 0
    for layer in decoder.layers:
        if (attention := layer.attention) is not None:
            heads, width = attention.num_attention_heads, head_width(attention.head_dim, dialect)
            query, key = heads * width, attention.num_key_value_heads * width
            if dialect == "opset23":
                stage = size * 2 * tokens * (3 * query + 3 * key) + workspace
            elif dialect == "primitive":
                stage = size * (tokens * (2 * heads * total + query + 2 * key) + workload.batch * total * key)
            else:
                stage = size * tokens * (heads * total + 2 * query + 2 * key)
            largest = max(largest, stage)
        if layer.mlp is not None:
            largest = max(largest, size * 3 * tokens * layer.mlp.intermediate_size + workspace)
    return size * tokens * (2 * decoder.hidden_size + (0 if in_place else total)) + largest


def buffer_bytes(decoder: Decoder, precision: PrecisionName, workload: Workload, dialect: str) -> int:
    """Inputs and outputs other than the cache: ids, positions, mask, logits of the last position."""
    ids = ID_BYTES * workload.batch * (2 * workload.prompt + _total_tokens(workload, dialect))
    return ids + PRECISIONS[precision].logit_bytes * workload.batch * decoder.vocab_size


def _total_tokens(workload: Workload, dialect: str) -> int:
    return workload.prompt + (0 if dialect == "onnxruntime" else workload.context - 1)


def estimate_memory(
    decoder: Decoder,
    profile: DeviceProfile,
    workload: Workload,
    precision: PrecisionName,
    weight_bytes: int | None = None,
) -> Memory:
    """The five parts in bytes; weights, cache and buffers are exact for our graph, activations a formula.

    weight_bytes: the weights as an engine holds them, where known. Raises InputError for a profile
    without hardware figures.
    """

    def part(value: float, basis: str) -> Estimate:
        return Estimate(value, "bytes", profile.name, basis)

    _require_figures(profile)
    in_place = _in_place(profile)
    cache = cache_bytes(decoder, precision, workload, in_place)
    return Memory(
        weights=part(_weight_bytes(decoder, profile, workload, precision), "bytes of the graph's initializers")
        if weight_bytes is None
        else part(weight_bytes, "bytes of the weights as the engine holds them"),
        cache=part(cache if in_place else 2 * cache, "one buffer" if in_place else "past and present, both held"),
        activations=part(
            activation_bytes(decoder, precision, workload, profile.dialect),
            f"largest set of tensors alive at once in a prefill of {workload.prompt} tokens",
        ),
        buffers=part(
            buffer_bytes(decoder, precision, workload, profile.dialect), "ids, mask and the last position's logits"
        ),
        runtime=part(profile.runtime_memory.si, f"{profile.name} runtime_memory: {profile.runtime_memory.source}"),
    )


def _weight_bytes(decoder: Decoder, profile: DeviceProfile, workload: Workload, precision: PrecisionName) -> float:
    stored = PRECISIONS[precision]
    written = graph_weight_bytes(decoder, stored.unquantised, profile.dialect, workload.context)
    return written + (stored.matrix_bytes - stored.element_bytes) * decoder.layer_parameters


def estimate_performance(
    decoder: Decoder,
    profile: DeviceProfile,
    workload: Workload,
    precision: PrecisionName,
    weight_bytes: int | None = None,
) -> Performance:
    """Memory by part, prefill and decode in ms of a model on the profile's device; `notes` names weak points.

    Raises InputError for a profile without hardware figures or without a rate for this precision.
    """
    _require_figures(profile)
    moved = bytes_per_token(decoder, precision, workload, _in_place(profile))
    overhead = profile.decode_overhead.si
    rate, rate_basis = _flops_per_second(profile, precision)
    flops = prefill_flops(decoder, workload)
    compute, weights = flops / rate, (moved.layers + moved.head) / _bytes_per_second(profile)
    bandwidth, efficiency = profile.bandwidth, profile.decode_efficiency
    reading = f"({bandwidth.value:g} {bandwidth.unit} x {efficiency.value:g})"
    fixed = f"{1e3 * overhead:.3g} ms"
    points = f"rests on: {'; '.join(dict.fromkeys((efficiency.source, profile.decode_overhead.source)))}"
    computing = f"GFLOP / {rate_basis} + {fixed}; rests on: {profile.prefill_efficiency.source}"
    if compute >= weights:
        prefill_basis = f"{flops / 1e9:.4g} {computing}"
    else:
        prefill_basis = f"bound by bytes: {(moved.layers + moved.head) / 1e6:.4g} MB / {reading} + {fixed}; {points}"
    copied = f", {moved.cache_copies / 1e6:.4g} MB of it our graph's copy of the cache," if moved.cache_copies else ""
    decode_basis = f"{moved.total / 1e6:.4g} MB per step{copied} / {reading} + {fixed}; {points}"
    step = decode_parts(decoder, profile, workload, precision)
    if step["compute"]:
        decode_basis = f"bound by compute: {decode_flops(decoder, workload) / 1e9:.4g} {computing}"
    return Performance(
        memory=estimate_memory(decoder, profile, workload, precision, weight_bytes),
        prefill=Estimate(1e3 * (max(compute, weights) + overhead), "ms", profile.name, prefill_basis),
        decode=Estimate(sum(step.values()), "ms", profile.name, decode_basis),
        notes=tuple(
            f"{name} of {profile.name} is of low confidence: {figure.source}"
            for name, figure in profile.hardware.items()
            if figure.confidence == "low"
        ),
    )


def resource_times(
    decoder: Decoder, profile: DeviceProfile, workload: Workload, precision: PrecisionName
) -> dict[str, dict[str, float]]:
    """ms of prefill and decode that each resource alone would take, without the overhead; the slower one binds.

    Each adds up over the modules of a model. Raises InputError as estimate_performance does.
    """
    _require_figures(profile)
    moved, rate = (
        bytes_per_token(decoder, precision, workload, _in_place(profile)),
        _flops_per_second(profile, precision),
    )
    milliseconds_per_byte = 1e3 / _bytes_per_second(profile)
    return {
        "prefill": {
            "compute": 1e3 * prefill_flops(decoder, workload) / rate[0],
            "bytes": (moved.layers + moved.head) * milliseconds_per_byte,
        },
        "decode": {
            "compute": 1e3 * decode_flops(decoder, workload) / rate[0],
            "bytes": moved.total * milliseconds_per_byte,
        },
    }


def latency_shares(
    decoder: Decoder, profile: DeviceProfile, workload: Workload, precision: PrecisionName
) -> dict[str, float]:
    """Estimated decode ms by part; no pruning of layers removes `head_and_embedding` and `overhead`."""
    parts = decode_parts(decoder, profile, workload, precision)
    return {
        "layers": parts["layers"] + parts["compute"],
        "head_and_embedding": parts["head"],
        "cache": parts["cache"] + parts["cache_copies"],
        "overhead": parts["overhead"],
    }


def decode_parts(
    decoder: Decoder, profile: DeviceProfile, workload: Workload, precision: PrecisionName, in_place: bool | None = None
) -> dict[str, float]:
    """Estimated decode ms by the parts of TokenBytes, what compute takes longer than them, and the overhead.

    in_place: the cache is, as in the runtime of the published points; by default what our graph does.
    """
    _require_figures(profile)
    moved = bytes_per_token(decoder, precision, workload, _in_place(profile) if in_place is None else in_place)
    parts = {name: 1e3 * value / _bytes_per_second(profile) for name, value in vars(moved).items()}
    compute = 1e3 * decode_flops(decoder, workload) / _flops_per_second(profile, precision)[0]
    return parts | {"compute": max(0.0, compute - sum(parts.values())), "overhead": 1e3 * profile.decode_overhead.si}


def floor_decoder(dense: Decoder, channel_multiple: int) -> Decoder:
    """The smallest candidate: one layer of one group of one head and one multiple of channels."""
    narrowest = min((layer.mlp.intermediate_size for layer in dense.layers if layer.mlp), default=channel_multiple)
    return replace(dense, layers=dense.layers[:1]).with_widths(1, 1, min(channel_multiple, narrowest))


def estimate_floor(dense: Decoder, profile: DeviceProfile, workload: Workload, precision: PrecisionName) -> Performance:
    """What the floor needs and reaches: embeddings, head and overhead dominate it, and no pruning goes below."""
    return estimate_performance(floor_decoder(dense, profile.channel_multiple), profile, workload, precision)


def _in_place(profile: DeviceProfile) -> bool:
    return profile.dialect == "onnxruntime"


def _bytes_per_second(profile: DeviceProfile) -> float:
    return profile.bandwidth.si * profile.decode_efficiency.si


def _flops_per_second(profile: DeviceProfile, precision: PrecisionName) -> tuple[float, str]:
    """The rate that prefill reaches, and how it came about."""
    efficiency = profile.prefill_efficiency.value
    figure = getattr(profile, PRECISIONS[precision].compute)
    if figure is not None:
        of_fp16 = " of fp16, which is bf16's too," if precision == "bf16" else ""
        return figure.si * efficiency, f"({figure.value:g} {figure.unit}{of_fp16} x {efficiency:g})"
    if precision == "fp32" and profile.fp16_compute is not None:
        # TensorRT computes fp32 products in TF32 unless told otherwise: half of fp16's rate on tensor cores.
        halved = f"({profile.fp16_compute.value:g} {profile.fp16_compute.unit} / 2 as TF32 x {efficiency:g})"
        return profile.fp16_compute.si * efficiency / 2, halved
    raise _no_rate(profile, precision)


def check_precision(profile: DeviceProfile, precision: str) -> PrecisionName:
    """Raises InputError for an unknown precision, or one that the device lacks or has no rate for, probed or not."""
    if precision not in PRECISIONS:
        raise InputError(f"unknown precision {precision!r}", f"Precisions are: {', '.join(PRECISIONS)}.")
    if not computes_in(profile, precision):
        lacking = f"SM {profile.sm}" if profile.sm else "ONNX Runtime on a processor"
        other = "fp32" if profile.sm is None else "fp16"
        raise InputError(
            f"{profile.name} has no {precision}: {lacking} computes no product in it", f"Use --precision {other}."
        )
    if PRECISIONS[precision].compute == "fp16_compute" and profile.fp16_compute is None:
        raise _no_rate(profile, precision)
    return precision


def computes_in(profile: DeviceProfile, precision: str) -> bool:
    """Returns whether the device's engine has products in a precision."""
    least = PRECISIONS[precision].least_sm
    return least is None or (profile.engine != "onnxruntime" and profile.sm is not None and profile.sm >= least)


def _no_rate(profile: DeviceProfile, precision: str) -> InputError:
    return InputError(
        f"the profile {profile.name} has no fp16 compute rate, which {precision} needs",
        f"Use --precision {profile.precision}, or add fp16_compute to a profile of your own.",
    )


def _require_figures(profile: DeviceProfile) -> None:
    if not profile.is_probed:
        raise InputError(
            f"the profile {profile.name} has no hardware figures to estimate from",
            "Measure them first (--device cpu does so on first use), or add them to the profile.",
        )


def counted(decoder: Decoder, precision: str, workload: Workload) -> Counted:
    """The bytes that ONNX Runtime's graph holds, its cache updated in place."""
    return Counted(
        weights=graph_weight_bytes(decoder, precision, "onnxruntime", workload.context),
        cache=cache_bytes(decoder, precision, workload, in_place=True),
        buffers=buffer_bytes(decoder, precision, workload, "onnxruntime"),
    )


def workspace_bytes(decoder: Decoder, profile: DeviceProfile, workload: Workload, precision: str) -> int:
    """Scratch memory that the profile leaves for one kernel: what is usable less weights and cache."""
    memory = estimate_performance(decoder, profile, workload, precision).memory
    return max(64 * 2**20, int(profile.usable_bytes - memory.weights.value - memory.cache.value))
