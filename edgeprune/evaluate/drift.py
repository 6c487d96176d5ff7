"""Distance of texts from calibration data, in the second moments of what the modules of a model read.

The closed-form update of a pruned module is a function of the second moments of its output projection's inputs: where
new texts have the same, it is right for them too. The distance is compared with that of the calibration samples from
each other. It knows token ids and no tokenizer.

Shapes: m modules, n samples, f features of a sketch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

from edgeprune.model.attention import LayerWeights, Tables
from edgeprune.model.decoder import Decoder
from edgeprune.model.forward import (
    BIAS,
    CHUNK_TOKENS,
    OUTPUT,
    add_module,
    check_finite,
    embed,
    entering,
    has_experts,
    module_activation,
    module_output,
    module_states,
    modules_of,
    row_chunks,
)
from edgeprune.model.model import Model
from edgeprune.model.quantised import input_scale_of, rounded_inputs, values_by_name

PROJECTED = 16  # dimensions that a module's inputs are projected to, at random
FEATURES = PROJECTED * (PROJECTED + 1) // 2  # of the moments of these
SPLITS = 2000  # of the calibration samples, for the null distribution
LEAST_SAMPLES = 4  # of either side: fewer have no splits worth the name
CONFIDENCE = 0.95


@dataclass(frozen=True)
class Distance:
    """The distance of new samples from calibration samples, relative to the length of the latter's moments.

    value: the root of the unbiased squared distance, 0 where that is below 0; limit: what 95 % of the splits of the
    calibration samples stay below; p: the share of the splits that lie as far apart.
    """

    value: float
    limit: float
    p: float

    @property
    def is_drift(self) -> bool:
        return self.value > self.limit


@dataclass(frozen=True)
class Drift:
    """The distance of the new samples over all modules, each of the same weight, and by module.

    samples: (n new,), of each by itself from the calibration data's mean; covering: all new samples in the order in
    which they stand for the new texts best.
    """

    whole: Distance
    modules: tuple[Distance, ...]
    samples: np.ndarray
    covering: tuple[int, ...]


def module_names(decoder: Decoder) -> list[tuple[int, str]]:
    """Returns layer and kind of every module, in the order of the sketches."""
    return [(index, kind) for index in range(len(decoder.layers)) for kind in modules_of(decoder, index)]


@torch.inference_mode()
def sketches(model: Model, ids: np.ndarray, on_layer: Callable[[], None] = lambda: None) -> np.ndarray:
    """Returns the second moments of what every module's output projection reads, sketched: (m, n, f) fp32.

    ids: (n, tokens) int64. A token's inputs are divided by the length of the residual stream, as in the update, and
    projected to PROJECTED dimensions by signs that depend on the module alone; a sample's sketch is the mean over its
    tokens of their products. Its Euclidean distances are those of the moments, but for the projection (Johnson and
    Lindenstrauss 1984). Of a mixture of experts, what the module itself reads. Raises NumericalError where activations
    are not finite.
    """
    decoder, rows = model.decoder, []
    hidden, tables = embed(model, torch.from_numpy(ids)), Tables(decoder, ids.shape[1])  # (n, t, c)
    for index in range(len(decoder.layers)):
        prefix = f"layers.{index}."
        weights = values_by_name(
            (name.removeprefix(prefix), model.stored[name]) for name in decoder.layer_shapes(index)
        )
        source = entering(decoder, hidden)
        for kind in modules_of(decoder, index):
            parts = zip(row_chunks(hidden, CHUNK_TOKENS), row_chunks(source, CHUNK_TOKENS), strict=True)
            rows.append(torch.cat([_add(decoder, index, kind, weights, tables, len(rows), *part) for part in parts]))
        on_layer()
    return torch.stack(rows).numpy()


def _add(
    decoder: Decoder,
    index: int,
    kind: str,
    weights: LayerWeights,
    tables: Tables,
    number: int,
    hidden: torch.Tensor,
    source: torch.Tensor,
) -> torch.Tensor:
    """Adds a module's output to hidden (b, t, c) in place and returns the sketches (b, f) of what it reads.

    number: of the module; source: (b, t, c), what it reads of the stream.
    """
    if has_experts(decoder, index, kind):
        inputs = module_states(decoder, kind, weights, source)  # (b, t, c)
        add_module(decoder, index, kind, weights, hidden, tables, source=source)
    else:
        inputs = module_activation(decoder, index, kind, weights, source, tables)  # (b, t, features)
        form = getattr(decoder.layers[index], kind).weight_format
        inputs = rounded_inputs(inputs, weights.get(input_scale_of(OUTPUT[kind])), form)
        hidden += module_output(
            decoder, kind, weights, F.linear(inputs, weights[OUTPUT[kind]], weights.get(BIAS[kind]))
        )
    check_finite(hidden, index, kind)
    length = hidden.norm(dim=-1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
    projected = (inputs / length) @ _signs(inputs.shape[-1], number)  # (b, t, p)
    return _upper(projected.mT @ projected / projected.shape[1])


def _signs(features: int, number: int) -> torch.Tensor:
    """Returns random signs (features, PROJECTED) fp32 of a module, over the root of PROJECTED: the same everywhere."""
    words = np.random.PCG64(number).random_raw(-(-features * PROJECTED // 64))  # whose stream numpy guarantees
    bits = np.unpackbits(words.astype("<u8").view(np.uint8), bitorder="little")[: features * PROJECTED]
    return torch.from_numpy(bits.reshape(features, PROJECTED).astype(np.float32) * 2 - 1) / PROJECTED**0.5


def _upper(moments: torch.Tensor) -> torch.Tensor:
    """Returns symmetric matrices (b, p, p) as vectors (b, f) of the same inner products."""
    row, column = torch.triu_indices(PROJECTED, PROJECTED)
    return moments[:, row, column] * torch.where(row == column, 1.0, 2.0**0.5)


def drift(calibration: np.ndarray, new: np.ndarray, seed: int, splits: int = SPLITS) -> Drift:
    """Returns how far new samples lie from calibration samples, both sketches (m, any, f).

    The squared distance is the unbiased estimate of the maximum mean discrepancy (Gretton et al. 2012, eq. 3) with the
    kernel of the samples' moments, <M_i, M_j>: its mean is 0 where both come from one distribution, whatever the
    numbers of samples. Its null distribution is that of random splits of the calibration samples, of which one side
    has as many samples as are new, or half of all: never more of either than there are, so that the limit is cautious.
    """
    old, count = calibration.shape[1], new.shape[1]
    # Inner products of all samples, relative to the calibration data's mean moments: (m, old + count, same).
    pooled = np.concatenate([calibration, new], axis=1).astype(np.float64)
    products = pooled @ pooled.transpose(0, 2, 1)
    products /= products[:, :old, :old].mean(axis=(1, 2))[:, None, None]
    ours = np.arange(old + count) >= old
    distances = _squared(products, ours[None])[:, 0]  # (m,)
    # The same of splits of the calibration samples.
    generator, part = np.random.default_rng(seed), min(count, old // 2)
    sides = generator.random((splits, old)).argsort(axis=1) < part  # (splits, old)
    null = _squared(products[:, :old, :old], sides)  # (m, splits)
    mean = products.mean(axis=0)  # (old + count, same)
    own = np.diagonal(mean)[old:] - 2 * mean[old:, :old].mean(axis=1) + mean[:old, :old].mean()
    return Drift(
        _distance(distances.mean(), null.mean(axis=0)),
        tuple(map(_distance, distances, null)),
        np.sqrt(np.maximum(own, 0.0)),
        covering(mean[old:, old:]),
    )


def _squared(products: np.ndarray, sides: np.ndarray) -> np.ndarray:
    """Returns the unbiased squared distances (m, s) of the two sides of splits (s, n) bool, by the samples' inner
    products (m, n, n)."""
    ours = sides.astype(np.float64)
    theirs = 1 - ours
    diagonal = np.diagonal(products, axis1=1, axis2=2)  # (m, n)

    def within(side: np.ndarray) -> np.ndarray:
        count = side.sum(axis=1)  # (s,)
        whole = np.einsum("si,mij,sj->ms", side, products, side, optimize=True)
        return (whole - diagonal @ side.T) / (count * (count - 1))

    between = np.einsum("si,mij,sj->ms", ours, products, theirs, optimize=True)
    return within(ours) + within(theirs) - 2 * between / (ours.sum(axis=1) * theirs.sum(axis=1))


def _distance(squared: float, null: np.ndarray) -> Distance:
    """Returns a distance by its square and those of the splits (splits,)."""
    limit = np.quantile(null, CONFIDENCE)
    p = (1 + (null >= squared).sum()) / (1 + len(null))
    return Distance(*(float(np.sqrt(max(0.0, value))) for value in (squared, limit)), float(p))


def covering(products: np.ndarray) -> tuple[int, ...]:
    """Returns all samples, by their inner products (n, n), in the order of kernel herding (Chen, Welling and Smola
    2010): each brings the mean of those before it, and itself, as near to the mean of all as it can."""
    count, target = len(products), products.mean(axis=1)
    chosen: list[int] = []
    for size in range(1, count + 1):
        # Squared distance of the mean with each further sample from the mean of all, but for a constant: (n,).
        between = products[:, chosen].sum(axis=1)
        squared = (2 * between + np.diagonal(products)) / size**2 - 2 * target / size
        squared[chosen] = np.inf
        chosen.append(int(squared.argmin()))
    return tuple(chosen)
