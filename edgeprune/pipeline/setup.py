"""Resolves what the user asked for, and refuses what cannot work before any long work starts."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field, replace
from math import ceil, log10
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgeprune import __version__
from edgeprune.dialects import reason_of
from edgeprune.engine.choose import choose_engine
from edgeprune.engine.engines import Engine
from edgeprune.engine.estimate import check_precision, estimate_floor, estimate_performance
from edgeprune.engine.llamacpp import LlamaCpp, on_llamacpp
from edgeprune.engine.probe import with_figures
from edgeprune.engine.remote import target_of
from edgeprune.engine.work import table_bytes
from edgeprune.errors import BudgetError, InputError
from edgeprune.evaluate.grades import check_metric, scale_of
from edgeprune.evaluate.tasks import check_questions, names_of, title_of
from edgeprune.model.checkpoint.llamagen import Hints
from edgeprune.model.checkpoint.quantization import STORAGES, can_be_packed
from edgeprune.model.decoder import Decoder
from edgeprune.model.export import GGUF, check_exports
from edgeprune.model.gguf.weights import check_in_blocks
from edgeprune.model.load import load_model, load_shape
from edgeprune.model.model import Model
from edgeprune.model.tokens.tokenizer import tokenizer_files
from edgeprune.ondevice.budget import CONSTRAINTS, Budget, format_bytes, format_ms, parse_budget
from edgeprune.ondevice.figures import Performance, Workload
from edgeprune.ondevice.machine import memory_state
from edgeprune.ondevice.runtimes import LLAMA_CPP, RUNTIMES
from edgeprune.pipeline.cache_formats import CacheChoice, cache_choice
from edgeprune.pipeline.formats import WeightChoice, weight_choice, without_formats
from edgeprune.pipeline.kind import Kind, kind_of
from edgeprune.pipeline.output import check_output, check_space
from edgeprune.pipeline.request import DEMO, SELF, Request, check_samples
from edgeprune.pipeline.room import disk_bytes
from edgeprune.pipeline.samples import UserSamples, samples_hash
from edgeprune.pipeline.task_scores import load_tasks
from edgeprune.precision import PRECISIONS
from edgeprune.profiles import DeviceProfile, in_precision, profile_of, with_tensorrt
from edgeprune.pruning.effort import RANK, ROW, STATE_BYTES, Effort, effort_of, needed_bytes
from edgeprune.search.search import MAX_CANDIDATES, RUNG_CANDIDATES

if TYPE_CHECKING:
    from edgeprune.evaluate.harness import Task

DEMO_MEMORY = "60%"
LAYOUTS = ("uniform", "per-layer")
VOCABULARIES = ("full", "samples")
MAX_RUNGS = 8
FILE_ENDINGS = (".gguf", ".pt", ".pth", ".safetensors")  # of a model in one file, which its bundle's name leaves out
FLOOR_ROOM = 0.1  # of the way from a floor to the dense model: what a refused budget is told to try
MOST_RECOVERED = 8  # candidates
LEAST_TOKENS = 300  # of a vocabulary: the bytes and some special tokens


@dataclass(frozen=True)
class Choice:
    """An automatic choice and its reason, for the report."""

    name: str
    value: str
    reason: str


@dataclass(frozen=True)
class Setup:
    """A request with everything resolved."""

    request: Request
    profile: DeviceProfile
    workload: Workload
    precision: str
    engine: Engine
    budget: Budget
    model: Model
    kind: Kind
    samples: UserSamples
    weights: WeightChoice
    cache: CacheChoice
    output: Path
    floor: Performance
    choices: tuple[Choice, ...] = field(default=())
    tasks: tuple[Task, ...] = field(default=())
    recovery_rank: int | None = None  # of what a recovery changes matrices by, where memory is short

    @property
    def length(self) -> int:
        """Returns the tokens of a sample."""
        return self.kind.sample_length(self.request, self.model.decoder)

    @property
    def effort(self) -> Effort | None:
        """Returns the work of a recovery; None where there is none."""
        return effort_of(self.request.recover)

    @property
    def recovery_tokens(self) -> int:
        """Returns the tokens of a row of a recovery: a part of a text's sample, all that is fed of a picture's."""
        return self.model.decoder.most_fed or min(ROW, self.length)

    @property
    def fingerprint(self) -> dict[str, Any]:
        """Returns what makes two runs the same run: the first line of the journal."""
        request = self.request
        # A value that changes what a stage gives stands here; where the bundle goes does not.
        return {
            "edgeprune": __version__,
            "model": self.model.fingerprint,
            "profile": self.profile.model_dump(mode="json"),
            "workload": [self.workload.batch, self.workload.prompt, self.workload.context],
            "precision": self.precision,
            "engine": self.engine.name,
            "target": request.target,
            "rungs": request.rungs,
            "budget": {name: limit.asked for name, limit in self.budget.limits.items()},
            "max_quality_loss": self.budget.max_quality_loss,
            "quality_metric": request.quality_metric,
            "tasks": [[task.name, task.digest] for task in self.tasks],
            "questions": request.questions,
            "max_task_drop": self.budget.max_task_drop,
            "samples": samples_hash(self.samples),
            "sample_count": request.samples,
            "length": self.length,
            "imaging": self.kind.fingerprint,
            "method": request.method,
            "layout": request.layout,
            "vocabulary": request.vocabulary,
            "recover": [request.recover, request.recover_candidates, self.recovery_rank],
            "weights": request.weights,
            "cache": request.cache,
            "seed": request.seed,
        }


def prepare(request: Request, ladder: bool = False, shared: Path | None = None) -> Setup:
    """Resolves a request; writes nothing. Raises InputError for bad input, BudgetError for a budget below the floor.

    ladder: for a frontier, whose rungs have each a budget of their own: none is resolved here. shared: the folder that
    the runs of a fleet share, who measure on one device one after the other.
    """
    if (request.device is None) == (request.profile is None):
        raise InputError("give one of --device and --profile", "`edgeprune devices` lists the devices.")
    # What was asked for, before anything is measured or a device is reached.
    target = target_of(request.target, request.keep_remote, shared)
    named = _named_profile(request)
    _check_quality(request)
    budget, budget_choice = (Budget(), None) if ladder else _budget(request, named)
    output = (request.output or default_output(request.model, named.name, ladder)).absolute()
    check_output(output, request.force, request.resume)
    _check_method(request.method)
    effort = _effort(request)
    _check_choice("layout", request.layout, LAYOUTS)
    _check_choice("vocabulary", request.vocabulary, VOCABULARIES)
    shape = load_shape(request.model, request.hints)[1].with_format(None)
    if named.engine == LLAMA_CPP:
        from edgeprune.model.gguf.metadata import check_family

        check_family(shape)
    kind = kind_of(shape)
    kind.check_options(request, shape)
    _check_numbers(request)
    tasks = _tasks(request)
    # The device, and what is to be measured there.
    profile = with_figures(named)
    workload = kind.workload(request, profile.workload, shape)
    precision = request.precision or profile.precision
    choices = []
    profile = in_precision(profile, precision)
    weight_choice(request.weights, profile, shape)  # refused before a device is asked
    cache_choice(request.cache, profile)
    engine = choose_engine(request.engine, profile, workload, precision, target, request.tensorrt is not None)
    if engine.compiles:
        engine.check_build(shape)  # of the dense model, which is built first
    profile, assumed = engine.profile, profile.tensorrt
    weights = weight_choice(request.weights, profile, shape)
    if not can_be_packed(shape.family) and any(form.storage in STORAGES for form in weights.quantised):
        weights = without_formats(
            weights, f"no checkpoint format holds few bits of {shape.family}'s transposed matrices"
        )
    cache = cache_choice(request.cache, profile)
    choices.append(Choice("weights", weights.names, weights.reason))
    choices.append(Choice("KV cache", cache.names, cache.reason))
    if profile.tensorrt is not None:
        reason = "assumed until the device says another"
        if request.tensorrt or profile.tensorrt != assumed:
            reason = "asked for" if request.tensorrt else f"reported by {target or 'this machine'}"
        choices.append(Choice("TensorRT", profile.tensorrt, reason))
    if RUNTIMES[profile.engine].on_gpu:
        reason = reason_of(profile.dialect, engine.name, profile.tensorrt, precision)
        choices.append(Choice("dialect", profile.dialect, reason))
        for form in cache.quantised:
            other = profile.for_cache(form).dialect
            reason = reason_of(other, engine.name, profile.tensorrt, precision, form.name)
            choices.append(Choice(f"dialect of {form.name} cache", other, reason))
    choices += [
        Choice("engine", engine.name, engine.reason),
        Choice(
            "precision",
            precision,
            "asked for" if request.precision else f"the profile {profile.name} runs {profile.precision}",
        ),
    ]
    choices += [budget_choice] if budget_choice else []
    # The model, after the samples' files were found readable.
    documents = kind.read_documents(request)
    model = load_dense(request.model, request.hints)
    reduced = request.vocabulary != "full"
    if profile.engine == LLAMA_CPP:
        if request.layout != "uniform":
            raise InputError("llama.cpp is measured with layers of one width", "Use --layout uniform.")
        check_exports((GGUF,), model, request.layout, reduced)
        if weights.quantised:
            check_in_blocks(model)
        engine = replace(engine, checkpoint=model.directory) if isinstance(engine, LlamaCpp) else engine
    if model.part_of:
        reason = f"of {model.part_of}: images are left out, and quality with them is not measured"
        choices.append(Choice("model", "the text part", reason))
    if model.dequantised:
        choices.append(
            Choice("checkpoint", "dequantised", f"{model.dequantised}: its quality is what the rises refer to")
        )
    kind = kind.with_model(request, model)
    if workload.context > model.decoder.max_position_embeddings:
        raise InputError(
            f"context {workload.context} exceeds the model's {model.decoder.max_position_embeddings} positions",
            f"Try --context {model.decoder.max_position_embeddings}.",
        )
    check_exports(request.export, model, request.layout, reduced, weights.layers)
    # What the smallest candidate needs, and room on the disk for all that will be written.
    formats = weights, cache
    floor = _check_floor(model, profile, workload, precision, budget, engine.measures, reduced, *formats, kind)
    samples = kind.read_samples(request, model, documents)
    choices.append(_calibration_choice(samples, kind))
    choices += [Choice(source.name, source.taken, source.left_out) for source in samples.sources]
    rank = None
    if effort is not None:
        tokens = model.decoder.most_fed or min(ROW, kind.sample_length(request, model.decoder))
        rank, choice = _recovery_choice(effort, model.decoder, tokens)
        choices.append(choice)
    candidates = (MAX_CANDIDATES if engine.builds else 1) + request.rungs - 1
    candidates = RUNG_CANDIDATES * request.rungs if ladder else candidates
    exports = len(request.export) * request.rungs
    states = 0
    if effort is not None:
        candidates += request.rungs + 2 * (request.recover_candidates - 1)
        states = STATE_BYTES * model.decoder.layer_parameters
    evaluated = sum(len(document) for documents in samples.evaluation.values() for document in documents)
    tokenizer_bytes = sum(path.stat().st_size for path in tokenizer_files(model.directory).values())
    of_engine = candidates, engine.builds, engine.measures, exports, evaluated, tokenizer_bytes
    check_space(output, states + disk_bytes(model.decoder, precision, *of_engine))
    return Setup(
        request,
        profile,
        workload,
        precision,
        engine,
        budget,
        model,
        kind,
        samples,
        weights,
        cache,
        output,
        floor,
        tuple(choices),
        tasks,
        rank,
    )


def with_weights(setup: Setup, weights: WeightChoice) -> Setup:
    """Returns a setup whose search chooses from other weight formats, which its floor and its choices know."""
    deployed = setup.profile, setup.workload, setup.precision
    smallest = _smallest(setup.model.decoder, setup.request.vocabulary != "full", weights)
    named = Choice("weights", weights.names, weights.reason)
    choices = tuple(named if choice.name == named.name else choice for choice in setup.choices)
    return replace(setup, weights=weights, floor=_floor(smallest, setup.cache, *deployed), choices=choices)


def _calibration_choice(samples: UserSamples, kind: Kind) -> Choice:
    if samples.calibration is None:
        return Choice("calibration", SELF, kind.own_samples_reason)
    reason = f"{kind.noun} of the model's own, at the same weight, hold in place what yours do not cover"
    return Choice("calibration", f"{samples.origin}, and generated {kind.noun}", reason)


def _recovery_choice(effort: Effort, decoder: Decoder, row_tokens: int) -> tuple[int | None, Choice]:
    """Returns the rank of what a recovery changes matrices by, None where memory holds the training of whole ones, and
    the choice with its memory. Raises InputError where the machine has too little for either."""
    whole, low = (needed_bytes(decoder, row_tokens, rank) for rank in (None, RANK))
    total = memory_state().get("total", whole)
    if whole <= total:
        return None, Choice("recovery", str(effort), f"asked for; it holds up to about {format_bytes(whole)} in memory")
    if low <= total:
        reason = (
            f"asked for; training whole matrices would hold about {format_bytes(whole)} in memory, this machine has "
            f"{format_bytes(total)}: they are changed by products of rank {RANK}, with about {format_bytes(low)}"
        )
        return RANK, Choice("recovery", str(effort), reason)
    raise InputError(
        f"--recover holds about {format_bytes(low)} in memory, this machine has {format_bytes(total)}",
        "Leave --recover out, or use a machine with more memory.",
    )


def load_dense(spec: str, hints: Hints) -> Model:
    """Returns the model to prune in floats, whatever it is stored in; its shape was loaded before.

    Raises InputError, also for layers of different widths, which the search does not know.
    """
    model = load_model(spec, hints, is_checked=True).as_floats
    groups, _, channels = model.decoder.layer_widths[0]
    if not (model.decoder.is_uniform and groups and channels):
        raise InputError(
            f"the layers of {spec} differ in width: it was pruned before", "Give the model that it was pruned from."
        )
    return model


def _named_profile(request: Request) -> DeviceProfile:
    """Returns the profile, which may still be without figures. Raises InputError for a precision it does not run."""
    named = profile_of(request.device, request.profile)
    if request.engine == LLAMA_CPP:
        named = on_llamacpp(named)
    if named.engine == LLAMA_CPP and request.layout != "uniform":
        raise InputError("llama.cpp cannot run layers of different widths", "Use --layout uniform.")
    named = with_tensorrt(named, request.tensorrt)
    if request.target is not None and request.device is not None and not named.is_probed:
        raise InputError(
            f"the profile {request.device} has no figures of {request.target}",
            "Measure them: python tools/probe_profile.py --target "
            f"{request.target} --output device.toml, then give --profile device.toml.",
        )
    precision = request.precision or named.precision
    if precision not in PRECISIONS:
        raise InputError(f"unknown precision {precision!r}", f"Precisions are: {', '.join(PRECISIONS)}.")
    check_precision(named, precision)
    return named


def _check_method(name: str) -> None:
    from edgeprune.pruning.methods import Recovery, method_named

    if method_named(name).recovery is Recovery.BIAS:
        raise InputError(
            f"the method {name} adds biases that a standard checkpoint has no place for",
            f"Try --method {name}+ls; `edgeprune compare` takes {name} as it is.",
        )


def _check_choice(name: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise InputError(f"unknown {name} {value!r}", f"Give one of: {', '.join(known)}.")


def default_output(model: str, device: str, ladder: bool) -> Path:
    """Returns the folder of a bundle where none was named."""
    path = Path(model)
    stem = (path.stem if path.suffix.lower() in FILE_ENDINGS else path.name) or "model"
    return Path(f"{stem}-{device}{'-frontier' if ladder else ''}")


def _check_numbers(request: Request) -> None:
    """Raises InputError for numbers that no run can have."""
    check_samples(request)
    if not 1 <= request.rungs <= MAX_RUNGS:
        raise InputError(f"--rungs {request.rungs} is not 1 to {MAX_RUNGS}", "A bundle of 3 covers most surprises.")
    for name in ("batch", "prompt", "context"):
        value = getattr(request, name)
        if value is not None and value < 1:
            raise InputError(f"--{name} {value} is less than 1", "Give a positive number.")


def _budget(request: Request, profile: DeviceProfile) -> tuple[Budget, Choice | None]:
    given = (request.memory, request.prefill, request.decode)
    choice = None
    if given == (None, None, None):
        if request.model == DEMO:
            given = (DEMO_MEMORY, None, None)
            choice = Choice("budget", f"memory {DEMO_MEMORY}", "the demo model's budget where none is given")
        else:
            default = profile.budget
            given = (default.memory, default.prefill, default.decode)
            text = ", ".join(f"{name} {value}" for name, value in zip(CONSTRAINTS, given, strict=True))
            choice = Choice("budget", text, f"none was given: the default of {profile.name}")
    broken = scale_of(request.quality_metric).broken
    return parse_budget(*given, request.max_quality_loss, request.max_task_drop, broken), choice


def _effort(request: Request) -> Effort | None:
    """Returns the work of a recovery. Raises InputError, also for candidates that nothing is to train."""
    effort, count = effort_of(request.recover), request.recover_candidates
    if not 1 <= count <= MOST_RECOVERED:
        raise InputError(f"--recover-candidates {count} is not from 1 to {MOST_RECOVERED}", "Try 3.")
    if effort is None and count > 1:
        raise InputError("--recover-candidates without --recover", "Add --recover 20min, or leave it out.")
    return effort


def _check_quality(request: Request) -> None:
    """Raises InputError for a metric and limits on tasks that go with no task that is asked."""
    names = [] if request.tasks is None else [title_of(name) for name in names_of(request.tasks)]
    check_metric(request.quality_metric, names)
    for name in ("questions", "max_task_drop"):
        if request.tasks is None and getattr(request, name) is not None:
            raise InputError(f"--{name.replace('_', '-')} without --tasks", "Add --tasks NAMES, or leave it out.")
    check_questions(request.questions)


def _tasks(request: Request) -> tuple[Task, ...]:
    """Returns the tasks of a request with their questions; a download is told before it begins."""
    if request.tasks is None:
        return ()
    return tuple(load_tasks(request.tasks, logging.getLogger("edgeprune").warning))


def _check_floor(
    model: Model,
    profile: DeviceProfile,
    workload: Workload,
    precision: str,
    budget: Budget,
    measures: bool,
    reduced: bool,
    weights: WeightChoice,
    cache: CacheChoice,
    kind: Kind,
) -> Performance:
    """Refuses a budget that the smallest candidate exceeds; returns that candidate's estimate."""
    dense = estimate_performance(model.decoder, profile, workload, precision)
    smallest = _smallest(model.decoder, reduced, weights)
    floor = _floor(smallest, cache, profile, workload, precision)
    # Latencies that will be measured are refused here only where the estimate leaves no doubt.
    doubt = {"memory": 1.0, "prefill": 0.7, "decode": 0.7} if measures else {}
    for name, limit in budget.absolute(dense).limits.items():
        least = floor.values[name]
        if least * doubt.get(name, 1.0) <= limit:
            continue
        show = format_bytes if name == "memory" else format_ms
        raise BudgetError(
            f"the {name} budget {budget.limits[name].asked} ({show(limit)}) is below the floor {show(least)} of "
            f"{profile.name}, estimated: {_floor_parts(name, floor, smallest, precision)}",
            _floor_remedy(name, least, dense.values[name], kind, reduced),
        )
    return floor


def _floor(
    smallest: Decoder, cache: CacheChoice, profile: DeviceProfile, workload: Workload, precision: str
) -> Performance:
    """Returns the least memory, prefill and decode that any format of the KV cache leaves, each by itself.

    Codes take fewer bytes, but the dialect that has them may hold and copy two caches.
    """
    floors = [estimate_floor(smallest.with_cache(form), profile, workload, precision) for form in cache.formats]
    least = {name: min(floors, key=lambda floor: floor.values[name]) for name in floors[0].values}
    return replace(floors[0], **{name: getattr(floor, name) for name, floor in least.items()})


def _smallest(decoder: Decoder, reduced: bool, weights: WeightChoice) -> Decoder:
    """Returns a Decoder with the fewest bytes in embedding and head; a floor leaves next to nothing of its layers.

    reduced: the vocabulary may be smaller.
    """
    tokens = min(LEAST_TOKENS, decoder.vocab_size) if reduced else decoder.vocab_size
    few = weights.fewest_bits
    return replace(decoder.with_vocabulary(tokens), embedding_format=few, head_format=few)


def _floor_parts(name: str, floor: Performance, decoder: Decoder, precision: str) -> str:
    if name != "memory":
        return "one layer of one head and the fewest channels, the head, the cache and the overhead"
    parts = [f"{part} {format_bytes(figure.value)}" for part, figure in floor.memory.parts.items()]
    return (
        f"{', '.join(parts)} (of the weights, embedding and head are {format_bytes(table_bytes(decoder, precision))})"
    )


def _floor_remedy(name: str, least: float, dense: float, kind: Kind, reduced: bool) -> str:
    """Returns a limit between the floor and the dense model, and what else lowers the floor of a model of this kind."""
    ways = [f"--{name} {_rounded_up(name, least + FLOOR_ROOM * (dense - least))}"] if least < dense else []
    if kind.writes_text:
        ways += [*(() if reduced else ("--vocabulary samples",)), "a shorter --context"]
    show = format_bytes if name == "memory" else format_ms
    return f"Try {''.join(f'{way}, ' for way in ways)}or a smaller model; the dense model has {show(dense)}."


def _rounded_up(name: str, value: float) -> str:
    """Returns a limit as it is written, rounded up by a thousandth at most."""
    number, unit = (value / 2**20, "MiB") if name == "memory" else (value, "ms")
    digits = max(0, 3 - ceil(log10(number)))
    return f"{ceil(number * 10**digits) / 10**digits:.{digits}f}{unit}"
