"""A model: its description, its weights (read on each access, by place) and the place of its files.

It does not know where the files came from.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from edgeprune.model.decoder import Decoder

if TYPE_CHECKING:
    import torch

    Weights = Mapping[str, "torch.Tensor"]  # by the names of decoder.py; each access reads the file again


@dataclass(frozen=True)
class Model:
    """A checkpoint in the standard layout: `directory` holds config.json, weights and tokenizer.

    `weights` maps the names of decoder.py to tensors in the checkpoint's own dtype. Each access reads the file, and
    nothing is kept, so that a walk through the model holds one layer at a time.
    """

    name: str
    directory: Path
    decoder: Decoder
    weights: Weights
    fingerprint: str  # sha256 over names, sizes and contents of config and weights; identifies a run
