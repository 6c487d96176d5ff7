"""About how long a run will take here: its work, counted by kind, and what of each kind was timed when it was asked.

The constants are counts of work; what this machine does in a second is in rates.py. It runs no stage.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from math import prod
from typing import TYPE_CHECKING

from edgeprune.generate.text import BATCH
from edgeprune.model.decoder import Decoder
from edgeprune.ondevice.durations import timing
from edgeprune.ondevice.runtimes import RUNTIMES
from edgeprune.pipeline.evaluation import ANSWER_TOKENS, PROMPTS, SAMPLE_TOKENS
from edgeprune.pipeline.packing import GENERATED
from edgeprune.pipeline.rates import Rates, probed
from edgeprune.pipeline.robustness import read_tokens
from edgeprune.pipeline.sketch import SAMPLES as SKETCHED
from edgeprune.pruning.effort import ROWS, holds_states

if TYPE_CHECKING:
    from collections.abc import Sequence

    from edgeprune.evaluate.harness import Task
    from edgeprune.model.decoder import Layer
    from edgeprune.pipeline.comparison import ComparedMethod
    from edgeprune.pipeline.formats import WeightChoice
    from edgeprune.pipeline.kind import Kind
    from edgeprune.pipeline.request import Request
    from edgeprune.pipeline.samples import UserSamples
    from edgeprune.pipeline.setup import Setup
    from edgeprune.precision import CacheFormat, WeightFormat
    from edgeprune.profiles import DeviceProfile
    from edgeprune.pruning.effort import Effort

# Passes of calibration tokens through the dense model's layers; a backward pass is two.
CHECK_PASSES = 1  # the check for overflow
SENSITIVITY_PASSES = 4  # forward, forward again layer by layer, and backward
STREAMS = 2  # of a pruning: the dense one and the pruned one
STEP_PASSES = 3  # of a step of a recovery, forward and backward; one more where layers are computed again
PRODUCTS = 4  # of the inputs of a projection with what it should give: two residuals, and their part in its update
HEAD_PASSES = 3  # of the sensitivities: forward and backward
# Factorisations of a matrix of moments: of an update, at the dampings that are tried and at the best one; of a module's
# widths, with the order of the features; of a rounding, tried on held-out samples and done, each with an inverse.
UPDATE_FACTORS, WIDTH_FACTORS, ROUNDING_FACTORS = 5, 6, 4
GRIDS = 2  # a rounding by GPTQ over a choice of its grid
MEASURED_CANDIDATES = 2  # on an engine that measures, whose figures correct the search; an estimate needs one


@dataclass(frozen=True)
class Work:
    """The work of a run: FLOP of passes through layers, of other products, of factorisations in fp64 and of steps of
    generation, weights that are rounded, and seconds of measurements whose duration is set."""

    passes: float = 0.0
    products: float = 0.0
    factors: float = 0.0
    steps: float = 0.0
    weights: float = 0.0
    seconds: float = 0.0

    def __add__(self, other: Work) -> Work:
        return Work(*(getattr(self, field.name) + getattr(other, field.name) for field in fields(Work)))

    def __mul__(self, count: float) -> Work:
        return Work(*(getattr(self, field.name) * count for field in fields(Work)))

    @property
    def flops(self) -> float:
        """Returns the FLOP of all kinds."""
        return self.passes + self.products + self.factors + self.steps

    def at(self, rates: Rates) -> float:
        """Returns the seconds that it takes."""
        of_rates = sum(getattr(self, field.name) / getattr(rates, field.name) for field in fields(Rates))
        return of_rates + self.seconds


def passing(decoder: Decoder, tokens: int, head: bool = False) -> Work:
    """Returns one pass of so many tokens through the layers, and through the head."""
    of_head = 2.0 * tokens * decoder.vocab_size * decoder.hidden_size if head else 0.0
    return Work(passes=2.0 * tokens * _active_parameters(decoder), products=of_head)


def _active_parameters(decoder: Decoder) -> float:
    """Returns the weights of the layers that a token meets: of experts, of its own alone."""
    total = 0.0
    for index, layer in enumerate(decoder.layers):
        experts = layer.mlp.experts if layer.mlp else None
        share = experts.num_experts_per_tok / experts.num_experts if experts else 1.0
        for name, shape in decoder.layer_shapes(index).items():
            if len(shape) == 2:
                total += prod(shape) * (share if ".experts." in name else 1.0)
    return total


def generating(decoder: Decoder, tokens: int) -> Work:
    """Returns the generation of so many tokens, of all sequences together."""
    return Work(steps=passing(decoder, tokens, head=True).flops)


def pruning(decoder: Decoder, tokens: int, rounds: bool = False) -> Work:
    """Returns one pruning of the whole model on so many calibration tokens, whose matrices are rounded too or not."""
    hidden = decoder.hidden_size
    work = passing(decoder, tokens) * STREAMS + _moments(decoder, tokens)
    for layer in decoder.layers:
        for width, share in _inputs(layer):
            # The residuals of both targets, their products with the inputs, and the solution.
            work += Work(products=PRODUCTS * 2.0 * tokens * share * width * hidden, factors=2.0 * width**2 * hidden)
            work += _factoring(width, UPDATE_FACTORS)
    return work + (_rounding(decoder, tokens) if rounds else Work())


def _rounding(decoder: Decoder, tokens: int) -> Work:
    """Returns the rounding of all matrices of the layers by GPTQ, on the moments of what they read."""
    hidden, work = decoder.hidden_size, Work(weights=float(GRIDS * decoder.layer_parameters))
    for index, layer in enumerate(decoder.layers):
        for width, share in _inputs(layer):
            work += Work(products=tokens * share * hidden**2)
            work += _factoring(width, ROUNDING_FACTORS) + _factoring(hidden, ROUNDING_FACTORS)
        shapes = (shape for shape in decoder.layer_shapes(index).values() if len(shape) == 2)
        work += Work(products=float(sum(prod(shape) * shape[1] for shape in shapes)))
    return work


def sensing(
    decoder: Decoder,
    samples: int,
    length: int,
    formats: Sequence[WeightFormat] = (),
    caches: Sequence[CacheFormat] = (),
) -> Work:
    """Returns the measurement of what every cut and every one of these formats loses, with its probes."""
    from edgeprune.search.response import PROBE_HELD_OUT, PROBE_SAMPLES, kinds_of, probed_layers
    from edgeprune.search.response import ROUNDED_SAMPLES as MOST_ROUNDED
    from edgeprune.search.sensitivity import ROUNDED_SAMPLES, SAMPLES

    tokens, few = min(samples, SAMPLES) * length, min(samples, ROUNDED_SAMPLES) * length
    work = passing(decoder, tokens) * SENSITIVITY_PASSES + _moments(decoder, tokens)
    work += Work(products=2.0 * HEAD_PASSES * tokens * decoder.vocab_size * decoder.hidden_size)
    for layer in decoder.layers:
        for width, _ in _inputs(layer):
            work += _factoring(width, WIDTH_FACTORS)
    work += (passing(decoder, few) + Work(weights=float(decoder.layer_parameters))) * len(formats)
    work += passing(decoder, few) * len(caches)
    # The probes: the samples to the last layers, and what is pruned or rounded there.
    pruned, rounded = (min(samples // 2, most) * length for most in (PROBE_SAMPLES, MOST_ROUNDED))
    held_out = PROBE_HELD_OUT * length
    share = len(probed_layers(len(decoder.layers))) / len(decoder.layers)
    work += passing(decoder, pruned + held_out) + pruning(decoder, pruned) * share
    kinds = len(kinds_of(formats))
    # A cache's are the scales' pass and that of the samples that it is compared on, as every probe's.
    compared = held_out * (2 + kinds + len(caches))
    work += passing(decoder, compared + pruned * len(caches)) * share
    return work + pruning(decoder, rounded, rounds=True) * (share * kinds)


def recovering(decoder: Decoder, effort: Effort | None, row_tokens: int) -> Work:
    """Returns one recovery: of each step a pass and its gradients, a row that is drawn and the dense model's pass of
    that."""
    if effort is None or effort.steps is None:
        return Work(seconds=60 * effort.minutes if effort else 0.0)
    tokens = ROWS * row_tokens
    head = Work(products=2.0 * tokens * decoder.vocab_size * decoder.hidden_size * HEAD_PASSES)
    passes = STEP_PASSES + (not holds_states(decoder, rank=None))
    step = passing(decoder, tokens) * passes + head
    return (step + generating(decoder, row_tokens) + passing(decoder, row_tokens)) * effort.steps


def _moments(decoder: Decoder, tokens: int) -> Work:
    """Returns half of the moments of output projections' inputs, which is computed."""
    inputs = (each for layer in decoder.layers for each in _inputs(layer))
    return Work(products=sum(tokens * share * width**2 for width, share in inputs))


def _factoring(width: int, count: int) -> Work:
    return Work(factors=count * width**3 / 3)


def _inputs(layer: Layer) -> list[tuple[int, float]]:
    """Returns the width of each output projection's inputs, and the share of all tokens that it reads."""
    attention, mlp = layer.attention, layer.mlp
    inputs = [(attention.query_size, 1.0)] if attention else []
    if mlp and mlp.experts:
        share = mlp.experts.num_experts_per_tok / mlp.experts.num_experts
        return inputs + [(mlp.intermediate_size, share)] * mlp.experts.num_experts
    return inputs + ([(mlp.intermediate_size, 1.0)] if mlp else [])


@dataclass(frozen=True)
class Samples:
    """The samples of a run: how many there are, how many more the model generates, the tokens of one, and the tokens to
    evaluate on."""

    count: int
    generated: int
    length: int
    evaluated: int

    @property
    def pruned(self) -> int:
        """Returns the tokens that a pruning reads: the user's samples go with as many of the model's own."""
        return (self.count + (self.generated if self.generated == GENERATED else 0)) * self.length


def samples_of(request: Request, given: UserSamples, kind: Kind, decoder: Decoder) -> Samples:
    """Returns the samples of a request before they are drawn."""
    length = kind.sample_length(request, decoder)
    evaluated = sum(len(document) for documents in given.evaluation.values() for document in documents)
    if given.calibration is not None:
        return Samples(len(given.calibration), GENERATED, length, evaluated)
    held_out = 0 if given.evaluation else max(1, request.samples // 4)
    return Samples(request.samples, request.samples + held_out, length, evaluated or held_out * length)


def searching(
    decoder: Decoder,
    samples: Samples,
    formats: Sequence[WeightFormat],
    caches: Sequence[CacheFormat],
    precision: str,
    candidates: int,
) -> Work:
    """Returns the work of a search that prunes so many candidates, whose matrices may get these formats."""
    work = generating(decoder, samples.generated * samples.length)
    work += sensing(decoder, samples.count, samples.length, formats, caches)
    work += passing(decoder, samples.count * samples.length) * (CHECK_PASSES if precision == "fp16" else 0)
    return work + pruning(decoder, samples.pruned, rounds=bool(formats)) * candidates


def evaluating(decoder: Decoder, samples: Samples, writes_text: bool, texts: int = 1) -> Work:
    """Returns the evaluation of one model, and of one that writes text its answers and its reading of odd input.

    texts: that are held out.
    """
    work = passing(decoder, samples.evaluated, head=True)
    if writes_text:
        work += generating(decoder, PROMPTS * ANSWER_TOKENS + SAMPLE_TOKENS)
        work += passing(decoder, read_tokens(max(0, texts - 1)), head=True)
    return work


def fitting(setup: Setup, rungs: int) -> Work:
    """Returns the work of `fit`, or of a ladder of so many rungs; without a search within the quality limit."""
    decoder, measures = setup.model.decoder, setup.engine.measures
    samples = samples_of(setup.request, setup.samples, setup.kind, decoder)
    candidates = rungs * (MEASURED_CANDIDATES if measures else 1)
    formats = setup.weights.quantised, setup.cache.quantised
    work = searching(decoder, samples, *formats, setup.precision, candidates)
    others = setup.request.recover_candidates - 1
    work += recovering(decoder, setup.effort, setup.recovery_tokens) * (rungs + others)
    work += evaluating(decoder, samples, setup.kind.writes_text, len(setup.samples.evaluation)) * (1 + rungs)
    if setup.kind.writes_text:
        work += passing(decoder, min(samples.count, SKETCHED) * samples.length)
    for task in setup.tasks:
        work += passing(decoder, _task_tokens(setup, task), head=True) * (1 + rungs)
    if imaging := setup.kind.imaging:
        work += generating(decoder, imaging.count * samples.length * imaging.sampling.streams) * (1 + rungs)
    if not measures:
        return work + Work(seconds=timing().cross_check_seconds)
    shape = decoder, setup.profile, setup.precision
    return work + measuring(*shape, setup.weights, candidates, setup.engine.one_width)


def fitting_announced(setup: Setup, rungs: int) -> str:
    """Returns the line of a run of `fit`, or of a ladder of so many rungs."""
    samples = samples_of(setup.request, setup.samples, setup.kind, setup.model.decoder)
    told = announced(fitting(setup, rungs), setup.model.decoder, samples.generated)
    builds = setup.engine.builds and RUNTIMES[setup.profile.engine].on_gpu
    return told + ("; builds of engines are not in it" if builds else "")


def _task_tokens(setup: Setup, task: Task) -> int:
    from edgeprune.evaluate.harness import read_tokens
    from edgeprune.model.tokens.tokenizer import load_tokenizer

    return read_tokens(task, load_tokenizer(setup.model.directory), setup.request.questions)


def measuring(
    decoder: Decoder, profile: DeviceProfile, precision: str, weights: WeightChoice, candidates: int, one_width: bool
) -> Work:
    """Returns the measurements of the dense model, of the width table, and of so many candidates.

    one_width: as of the engine that is measured.
    """
    from edgeprune.search.latency_table import design

    durations, shape = timing(), (decoder, precision, profile.channel_multiple)
    points = design(*shape, weights.formats, weights.tables, one_width=one_width)
    return Work(seconds=durations.measure_seconds * (1 + candidates) + durations.survey_seconds * len(points))


def comparing(decoder: Decoder, samples: Samples, methods: Sequence[ComparedMethod], times: int) -> Work:
    """Returns the work of a comparison beside the dense model, of so many rows of each method.

    A method that refits the kept weights reads the model's own samples too; another one has one stream alone.
    """
    from edgeprune.pruning.methods import Recovery

    evaluation = passing(decoder, samples.evaluated, head=True)
    tokens = samples.count * samples.length
    work = generating(decoder, samples.generated * samples.length) + sensing(decoder, samples.count, samples.length)
    work += evaluation
    for compared in methods:
        one = passing(decoder, tokens) + _moments(decoder, tokens)
        if compared.slices:
            one = passing(decoder, tokens) + _components(decoder, tokens)
        elif compared.method.recovery is Recovery.BIAS:
            one += passing(decoder, tokens)  # the stream moves by what the uncut modules give
        elif compared.method.recovery is Recovery.LEAST_SQUARES:
            one = pruning(decoder, samples.pruned, rounds=compared.form is not None)
        work += (one + evaluation) * times
    return work


def _components(decoder: Decoder, tokens: int) -> Work:
    """Returns the moments and the eigenvectors of the stream behind every module, in fp64: half the speed of fp32, and
    about 9 width^3 by LAPACK's divide and conquer."""
    width, modules = decoder.hidden_size, 2 * len(decoder.layers)
    return Work(products=4 * modules * tokens * width**2) + _factoring(width, 27 * modules)


def announced(work: Work, decoder: Decoder, samples: int) -> str:
    """Returns the line that says how long a run will take here. samples: that are generated."""
    rates = probed(decoder, min(samples, BATCH))
    rest = f", and {work.seconds:.0f} s of measurements" if work.seconds else ""
    return (
        f"duration: {in_words(work.at(rates))} here, estimated: {work.flops / 1e12:.2g} TFLOP as were just timed "
        f"({rates.passes / 1e9:.0f} GFLOP/s through a layer, {rates.factors / 1e9:.0f} of factorisations, "
        f"{rates.steps / 1e9:.0f} of generation){rest}"
    )


def in_words(seconds: float) -> str:
    """Returns a rough duration: about 40 s, about 8 minutes, about 2 hours."""
    if seconds < 90:
        return f"about {max(10, round(seconds, -1)):.0f} s"
    minutes = seconds / 60
    return f"about {minutes:.0f} minutes" if minutes < 90 else f"about {minutes / 60:.0f} hours"
