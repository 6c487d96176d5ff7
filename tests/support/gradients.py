"""The squared lengths of all gradients of a model, as its backward pass hands them out."""

from __future__ import annotations

import torch

from edgeprune.model.backward import ModuleStates, token_gradients
from edgeprune.model.model import Model


def module_energies(model: Model, ids: torch.Tensor, seed: int = 0) -> list[dict[str, torch.Tensor]]:
    """Returns the energies (samples, tokens) behind every module, by layer and kind."""
    found: list[dict[str, torch.Tensor]] = [{} for _ in model.decoder.layers]

    def keep(module: ModuleStates) -> None:
        found[module.index][module.kind] = module.energy

    token_gradients(model, ids, seed, keep)
    return found
