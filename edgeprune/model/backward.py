"""One backward pass of the whole model, a layer at a time: how much each token's state moves the loss.

The forward pass keeps every layer's input on disk; the backward pass reads it again, with the layer's
weights, in reverse order. So neither the activations nor the weights of more than one layer are in memory.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from edgeprune.model.forward import (
    CHUNK_TOKENS,
    LOGIT_ROWS,
    Tables,
    add_layer,
    embed,
    head_logits,
    layer_weights,
    module_output,
    module_raw,
    modules_of,
    normed,
    row_chunks,
)
from edgeprune.model.model import Model


def token_gradients(
    model: Model, ids: torch.Tensor, seed: int, on_layer: Callable[[], None] = lambda: None
) -> list[dict[str, torch.Tensor]]:
    """||dL/dh_t||^2 (samples, tokens) fp32 behind every module, by layer and kind of module.

    L is the summed negative log-likelihood in nats of one label per token that is drawn from the model's
    own distribution, so that E[g g^T] is the Fisher information (Martens 2020, arXiv 1412.1193): a change
    dy of the stream behind the module raises the loss by about 1/2 E[(g . dy)^2].
    on_layer is called twice for each layer. ids: (samples, tokens) int64.
    """
    decoder = model.decoder
    count = len(decoder.layers)
    tables = Tables(decoder, ids.shape[1])
    energies: list[dict[str, torch.Tensor]] = [{} for _ in range(count)]
    with tempfile.TemporaryDirectory(prefix="edgeprune-") as folder:
        with torch.inference_mode():
            hidden = embed(model, ids)
            for index in range(count):
                hidden.numpy().tofile(Path(folder) / str(index))  # a mapped file would count as resident
                weights = layer_weights(model, index)
                add_layer(decoder, index, weights, hidden, tables)
                on_layer()
        gradient = _head_gradient(model, hidden.clone(), seed)
        for index in reversed(range(count)):
            weights = layer_weights(model, index)
            kinds = modules_of(decoder, index)
            entering = torch.from_numpy(np.fromfile(Path(folder) / str(index), np.float32)).view_as(gradient)
            parts = []
            for x, g in zip(row_chunks(entering, CHUNK_TOKENS), row_chunks(gradient, CHUNK_TOKENS), strict=True):
                states = [x.clone().requires_grad_(True)]
                for kind in kinds:
                    source = states[0] if decoder.parallel else states[-1]
                    raw = module_raw(decoder, index, kind, weights, source, tables)
                    states.append(states[-1] + module_output(decoder, kind, weights, raw))
                gradients = [*torch.autograd.grad(states[-1], states[:-1], g), g]
                gradients = [_of_states(own, state) for own, state in zip(gradients, states, strict=True)]
                parts.append([gradients[0], *(own.square().sum(dim=-1) for own in gradients[1:])])
            gradient, *behind = (torch.cat(part) for part in zip(*parts, strict=True))
            energies[index] = dict(zip(kinds, behind, strict=True))
            on_layer()
    return energies


def _of_states(gradient: torch.Tensor, state: torch.Tensor) -> torch.Tensor:
    """The gradient (b, t, c), 0 at a state of zeros (some models embed padding so): a norm turns the least change of
    it into all of its direction, and layers of norms make that gradient infinite."""
    return torch.where((state.detach() != 0).any(dim=-1, keepdim=True), gradient, 0.0)


def _head_gradient(model: Model, hidden: torch.Tensor, seed: int) -> torch.Tensor:
    """dL/dh (b, t, c) behind the last layer, with labels drawn from the model's distribution."""
    decoder = model.decoder
    generator = torch.Generator().manual_seed(seed)
    norm = {name: model.weights[name].float() for name in decoder.norm_shapes("norm")}
    head = model.weights["embedding" if decoder.tie_word_embeddings else "head"].float()
    parts = []
    for part in hidden.flatten(0, 1).split(LOGIT_ROWS):
        states = part.requires_grad_(True)
        logits = head_logits(decoder, normed(decoder, states, norm, "norm"), head)
        labels = torch.multinomial(F.softmax(logits.detach(), dim=-1), 1, generator=generator).squeeze(1)
        loss = F.cross_entropy(logits, labels, reduction="sum")
        parts.append(torch.autograd.grad(loss, states)[0])
    return torch.cat(parts).view_as(hidden)
