"""SliceGPT (Ashkboos et al. 2024, arXiv 2401.15024): the residual stream in its principal components, the last cut.

Every module reads the stream in a basis of its own, so that a matrix beside it, its shortcut, takes the stream from one
basis to the next; a tied head is a matrix of its own. The result is therefore no Decoder: no file format and no graph
here has shortcuts, and only comparisons use it. Behind the last module the stream is in the dense model's basis again,
as in the authors' program, which does not slice the head either; unlike there, the mean of each embedding stays, which
norms other than RMS alone take away.

Shapes: b samples, t tokens, c hidden_size, d features that are kept, n the features behind a module: d, or c behind the
last one.
"""

from __future__ import annotations

import bisect
from collections.abc import Iterator
from math import prod

import torch
import torch.nn.functional as F

from edgeprune.errors import InputError
from edgeprune.model.attention import LayerWeights, Tables, attention_context
from edgeprune.model.decoder import Decoder
from edgeprune.model.forward import (
    BIAS,
    CHUNK_TOKENS,
    OUTPUT,
    WeightStream,
    check_finite,
    embed,
    layer_weights,
    modules_of,
    normed,
    row_chunks,
)
from edgeprune.model.mlp import mlp_activation
from edgeprune.model.model import Model
from edgeprune.pruning.moments import CHUNK

SLICEGPT = "slicegpt"
WORDS = "least principal components of the residual stream (SliceGPT, Ashkboos et al. 2024); in torch, never exported"
SHORTCUT = "shortcut"


def check_sliceable(decoder: Decoder) -> None:
    """Raises InputError for a model whose stream cannot be rotated without a change of what it computes."""
    plain = decoder.norm == "rms" and decoder.norms == "before" and not decoder.parallel
    mixed = any(layer.mlp and layer.mlp.experts for layer in decoder.layers)
    if not plain or decoder.learned_positions or mixed or decoder.weight_formats:
        raise InputError(
            f"slicegpt does not take models of the family {decoder.family}: it needs weights in floats, no experts, no "
            "table of positions, and one RMS norm before each module, attention and MLP one after the other",
            "Leave slicegpt out of --methods.",
        )


def sliced_shapes(decoder: Decoder, width: int) -> dict[str, tuple[int, ...]]:
    """Returns the shape of every weight of the sliced model, by name, in the order in which they are used.

    width: the features that are kept, d. The norms of the modules are folded into the matrices that read them.
    """
    shapes: dict[str, tuple[int, ...]] = {"embedding": (decoder.input_vocab_size, width)}
    modules = _modules(decoder)
    for number, (index, kind) in enumerate(modules):
        behind = width if number + 1 < len(modules) else decoder.hidden_size
        prefix = f"layers.{index}."
        for full, shape in decoder.layer_shapes(index).items():
            name = full.removeprefix(prefix)
            if not name.startswith(kind) or name == f"{kind}.norm":
                continue
            if name in _readers(decoder, index, kind):
                shape = (shape[0], width)
            elif name in (OUTPUT[kind], BIAS[kind]):
                shape = (behind, *shape[1:])
            shapes[full] = shape
        shapes[f"{prefix}{kind}.{SHORTCUT}"] = (width, behind)
    return shapes | {"norm": (decoder.hidden_size,), "head": (decoder.vocab_size, decoder.hidden_size)}


def sliced_layer_parameters(decoder: Decoder, width: int) -> int:
    """Returns the number of parameters of the attention and MLP matrices, shortcuts included."""
    shapes = sliced_shapes(decoder, width).items()
    return sum(prod(shape) for name, shape in shapes if name.startswith("layers.") and len(shape) == 2)


def widest_slice(decoder: Decoder, capacity: int) -> int:
    """Returns the most features whose attention and MLP matrices, shortcuts included, have at most `capacity`
    parameters; 0 where a single one has more."""
    widths = range(1, decoder.hidden_size + 1)
    return bisect.bisect_right(widths, capacity, key=lambda width: sliced_layer_parameters(decoder, width))


@torch.inference_mode()
def principal_components(hidden: torch.Tensor, width: int) -> torch.Tensor:
    """Returns the first components (c, width) fp32 of the states (b, t, c), their means not taken away.

    In fp64 throughout: the states of a few tokens are hundreds of times longer than the others.
    """
    total = torch.zeros(hidden.shape[-1], hidden.shape[-1], dtype=torch.float64)
    for rows in hidden.flatten(0, 1).split(CHUNK):
        rows = rows.double()
        total += rows.T @ rows
    return torch.linalg.eigh(total).eigenvectors.flip(1)[:, :width].float()  # eigh's values rise


def slice_model(model: Model, width: int, ids: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
    """Yields the weights of the sliced model fp32, by the names and in the order of `sliced_shapes`.

    width: the features that are kept, d; ids: calibration samples (b, t) int64. The components of each module's states
    are those of the stream behind the modules that are sliced already. One module is in memory at a time. Raises
    NumericalError naming the layer whose activations are not finite.
    """
    decoder, modules = model.decoder, _modules(model.decoder)
    tables = Tables(decoder, ids.shape[1])
    hidden = embed(model, ids)  # (b, t, c), the stream in the dense model's basis
    basis = principal_components(hidden, width)  # (c, d)
    yield "embedding", model.weights["embedding"].float() @ basis
    for number, (index, kind) in enumerate(modules):
        with torch.inference_mode():
            # Fold the norm into the matrices that read it, and turn these into the basis of the sliced stream.
            weights = layer_weights(model, index, kind)
            norm = weights.pop(f"{kind}.norm")
            for name in _readers(decoder, index, kind):
                weights[name] = (weights[name] * norm) @ basis
            # Move the stream, and find the next basis behind the module.
            weights[f"{kind}.{SHORTCUT}"] = basis.T
            hidden = _behind(decoder, index, kind, weights, hidden @ basis, tables)
            is_last = number + 1 == len(modules)
            basis = torch.eye(decoder.hidden_size) if is_last else principal_components(hidden, width)
            # Turn the outputs into that one.
            weights[OUTPUT[kind]] = basis.T @ weights[OUTPUT[kind]]
            if BIAS[kind] in weights:
                weights[BIAS[kind]] = weights[BIAS[kind]] @ basis
            weights[f"{kind}.{SHORTCUT}"] = weights[f"{kind}.{SHORTCUT}"] @ basis
        yield from ((f"layers.{index}.{name}", weight) for name, weight in weights.items())
    yield "norm", model.weights["norm"].float()
    yield "head", model.weights["embedding" if decoder.tie_word_embeddings else "head"].float()


@torch.inference_mode()
def sliced_states(decoder: Decoder, weights: WeightStream, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns what the head reads at every position but the last of each sample, (b * (t - 1), c), and the head.

    decoder: the dense one; weights: those of the sliced model, consumed as they come; ids: (b, t) int64.
    """
    stream, ids = iter(weights), ids[:, :-1]
    table = next(stream)[1]
    hidden = F.embedding(ids, table) * decoder.embedding_scale  # (b, t - 1, d)
    names, tables = sliced_shapes(decoder, table.shape[1]), Tables(decoder, ids.shape[1])
    del table
    for index, kind in _modules(decoder):
        prefix = f"layers.{index}."
        own = {name.removeprefix(prefix): next(stream)[1] for name in names if name.startswith(f"{prefix}{kind}.")}
        hidden = _behind(decoder, index, kind, own, hidden, tables)
    states = normed(decoder, hidden, dict([next(stream)]), "norm").flatten(0, 1)
    return states, next(stream)[1]


def _modules(decoder: Decoder) -> list[tuple[int, str]]:
    """Returns layer and kind of all modules, in the order in which they run."""
    return [(index, kind) for index in range(len(decoder.layers)) for kind in modules_of(decoder, index)]


def _readers(decoder: Decoder, index: int, kind: str) -> list[str]:
    """Returns the names of the matrices that read the stream."""
    return [f"{kind}.{name}" for name in (decoder.layers[index].mlp.inputs if kind == "mlp" else "qkv")]


def _behind(
    decoder: Decoder, index: int, kind: str, weights: LayerWeights, hidden: torch.Tensor, tables: Tables
) -> torch.Tensor:
    """Returns the stream (b, t, n) behind a module that reads the sliced stream hidden (b, t, d).

    The norm divides by the length over all c features: those that are cut off count as zeros.
    """
    layer, eps = decoder.layers[index], decoder.norm_eps
    output = torch.empty(*hidden.shape[:2], len(weights[OUTPUT[kind]]))
    for behind, part in zip(row_chunks(output, CHUNK_TOKENS), row_chunks(hidden, CHUNK_TOKENS), strict=True):
        states = part * (part.square().sum(dim=-1, keepdim=True) / decoder.hidden_size + eps).rsqrt()
        if kind == "mlp":
            inputs = mlp_activation(states, weights, layer.mlp)
        else:
            inputs = attention_context(states, weights, layer.attention, tables, eps)
        behind.copy_(F.linear(inputs, weights[OUTPUT[kind]], weights.get(BIAS[kind])))
        check_finite(behind, index, kind)
        behind += part @ weights[f"{kind}.{SHORTCUT}"]
    return output
