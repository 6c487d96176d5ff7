"""Formats that differ in a model, checkpoints of codes, and what transformers makes of these."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers
from transformers import PreTrainedModel

from edgeprune.model.decoder import Decoder
from edgeprune.model.levels import codes_of, nearest, nearest_e4m3
from edgeprune.model.model import Model
from edgeprune.model.quantised import QuantisedWeight, storable
from edgeprune.model.save import save_checkpoint
from edgeprune.precision import WEIGHT_FORMATS, WeightFormat
from tests.support.roundings import INT8, Stored, numbers

WITHOUT = "pip install edgeprune[runtimes]"  # compressed-tensors
PACKED_FORMATS = {name: form for name, form in WEIGHT_FORMATS.items() if form.storage == "packed"}  # in checkpoints
FLOAT_FORMATS = {name: form for name, form in WEIGHT_FORMATS.items() if form.storage == "floats"}  # there too
INT4, ASYMMETRIC = (WEIGHT_FORMATS[name] for name in ("int4-32", "int4-32-asymmetric"))


def packable(decoder: Decoder, asymmetric: bool = False, tables: bool = True) -> Decoder:
    """Other formats in every layer, floats among them; experts have one. Groups of 32 where they divide the widths."""
    small = ASYMMETRIC if asymmetric else INT4
    if decoder.hidden_size % small.group:
        small = INT8
    attentions, mlps = (INT8, small, None), (small, INT8, None)
    if decoder.layers[0].mlp.experts:
        mlps = (INT4,) * 3
    layers = [(attentions[index % 3], mlps[index % 3]) for index in range(len(decoder.layers))]
    return decoder.with_formats(layers, INT8 if tables else None, INT8 if tables else None)


def random_codes(form: WeightFormat, rows: int, columns: int, seed: int = 0) -> QuantisedWeight:
    generator = torch.Generator().manual_seed(seed)

    def drawn(*shape: int) -> torch.Tensor:
        levels = torch.randint(form.least, form.most + 1, shape, generator=generator).float()
        return codes_of(nearest(levels, form.levels, form.least, form.most), form.levels)

    groups = form.groups_of(columns)
    scales = storable(torch.rand(rows, groups, generator=generator) + 0.1)
    zeros = drawn(rows, groups) if form.offset == "zero" else None
    input_scale = storable(torch.rand((), generator=generator)) if form.activation_bits else None
    unit = torch.tensor(2.0**-7) if form.e4m3_scales else None
    if unit is not None:
        scales, input_scale = nearest_e4m3(scales / unit) * unit, torch.tensor(2.0**-9)
    weight = QuantisedWeight(form, drawn(rows, columns), scales, zeros, input_scale, scale_unit=unit)
    if form.offset != "minimum":
        return weight
    minima = torch.rand(rows, groups, generator=generator) - 0.5
    return replace(weight, minima=storable(minima.abs()).copysign(minima))


def random_weights(decoder: Decoder) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {name: 0.2 * torch.randn(shape, generator=generator) for name, shape in decoder.shapes().items()}


def assert_stored(model: Model, decoder: Decoder, weights: Stored) -> None:
    """The model has the decoder's formats and exactly these codes; its floats may be rounded by a shift or factor."""
    assert model.decoder.weight_formats == decoder.weight_formats
    assert list(model.quantised) == list(decoder.weight_formats)
    for name, weight in weights.items():
        if isinstance(weight, QuantisedWeight):
            found = model.quantised[name]
            assert found.form == weight.form
            assert found.codes.dtype == torch.int8
            assert torch.equal(found.codes, weight.codes)
            assert found.parts.keys() == weight.parts.keys()
            assert all(torch.equal(part, weight.parts[key]) for key, part in found.parts.items())
            assert found.input_scale == weight.input_scale
            assert found.scale_unit == weight.scale_unit
            assert model.weights[name].dtype == torch.float32
            assert torch.equal(model.weights[name], weight.dequantised())
        else:
            assert torch.allclose(model.weights[name], weight, rtol=1e-6, atol=1e-6)


def in_transformers(folder: Path, **options: object) -> PreTrainedModel:
    """The checkpoint as `from_pretrained` loads it, in fp32 by default, with no tensor missing or left over."""
    pytest.importorskip("compressed_tensors", reason=WITHOUT)
    name = json.loads((folder / "config.json").read_text())["architectures"][0]
    model, notes = getattr(transformers, name).from_pretrained(
        folder, output_loading_info=True, **({"dtype": torch.float32} | options)
    )
    assert not notes["missing_keys"] | notes["unexpected_keys"] | notes["mismatched_keys"], notes
    return model.eval()


def logits_of(model: PreTrainedModel, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(ids).logits


def save_both(decoder: Decoder, weights: Stored, source: Model, folder: Path) -> tuple[Path, Path]:
    """The checkpoint of the codes, and one of the numbers that they stand for."""
    save_checkpoint(decoder, weights.items(), source, folder / "codes", dtype=torch.float32)
    floats = decoder.with_format(None)
    save_checkpoint(floats, numbers(weights).items(), source, folder / "floats", dtype=torch.float32)
    return folder / "codes", folder / "floats"
