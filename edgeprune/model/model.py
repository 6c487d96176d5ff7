"""A model: its description, its weights (read lazily, by place) and where its files stand."""

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
    """A checkpoint in the standard layout: `directory` holds config.json, safetensors and tokenizer.

    `weights` maps the names of decoder.py to tensors in the checkpoint's own dtype, read from the
    file at each access and kept by nobody, so that a walk holds one layer at a time.
    """

    name: str
    directory: Path
    decoder: Decoder
    weights: Weights
    fingerprint: str  # sha256 over names, sizes and contents of config and weights; identifies a run
