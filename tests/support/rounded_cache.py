"""transformers' KV cache with keys and values rounded to int8 by given scales: what graphs are compared with."""

from __future__ import annotations

import numpy as np
import torch
from transformers import DynamicCache, PreTrainedModel

from tests.support.graph_models import Sample


def rounded(states: torch.Tensor, scale: np.ndarray) -> torch.Tensor:
    """The nearest codes of states (b, k, t, d) times their scales (1, k, 1, d), counted in fp64."""
    codes = np.clip(np.rint(states.numpy() / scale.astype(np.float64)), -128, 127)
    return torch.from_numpy((codes * scale).astype(np.float32))


class RoundedCache(DynamicCache):
    """scales: of the keys and the values of each layer, (1, k, 1, d) each; None: it notes what it is given."""

    def __init__(self, scales: list[tuple[np.ndarray, np.ndarray]] | None = None) -> None:
        super().__init__()
        self.scales, self.seen = scales, []

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *more, **named):
        self.seen.append((key_states.numpy(), value_states.numpy()))
        if self.scales is not None:
            of_keys, of_values = self.scales[layer_idx]
            key_states, value_states = rounded(key_states, of_keys), rounded(value_states, of_values)
        return super().update(key_states, value_states, layer_idx, *more, **named)


@torch.inference_mode()
def cached_logits(model: PreTrainedModel, batch: Sample, cache: RoundedCache) -> np.ndarray:
    """(2, tokens, vocabulary) fp32 of a whole sample over a cache."""
    ids, mask, positions = (torch.from_numpy(array) for array in (batch.ids, batch.mask, batch.positions))
    inputs = {"input_ids": ids, "attention_mask": mask, "position_ids": positions}
    return model(**inputs, past_key_values=cache, use_cache=True).logits.float().numpy()


def largest(model: PreTrainedModel, batch: Sample) -> list[tuple[np.ndarray, np.ndarray]]:
    """The largest absolute key and value of each channel (1, k, 1, d), by layer."""
    cache = RoundedCache()
    cached_logits(model, batch, cache)
    return [tuple(np.abs(states).max(axis=(0, 2), keepdims=True) for states in pair) for pair in cache.seen]
