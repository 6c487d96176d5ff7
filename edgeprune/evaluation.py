"""What pruning cost: the dense and the fitted model on the held-out texts, and one answer of each.

What belongs to the dense model is a stage of its own, computed once for all rungs of a run.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from edgeprune.engine.choose import RUNTIME_GRAPH
from edgeprune.journal import Journal
from edgeprune.model.model import Model
from edgeprune.prepare import Setup
from edgeprune.progress import Progress
from edgeprune.results import Candidate, Quality, Samples

if TYPE_CHECKING:
    from edgeprune.evaluate.perplexity import Losses

WINDOW = 256  # tokens, at least, that a held-out document is cut into
SAMPLE_PROMPT = "Explain in a few sentences why the sky is blue."
SAMPLE_TOKENS = 80


@dataclass(frozen=True)
class Evaluator:
    """Compares candidates of a run with its dense model. plain: the folder of the dense model's fp32 graphs."""

    setup: Setup
    journal: Journal
    progress: Progress
    samples: Samples
    plain: Path

    def quality(self, name: str, chosen: Candidate) -> Quality:
        """Perplexity of both models on the held-out texts, and a sample of each; the stage `evaluation {name}`."""
        dense = self.journal.stage("evaluation dense", lambda: self._side(self.setup.model, self.plain))

        def compute() -> dict[str, Any]:
            graphs = chosen.exported.graphs.parent / "onnx-fp32"
            return _compare(dense, self._side(chosen.model, graphs), self.setup.request.seed)

        return Quality(**self.journal.stage(f"evaluation {name}", compute))

    def _side(self, model: Model, graphs: Path) -> dict[str, Any]:
        return _side(self.setup, self.progress, model, graphs, self.samples.evaluation)


def _side(
    setup: Setup, progress: Progress, model: Model, graphs: Path, texts: Mapping[str, Sequence[np.ndarray]]
) -> dict[str, Any]:
    """One model: nats and tokens of every document, by text, and its answer to the prompt."""
    from edgeprune.evaluate.perplexity import document_losses
    from edgeprune.generation import sample_text

    length = max(setup.request.length, WINDOW)
    advance = progress.stage("evaluate", len(texts) * len(model.decoder.layers))
    losses = {name: document_losses(model, documents, length, advance) for name, documents in texts.items()}
    progress.stage("generate a sample")
    answer = sample_text(
        graphs / RUNTIME_GRAPH, setup.model.directory, SAMPLE_PROMPT, setup.workload.context, SAMPLE_TOKENS,
        setup.request.seed,
    )  # fmt: skip
    return {
        "texts": {name: {"nats": of.nats.tolist(), "tokens": of.tokens.tolist()} for name, of in losses.items()},
        "sample": answer,
    }


def _compare(dense: dict[str, Any], fitted: dict[str, Any], seed: int) -> dict[str, Any]:
    from edgeprune.evaluate.perplexity import rise

    texts = {}
    for name in dense["texts"]:
        losses = [_losses(side["texts"][name]) for side in (dense, fitted)]
        texts[name] = {
            "dense": losses[0].perplexity, "fitted": losses[1].perplexity, "tokens": int(losses[0].tokens.sum()),
            **asdict(rise(*losses, seed)),
        }  # fmt: skip
    return {
        "texts": texts, "prompt": SAMPLE_PROMPT, "dense_sample": dense["sample"], "fitted_sample": fitted["sample"],
    }  # fmt: skip


def _losses(stored: dict[str, list[float]]) -> Losses:
    from edgeprune.evaluate.perplexity import Losses

    return Losses(np.array(stored["nats"]), np.array(stored["tokens"]))
