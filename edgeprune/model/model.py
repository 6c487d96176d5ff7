"""A model: its description, its weights (read on each access, by place) and the place of its files.

It does not know where the files came from.
"""

from __future__ import annotations

from collections import ChainMap
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
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
    `dequantised` says in words what the weights were quantised to, where they are given as floats of fp32; `part_of` is
    the model_type of a model of images and text whose text part this is, of which the other parts are not read.
    """

    name: str
    directory: Path
    decoder: Decoder
    weights: Weights
    fingerprint: str  # sha256 over names, sizes and contents of config and weights; identifies a run
    quantised: Mapping[str, QuantisedWeight] = field(default_factory=dict)
    dequantised: str = ""
    part_of: str = ""

    @property
    def stored(self) -> StoredWeights:
        """Returns the weights as the checkpoint stores them, by name: codes and scales where it has these."""
        return ChainMap(self.quantised, self.weights)

    @property
    def as_floats(self) -> Model:
        """Returns the same model without formats: its weights are the values of their codes, in fp32."""
        if not self.decoder.weight_formats:
            return self
        words = ", ".join(dict.fromkeys(form.name for form in self.decoder.weight_formats.values()))
        floats = self.decoder.with_format(None)
        return replace(self, decoder=floats, quantised={}, dequantised=f"edgeprune's own, {words}")
