"""A subset of documents whose second moments are those of all: chosen one by one, each the best beside those before.

Least squares and scores read the moments X^T X of the output projections' inputs alone, so that a subset with the
moments of the whole yields the same pruned model. They are compared as the whole sees them: with S the moments of the
whole and M those of a subset, both for each token, the distance is the mean over the probes of

    ||S^-1/2 M S^-1/2 - I||^2 / r

in r random directions (Johnson and Lindenstrauss 1984), in which a direction of small inputs counts as much as one of
large ones. The greedy choice is kernel herding (Chen, Welling and Smola 2010, arXiv 1203.3472) for these features.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch

from edgeprune.model.model import Model
from edgeprune.pruning.linear import cholesky
from edgeprune.pruning.probes import Probe, probes_of, visit_inputs

DIRECTIONS = 64  # r
WHITENING = 1e-3  # of the mean moment, added to those of the whole


def sketches(
    model: Model, documents: Sequence[np.ndarray], seed: int, on_layer: Callable[[], None] = lambda: None
) -> np.ndarray:
    """Returns the moments of each document for each token, less those of the whole, whitened by these.

    documents: (tokens,) int64 each. Returns (documents, features) fp32, whose squared norms are the distances above; a
    mean over documents, weighted by their tokens, gives that of these together. Raises NumericalError.
    """
    generator, probes = torch.Generator().manual_seed(seed), probes_of(model.decoder)
    moments = torch.zeros(len(documents), len(probes), DIRECTIONS, DIRECTIONS)
    directions: dict[Probe, torch.Tensor] = {}

    def visit(probe: Probe, weight: torch.Tensor, number: int, inputs: torch.Tensor) -> None:
        if probe not in directions:
            directions[probe] = torch.randn(inputs.shape[1], DIRECTIONS, generator=generator)
        projected = inputs @ directions[probe]  # (t, r)
        moments[number, probes.index(probe)] = projected.T @ projected / len(projected)

    visit_inputs(model, documents, visit, on_layer)
    weights = torch.tensor([len(ids) for ids in documents], dtype=torch.float64)
    weights /= weights.sum()
    features = []
    for place in range(len(probes)):
        of_probe = moments[:, place].double()  # (documents, r, r)
        whole = torch.einsum("n,nij->ij", weights, of_probe)  # (r, r)
        factor = cholesky(whole, WHITENING)
        left = torch.linalg.solve_triangular(factor, of_probe - whole, upper=False)
        whitened = torch.linalg.solve_triangular(factor, left.mT, upper=False)  # symmetric
        features.append(whitened.flatten(1).float() / (DIRECTIONS * len(probes)) ** 0.5)
    return torch.cat(features, dim=1).numpy()


class Herd:
    """The documents that are chosen so far, by their sketches; calling it returns the best of some to add.

    features: (documents, features), as from `sketches`; tokens: (documents,) of each.
    """

    def __init__(self, features: np.ndarray, tokens: np.ndarray) -> None:
        self._features, self._tokens = features, tokens.astype(np.float64)
        self._norms = np.einsum("nf,nf->n", features, features, dtype=np.float64)
        self._sum, self._taken = np.zeros(features.shape[1], np.float32), 0.0

    def __call__(self, candidates: np.ndarray) -> int:
        """Adds the one of the candidates (numbers) that brings the mean closest to the whole's, and returns it."""
        tokens = self._tokens[candidates]
        inner = self._features[candidates] @ self._sum
        size = float(self._sum @ self._sum)
        distances = (size + 2 * tokens * inner + tokens**2 * self._norms[candidates]) / (self._taken + tokens) ** 2
        chosen = int(candidates[int(np.argmin(distances))])
        self._sum += np.float32(self._tokens[chosen]) * self._features[chosen]
        self._taken += self._tokens[chosen]
        return chosen


def distance(features: np.ndarray, tokens: np.ndarray, chosen: Sequence[int]) -> float:
    """Returns how far the moments of the chosen documents are from those of the whole; 0: they are the same."""
    mean = np.average(features[list(chosen)], axis=0, weights=tokens[list(chosen)])
    return float(mean @ mean) ** 0.5
