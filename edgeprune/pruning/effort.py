"""The work of a recovery as people write it, and its memory. It knows no torch: requests are checked by it."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from edgeprune.errors import InputError
from edgeprune.model.decoder import Decoder, Layer

OFF = "off"
ROW = 256  # tokens of a row, at most
ROWS = 2  # of a step: one of the user's and one of the model's own, or two of these
STATE_BYTES = 28  # of each weight on the disk: it and two moments, those of the state before meanwhile, and the best
RANK = 16  # of what matrices are changed by, where memory does not hold the training of whole ones
LOGIT_ROWS = 128  # positions whose logits are in memory at a time
MOST_STEPS, MOST_MINUTES = 1_000_000, 10_000.0
_MINUTES = re.compile(r"(\d+(?:\.\d+)?)\s*min")


@dataclass(frozen=True)
class Effort:
    """The work of a recovery: so many steps, or as many as fit into so many minutes."""

    steps: int | None = None
    minutes: float | None = None

    def __str__(self) -> str:
        return f"{self.steps} steps" if self.steps is not None else f"{self.minutes:g} minutes"


def effort_of(text: str) -> Effort | None:
    """Returns the work that a text asks for: `60` steps, `20min`; None for `off`. Raises InputError."""
    word = text.strip().lower()
    if word == OFF:
        return None
    if word.isascii() and word.isdigit() and 1 <= int(word[:10]) <= MOST_STEPS and len(word) <= 10:
        return Effort(steps=int(word))
    minutes = _MINUTES.fullmatch(word)
    if minutes and 0 < float(minutes[1]) <= MOST_MINUTES:
        return Effort(minutes=float(minutes[1]))
    raise InputError(f"--recover {text[:40]!r} is neither off, steps nor minutes", "Try --recover 20min, or 240 steps.")


def needed_bytes(decoder: Decoder, row_tokens: int, rank: int | None = None) -> int:
    """Returns about the bytes that a recovery of a model holds at its peak, all in fp32.

    Of each weight of the layers itself, and of what is trained, it or the factors of a rank, gradient and two moments;
    of one layer the weights as they are deployed; embedding and head, and the dense model's; of a step the stream
    behind every layer and the states of one, or where holds_states says so of all, and some logits of both models.
    """
    shapes = [shape for i in range(len(decoder.layers)) for shape in decoder.layer_shapes(i).values()]
    trained = sum(math.prod(shape) if rank is None or len(shape) < 2 else rank * sum(shape) for shape in shapes)
    of_layers = [sum(map(math.prod, decoder.layer_shapes(i).values())) for i in range(len(decoder.layers))]
    tokens = ROWS * row_tokens
    of_layer = [8 * decoder.hidden_size + 6 * _widest(layer) for layer in decoder.layers]
    held = sum(of_layer) if holds_states(decoder, rank) else max(of_layer)
    states = tokens * (decoder.hidden_size * len(decoder.layers) + held)
    tables = 2 * decoder.table_parameters
    logits = 6 * LOGIT_ROWS * decoder.vocab_size
    weights = sum(of_layers) + (3 if rank is None else 4) * trained + 2 * max(of_layers)
    return 4 * (weights + states + tables + logits)


def holds_states(decoder: Decoder, rank: int | None) -> bool:
    """Returns whether a step keeps the states of all layers for the way back, and does not compute them again.

    Beside weights, gradients and moments they are little, but where memory is short, or where weights are on a grid,
    whose every rounding would have to be kept.
    """
    modules = (module for layer in decoder.layers for module in (layer.attention, layer.mlp) if module is not None)
    return rank is None and all(module.weight_format is None for module in modules)


def _widest(layer: Layer) -> int:
    """Returns the most features that a module of a layer has inside."""
    attention = layer.attention.query_size if layer.attention else 0
    return max(attention, layer.mlp.intermediate_size if layer.mlp else 0)
