"""A model: its description, its weights (read on each access, by place) and the place of its files.

It does not know where the files came from.
"""

from __future__ import annotations

from collections import ChainMap
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from edgeprune.model.decoder import Decoder

if TYPE_CHECKING:
    import torch

    from edgeprune.model.quantised import QuantisedWeight

    Weights = Mapping[str, "torch.Tensor"]  # by the names of decoder.py; each access reads the file again
    Stored = torch.Tensor | QuantisedWeight
    StoredWeights = Mapping[str, Stored]


@dataclass(frozen=True)
class Model:
    """A checkpoint in the standard layout: `directory` holds config.json, weights and tokenizer.

    `weights` maps the names of decoder.py to tensors in the checkpoint's own dtype. Each access reads the file, and
    nothing is kept, so that a walk through the model holds one layer at a time. `quantised` maps the names of
    decoder.weight_formats to codes and scales, read in the same way; `weights` has these names too, as fp32.
    """

    name: str
    directory: Path
    decoder: Decoder
    weights: Weights
    fingerprint: str  # sha256 over names, sizes and contents of config and weights; identifies a run
    quantised: Mapping[str, QuantisedWeight] = field(default_factory=dict)

    @property
    def stored(self) -> StoredWeights:
        """Returns the weights as the checkpoint stores them, by name: codes and scales where it has these."""
        return ChainMap(self.quantised, self.weights)
