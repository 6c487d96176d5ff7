"""Weights in the formats of ggml with drawn codes, on grids of all kinds."""

from __future__ import annotations

import torch

from edgeprune.model.quantised import SMALLEST_SCALE, QuantisedWeight
from edgeprune.precision import WEIGHT_FORMATS, WeightFormat

GGML_FORMATS = {name: form for name, form in WEIGHT_FORMATS.items() if form.storage == "gguf"}


def drawn_blocks(form: WeightFormat, seed: int, outputs: int = 6, inputs: int = 512) -> QuantisedWeight:
    """Codes, scales and units of their whole ranges, tiny and zero ones among them."""
    generator = torch.Generator().manual_seed(seed)

    def whole(least: int, most: int, *shape: int) -> torch.Tensor:
        return torch.randint(least, most + 1, shape, generator=generator)

    def halves(*shape: int, signed: bool) -> torch.Tensor:
        numbers = (2 ** (torch.rand(shape, generator=generator) * 34 - 24)).half().float()  # up to 1024
        return numbers * (whole(0, 1, *shape) * 2 - 1) if signed else numbers

    groups, codes = form.groups_of(inputs), whole(form.least, form.most, outputs, inputs).to(torch.int8)
    if form.block is None:
        scales = halves(outputs, groups, signed=form.signed_scales)
        scales[0, 0] = SMALLEST_SCALE
        minima = halves(outputs, groups, signed=True) if form.offset else None
        return QuantisedWeight(form, codes, scales, minima=minima)
    block = form.block
    units = halves(outputs, inputs // block.inputs, signed=block.signed)
    units[1, 0] = 0.0
    steps = whole(block.least, block.most, outputs, groups).float()
    steps[1, : block.inputs // form.group] = 0.0  # what is left of them
    scales = steps * units.repeat_interleave(block.inputs // form.group, dim=1)
    if not form.offset:
        return QuantisedWeight(form, codes, scales, units=units)
    minimum_units = halves(outputs, inputs // block.inputs, signed=False)
    minimum_units[2, 0] = 0.0
    minima = whole(0, block.most, outputs, groups) * minimum_units.repeat_interleave(block.inputs // form.group, dim=1)
    return QuantisedWeight(form, codes, scales, minima=-minima, units=units, minimum_units=minimum_units)


def assert_equal(found: QuantisedWeight, expected: QuantisedWeight) -> None:
    assert found.form == expected.form
    assert found.parts.keys() == expected.parts.keys()
    for name, part in expected.parts.items():
        assert found.parts[name].dtype == part.dtype, name
        assert torch.equal(found.parts[name], part), name
