"""compare(): methods side by side at equal ratios, on several texts; no device, no engine."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgeprune.engine.onnxruntime import peak_bytes
from edgeprune.errors import InputError
from edgeprune.model.decoder import Decoder, ratio
from edgeprune.model.load import load_model
from edgeprune.model.model import Model
from edgeprune.model.save import save_checkpoint
from edgeprune.prepare import SELF, Request, pack_samples, read_documents_of
from edgeprune.progress import Progress

CHANNEL_MULTIPLE = 8  # fine enough to realise a ratio within half a point
DENSE = "dense"


@dataclass(frozen=True)
class Row:
    """One method at one realised ratio. peak_bytes: of this process so far; seconds: pruning alone."""

    method: str
    ratio: float
    perplexity: dict[str, float]
    parameters: int
    seconds: float
    peak_bytes: int

    def as_json(self) -> dict[str, Any]:
        return dict(self.__dict__)


def compare(
    spec: str, ratios: Sequence[float], methods: Sequence[str], calibration: str, evaluate: Sequence[Path],
    samples: int, length: int, seed: int, progress: Progress,
) -> list[Row]:  # fmt: skip
    """One row for the dense model and for each ratio and method, all on the same samples.

    ratios: percent of the parameters in attention and MLP matrices to remove. Every method gets the
    same widths at a ratio: those of the least predicted error. Raises InputError.
    """
    import torch

    from edgeprune.evaluate.perplexity import document_losses
    from edgeprune.pruning.prune import METHODS, method_named, prune
    from edgeprune.pruning.sensitivity import measure_response, measure_sensitivities

    chosen = {name: method_named(name) for name in methods if name != DENSE}
    for value in ratios:
        if not 0 < value < 100:
            raise InputError(f"the ratio {value:g} is not between 0 and 100 percent", "Try --ratios 20,30,50.")
    if calibration == SELF:
        raise InputError("compare needs real text to calibrate on", "Give --calibration PATH.")
    request = Request(
        model=spec, calibration=calibration, evaluate=tuple(evaluate), samples=samples, length=length, seed=seed
    )
    documents = read_documents_of(request)
    model = load_model(spec)
    texts = pack_samples(request, model, *documents)
    ids = torch.from_numpy(texts.calibration)
    window = max(length, 256)

    def evaluated(candidate: Model) -> dict[str, float]:
        return {
            name: document_losses(candidate, documents, window).perplexity
            for name, documents in texts.evaluation.items()
        }

    advance = progress.stage("dense", 1)
    rows = [Row(DENSE, 0.0, evaluated(model), model.decoder.parameters, 0.0, peak_bytes())]
    advance()
    advance = progress.stage("measure sensitivities", len(model.decoder.layers))
    sensitivities = measure_sensitivities(model, ids, METHODS["default"].score, seed, advance)
    sensitivities = measure_response(model, ids, sensitivities, METHODS["default"], seed)
    for value in ratios:
        target = widths_at(model.decoder, value / 100, sensitivities)
        for name, method in chosen.items():
            advance = progress.stage(f"{name} at {value:g} %", 2 * len(model.decoder.layers))
            with tempfile.TemporaryDirectory(prefix="edgeprune-") as folder:
                start = time.monotonic()
                weights = prune(model, target, ids, method, seed, lambda record: advance())  # noqa: B023
                save_checkpoint(target, weights, model, Path(folder) / "model")
                seconds = time.monotonic() - start
                candidate = load_model(f"{folder}/model")
                perplexity = evaluated(candidate)
            rows.append(Row(name, ratio(target, model.decoder), perplexity, target.parameters, seconds, peak_bytes()))
    return rows


def widths_at(dense: Decoder, wanted: float, sensitivities: Any) -> Decoder:
    """The uniform Decoder of the least predicted error whose ratio is within 0.5 points of `wanted`."""
    from edgeprune.pruning.allocate import Widths, best_within, uniform_options

    layer = dense.layers[0]
    full = Widths(layer.attention.num_key_value_heads, layer.attention.heads_per_group, layer.mlp.intermediate_size)
    decoders = {widths: dense.with_widths(*widths) for widths in uniform_options(full, CHANNEL_MULTIPLE)}
    near = best_within(
        list(decoders), sensitivities.uniform_loss, lambda widths: abs(ratio(decoders[widths], dense) - wanted) <= 0.005
    )
    if near is None:
        reached = min((ratio(d, dense) for d in decoders.values()), key=lambda value: abs(value - wanted))
        raise InputError(
            f"no uniform widths of this model remove {100 * wanted:g} %", f"The nearest is {100 * reached:.1f} %."
        )
    return decoders[near]
