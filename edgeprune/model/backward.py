"""One backward pass of the whole model, a layer at a time: how much each token's state moves the loss.

The forward pass writes every layer's input to disk; the backward pass reads it again, together with the layer's
weights, in reverse order. So the activations and the weights of one layer at most are in memory. It hands out what it
computes on its way, so that nobody has to compute it again; it does not know what that is used for.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

from edgeprune.files import scratch_folder
from edgeprune.model.attention import LayerWeights, Tables
from edgeprune.model.decoder import Decoder
from edgeprune.model.forward import (
    BIAS,
    CHUNK_TOKENS,
    LOGIT_ROWS,
    OUTPUT,
    add_layer,
    embed,
    has_experts,
    head_logits,
    layer_weights,
    module_activation,
    module_output,
    module_raw,
    modules_of,
    normed,
    row_chunks,
)
from edgeprune.model.model import Model


@dataclass(frozen=True)
class ModuleStates:
    """A module of the dense model on b samples of t tokens: what it reads and gives, fp32, and how much that matters.

    weights: of its layer; source: (b, t, c), the stream that it reads; inputs: (b, t, in_features), of its output
    projection, None of a mixture of experts; raw: (b, t, c), the output of that projection, before any norm; energy:
    (b, t), ||dL/dh_t||^2 with h the stream behind the module.
    """

    index: int
    kind: str
    weights: LayerWeights
    source: torch.Tensor
    inputs: torch.Tensor | None
    raw: torch.Tensor
    energy: torch.Tensor


@dataclass(frozen=True)
class Ends:
    """Both ends of a backward pass: the stream behind the last layer (samples, tokens, c), and ||dL/dh_t||^2 behind the
    embedding (samples, tokens), fp32."""

    last: torch.Tensor
    embedding_energy: torch.Tensor


def token_gradients(
    model: Model,
    ids: torch.Tensor,
    seed: int,
    on_module: Callable[[ModuleStates], None],
    on_layer: Callable[[], None] = lambda: None,
) -> Ends:
    """Hands out the squared lengths of the gradients of the loss L by the stream's states h_t, module by module.

    L is the summed negative log-likelihood in nats of one label per token, drawn from the model's own distribution,
    so that E[g g^T] is the Fisher information (Martens 2020, arXiv 1412.1193): a change dy of the stream behind the
    module raises the loss by about 1/2 E[(g . dy)^2]. ids: (samples, tokens) int64. on_module is called for the last
    module first, without gradients; on_layer twice for each layer.
    """
    decoder = model.decoder
    count = len(decoder.layers)
    tables = Tables(decoder, ids.shape[1])
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
            entering = torch.from_numpy(np.fromfile(folder / str(index), np.float32)).view_as(gradient)
            parts = zip(row_chunks(entering, CHUNK_TOKENS), row_chunks(gradient, CHUNK_TOKENS), strict=True)
            chunks = [_backward(decoder, index, weights, *part, tables) for part in parts]
            gradient = torch.cat([of_input for of_input, _ in chunks])
            # Hand out the modules of all chunks as one, and free them before the next layer.
            modules = [list(of_chunk) for of_chunk in zip(*(states for _, states in chunks), strict=True)]
            del chunks
            with torch.inference_mode():
                while modules:
                    on_module(_joined(modules.pop()))
            on_layer()
    return Ends(hidden, gradient.square().sum(dim=-1))


def _backward(
    decoder: Decoder,
    index: int,
    weights: LayerWeights,
    states_in: torch.Tensor,
    gradient_out: torch.Tensor,
    tables: Tables,
) -> tuple[torch.Tensor, list[ModuleStates]]:
    """Returns the gradient by the input of a layer, and its modules, on a chunk of samples.

    states_in: (chunk, t, c), the input; gradient_out: (chunk, t, c), that of its output.
    """
    kinds = modules_of(decoder, index)
    # states: the input of the layer and what follows each of its modules, (chunk, t, c) each.
    states, found = [states_in.clone().requires_grad_(True)], []
    for kind in kinds:
        source = states[0] if decoder.parallel else states[-1]
        inputs = None
        if has_experts(decoder, index, kind):
            raw = module_raw(decoder, index, kind, weights, source, tables)
        else:
            inputs = module_activation(decoder, index, kind, weights, source, tables)
            raw = F.linear(inputs, weights[OUTPUT[kind]], weights.get(BIAS[kind]))
        states.append(states[-1] + module_output(decoder, kind, weights, raw))
        found.append((kind, source.detach(), None if inputs is None else inputs.detach(), raw.detach()))
    # Keep the gradient of the layer's input, and of the others only their squared lengths (chunk, t).
    gradients = [*torch.autograd.grad(states[-1], states[:-1], gradient_out), gradient_out]
    gradients = [_of_states(gradient, state) for gradient, state in zip(gradients, states, strict=True)]
    modules = [
        ModuleStates(index, kind, weights, source, inputs, raw, gradient.square().sum(dim=-1))
        for (kind, source, inputs, raw), gradient in zip(found, gradients[1:], strict=True)
    ]
    return gradients[0], modules


def _joined(chunks: list[ModuleStates]) -> ModuleStates:
    """Returns a module on all samples; consumes its chunks."""
    first = chunks[0]
    inputs = None if first.inputs is None else torch.cat([chunk.inputs for chunk in chunks])
    source, raw, energy = (
        torch.cat([getattr(chunk, name) for chunk in chunks]) for name in ("source", "raw", "energy")
    )
    chunks.clear()
    return ModuleStates(first.index, first.kind, first.weights, source, inputs, raw, energy)


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
        # The gradient of the loss by the logits: what the model expects, less the label.
        shares = F.softmax(logits.detach(), dim=-1)  # (n, vocab_size)
        shares[torch.arange(len(shares)), drawn(shares, generator)] -= 1.0
        gradients.append(torch.autograd.grad(logits, states, shares)[0])
    return torch.cat(gradients).view_as(hidden)
