"""About how long a run will take here: its work, counted in passes of the dense model, and two timed products.

The constants are counts of work; what this machine does in a second is timed when it is asked. It runs no stage.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from edgeprune.generate.text import BATCH
from edgeprune.model.decoder import Decoder, Layer
from edgeprune.ondevice.durations import timing
from edgeprune.pipeline.evaluation import ANSWER_TOKENS, PROMPTS, SAMPLE_TOKENS
from edgeprune.pipeline.packing import GENERATED

if TYPE_CHECKING:
    from collections.abc import Callable

    from edgeprune.pipeline.kind import Kind
    from edgeprune.pipeline.request import Request
    from edgeprune.pipeline.samples import UserSamples
    from edgeprune.pipeline.setup import Setup

# Passes of calibration tokens through the dense model's layers; a backward pass is two.
CHECK_PASSES = 1  # the check for overflow
SENSITIVITY_PASSES = 5  # forward, forward again layer by layer, backward, and what rounding changes
PRUNE_PASSES = 3  # the dense stream, the pruned one, and the products of both that the update is solved with
PROBE_PASSES = 2  # of the same samples: to the last fifth of the layers, and twice two streams through that
CUBES = 1  # products of three widths for a module: two factors, an inverse and what it is downdated by, in fp64
FP64 = 2  # its work over that of fp32
MEASURED_CANDIDATES = 2  # on an engine that measures, whose figures correct the search; an estimate needs one
# The probe.
PROBE_ROWS, PROBE_WIDTH = 1024, 2048


@dataclass(frozen=True)
class Rates:
    """This machine's FLOP/s: of products of many tokens, and of a step of generation for so few sequences at once."""

    many: float
    few: float


@dataclass(frozen=True)
class Work:
    """The work of a run: FLOP in passes of many tokens, FLOP in steps of generation, and seconds of measurements whose
    duration is set."""

    passes: float = 0.0
    steps: float = 0.0
    seconds: float = 0.0

    def __add__(self, other: Work) -> Work:
        return Work(self.passes + other.passes, self.steps + other.steps, self.seconds + other.seconds)

    def __mul__(self, count: float) -> Work:
        return Work(self.passes * count, self.steps * count, self.seconds * count)

    def at(self, rates: Rates) -> float:
        """Returns the seconds that it takes."""
        return self.passes / rates.many + self.steps / rates.few + self.seconds


def passing(decoder: Decoder, tokens: int, head: bool = False) -> Work:
    """Returns one pass of so many tokens through the layers, and through the head."""
    weights = decoder.layer_parameters + (decoder.vocab_size * decoder.hidden_size if head else 0)
    return Work(passes=2.0 * tokens * weights)


def generating(decoder: Decoder, tokens: int) -> Work:
    """Returns the generation of so many tokens, of all sequences together."""
    return Work(steps=passing(decoder, tokens, head=True).passes)


def pruning(decoder: Decoder, tokens: int) -> Work:
    """Returns one pruning of the whole model on so many calibration tokens."""
    return passing(decoder, tokens) * PRUNE_PASSES + _moments(decoder, tokens)


def sensing(decoder: Decoder, samples: int, length: int) -> Work:
    """Returns the measurement of what every cut loses, with its probes."""
    from edgeprune.search.sensitivity import SAMPLES

    tokens = min(samples, SAMPLES) * length
    head = passing(decoder, tokens, head=True) + passing(decoder, tokens) * -1
    return passing(decoder, tokens) * (SENSITIVITY_PASSES + PROBE_PASSES) + head * 3 + _moments(decoder, tokens)


def _moments(decoder: Decoder, tokens: int, are_solved: bool = True) -> Work:
    """Returns half of the moments of output projections' inputs, which is computed, and what is solved with them."""
    widths = [width for layer in decoder.layers for width in _input_widths(layer)]
    cubes = 2.0 * FP64 * CUBES * sum(width**3 for width in widths) if are_solved else 0.0
    return Work(passes=cubes + tokens * sum(width**2 for width in widths))


def _input_widths(layer: Layer) -> list[int]:
    attention, mlp = layer.attention, layer.mlp
    widths = [attention.query_size] if attention else []
    return widths + ([mlp.intermediate_size] * (mlp.experts.num_experts if mlp.experts else 1) if mlp else [])


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


def fitting(setup: Setup, rungs: int) -> Work:
    """Returns the work of `fit`, or of a ladder of so many rungs; without a search within the quality limit."""
    decoder, measures = setup.model.decoder, setup.engine.measures
    samples = samples_of(setup.request, setup.samples, setup.kind, decoder)
    tokens = samples.count * samples.length
    candidates = rungs * (MEASURED_CANDIDATES if measures else 1)
    work = generating(decoder, samples.generated * samples.length) + sensing(decoder, samples.count, samples.length)
    work += passing(decoder, tokens) * (CHECK_PASSES if setup.precision == "fp16" else 0)
    work += pruning(decoder, samples.pruned) * candidates
    # The dense model and every rung are evaluated.
    answers = generating(decoder, PROMPTS * ANSWER_TOKENS + SAMPLE_TOKENS) if setup.kind.writes_text else Work()
    work += (passing(decoder, samples.evaluated, head=True) + answers) * (1 + rungs)
    if imaging := setup.kind.imaging:
        work += generating(decoder, imaging.count * samples.length * imaging.sampling.streams) * (1 + rungs)
    return work + Work(seconds=_measured_seconds(setup, candidates))


def fitting_announced(setup: Setup, rungs: int) -> str:
    """Returns the line of a run of `fit`, or of a ladder of so many rungs."""
    samples = samples_of(setup.request, setup.samples, setup.kind, setup.model.decoder)
    return announced(fitting(setup, rungs), setup.model.decoder, samples.generated)


def _measured_seconds(setup: Setup, candidates: int) -> float:
    """Returns the seconds of all measurements: of the dense model, the width table and the candidates, or a
    cross-check."""
    from edgeprune.search.latency_table import design

    durations = timing()
    if not setup.engine.measures:
        return durations.cross_check_seconds
    weights = setup.weights
    shape = setup.model.decoder, setup.precision, setup.profile.channel_multiple
    points = design(*shape, weights.formats, weights.tables)
    return durations.measure_seconds * (1 + candidates) + durations.survey_seconds * len(points)


def comparing(decoder: Decoder, samples: Samples, compensated: int, plain: int) -> Work:
    """Returns the work of a comparison beside the dense model: so many rows whose kept weights are refitted, on the
    model's own samples too, and so many with one stream alone."""
    evaluation = passing(decoder, samples.evaluated, head=True)
    work = generating(decoder, samples.generated * samples.length) + sensing(decoder, samples.count, samples.length)
    work += pruning(decoder, samples.pruned) * compensated + evaluation * (1 + compensated + plain)
    tokens = samples.count * samples.length
    return work + (passing(decoder, tokens) + _moments(decoder, tokens, are_solved=False)) * plain


def announced(work: Work, decoder: Decoder, samples: int) -> str:
    """Returns the line that says how long a run will take here. samples: that are generated."""
    rates = probed(decoder, min(samples, BATCH))
    rest = f", and {work.seconds:.0f} s of measurements" if work.seconds else ""
    return (
        f"duration: {in_words(work.at(rates))} here, estimated: {(work.passes + work.steps) / 1e12:.2g} TFLOP in "
        f"products as were just timed ({rates.many / 1e9:.0f} GFLOP/s of many rows, {rates.few / 1e9:.0f} of few){rest}"
    )


def probed(decoder: Decoder, sequences: int) -> Rates:
    """Returns this machine's rates on matrices about as large as the model's, timed for a second at most.

    sequences: that are generated at once.
    """
    import torch

    widest = max(width for layer in decoder.layers for width in _input_widths(layer))
    width = min(PROBE_WIDTH, max(decoder.hidden_size, widest))
    height = min(PROBE_WIDTH, decoder.hidden_size)
    # As many matrices as leave a processor's cache, so that few rows wait for the memory as they do in a model.
    count = max(1, (64 << 20) // (4 * width * height))
    weights = torch.rand(count, height, width)

    def rate(rows: int, of: int) -> float:
        inputs = torch.rand(rows, height)
        return 2.0 * rows * height * width * _per_second(lambda turn: inputs @ weights[turn % of])

    return Rates(rate(PROBE_ROWS, 1), rate(max(1, sequences), count))


def _per_second(call: Callable[[int], object]) -> float:
    """Returns how often a function is called in a second, after a first call that is not counted."""
    call(0)
    begun, calls = time.perf_counter(), 0
    while (seconds := time.perf_counter() - begun) < timing().probe_seconds or not calls:
        call(calls)
        calls += 1
    return calls / seconds


def in_words(seconds: float) -> str:
    """Returns a rough duration: about 40 s, about 8 minutes, about 2 hours."""
    if seconds < 90:
        return f"about {max(10, round(seconds, -1)):.0f} s"
    minutes = seconds / 60
    return f"about {minutes:.0f} minutes" if minutes < 90 else f"about {minutes / 60:.0f} hours"
