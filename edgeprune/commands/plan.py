"""plan(): estimates of what a model's shape needs and reaches on a device, or on all of them, without its weights.

Everything here is estimated; the figures name the points that they rest on.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import ceil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgeprune.commands.result import Result
from edgeprune.dialects import reason_of
from edgeprune.engine.build_memory import build_limit, build_memory, note_of_build
from edgeprune.engine.choose import check_engine
from edgeprune.engine.estimate import check_precision, decode_parts, estimate_memory, estimate_performance
from edgeprune.engine.llamacpp import on_llamacpp
from edgeprune.engine.probe import with_figures
from edgeprune.engine.work import bytes_per_token, decode_flops, prefill_flops
from edgeprune.errors import InputError
from edgeprune.files import at_home
from edgeprune.model.checkpoint.llamagen import Hints
from edgeprune.model.decoder import Decoder
from edgeprune.model.load import load_outline
from edgeprune.ondevice.build_room import can_build
from edgeprune.ondevice.figures import Performance, Workload
from edgeprune.ondevice.runtimes import LLAMA_CPP, RUNTIMES
from edgeprune.pipeline.cache_formats import cache_choice
from edgeprune.pipeline.formats import FLOAT, weight_choice
from edgeprune.precision import GraphPrecision
from edgeprune.profiles import DeviceProfile, in_precision, list_profiles, profile_of, with_tensorrt

if TYPE_CHECKING:
    from edgeprune.pipeline.outlook import Outlook

MOST = 2**31 - 1  # tokens or sequences; beyond any device


@dataclass(frozen=True)
class Question:
    """In the words of the command line; None: the profile's default. past: tokens in the cache before a step."""

    model: str
    device: str | None = None
    profile: Path | None = None
    precision: str | None = None
    weights: str = FLOAT
    cache: str = FLOAT
    tensorrt: str | None = None
    prompt: int | None = None
    past: int | None = None
    batch: int | None = None
    engine: str = "auto"
    hints: Hints = Hints()


@dataclass(frozen=True)
class Plan:
    """One model's shape on one device.

    weights: the name of the format of its layers' matrices; cache: that of the KV cache; decode_parts: ms by layers,
    head, cache, cache_copies, compute, overhead; attended: the workload with the context that a step attends to, which
    is the cache's capacity where the engine updates it in place; build_bytes: that building the engine takes, None for
    one that builds none; decode_in_place_ms: what a runtime would reach that keeps its cache in place, as that of the
    points does; outlook: what a fit takes of this machine, where that was asked.
    """

    model: str
    decoder: Decoder
    profile: DeviceProfile
    precision: GraphPrecision
    weights: str
    cache: str
    workload: Workload
    attended: Workload
    performance: Performance
    build_bytes: float | None
    decode_parts: dict[str, float]
    decode_in_place_ms: float
    notes: tuple[str, ...]
    outlook: Outlook | None = None

    @property
    def past(self) -> int:
        return self.workload.context - 1

    @property
    def fits(self) -> bool:
        return self.performance.memory.total <= self.profile.available_bytes

    @property
    def dialect_reason(self) -> str:
        """Returns why the graph's dialect is assumed, in words."""
        cache = None if self.cache == FLOAT else self.cache
        return reason_of(self.profile.dialect, self.profile.engine, self.profile.tensorrt, self.precision, cache)

    @property
    def builds(self) -> bool | None:
        """Returns whether the device has the memory to build the engine; None where no profile tells."""
        limit = build_limit(self.profile)
        return None if self.build_bytes is None or limit is None else can_build(self.build_bytes, limit)

    @property
    def work(self) -> dict[str, float]:
        """Returns bytes and FLOPs of one decode step, as our graph moves them and in place, and of the prefill."""
        routes = self.profile.routes
        ours, in_place = (
            bytes_per_token(self.decoder, self.precision, self.attended, flag, routes=routes) for flag in (False, True)
        )
        moved = in_place if self.profile.in_place else ours
        return {
            "decode_bytes": moved.total,
            "decode_bytes_in_place": in_place.total,
            "decode_flops": decode_flops(self.decoder, self.attended, routes),
            "prefill_bytes": in_place.layers + in_place.head,
            "prefill_flops": prefill_flops(self.decoder, self.attended, dialect=self.profile.dialect, routes=routes),
        }

    def as_json(self) -> dict[str, Any]:
        """Returns bytes and ms, total and by part, and what each figure rests on."""
        # Whole bytes by part, so that the total is their sum.
        performance = self.performance
        memory = performance.memory.parts
        memory_bytes = {name: ceil(part.value) for name, part in memory.items()}
        return {
            "model": self.model,
            "parameters": self.decoder.parameters,
            "device": self.profile.name,
            "dialect": self.profile.dialect,
            "precision": self.precision,
            "weights": self.weights,
            "cache": self.cache,
            "batch": self.workload.batch,
            "prompt": self.workload.prompt,
            "past": self.past,
            "source": "estimated",
            "memory_bytes": sum(memory_bytes.values()),
            "available_bytes": int(self.profile.available_bytes),
            "fits": self.fits,
            "build_bytes": None if self.build_bytes is None else ceil(self.build_bytes),
            "build_available_bytes": None if self.builds is None else build_limit(self.profile),
            "builds": self.builds,
            "prefill_ms": performance.prefill.value,
            "decode_ms": performance.decode.value,
            "decode_in_place_ms": self.decode_in_place_ms,
            "work": self.work,
            "parts": {"memory_bytes": memory_bytes, "decode_ms": self.decode_parts},
            "basis": {f"memory.{name}": part.basis for name, part in memory.items()}
            | {
                "prefill": performance.prefill.basis,
                "decode": performance.decode.basis,
                "dialect": self.dialect_reason,
            },
            "notes": [*self.notes, *performance.notes],
        } | ({} if self.outlook is None else {"fit": self.outlook.as_json()})


def plan(
    model: str | Path,
    *,
    device: str | None = None,
    profile: str | Path | None = None,
    precision: str | None = None,
    weights: str = FLOAT,
    cache: str = FLOAT,
    tensorrt: str | None = None,
    prompt: int | None = None,
    past: int | None = None,
    batch: int | None = None,
    engine: str = "auto",
    image_size: int | None = None,
    num_heads: int | None = None,
    work: bool = False,
) -> Result[list[Plan]]:
    """Estimates what a model's shape needs and reaches: on the one device that is named, or on all of them.

    model: a config.json, or a model as of fit, of which no weight is read. past: tokens in the cache before a step.
    weights: the format of the layers' matrices; embedding and head are floats. cache: that of the KV cache. engine:
    the device's own, or llama.cpp. work: also what a fit for the one device takes of this machine. Raises InputError.
    """
    file = None if profile is None else Path(at_home(profile))
    hints = Hints(image_size, num_heads)
    of_device = precision, weights, cache, tensorrt, prompt, past, batch, engine
    question = Question(str(model), device, file, *of_device, hints)
    is_one = device is not None or profile is not None
    if work and not is_one:
        raise InputError("--work is of one device", "Name it: --device jetson-orin.")
    plans = [plan_one(question)] if is_one else plan_all(question)
    if work:
        plans = [replace(one, outlook=_outlook(one)) for one in plans]
    return Result(None, plans)


def _outlook(planned: Plan) -> Outlook:
    """Returns what a fit of the planned model takes of this machine."""
    from edgeprune.pipeline.outlook import outlook

    return outlook(planned.decoder.with_format(None).with_cache(None), planned.profile, planned.precision)


def plan_one(question: Question) -> Plan:
    """Returns the plan for the one device that was named. Raises InputError."""
    _check(question)
    profile = with_tensorrt(_with_engine(question, profile_of(question.device, question.profile)), question.tensorrt)
    check_precision(profile, question.precision or profile.precision)  # before a probe takes its time
    model, decoder, notes = load_outline(question.model, question.hints)
    return _on(question, with_figures(profile), model, decoder, notes)


def plan_all(question: Question) -> list[Plan]:
    """Returns a plan for every shipped device with hardware figures: all but this machine's processor."""
    _check(question)
    profiles = [profile for profile in list_profiles() if profile.is_probed]
    if question.engine == LLAMA_CPP:
        profiles = [on_llamacpp(profile) for profile in profiles]
    elif question.engine != "auto":
        raise InputError(f"--engine {question.engine} is of one device", "Name it: --device jetson-orin.")
    if question.tensorrt is not None:
        raise InputError("--tensorrt is of one device", "Name it: --device jetson-orin.")
    for profile in profiles:
        check_precision(profile, question.precision or profile.precision)
    model, decoder, notes = load_outline(question.model, question.hints)
    return [_on(question, profile, model, decoder, notes) for profile in profiles]


def _with_engine(question: Question, profile: DeviceProfile) -> DeviceProfile:
    """Returns the profile with the engine that was asked for. Raises InputError where it is not the device's."""
    profile = on_llamacpp(profile) if question.engine == LLAMA_CPP else profile
    check_engine(question.engine, profile, has_target=False)
    return profile


def _check(question: Question) -> None:
    for name in ("batch", "prompt", "past"):
        value = getattr(question, name)
        if value is not None and value < 1:
            raise InputError(f"--{name} {value} is less than 1", "Give a positive number.")
        if value is not None and value > MOST:
            raise InputError(f"--{name} is more than {MOST}", "Give a number that a device could hold.")


def _on(question: Question, profile: DeviceProfile, model: str, decoder: Decoder, left_out: tuple[str, ...]) -> Plan:
    """Returns the plan for one device. left_out: in words, what of the model is not in its decoder."""
    precision = check_precision(profile, question.precision or profile.precision)
    if profile.engine == LLAMA_CPP:
        from edgeprune.model.gguf.metadata import check_family

        check_family(decoder)
    profile = in_precision(profile, precision)
    formats = weight_choice(question.weights, profile, decoder).layers
    if len(formats) > 1:
        raise InputError(f"--weights {question.weights} names several formats", "A plan is of one: --weights int4.")
    caches = cache_choice(question.cache, profile).formats
    if len(caches) > 1:
        raise InputError(f"--cache {question.cache} names several formats", "A plan is of one: --cache int8.")
    decoder, profile = decoder.with_format(formats[0]).with_cache(caches[0]), profile.for_cache(caches[0])
    asked = _workload(question, profile, decoder)
    held = replace(asked, context=max(asked.prompt + 1, asked.context))  # the cache has room for the prompt
    attended = held if profile.dialect == "opset24" else asked
    performance = estimate_performance(decoder, profile, attended, precision)
    on_gpu = RUNTIMES[profile.engine].on_gpu
    note = note_of_build(decoder, profile, held, precision) if on_gpu else None
    return Plan(
        model,
        decoder,
        profile,
        precision,
        formats[0].name if formats[0] else FLOAT,
        caches[0].name if caches[0] else FLOAT,
        asked,
        attended,
        replace(performance, memory=estimate_memory(decoder, profile, held, precision)),
        build_memory(decoder, profile, held, precision).total if on_gpu else None,
        decode_parts(decoder, profile, attended, precision),
        sum(decode_parts(decoder, profile, attended, precision, in_place=True).values()),
        (*left_out, *_notes(decoder, held), *([note] if note else [])),
    )


def _workload(question: Question, profile: DeviceProfile, decoder: Decoder) -> Workload:
    """Returns the workload: where left out, the profile's batch, prompt and context, as far as the model has positions
    for them; of an image generator a whole picture, and with it the stream that guides it."""
    default, positions = profile.workload, decoder.max_position_embeddings
    if (picture := decoder.picture) is not None:
        if question.prompt or question.past:
            raise InputError(
                f"{question.model} draws pictures of {picture.tokens} tokens", "Leave --prompt and --past out."
            )
        streams = 2 if picture.is_guided else 1
        return Workload((question.batch or default.batch) * streams, 1, picture.tokens)
    prompt = question.prompt or min(default.prompt, question.past or max(1, positions // 2))
    past = question.past or max(prompt, min(default.context, positions) - 1)
    return Workload(question.batch or default.batch, prompt, past + 1)


def _notes(decoder: Decoder, held: Workload) -> Sequence[str]:
    notes = []
    if form := next(iter(decoder.weight_formats.values()), None):
        group = f"for each group of {form.group} inputs" if form.group else "for each output"
        group = f"and a minimum {group}" if form.offset == "minimum" else group
        bits = f"{'' if form.levels == 'whole' else 'floats of '}{form.bits} bits"
        scales = f"a scale for each {form.group} of a token" if form.e4m3_scales else "one scale"
        read = f", what they read in {form.activations} with {scales}" if form.activation_bits else ""
        notes.append(f"{form.name}: the layers' matrices in {bits} with a scale {group}{read}; all else floats")
    if held.context > decoder.max_position_embeddings:
        notes.append(f"{held.context} tokens are more than the model's {decoder.max_position_embeddings} positions")
    return notes
