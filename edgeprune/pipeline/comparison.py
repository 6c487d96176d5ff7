"""Pruning methods side by side on one model, the same samples and the same texts."""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import TYPE_CHECKING, Any

import numpy as np

from edgeprune.engine.work import bytes_per_token
from edgeprune.errors import InputError
from edgeprune.files import scratch_folder
from edgeprune.model.decoder import Decoder, ratio
from edgeprune.model.model import Model
from edgeprune.ondevice.figures import Workload
from edgeprune.ondevice.machine import peak_bytes, reset_peak_bytes
from edgeprune.pipeline.formats import refusal
from edgeprune.precision import PRECISIONS, WEIGHT_FORMATS, WeightFormat
from edgeprune.progress import Progress
from edgeprune.search.module_costs import additive

if TYPE_CHECKING:
    import torch

    from edgeprune.evaluate.perplexity import Losses
    from edgeprune.pipeline.kind import Kind
    from edgeprune.pruning.methods import Method
    from edgeprune.pruning.score import Score
    from edgeprune.search.widths import Sensitivities, Widths

CHANNEL_MULTIPLE = 8  # fine enough to realise a ratio within half a point
RATIO_TOLERANCE = 0.005
DENSE = "dense"
DENSE_KEY = (DENSE, "", "0")  # of its row
DECODE_WORKLOAD = Workload(batch=1, prompt=512, context=1024)  # that decode bytes are stated for, in fp16


FORMAT_WORDS = {name: (name,) for name in WEIGHT_FORMATS} | {"int4": ("int4-64", "int4-32")}
"""The words for weight formats in a method's name, each with the formats to take the first fitting of."""


class Layout(StrEnum):
    UNIFORM = "uniform"
    PER_LAYER = "per-layer"


class WidthRule(StrEnum):
    """The rule that gives the widths: equal shares, FLAP's one cut over standardised scores, or the least loss.

    The scores are the method's own where they are standardised, else FLAP's metric.
    """

    EVEN = "even"
    SCORE = "score"
    SENSITIVITY = "sensitivity"


@dataclass(frozen=True)
class Row:
    """One method at one ratio: asked for, and realised.

    perplexity: by text, None beyond floating point; rise: nats per token over the dense model, [value, low,
    high] by text; over_default: the same over the default method at this ratio, where that ran too.
    parameters: all; total_ratio: their removed share; decode_bytes: of one fp16 step at past 1023. seconds:
    pruning alone; peak_bytes: resident, while it pruned and was evaluated. fell_back: modules where no
    update helped.
    """

    method: str
    layout: str
    allocation: str
    asked: float
    ratio: float
    total_ratio: float
    perplexity: dict[str, float | None]
    rise: dict[str, tuple[float, float, float]]
    over_default: dict[str, tuple[float, float, float]]
    parameters: int
    decode_bytes: int
    seconds: float
    peak_bytes: int
    fell_back: int

    @property
    def key(self) -> tuple[str, str, str]:
        """Returns method, layout and the ratio that was asked for."""
        return self.method, self.layout, f"{self.asked:g}"

    def as_json(self) -> dict[str, Any]:
        return dict(self.__dict__)


@dataclass(frozen=True)
class ComparedMethod:
    """A method, and the weight format that the layers' matrices are rounded to, if any; prunes: it removes weights.

    method: None for SliceGPT, which cuts the residual stream and no heads or channels.
    """

    name: str
    method: Method | None
    form: WeightFormat | None = None
    prunes: bool = True

    @property
    def slices(self) -> bool:
        """Returns whether this is SliceGPT."""
        return self.method is None

    def rule(self, layout: Layout) -> WidthRule:
        """Returns what gives the widths: the least loss; FLAP has a cut of its own, SliceGPT one width everywhere."""
        if self.method is None:
            return WidthRule.EVEN
        own_cut = self.method.standardised and layout is Layout.PER_LAYER
        return WidthRule.SCORE if own_cut else WidthRule.SENSITIVITY


def check_method(name: str) -> None:
    """Raises InputError for a name that stands for no method, whatever the model."""
    from edgeprune.pruning.methods import METHODS
    from edgeprune.pruning.slicegpt import SLICEGPT

    before, _, last = name.rpartition("+")
    if name in (*METHODS, SLICEGPT) or (last in FORMAT_WORDS and before in ("", *METHODS)):
        return
    if before == SLICEGPT and last in FORMAT_WORDS:
        raise InputError(f"the method {name}: what SliceGPT keeps stays in floats here", f"Compare {SLICEGPT} alone.")
    raise InputError(f"unknown method {name!r}", f"Methods are: {', '.join((*METHODS, SLICEGPT))}.")


def compared_method(name: str, decoder: Decoder) -> ComparedMethod:
    """Returns the method of a name: of the table of methods, a weight format, or both with a plus between.

    Raises InputError for an unknown name, for a format that the decoder's matrices cannot be in, and for a decoder that
    SliceGPT does not take.
    """
    from edgeprune.pruning.methods import DEFAULT, METHODS, method_named
    from edgeprune.pruning.slicegpt import SLICEGPT, check_sliceable

    check_method(name)
    if name == SLICEGPT:
        check_sliceable(decoder)
        return ComparedMethod(name, None)
    before, _, last = name.rpartition("+")
    if name in METHODS or last not in FORMAT_WORDS:
        return ComparedMethod(name, method_named(name))
    for form in (WEIGHT_FORMATS[word] for word in FORMAT_WORDS[last]):
        if (reason := refusal(form, decoder)) is None:
            return ComparedMethod(name, method_named(before or DEFAULT), form, prunes=bool(before))
    raise InputError(reason, "Compare int8.")


@dataclass
class TimedStream:
    """A stream that adds up the seconds its consumer waits for it."""

    stream: Iterator[Any]
    seconds: float = 0.0

    def __iter__(self) -> Iterator[Any]:
        while True:
            start = time.monotonic()
            try:
                item = next(self.stream)
            except StopIteration:
                return
            finally:
                self.seconds += time.monotonic() - start
            yield item


@dataclass(frozen=True)
class Size:
    """The numbers of a model's parameters, those of its attention and MLP matrices and all, and its decode bytes as in
    a Row."""

    layer_parameters: int
    parameters: int
    decode_bytes: int


def size_of(decoder: Decoder) -> Size:
    """Returns the size of a Decoder."""
    moved = bytes_per_token(decoder, "fp16", DECODE_WORKLOAD, in_place=True).total
    return Size(decoder.layer_parameters, decoder.parameters, int(moved))


def sliced_size(decoder: Decoder, width: int) -> Size:
    """Returns the size of what SliceGPT makes of a Decoder: shortcuts and an untied head count, as they are read."""
    from edgeprune.pruning.slicegpt import sliced_layer_parameters, sliced_shapes

    moved = bytes_per_token(decoder, "fp16", DECODE_WORKLOAD, in_place=True)
    numbers = {name: math.prod(shape) for name, shape in sliced_shapes(decoder, width).items()}
    of_layers = sum(number for name, number in numbers.items() if name.startswith("layers."))
    return Size(
        sliced_layer_parameters(decoder, width),
        sum(numbers.values()),
        int(moved.total - moved.layers + PRECISIONS["fp16"].element_bytes * of_layers),
    )


@dataclass(frozen=True)
class Comparison:
    """A model, the samples to calibrate on (samples, length) int64 and texts of token documents to judge by.

    generated: samples of the model's own, for the methods that compensate. losses: of what was evaluated, by
    the row's key; another comparison on the same texts may share them.
    """

    model: Model
    ids: torch.Tensor
    generated: torch.Tensor | None
    texts: Mapping[str, Sequence[np.ndarray]]
    window: int
    seed: int
    progress: Progress
    losses: dict[tuple[str, str, str], dict[str, Losses]] = field(default_factory=dict)

    @functools.cached_property
    def sensitivities(self) -> Sensitivities:
        from edgeprune.pruning.methods import DEFAULT
        from edgeprune.search.sensitivity import sensitivities_of

        return sensitivities_of(self.model, self.ids.numpy(), DEFAULT, self.seed, self.progress)

    @functools.cached_property
    def dense(self) -> Row:
        from edgeprune.evaluate.perplexity import text_losses
        from edgeprune.model.forward import weight_stream

        decoder = self.model.decoder
        reset_peak_bytes()
        if DENSE_KEY not in self.losses:
            advance = self.progress.stage(DENSE, len(decoder.layers))
            stream = weight_stream(self.model)
            self.losses[DENSE_KEY] = text_losses(decoder, stream, self.texts, self.window, advance)
        return self._row(DENSE, "", "", 0.0, size_of(decoder), self.losses[DENSE_KEY], 0.0, 0)

    def run(self, name: str, wanted: float, layout: Layout, allocation: WidthRule) -> Row:
        """Prunes with a method to a ratio (0 to 1), rounds where it has a format, and evaluates, in one walk.

        A weight format by itself prunes nothing, whatever the ratio. SliceGPT has one width for all layers, whatever
        the layout and the allocation. Raises InputError.
        """
        compared, target = compared_method(name, self.model.decoder), self.model.decoder
        if compared.slices:
            return self._run_sliced(name, wanted, layout, allocation)
        if compared.prunes:
            group = 1 if compared.form is None else compared.form.multiple
            multiple = math.lcm(CHANNEL_MULTIPLE, group)
            target = self.target(wanted, layout, allocation, multiple, compared.method.cut_score)
        return self.run_to(
            target.with_format(compared.form), name, wanted if compared.prunes else 0.0, layout, allocation
        )

    def run_to(self, target: Decoder, name: str, wanted: float, layout: Layout, allocation: WidthRule) -> Row:
        """Prunes with a method to the widths and formats of a Decoder and evaluates in one walk."""
        from edgeprune.evaluate.perplexity import text_losses
        from edgeprune.pruning.prune import prune, result_of

        method = compared_method(name, self.model.decoder).method
        layers = len(self.model.decoder.layers)
        advance = self.progress.stage(f"{name} at {100 * wanted:g} %, {layout}", 2 * layers)
        fell_back: list[bool] = []  # of each module, as it is pruned
        _ = self.dense  # what the rise refers to
        reset_peak_bytes()
        # The weights are evaluated as they are pruned, so that the model is never held twice.
        stream = TimedStream(
            prune(
                self.model,
                target,
                self.ids,
                method,
                self.seed,
                lambda record: (fell_back.append(record.fell_back), advance()),
                self.generated,
            )
        )
        decoder = result_of(target, method)
        losses = text_losses(decoder, stream, self.texts, self.window)
        return self._row(name, layout, allocation, wanted, size_of(decoder), losses, stream.seconds, sum(fell_back))

    def _run_sliced(self, name: str, wanted: float, layout: Layout, allocation: WidthRule) -> Row:
        """Slices the residual stream and evaluates in one walk: the most features that leave the ratio to be removed.

        Raises InputError where not one does.
        """
        from edgeprune.evaluate.perplexity import predicted_losses
        from edgeprune.model.forward import predictions
        from edgeprune.pruning.slicegpt import SHORTCUT, slice_model, sliced_states, widest_slice

        decoder = self.model.decoder
        width = widest_slice(decoder, int(decoder.layer_parameters * (1 - wanted)))
        if not width:
            raise InputError(
                f"one feature of this model's residual stream is more than {100 * (1 - wanted):g} % of its parameters",
                "Try a lower ratio: the shortcuts of slicegpt count too.",
            )
        advance = self.progress.stage(f"{name} at {100 * wanted:g} %", 2 * len(decoder.layers))
        _ = self.dense  # what the rise refers to
        reset_peak_bytes()
        stream = TimedStream(slice_model(self.model, width, self.ids))

        def shown() -> Iterator[tuple[str, torch.Tensor]]:
            for weight_name, weight in stream:
                if weight_name.endswith(SHORTCUT):
                    advance()
                yield weight_name, weight

        def predict(ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            return predictions(decoder, *sliced_states(decoder, shown(), ids), ids)

        losses = predicted_losses(predict, self.texts, self.window)
        return self._row(name, layout, allocation, wanted, sliced_size(decoder, width), losses, stream.seconds, 0)

    def target(
        self,
        wanted: float,
        layout: Layout,
        allocation: WidthRule,
        multiple: int = CHANNEL_MULTIPLE,
        cut_score: Score | None = None,
    ) -> Decoder:
        """Returns the Decoder to reach: at most 1 - wanted of the parameters, to half a point. Raises InputError.

        multiple: of the MLP channels; cut_score: of one cut over all modules, None for FLAP's metric.
        """
        from edgeprune.pruning.score import fluctuation
        from edgeprune.search.sensitivity import measure_scores
        from edgeprune.search.widths import dense_widths, even, layer_parameters, standardised_cut

        dense = self.model.decoder
        full, cost = dense_widths(dense), functools.partial(layer_parameters, dense)
        layers, capacity = len(dense.layers), int(dense.layer_parameters * (1 - wanted))
        least = math.ceil(dense.layer_parameters * (1 - wanted - RATIO_TOLERANCE))
        # The widths, by the rule that was asked for.
        widths: list[Widths] | None
        if allocation is WidthRule.EVEN:
            widths = even(full, layers, cost, capacity, multiple, least)
        elif allocation is WidthRule.SCORE:
            advance = self.progress.stage("scores of every layer", layers)
            scores = measure_scores(self.model, self.ids, cut_score or fluctuation, self.seed, advance)
            widths = standardised_cut(*scores, full, cost, capacity)
        else:
            widths = self._least_loss(capacity, least, layout, multiple)
        # What they really remove must be within the tolerance.
        target = dense.with_layer_widths(widths) if widths else None
        if target is None or abs(ratio(target, dense) - wanted) > RATIO_TOLERANCE:
            raise InputError(
                f"no {layout} widths of this model remove {100 * wanted:g} % within {100 * RATIO_TOLERANCE:g} points",
                "Try another ratio: widths come in steps, and at least one layer stays.",
            )
        return target

    def _least_loss(self, capacity: int, least: int, layout: Layout, multiple: int) -> list[Widths] | None:
        from edgeprune.search.solve import Problem, per_layer, uniform
        from edgeprune.search.widths import dense_widths, parameter_costs

        parameters = parameter_costs(self.model.decoder)
        removed = additive(-parameters.attention, -parameters.mlp)  # not more than was asked for either
        problem = Problem(
            dense_widths(self.model.decoder),
            self.sensitivities,
            {"parameters": parameters, "removed": removed},
            multiple,
        )
        solve = uniform if layout is Layout.UNIFORM else per_layer
        allocation = solve(problem, {"parameters": capacity, "removed": -least})
        return allocation and list(allocation.layers)

    def over_default(self, row: Row) -> Row:
        """Returns the row with its rise over the default method's, where that ran at the same ratio and layout."""
        from edgeprune.evaluate.perplexity import log_rise
        from edgeprune.pruning.methods import DEFAULT

        default = self.losses.get((DEFAULT, *row.key[1:]))
        if default is None or row.method == DEFAULT:
            return row
        own = self.losses[row.key]
        return replace(row, over_default={text: log_rise(default[text], own[text], self.seed) for text in own})

    def _row(
        self,
        name: str,
        layout: str,
        allocation: str,
        wanted: float,
        size: Size,
        losses: dict[str, Losses],
        seconds: float,
        fell_back: int,
    ) -> Row:
        """Returns a row, and keeps the losses under its key."""
        from edgeprune.evaluate.perplexity import log_rise

        dense, reference = self.model.decoder, self.losses[DENSE_KEY]
        row = Row(
            method=name,
            layout=layout,
            allocation=allocation,
            asked=wanted,
            ratio=1 - size.layer_parameters / dense.layer_parameters,
            total_ratio=1 - size.parameters / dense.parameters,
            perplexity={text: _finite(fitted.perplexity) for text, fitted in losses.items()},
            rise={text: log_rise(reference[text], fitted, self.seed) for text, fitted in losses.items()},
            over_default={},
            parameters=size.parameters,
            decode_bytes=size.decode_bytes,
            seconds=seconds,
            peak_bytes=peak_bytes(),
            fell_back=fell_back,
        )
        self.losses[row.key] = losses
        return row


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def generate_samples(
    model: Model, kind: Kind, count: int, length: int, seed: int, progress: Progress, given: np.ndarray | None = None
) -> torch.Tensor:
    """Returns (count, length) int64 that the dense model draws, from a graph of its own in a temporary folder.

    kind: with its model; length: of an image generator that of its pictures; given: as of Kind.draw_samples.
    """
    import torch

    from edgeprune.engine.onnx.graph import ONNXRUNTIME_GRAPH, write_graphs
    from edgeprune.ondevice.onnxruntime import GRAPH_FILE

    with scratch_folder() as folder:
        write_graphs(model.decoder, model.weights, folder, "fp32", [ONNXRUNTIME_GRAPH], length)
        return torch.from_numpy(kind.draw_samples(folder / GRAPH_FILE, model, count, length, seed, progress, given))
