"""The likelihood of continuations: by a graph in ONNX Runtime as it is deployed, or by a checkpoint's own walk.

It knows token ids; it knows no tokenizer and no task.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
import torch.nn.functional as F

from edgeprune.evaluate.agreement import common_beginning
from edgeprune.evaluate.perplexity import padded
from edgeprune.model.forward import CHUNK_TOKENS, final_states, predictions, weight_stream
from edgeprune.model.model import Model
from edgeprune.ondevice.onnxruntime import GraphRunner

WALK_TOKENS = 1 << 14  # of windows that walk through the layers together
STEP_TOKENS = 256  # that a graph is fed at once: its logits of all of them are in memory
Likelihood = tuple[float, bool]  # nats (at most 0), and whether each token is the likeliest one


@dataclass(frozen=True)
class Continuation:
    """The tokens (context and continuation,) int64 of one question, of which those from `start` on are predicted."""

    ids: np.ndarray
    start: int


class Likelihoods(Protocol):
    """A model that predicts continuations. capacity: the tokens that it is fed at most, all but a sequence's last."""

    capacity: int
    vocab_size: int

    def of(self, asked: Sequence[Continuation], on_each: Callable[[], None] = lambda: None) -> list[Likelihood]:
        """Returns the likelihoods of continuations, in their order; on_each is called after each."""


@dataclass(frozen=True)
class GraphLikelihoods:
    """A graph of the onnxruntime dialect with the logits of all positions, of at least `capacity` positions.

    exact: as of ondevice.onnxruntime.open_session. Sequences that begin alike, as the choices of a question do, are fed
    their beginning once.
    """

    graph: Path
    capacity: int
    exact: bool

    @cached_property
    def _runner(self) -> GraphRunner:
        return GraphRunner(self.graph, 1, self.capacity, exact=self.exact)

    @property
    def vocab_size(self) -> int:
        return self._runner.vocab_size

    def of(self, asked: Sequence[Continuation], on_each: Callable[[], None] = lambda: None) -> list[Likelihood]:
        """Returns the likelihoods of continuations. Raises EngineError."""
        results: list[Likelihood] = [(0.0, True)] * len(asked)
        previous = np.zeros(0, np.int64)
        for place in sorted(range(len(asked)), key=lambda place: asked[place].ids.tolist()):
            one = asked[place]
            past = min(common_beginning(previous, one.ids), one.start - 1)  # in the cache already
            self._runner.reset(past)
            pieces = [
                self._runner.logits(one.ids[None, begin : min(begin + STEP_TOKENS, len(one.ids) - 1)])[0]
                for begin in range(past, len(one.ids) - 1, STEP_TOKENS)
            ]
            logits = torch.from_numpy(np.concatenate(pieces)[one.start - 1 - past :]).float()  # (continuation, vocab)
            results[place] = _likelihood(logits, torch.from_numpy(one.ids[one.start :]))
            previous = one.ids[:-1]
            on_each()
        return results


@dataclass(frozen=True)
class ModelLikelihoods:
    """A model in fp32 in torch, of which a layer is in memory at a time."""

    model: Model
    capacity: int

    @property
    def vocab_size(self) -> int:
        return self.model.decoder.vocab_size

    def of(self, asked: Sequence[Continuation], on_each: Callable[[], None] = lambda: None) -> list[Likelihood]:
        """Returns the likelihoods of continuations."""
        results: list[Likelihood] = [(0.0, True)] * len(asked)
        order = sorted(range(len(asked)), key=lambda place: len(asked[place].ids))
        while order:
            # The longest first: they decide how many rows a batch has.
            count = max(1, WALK_TOKENS // len(asked[order[-1]].ids))
            places, order = order[-count:], order[:-count]
            ids = torch.from_numpy(padded([asked[place].ids for place in places]))  # (count, longest)
            states = final_states(self.model.decoder, weight_stream(self.model), ids, CHUNK_TOKENS, lambda: None)
            losses, likeliest = predictions(self.model.decoder, *states, ids)
            for row, place in enumerate(places):
                span = slice(asked[place].start - 1, len(asked[place].ids) - 1)
                is_greedy = torch.equal(likeliest[row, span], ids[row, 1:][span])
                results[place] = (-float(losses[row, span].sum()), is_greedy)
                on_each()
        return results


def _likelihood(logits: torch.Tensor, targets: torch.Tensor) -> Likelihood:
    """Returns the likelihood of targets (n,) int64 by logits (n, vocabulary) fp32."""
    nats = F.cross_entropy(logits, targets, reduction="none").double().sum()
    return -float(nats), torch.equal(logits.argmax(dim=-1), targets)
