"""A model's own walk in torch as a runner step by step, for what no engine of this machine computes.

It has no KV cache: every step reads the whole sequence again.
"""

from __future__ import annotations

import numpy as np
import torch

from edgeprune.model.forward import CHUNK_TOKENS, final_states, head_logits, weight_stream
from edgeprune.model.model import Model


class WalkRunner:
    """A runner of one sequence of at most `capacity` tokens, with the interface of ondevice.reference.StepRunner."""

    def __init__(self, model: Model, capacity: int) -> None:
        self.batch, self.capacity, self.vocab_size, self._model = 1, capacity, model.decoder.vocab_size, model
        self.reset()

    def reset(self, past: int = 0) -> None:
        """Begins a sequence; `past` is 0, because what came before is not kept."""
        self._ids = np.zeros((1, past), np.int64)

    @torch.inference_mode()
    def run(self, ids: np.ndarray, mask: np.ndarray | None = None) -> np.ndarray:
        """Returns the logits (1, vocabulary) fp32 of the last of ids (1, tokens) int64, which join the sequence."""
        self._ids = np.concatenate([self._ids, ids], axis=1)
        fed = torch.from_numpy(np.pad(self._ids, ((0, 0), (0, 1))))  # the last token of a walk is never fed
        decoder = self._model.decoder
        states, head = final_states(decoder, weight_stream(self._model), fed, CHUNK_TOKENS, lambda: None)
        return head_logits(decoder, states[-1:], head).numpy()
