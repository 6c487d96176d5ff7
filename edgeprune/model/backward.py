"""One backward pass of the whole model, a layer at a time: how much each token's state moves the loss.

The forward pass writes every layer's input to disk; the backward pass reads it again, together with the layer's
weights, in reverse order. So the activations and the weights of one layer at most are in memory. It does not know
what the gradients are used for.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

from edgeprune.files import scratch_folder
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


@dataclass(frozen=True)
class TokenGradients:
    """||dL/dh_t||^2, (samples, tokens) fp32 each: behind every module, by layer and kind, and behind the embedding."""

    modules: list[dict[str, torch.Tensor]]
    embedding: torch.Tensor


def token_gradients(
    model: Model, ids: torch.Tensor, seed: int, on_layer: Callable[[], None] = lambda: None
) -> TokenGradients:
    """Returns the squared lengths of the gradients of the loss L by the stream's states h_t.

    L is the summed negative log-likelihood in nats of one label per token, drawn from the model's own distribution,
    so that E[g g^T] is the Fisher information (Martens 2020, arXiv 1412.1193): a change dy of the stream behind the
    module raises the loss by about 1/2 E[(g . dy)^2]. ids: (samples, tokens) int64. on_layer is called twice for each
    layer.
    """
    decoder = model.decoder
    count = len(decoder.layers)
    tables = Tables(decoder, ids.shape[1])
    energies: list[dict[str, torch.Tensor]] = [{} for _ in range(count)]
    with scratch_folder() as folder:
        # Forward: keep the input of every layer on disk.
        with torch.inference_mode():
            hidden = embed(model, ids)  # (b, t, c)
            for index in range(count):
                (folder / str(index)).write_bytes(hidden.numpy())  # a mapped file would count as resident
                weights = layer_weights(model, index)
                add_layer(decoder, index, weights, hidden, tables)
                on_layer()
        # Backward through head and loss.
        gradient = _head_gradient(model, hidden.clone(), seed)  # (b, t, c)
        # Backward through one layer at a time: run it again with gradients, a chunk of samples at a time.
        for index in reversed(range(count)):
            weights = layer_weights(model, index)
            kinds = modules_of(decoder, index)
            entering = torch.from_numpy(np.fromfile(folder / str(index), np.float32)).view_as(gradient)
            chunks = []
            for states_in, gradient_out in zip(
                row_chunks(entering, CHUNK_TOKENS), row_chunks(gradient, CHUNK_TOKENS), strict=True
            ):
                # states: the input of the layer and what follows each of its modules, (chunk, t, c) each.
                states = [states_in.clone().requires_grad_(True)]
                for kind in kinds:
                    source = states[0] if decoder.parallel else states[-1]
                    raw = module_raw(decoder, index, kind, weights, source, tables)
                    states.append(states[-1] + module_output(decoder, kind, weights, raw))
                # Keep the gradient of the layer's input, and of the others only their squared lengths (chunk, t).
                gradients = [*torch.autograd.grad(states[-1], states[:-1], gradient_out), gradient_out]
                gradients = [
                    _of_states(state_gradient, state) for state_gradient, state in zip(gradients, states, strict=True)
                ]
                chunks.append(
                    [gradients[0], *(state_gradient.square().sum(dim=-1) for state_gradient in gradients[1:])]
                )
            # Join the chunks of samples.
            gradient, *squared_lengths = (torch.cat(chunk_results) for chunk_results in zip(*chunks, strict=True))
            energies[index] = dict(zip(kinds, squared_lengths, strict=True))
            on_layer()
    return TokenGradients(energies, gradient.square().sum(dim=-1))


def _of_states(gradient: torch.Tensor, state: torch.Tensor) -> torch.Tensor:
    """Returns the gradient (b, t, c), with 0 for every token whose state is all zeros.

    Some models embed padding as zeros. A norm turns the least change of such a state into all of its direction, and
    several layers of norms would make that gradient infinite.
    """
    return torch.where((state.detach() != 0).any(dim=-1, keepdim=True), gradient, 0.0)


def drawn(shares: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Returns one label (n,) int64 for each row of shares (n, labels), by their running sums: torch.multinomial draws a
    random number for each label."""
    sums = shares.cumsum(dim=-1)
    places = torch.rand(len(shares), 1, generator=generator) * sums[:, -1:]
    return torch.searchsorted(sums, places, right=True).clamp_max_(shares.shape[1] - 1).squeeze(1)


def _head_gradient(model: Model, hidden: torch.Tensor, seed: int) -> torch.Tensor:
    """Returns dL/dh (b, t, c) behind the last layer, for labels drawn from the model's distribution."""
    decoder = model.decoder
    generator = torch.Generator().manual_seed(seed)
    norm = {name: model.weights[name].float() for name in decoder.norm_shapes("norm")}
    head = model.weights["embedding" if decoder.tie_word_embeddings else "head"].float()
    gradients = []
    # The logits of a few positions at a time are in memory.
    for chunk_states in hidden.flatten(0, 1).split(LOGIT_ROWS):
        states = chunk_states.requires_grad_(True)
        logits = head_logits(decoder, normed(decoder, states, norm, "norm"), head)  # (n, vocab_size)
        labels = drawn(F.softmax(logits.detach(), dim=-1), generator)  # (n,)
        loss = F.cross_entropy(logits, labels, reduction="sum")
        gradients.append(torch.autograd.grad(loss, states)[0])
    return torch.cat(gradients).view_as(hidden)
