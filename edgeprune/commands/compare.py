"""compare(): methods side by side at equal ratios, on several texts; no device, no engine."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from edgeprune.errors import InputError
from edgeprune.model.load import load_shape
from edgeprune.pipeline.comparison import DENSE, Allocation, Comparison, Layout, Row, generate_samples
from edgeprune.pipeline.imaging import check_kind, imaging_of
from edgeprune.pipeline.request import SELF, Request, check_samples
from edgeprune.pipeline.samples import LENGTH, length_of, read_documents_of, read_samples
from edgeprune.pipeline.setup import load_dense
from edgeprune.progress import Progress

if TYPE_CHECKING:
    pass

BOTH = "both"  # layouts


def compare(
    request: Request, ratios: Sequence[float], methods: Sequence[str], layout: str, progress: Progress
) -> list[Row]:
    """One row for the dense model and for each layout, ratio and method, all on the same samples.

    request: model and samples. ratios: percent of the parameters in attention and MLP matrices to remove. Every
    method gets the widths of the least predicted loss, but FLAP's in the layout `per-layer` come from its own cut
    over all layers. Raises InputError.
    """
    from edgeprune.pruning.methods import DEFAULT, METHODS, method_named

    names = [name for name in dict.fromkeys(METHODS if methods == ["all"] else methods) if name != DENSE]
    chosen = {name: method_named(name) for name in sorted(names, key=lambda name: name != DEFAULT)}
    for value in ratios:
        if not 0 < value < 100:
            raise InputError(f"the ratio {value:g} is not between 0 and 100 percent", "Try --ratios 20,30,50.")
    if layout not in (*Layout, BOTH):
        raise InputError(f"unknown layout {layout!r}", f"Layouts are: {', '.join((*Layout, BOTH))}.")
    comparison = _comparison(request, progress)
    rows = [comparison.dense]
    for each in Layout if layout == BOTH else [Layout(layout)]:
        for value in ratios:
            for name, method in chosen.items():
                own_cut = method.standardised and each is Layout.PER_LAYER
                allocation = Allocation.SCORE if own_cut else Allocation.SENSITIVITY
                rows.append(comparison.over_default(comparison.run(name, value / 100, each, allocation)))
    return rows


def _comparison(request: Request, progress: Progress) -> Comparison:
    """Model and samples as asked for: the user's, beside some that the model makes; of pictures those alone do."""
    import torch

    from edgeprune.pipeline.documents import GENERATED

    shape = load_shape(request.model, request.hints)[1]
    check_kind(request, shape)
    own = request.calibration != SELF
    if not own and shape.picture is None:
        raise InputError("compare needs real text to calibrate on", "Give --calibration PATH.")
    check_samples(request)
    length = length_of(request, shape)
    documents = None if shape.picture else read_documents_of(request)
    model = load_dense(request.model, request.hints)
    imaging = imaging_of(request, model) if shape.picture else None
    texts = read_samples(request, model, documents, imaging)
    held_out = 0 if own or texts.evaluation else max(1, request.samples // 4)
    count = GENERATED if own else request.samples + held_out
    sampling = imaging and imaging.sampling
    drawn = generate_samples(model, count, length, request.seed, progress, sampling)
    evaluation = texts.evaluation or {"drawn by the dense model": [*drawn[request.samples :].numpy()]}
    fed = drawn[:, : shape.most_fed]
    ids, generated = (torch.from_numpy(texts.calibration), fed) if own else (fed[: request.samples], None)
    return Comparison(model, ids, generated, evaluation, max(length, LENGTH), request.seed, progress)
