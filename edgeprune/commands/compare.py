"""compare(): methods side by side at equal ratios, on several texts; no device, no engine."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from edgeprune.commands.result import Result
from edgeprune.errors import InputError
from edgeprune.model.decoder import Decoder
from edgeprune.model.load import load_shape
from edgeprune.pipeline.comparison import (
    DENSE,
    ComparedMethod,
    Comparison,
    Layout,
    Row,
    check_method,
    compared_method,
    generate_samples,
)
from edgeprune.pipeline.duration import announced, comparing, samples_of
from edgeprune.pipeline.kind import kind_of
from edgeprune.pipeline.request import DEMO, RATIOS, SELF, Request, check_samples, request_of
from edgeprune.pipeline.request import METHODS as DEFAULT_METHODS
from edgeprune.pipeline.samples import LENGTH
from edgeprune.pipeline.setup import load_dense
from edgeprune.progress import OnProgress, Progress, progress_of

BOTH, ALL = "both", "all"  # layouts, methods


def compare(
    model: str | Path = DEMO,
    *,
    ratios: str | float | Sequence[float] = RATIOS,
    methods: str | Sequence[str] = DEFAULT_METHODS,
    layout: str = "uniform",
    progress: Progress | OnProgress | None = None,
    **options: Any,
) -> Result[list[Row]]:
    """Compares pruning methods at equal ratios on the same samples and texts.

    ratios: percent of the parameters in attention and MLP matrices to remove; methods: names, `all` for all of them;
    weight formats are methods too (int8, int4), and may follow another one (default+int4); options: those of samples
    and images, as of fit. Returns a row for the dense model and one for each layout, ratio and method. Every method
    gets the widths of the least predicted loss, but FLAP's in the layout `per-layer` come from its own cut over all
    layers. SliceGPT has one width for all layers: it stands in the first layout alone, and `all` leaves it out for
    models that it does not take. Raises InputError.
    """
    from edgeprune.pruning.methods import DEFAULT, METHODS
    from edgeprune.pruning.slicegpt import SLICEGPT, check_sliceable

    # What is asked for, checked before any long work.
    request = request_of(model=model, **options)
    asked, ratios = _names(methods), _numbers(ratios)
    names = [name for name in dict.fromkeys([*METHODS, SLICEGPT] if ALL in asked else asked) if name != DENSE]
    if not names:
        raise InputError(
            f"--methods {methods!r} names nothing to compare with the dense model",
            f"Methods are: {', '.join((*METHODS, SLICEGPT))}; or {ALL}.",
        )
    names.sort(key=lambda name: name != DEFAULT)
    for name in names:
        check_method(name)
    for value in ratios:
        if not 0 < value < 100:
            raise InputError(f"the ratio {value:g} is not between 0 and 100 percent", "Try --ratios 20,30,50.")
    if layout not in (*Layout, BOTH):
        raise InputError(f"unknown layout {layout!r}", f"Layouts are: {', '.join((*Layout, BOTH))}.")
    progress = progress_of(progress)
    shape = load_shape(request.model, request.hints)[1].with_format(None)
    if ALL in asked:
        try:
            check_sliceable(shape)
        except InputError as refused:
            progress.note(refused.message)
            names.remove(SLICEGPT)
    chosen = [compared_method(name, shape) for name in names]
    # The dense model first: every rise refers to it.
    layouts = list(Layout) if layout == BOTH else [Layout(layout)]
    comparison = _comparison(request, progress, shape, chosen, len(ratios) * len(layouts))
    rows = [comparison.dense]
    first = layouts[0], ratios[0]
    for each in layouts:
        for value in ratios:
            for compared in chosen:
                if not compared.prunes and (each, value) != first:
                    continue  # a weight format by itself is the same at every ratio
                if compared.slices and each is not layouts[0]:
                    continue
                row = comparison.run(compared.name, value / 100, each, compared.rule(each))
                rows.append(comparison.over_default(row))
    return Result(None, rows)


def _comparison(
    request: Request, progress: Progress, shape: Decoder, methods: Sequence[ComparedMethod], times: int
) -> Comparison:
    """Loads model and samples: the user's, beside some that the model makes; of pictures those alone suffice.

    shape: of the model, in floats; methods: each of which runs so many times; for the estimate of how long it takes.
    """
    import torch

    from edgeprune.pipeline.packing import GENERATED

    kind = kind_of(shape)
    kind.check_options(request, shape)
    own = request.calibration != SELF
    check_samples(request)
    length = kind.sample_length(request, shape)
    documents = kind.read_documents(request)
    # Samples of the user's, or drawn by the model, some of them held out.
    model = load_dense(request.model, request.hints)
    if model.dequantised:
        progress.note(f"the checkpoint is dequantised: {model.dequantised}")
    kind = kind.with_model(request, model)
    texts = kind.read_samples(request, model, documents)
    if not own:
        progress.note(f"calibration: {kind.own_samples_reason}")
    for source in texts.sources:
        progress.note(str(source))
    samples = samples_of(request, texts, kind, shape)
    work = comparing(shape, samples, methods, times)
    progress.note(announced(work, shape, samples.generated))
    held_out = 0 if own or texts.evaluation else max(1, request.samples // 4)
    count = GENERATED if own else request.samples + held_out
    drawn = generate_samples(model, kind, count, length, request.seed, progress, texts.calibration)
    evaluation = texts.evaluation or {kind.own_evaluation: [*drawn[request.samples :].numpy()]}
    fed = drawn[:, : shape.most_fed]
    ids, generated = (torch.from_numpy(texts.calibration), fed) if own else (fed[: request.samples], None)
    return Comparison(model, ids, generated, evaluation, max(length, LENGTH), request.seed, progress)


def _numbers(given: str | float | Sequence[float]) -> list[float]:
    """Returns the ratios, each once. Raises InputError where there is none, or one is not a number."""
    parts = given.split(",") if isinstance(given, str) else given if isinstance(given, Sequence) else [given]
    try:
        ratios = [float(str(part).strip().removesuffix("%")) for part in parts if str(part).strip()]
    except (ValueError, TypeError):
        ratios = []
    if not ratios:
        raise InputError(f"malformed ratios {given!r}", "Write percentages with commas: --ratios 20,30,50.")
    return list(dict.fromkeys(ratios))


def _names(given: str | Sequence[str]) -> list[str]:
    parts = given.split(",") if isinstance(given, str) else given
    return [name for part in parts if (name := str(part).strip())]
