"""The estimator: memory and latency of a Decoder on a device, from its bytes and FLOPs and the profile's figures.

    decode  = max(bytes / (decode_efficiency x bandwidth), FLOPs / (prefill_efficiency x compute)) + overhead
    prefill = FLOPs / (prefill_efficiency x compute) + weights / bandwidth + tokens x layers x token_overhead + overhead

for one decode step, which is bound by bytes except for large batches, and a prefill. The overhead is a constant, or a
time for each layer: half of it for its attention and half for its MLP.

Pure: it reads no file and measures nothing. Every figure that it returns is an Estimate, whose basis names the points
that it rests on. Efficiency and overhead are fits of published points (published.py), whose runtime updates its KV
cache in place. The copies of the KV cache that graphs of older dialects make are added explicitly, and named in the
basis.
A weight format changes the bytes of a matrix, and the time of reading one and of its products in a prefill, as the
profile says.
"""

from __future__ import annotations

from dataclasses import replace

from edgeprune.engine.onnx.graph import graph_weight_bytes
from edgeprune.engine.overheads import fixed_times, modules_in_layers, overhead_ms
from edgeprune.engine.work import (
    TokenBytes,
    activation_bytes,
    buffer_bytes,
    bytes_per_token,
    cache_bytes,
    decode_flops,
    prefill_flops,
)
from edgeprune.errors import InputError
from edgeprune.model.decoder import Decoder
from edgeprune.ondevice.figures import Estimate, Memory, Performance, Workload
from edgeprune.ondevice.measure import Counted
from edgeprune.precision import PRECISIONS, GraphPrecision
from edgeprune.profiles import DeviceProfile, HardwareFigure

OVERHEADS = ("layer_overhead", "decode_overhead")  # figures of a profile


def estimate_memory(
    decoder: Decoder,
    profile: DeviceProfile,
    workload: Workload,
    precision: GraphPrecision,
    weight_bytes: int | None = None,
) -> Memory:
    """Returns the five parts of the memory in bytes.

    Weights, KV cache and buffers are exact for our graph; activations are those of activation_bytes. weight_bytes: the
    weights as an engine holds them, where known. Raises InputError for a profile without hardware figures.
    """

    def part(value: float, basis: str) -> Estimate:
        return Estimate(value, "bytes", profile.name, basis)

    # Graphs that do not update the KV cache in place hold two buffers of it.
    _require_figures(profile)
    profile = profile.for_cache(decoder.cache_format)
    in_place = profile.in_place
    cache = cache_bytes(decoder, precision, workload, profile.dialect == "onnxruntime")
    return Memory(
        weights=part(
            graph_weight_bytes(decoder, precision, profile.dialect, workload.context),
            "bytes of the graph's initializers",
        )
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


def estimate_performance(
    decoder: Decoder,
    profile: DeviceProfile,
    workload: Workload,
    precision: GraphPrecision,
    weight_bytes: int | None = None,
) -> Performance:
    """Returns memory by part, and prefill and decode in ms, of a model on the profile's device.

    Its notes name the figures of low confidence. weight_bytes: the weights as an engine holds them, where known.
    Raises InputError for a profile without hardware figures or without a rate for this precision.
    """
    # Prefill: its parts add up.
    _require_figures(profile)
    profile = profile.for_cache(decoder.cache_format)
    prefill = prefill_parts(decoder, profile, workload, precision)
    flops = prefill_flops(decoder, workload, dialect=profile.dialect, routes=profile.routes)
    counted_flops = _counted_flops(decoder, workload, profile)
    dequantising = f" ({counted_flops / flops:.3g} x for its formats)" if counted_flops != flops else ""
    computing = f"GFLOP{{}} / {_flops_per_second(profile, precision)[1]}"
    moved = bytes_per_token(decoder, precision, workload, profile.in_place, routes=profile.routes)
    read = _prefill_bytes(decoder, profile, workload, precision)
    bandwidth, efficiency = profile.bandwidth, profile.decode_efficiency
    prefill_basis = (
        f"{flops / 1e9:.4g} {computing.format(dequantising)} + {read / 1e6:.4g} MB / "
        f"{bandwidth.value:g} {bandwidth.unit}{_in_words(prefill)}; "
        f"{_rests_on(decoder, profile, 'prefill_efficiency', 'token_overhead', 'prefill_overhead', *OVERHEADS)}"
    )
    # Decode: the slower resource binds.
    step = decode_parts(decoder, profile, workload, precision)
    counted_more = _moved(decoder, profile, workload, precision, profile.in_place).total
    formats = f" ({counted_more / moved.total:.3g} x for its weight formats)" if counted_more != moved.total else ""
    copied = f", {moved.cache_copies / 1e6:.4g} MB of it our graph's copy of the cache," if moved.cache_copies else ""
    decode_basis = (
        f"{moved.total / 1e6:.4g} MB per step{copied}{formats} / ({bandwidth.value:g} {bandwidth.unit} x "
        f"{efficiency.value:g}){_in_words(step)}; "
        f"{_rests_on(decoder, profile, 'decode_efficiency', *OVERHEADS)}"
    )
    if step["compute"]:
        decode = decode_flops(decoder, workload, profile.routes)
        decode_basis = (
            f"bound by compute: {decode / 1e9:.4g} {computing.format('')}{_in_words(step)}; "
            f"{_rests_on(decoder, profile, 'prefill_efficiency', *OVERHEADS)}"
        )
    return Performance(
        memory=estimate_memory(decoder, profile, workload, precision, weight_bytes),
        prefill=Estimate(sum(prefill.values()), "ms", profile.name, prefill_basis),
        decode=Estimate(sum(step.values()), "ms", profile.name, decode_basis),
        notes=(*low_confidence_notes(profile), *_untimed_notes(decoder, profile)),
    )


def _counted_flops(decoder: Decoder, workload: Workload, profile: DeviceProfile) -> float:
    """Returns the FLOPs of a prefill on a device, where products and attention in formats count more."""
    of_cache = profile.cache_prefill_factor(decoder.cache_format)
    return prefill_flops(decoder, workload, profile.prefill_factor, profile.dialect, of_cache, profile.routes)


def _prefill_bytes(decoder: Decoder, profile: DeviceProfile, workload: Workload, precision: GraphPrecision) -> float:
    """Returns the bytes of the weights that a prefill reads."""
    tokens = replace(workload, batch=workload.batch * workload.prompt)  # whose experts it reads
    step = bytes_per_token(decoder, precision, tokens, routes=profile.routes)
    return step.layers + step.head


def _moved(
    decoder: Decoder, profile: DeviceProfile, workload: Workload, precision: GraphPrecision, in_place: bool
) -> TokenBytes:
    """Returns the bytes of a decode step, of which those in a format count more."""
    return bytes_per_token(decoder, precision, workload, in_place, profile.decode_factor, profile.routes)


def _in_words(parts: dict[str, float]) -> str:
    """Returns the parts of a latency that are not of bytes or FLOPs, as a sum in ms."""
    tokens = f" + {parts['tokens']:.3g} ms for its tokens" if parts.get("tokens") else ""
    return f"{tokens} + {parts['overhead']:.3g} ms"


def _rests_on(decoder: Decoder, profile: DeviceProfile, *names: str) -> str:
    """Returns the sources of figures of a profile, and of those that the decoder's weight formats have of their own."""
    figures = [getattr(profile, name) for name in names]
    forms = (*decoder.weight_formats.values(), decoder.head_format)
    figures += [profile.figure_of(names[0], form) for form in dict.fromkeys(forms)]
    return f"rests on: {'; '.join(dict.fromkeys(figure.source for figure in figures if figure is not None))}"


def low_confidence_notes(profile: DeviceProfile) -> tuple[str, ...]:
    """Returns a note for each figure of a profile that its estimates rest on and that is hardly known."""
    return tuple(
        f"{name} of {profile.name} is of low confidence: {figure.source}"
        for name, figure in profile.figures.items()
        if figure.confidence == "low"
    )


def _untimed_notes(decoder: Decoder, profile: DeviceProfile) -> tuple[str, ...]:
    """Returns a note for each weight format of a decoder whose speed on the device is assumed."""
    return tuple(
        f"the speed of {name} is estimated from its bytes and products alone: nobody timed it on {profile.name}"
        for name in profile.untimed(decoder.weight_formats.values())
    )


def resource_times(
    decoder: Decoder, profile: DeviceProfile, workload: Workload, precision: GraphPrecision
) -> dict[str, dict[str, float]]:
    """Returns the ms that each resource alone would take, by prefill or decode and by resource.

    The slower resource binds a decode step; the times of a prefill add up. The time of each adds up over the modules of
    a model: what scales with nothing is left out (fixed_times). Raises InputError as estimate_performance does.
    """
    _require_figures(profile)
    profile = profile.for_cache(decoder.cache_format)
    moved = _moved(decoder, profile, workload, precision, profile.in_place).total
    compute = decode_flops(decoder, workload, profile.routes) / _flops_per_second(profile, precision)[0]
    layers = overhead_ms(decoder, profile) - fixed_times(profile)["decode"]
    prefill = sum(prefill_parts(decoder, profile, workload, precision).values()) - fixed_times(profile)["prefill"]
    return {
        "prefill": {"all": prefill},
        "decode": {"compute": 1e3 * compute + layers, "bytes": 1e3 * moved / _bytes_per_second(profile) + layers},
    }


def prefill_parts(
    decoder: Decoder, profile: DeviceProfile, workload: Workload, precision: GraphPrecision
) -> dict[str, float]:
    """Returns the estimated ms of each part of a prefill: compute, weights, tokens, overhead.

    weights: reading them once; tokens: what each costs in each layer beside products. Raises InputError as
    estimate_performance does.
    """
    _require_figures(profile)
    profile = profile.for_cache(decoder.cache_format)
    tokens = workload.batch * workload.prompt
    fixed, of_token = fixed_times(profile), profile.token_overhead.si if profile.token_overhead else 0.0
    return {
        "compute": 1e3 * _counted_flops(decoder, workload, profile) / _flops_per_second(profile, precision)[0],
        "weights": 1e3 * _prefill_bytes(decoder, profile, workload, precision) / profile.bandwidth.si,
        "tokens": 1e3 * tokens * modules_in_layers(decoder) * of_token,
        "overhead": overhead_ms(decoder, profile) + fixed["prefill"] - fixed["decode"],
    }


def latency_shares(
    decoder: Decoder, profile: DeviceProfile, workload: Workload, precision: GraphPrecision
) -> dict[str, float]:
    """Returns the estimated decode ms by part; pruning widths removes neither `head_and_embedding` nor `overhead`."""
    parts = decode_parts(decoder, profile, workload, precision)
    return {
        "layers": parts["layers"] + parts["compute"],
        "head_and_embedding": parts["head"],
        "cache": parts["cache"] + parts["cache_copies"],
        "overhead": parts["overhead"],
    }


def decode_parts(
    decoder: Decoder,
    profile: DeviceProfile,
    workload: Workload,
    precision: GraphPrecision,
    in_place: bool | None = None,
) -> dict[str, float]:
    """Returns the estimated decode ms of each part of TokenBytes, of compute beyond these, and of the overhead.

    in_place: the KV cache is updated in place, as in the runtime of the published points; by default as our graph does.
    Raises InputError as estimate_performance does.
    """
    _require_figures(profile)
    profile = profile.for_cache(decoder.cache_format)
    in_place = profile.in_place if in_place is None else in_place
    moved = _moved(decoder, profile, workload, precision, in_place)
    parts = {name: 1e3 * value / _bytes_per_second(profile) for name, value in vars(moved).items()}
    compute = 1e3 * decode_flops(decoder, workload, profile.routes) / _flops_per_second(profile, precision)[0]
    return parts | {"compute": max(0.0, compute - sum(parts.values())), "overhead": overhead_ms(decoder, profile)}


def floor_decoder(dense: Decoder, channel_multiple: int) -> Decoder:
    """Returns the smallest candidate: one layer, with one group of one head and one multiple of channels."""
    narrowest = min((layer.mlp.intermediate_size for layer in dense.layers if layer.mlp), default=channel_multiple)
    return replace(dense, layers=dense.layers[:1]).with_widths(1, 1, min(channel_multiple, narrowest))


def estimate_floor(
    dense: Decoder, profile: DeviceProfile, workload: Workload, precision: GraphPrecision
) -> Performance:
    """Returns the performance of the smallest candidate, which no pruning goes below.

    Embeddings, head and overhead dominate it. Raises InputError as estimate_performance does.
    """
    return estimate_performance(floor_decoder(dense, profile.channel_multiple), profile, workload, precision)


def _bytes_per_second(profile: DeviceProfile) -> float:
    return profile.bandwidth.si * profile.decode_efficiency.si


def _flops_per_second(profile: DeviceProfile, precision: GraphPrecision) -> tuple[float, str]:
    """Returns the rate that prefill reaches, and its terms in words; raises InputError where the profile has none."""
    efficiency = profile.prefill_efficiency.value
    figure = _rate_of(profile, precision)
    if figure is not None:
        of_fp16 = " of fp16, which is bf16's too," if precision == "bf16" else ""
        return figure.si * efficiency, f"({figure.value:g} {figure.unit}{of_fp16} x {efficiency:g})"
    if precision == "fp32" and profile.fp16_compute is not None:
        # TensorRT computes fp32 products in TF32 by default, at half of fp16's rate on tensor cores.
        halved = f"({profile.fp16_compute.value:g} {profile.fp16_compute.unit} / 2 as TF32 x {efficiency:g})"
        return profile.fp16_compute.si * efficiency / 2, halved
    raise _no_rate(profile, precision)


def check_precision(profile: DeviceProfile, precision: str) -> GraphPrecision:
    """Returns a precision that is checked against the profile, which need not have hardware figures.

    Raises InputError for an unknown precision, for one that the device lacks, and for one without a rate.
    """
    if precision not in PRECISIONS:
        raise InputError(f"unknown precision {precision!r}", f"Precisions are: {', '.join(PRECISIONS)}.")
    if not computes_in(profile, precision):
        lacking = f"SM {profile.sm}" if profile.sm else "ONNX Runtime on a processor"
        other = "fp32" if profile.sm is None else "fp16"
        raise InputError(
            f"{profile.name} has no {precision}: {lacking} computes no product in it", f"Use --precision {other}."
        )
    if profile.engine == "llama.cpp" and precision == "fp32":
        raise InputError(
            "llama.cpp keeps its KV cache in fp16, and floats in 16 bits",
            "Use --precision fp16 or bf16, or leave it out.",
        )
    is_measured_later = profile.engine == "llama.cpp" and not profile.is_probed
    if (
        PRECISIONS[precision].compute == "fp16_compute"
        and _rate_of(profile, precision) is None
        and not is_measured_later
    ):
        raise _no_rate(profile, precision)
    return precision


def _rate_of(profile: DeviceProfile, precision: str) -> HardwareFigure | None:
    """Returns the rate of products in a precision; llama.cpp computes on a processor at fp32's, whatever it reads."""
    of_fp32 = profile.engine == "llama.cpp" and profile.on_processor
    return getattr(profile, "fp32_compute" if of_fp32 else PRECISIONS[precision].compute)


def computes_in(profile: DeviceProfile, precision: str) -> bool:
    """Returns whether the device's engine has products in a precision."""
    least = PRECISIONS[precision].least_sm
    if profile.engine == "llama.cpp" and profile.on_processor:
        return True
    return least is None or (profile.engine != "onnxruntime" and profile.sm is not None and profile.sm >= least)


def _no_rate(profile: DeviceProfile, precision: str) -> InputError:
    """Returns the error for a precision without a compute rate."""
    return InputError(
        f"the profile {profile.name} has no fp16 compute rate, which {precision} needs",
        f"Use --precision {profile.precision}, or add fp16_compute to a profile of your own.",
    )


def _require_figures(profile: DeviceProfile) -> None:
    """Raises InputError for a profile without hardware figures."""
    if not profile.is_probed:
        raise InputError(
            f"the profile {profile.name} has no hardware figures to estimate from",
            "Measure them first (--device cpu does so on first use), or add them to the profile.",
        )


def counted(decoder: Decoder, precision: str, workload: Workload) -> Counted:
    """Returns the bytes that ONNX Runtime's graph holds, with its KV cache updated in place."""
    return Counted(
        weights=graph_weight_bytes(decoder, precision, "onnxruntime", workload.context),
        cache=cache_bytes(decoder, precision, workload, padded=True),
        buffers=buffer_bytes(decoder, precision, workload, "onnxruntime"),
    )


def workspace_bytes(decoder: Decoder, profile: DeviceProfile, workload: Workload, precision: str) -> int:
    """Returns the bytes of scratch memory that are left for one kernel: the usable ones less weights and KV cache."""
    memory = estimate_performance(decoder, profile, workload, precision).memory
    return max(64 * 2**20, int(profile.usable_bytes - memory.weights.value - memory.cache.value))
