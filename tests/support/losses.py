"""Predicted losses of no model."""

import numpy as np

from edgeprune.precision import CACHE_FORMATS, WEIGHT_FORMATS
from edgeprune.search.widths import CacheLosses, RoundingLosses, Sensitivities


def sensitivities(seed: int, layers: int = 3) -> Sensitivities:
    """Losses that fall with the width, of layers with 2 groups of 3 heads and 20 channels."""
    generator = np.random.default_rng(seed)
    attention = np.zeros((layers, 3, 3))
    for layer in attention:
        layer[1:] = np.sort(generator.random(6))[::-1].reshape(2, 3)
        layer[0], layer[2, 2] = 1 + generator.random(), 0.0
    mlp = -np.sort(-generator.random((layers, 21)), axis=1)
    mlp[:, -1] = 0.0
    roundings = {
        name: RoundingLosses(generator.random(layers), generator.random(layers), *generator.random(3))
        for name in WEIGHT_FORMATS
    }
    caches = {name: CacheLosses(0.1 * generator.random(layers), 1.5) for name in CACHE_FORMATS}
    return Sensitivities(attention, mlp, generator.random(3) + 0.5, roundings, caches)
