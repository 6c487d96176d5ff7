"""The error of cut modules on unseen text by the number of samples that they were chosen and refitted on.

It does not know how the samples were chosen.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from edgeprune.model.model import Model
from edgeprune.pruning.compensate import DAMPINGS, least_squares_update
from edgeprune.pruning.moments import gram
from edgeprune.pruning.probes import Probe, visit_inputs
from edgeprune.pruning.score import Projection, obs
from edgeprune.pruning.select import features_of, top_units

REMOVED = 0.3  # of each module's units
ENOUGH = 0.05  # of the error: where twice the samples lower it by less, they are enough


@dataclass(frozen=True)
class CurvePoint:
    """The error on held-out documents with so many samples; tokens: of the documents that they are.

    error: ||Y - Y'||^2 / ||Y||^2 of the outputs of the probed modules, the mean over these.
    """

    samples: int
    tokens: int
    error: float


@torch.inference_mode()
def learning_curve(
    model: Model,
    held_out: Sequence[np.ndarray],
    documents: Sequence[np.ndarray],
    length: int,
    on_layer: Callable[[], None] = lambda: None,
) -> list[CurvePoint]:
    """Returns the errors with 2, 4, 8, ... samples, as far as the documents go, in their order.

    held_out, documents: (tokens,) int64 each; length: tokens of a sample. Of each probed module REMOVED of the units go
    by the default score, and the rest is refitted, on the dense model's inputs: no module sees what others lost.
    """
    ends = _ends([len(ids) for ids in documents], length)
    errors: dict[int, list[float]] = {samples: [] for samples in ends}
    moments: dict[Probe, _Moments] = {}

    def visit(probe: Probe, weight: torch.Tensor, number: int, inputs: torch.Tensor) -> None:
        of_probe = moments.setdefault(probe, _Moments())
        of_probe.rows.append(inputs)
        place = number + 1 - len(held_out)  # documents that are solved on so far
        if place == 0:
            of_probe.held_out = of_probe.drained()
        for samples in (samples for samples, end in ends.items() if end == place):
            if of_probe.rows:
                of_probe.solved = of_probe.solved + of_probe.drained()
            errors[samples].append(held_out_error(weight, of_probe.solved, of_probe.held_out, probe.unit))
        if place == len(documents):
            del moments[probe]

    visit_inputs(model, [*held_out, *documents], visit, on_layer)
    tokens = np.cumsum([len(ids) for ids in documents])
    return [CurvePoint(samples, int(tokens[end - 1]), float(np.mean(errors[samples]))) for samples, end in ends.items()]


@dataclass
class _Moments:
    """The moments (f, f) fp64 of one probe, of the held-out tokens and of those solved on, and rows (t, f) of neither
    yet."""

    held_out: torch.Tensor | float = 0.0
    solved: torch.Tensor | float = 0.0
    rows: list[torch.Tensor] = field(default_factory=list)

    def drained(self) -> torch.Tensor:
        """Returns the moments of the rows, which are forgotten."""
        total = gram(torch.cat(self.rows))
        self.rows.clear()
        return total


def _ends(tokens: Sequence[int], length: int) -> dict[int, int]:
    """Returns for 2, 4, 8, ... samples how many of the documents hold them."""
    total, ends = np.cumsum(tokens), {}
    samples = 2
    while samples * length <= total[-1]:
        ends[samples] = int(np.searchsorted(total, samples * length)) + 1
        samples *= 2
    return ends


def held_out_error(weight: torch.Tensor, moments: torch.Tensor, held_out: torch.Tensor, unit: int) -> float:
    """Returns the error on held-out tokens of an output projection that is cut and refitted on others.

    weight: (c, f) fp32; moments, held_out: (f, f) fp64. The kept columns are W_S + W_P G_PS (G_SS + g I)^-1 (Shen et
    al. 2025, eq. 8); of the dampings g the best one counts. With E the change of the weight the error is tr(E H E^T) /
    tr(W H W^T). Raises NumericalError.
    """
    units = weight.shape[1] // unit
    projection = Projection(weight, moments, torch.empty(0), torch.Generator())
    keep = max(1, round(units * (1 - REMOVED)))
    is_kept = torch.zeros(weight.shape[1], dtype=torch.bool)
    is_kept[features_of(top_units(obs(projection, unit, keep), keep), unit)] = True
    wide, errors = weight.double(), []
    cross = moments[is_kept][:, ~is_kept] @ wide[:, ~is_kept].T  # (kept, c)
    for damping in DAMPINGS[::2]:
        change = wide.clone()
        change[:, is_kept] = -least_squares_update(moments[is_kept][:, is_kept], cross.clone(), damping).T
        errors.append(float(((change @ held_out) * change).sum()))
    return min(errors) / float(((wide @ held_out) * wide).sum())


def enough(curve: Sequence[CurvePoint]) -> int | None:
    """Returns the fewest samples of which twice as many lower the error by less than ENOUGH; None: the most do not."""
    for point, double in zip(curve, curve[1:], strict=False):
        if double.error > (1 - ENOUGH) * point.error:
            return point.samples
    return None
