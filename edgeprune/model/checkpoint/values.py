"""The scales and offsets of weights of few bits that no loader takes packed, in a small file beside their values.

places.py says which weights these are. A checkpoint holds their values, in fp32, which are the codes times their
scales, added to the minima. With these the codes follow from the values. The file is in the format of safetensors,
under a name that no other loader takes for weights.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from edgeprune.model.checkpoint.configuration import valued_formats
from edgeprune.model.checkpoint.places import Shape
from edgeprune.model.checkpoint.safetensors_file import tensor_bytes, write_header
from edgeprune.model.decoder import Decoder
from edgeprune.precision import WeightFormat

if TYPE_CHECKING:
    import torch

    from edgeprune.model.model import Stored
    from edgeprune.model.quantised import QuantisedWeight

SCALES_FILE = "weights.scales"


def parts_of(form: WeightFormat) -> dict[str, torch.dtype]:
    """Returns what the file holds of a weight in a format: the names of its parts but the codes, and their types."""
    import torch

    offsets = {None: {}, "zero": {"zeros": torch.int8}, "minimum": {"minima": torch.float32}}[form.offset]
    return {"scales": torch.float32} | offsets


def scale_entries(decoder: Decoder) -> dict[str, tuple[torch.dtype, Shape]]:
    """Returns type and shape of all that the file holds for a decoder, by `{weight}.{part}`; empty where it has none.

    They come in the order of decoder.shapes().
    """
    shapes, entries = decoder.shapes(), {}
    for name, form in valued_formats(decoder).items():
        rows, columns = shapes[name]
        entries |= {
            f"{name}.{part}": (dtype, (rows, form.groups_of(columns))) for part, dtype in parts_of(form).items()
        }
    return entries


def with_values(
    decoder: Decoder, weights: Iterable[tuple[str, Stored]], directory: Path
) -> Iterator[tuple[str, Stored]]:
    """Yields the weights with values in place of the codes that are not packed; writes their scales into the file.

    weights: in the order of decoder.shapes().
    """
    from edgeprune.model.quantised import QuantisedWeight

    if not (entries := scale_entries(decoder)):
        yield from weights
        return
    valued = valued_formats(decoder)
    with (directory / SCALES_FILE).open("wb") as file:
        write_header(file, entries)
        for name, weight in weights:
            if isinstance(weight, QuantisedWeight) and name in valued:
                for part, dtype in parts_of(weight.form).items():
                    file.write(tensor_bytes(getattr(weight, part).to(dtype).contiguous()))
                weight = weight.dequantised()
            yield name, weight
            del weight  # freed before the next one is made


def codes_of(
    form: WeightFormat,
    values: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor | None = None,
    minima: torch.Tensor | None = None,
) -> QuantisedWeight:
    """Returns the weight of values (rows, columns), each a whole number of steps from its minimum.

    scales, zeros, minima: (rows, groups), as QuantisedWeight has them. A code times its scale is exact in fp32, and the
    sum with a minimum is off by less than half a step, or other codes stand for the same sum.
    """
    import torch

    from edgeprune.model.quantised import QuantisedWeight

    grouped = values.float().unflatten(1, (scales.shape[1], -1))  # (rows, groups, group)
    steps = (grouped if minima is None else grouped - minima[..., None]) / scales[..., None]
    codes = steps.round() + (0 if zeros is None else zeros[..., None])
    codes = codes.flatten(1).clamp(form.least, form.most).to(torch.int8)
    return QuantisedWeight(form, codes, scales, zeros, minima=minima)
