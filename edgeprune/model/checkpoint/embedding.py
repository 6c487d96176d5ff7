"""The scales of an embedding of few bits, in a small file of their own beside the weights.

transformers loads no packed embedding, so its values are stored, in fp32, which holds each code times its scale. With
the scales the codes follow from them. The file is in the format of safetensors, under a name that no other loader
takes for weights.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from edgeprune.precision import WeightFormat

if TYPE_CHECKING:
    import torch

    from edgeprune.model.model import Stored
    from edgeprune.model.quantised import QuantisedWeight

EMBEDDING_SCALES = "embedding.scales"


def scale_parts(form: WeightFormat) -> dict[str, str]:
    """Returns the names in the file of a format's embedding, and their dtypes."""
    return {"scales": "F32"} | ({"zeros": "I8"} if form.offset else {})


def with_embedding_values(weights: Iterable[tuple[str, Stored]], directory: Path) -> Iterator[tuple[str, Stored]]:
    """Yields the weights with the values of an embedding in place of its codes; writes its scales into the file."""
    from safetensors.torch import save_file

    from edgeprune.model.quantised import QuantisedWeight

    for name, weight in weights:
        if name == "embedding" and isinstance(weight, QuantisedWeight):
            parts = {part: getattr(weight, part).contiguous() for part in scale_parts(weight.form)}
            save_file(parts, directory / EMBEDDING_SCALES)
            weight = weight.dequantised()
        yield name, weight
        del weight  # freed before the next one is made


def codes_of(
    form: WeightFormat, values: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor | None = None
) -> QuantisedWeight:
    """Returns the weight of an embedding's values (rows, columns), each a whole number of steps: zero for the code 0.

    scales: (rows, groups) fp32; zeros: (rows, groups) int8. A value is a code times its scale without any error, so
    that the quotient is the code.
    """
    import torch

    from edgeprune.model.quantised import QuantisedWeight

    steps = values.float().unflatten(1, (scales.shape[1], -1)) / scales[..., None]  # (rows, groups, group)
    codes = steps.round() + (0 if zeros is None else zeros[..., None])
    return QuantisedWeight(form, codes.flatten(1).clamp(form.least, form.most).to(torch.int8), scales, zeros)
