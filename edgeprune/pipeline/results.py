"""The results of a run: samples, candidates, quality, and all of it together, from which the report is made."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from edgeprune.engine.engines import Exported
from edgeprune.engine.onnx.graph import GraphVariant
from edgeprune.evaluate.grades import drop, losses
from edgeprune.model.decoder import Decoder
from edgeprune.model.model import Model
from edgeprune.ondevice.budget import Status, Verdict, judge, judge_quality
from edgeprune.ondevice.figures import Measured, Performance
from edgeprune.ondevice.onnxruntime import GRAPH_FILE
from edgeprune.pipeline.setup import Setup
from edgeprune.search.latency_table import LatencyCosts
from edgeprune.search.planner import Levers
from edgeprune.search.search import Outcome

if TYPE_CHECKING:
    import torch

EVALUATED = GraphVariant("onnxruntime", "all").filename  # the graph that ONNX Runtime runs, with all logits


@dataclass(frozen=True)
class Samples:
    """calibration: (samples, length) int64; generated: what the model wrote, beside the user's own
    (none where those are generated already); evaluation: token documents by name of the text."""

    calibration: np.ndarray
    generated: np.ndarray | None
    evaluation: dict[str, list[np.ndarray]]
    self_generated: bool  # the evaluation then measures agreement with the dense model


@dataclass(frozen=True)
class Candidate:
    """A model on disk with what it needs and reaches.

    model: its checkpoint, whose cache is of floats; records: what was done to each module; scales: of its KV cache,
    where that is in a format; recovery: what its training did, as pruning.recover.Recovered has it, none without one.
    """

    model: Model
    target: Decoder  # its widths with the dense model's layers, those without a module included
    exported: Exported
    performance: Performance
    records: tuple[dict[str, Any], ...]
    scales: Mapping[str, torch.Tensor] = field(default_factory=dict)
    recovery: dict[str, Any] | None = None

    @property
    def decoder(self) -> Decoder:
        """Returns what is deployed: the checkpoint's decoder, with the format of its KV cache."""
        return self.exported.decoder

    @property
    def deployed(self) -> Model:
        """Returns the model as it is deployed, with the scales of its KV cache."""
        if (form := self.decoder.cache_format) is None:
            return self.model
        from edgeprune.model.cache import with_cache

        return with_cache(self.model, form, self.scales)

    @property
    def runnable_graph(self) -> Path:
        """Returns the fp32 graph that ONNX Runtime runs on this machine, whatever the device's precision."""
        return self.exported.graphs.parent / "onnx-fp32" / GRAPH_FILE

    @property
    def evaluated_graph(self) -> Path:
        """Returns the same with the logits of all positions."""
        return self.runnable_graph.with_name(EVALUATED)


@dataclass(frozen=True)
class Quality:
    """texts: {name: {dense, fitted, percent, low, high, documents, tokens, agreement}}, the last as evaluate.agreement
    has it, or none; answers: {device, prompt_tokens, identical}, or none; samples of both from one prompt. Of an image
    generator none of these but its pictures, as report.images has them. tasks: by name, as pipeline.task_scores has
    them."""

    texts: dict[str, dict[str, Any]]
    answers: dict[str, Any] | None
    prompt: str | None
    dense_sample: str | None
    fitted_sample: str | None
    pictures: dict[str, Any] | None = None
    tasks: dict[str, dict[str, Any]] | None = None

    @property
    def worst_percent(self) -> float:
        return max(text["percent"] for text in self.texts.values())

    def losses(self, metric: str) -> list[tuple[float, float]]:
        """Bounds of the interval of the loss by a metric: of the rise of perplexity in percent, by text."""
        return [(loss.low, loss.high) for loss in losses(metric, self.texts, self.tasks)]

    @property
    def drops(self) -> list[tuple[float, float]]:
        """Bounds of the interval of the points that each task lost."""
        return [(lost.low, lost.high) for lost in (drop(name, task) for name, task in (self.tasks or {}).items())]

    def status(self, setup: Setup) -> Status:
        """Returns whether the limits on quality and tasks are met, missed, or the intervals too wide to tell."""
        return judge_quality(setup.budget, self.losses(setup.request.quality_metric), self.drops)


@dataclass(frozen=True)
class QualityStop:
    """The budget lies beyond the quality limit: its own candidate, what that costs, and how many smaller steps
    were tried to find the smallest model within the limit, which is the chosen one."""

    beyond: Candidate
    quality: Quality
    tried: int


@dataclass(frozen=True)
class Rival:
    """A candidate that was trained beside others. name: in words; before, after: its worst loss by the run's metric
    without and with its recovery."""

    name: str
    before: float
    after: float


@dataclass(frozen=True)
class Fitted:
    """Everything that the report is made of. outcome is None where the dense model meets the budget."""

    setup: Setup
    samples: Samples
    dense: Performance
    chosen: Candidate
    outcome: Outcome | None
    quality: Quality
    cross_check: dict[str, Measured] | None
    seconds: dict[str, float]
    gains: dict[str, float]  # nats per token that a few percent more of each constraint would save
    costs: LatencyCosts | None  # that the search began with
    stop: QualityStop | None = None
    levers: Levers | None = None
    robustness: list[dict[str, Any]] | None = None  # as pipeline.robustness.judged returns it
    sketch: Path | None = None  # the file of the calibration data's moments, as pipeline.sketch writes it
    rivals: tuple[Rival, ...] = ()  # that a recovery trained beside each other, the best first

    @property
    def verdict(self) -> Verdict:
        return judge(self.setup.budget, self.dense, self.chosen.performance)

    @property
    def quality_status(self) -> Status:
        return self.quality.status(self.setup)


def has_checkpoint(fitted: Fitted) -> bool:
    """Returns whether a bundle has a standard checkpoint: layers of different widths fit into no configuration."""
    return fitted.setup.request.checkpoint and fitted.chosen.model.decoder.is_uniform
