"""The data files of a graph: the weights, once each, and those that do not fit."""

from __future__ import annotations

import dataclasses
import gc
import re
import weakref
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from edgeprune.engine.onnx import data as data_module
from edgeprune.engine.onnx.graph import graph_weight_bytes, write_graphs
from edgeprune.errors import InputError, NumericalError
from edgeprune.model.decoder import Attention, Decoder, Experts, Grid, Layer, Mlp, Picture, Rotary
from edgeprune.model.quantised import QuantisedWeight
from edgeprune.precision import WEIGHT_FORMATS, WeightFormat
from tests.support.graph_models import VARIANTS, llama
from tests.support.reference import decoder_of, weights_of
from tests.support.roundings import INT8, OF_LAYERS, OF_WEIGHTS, Stored, mixed, rounded


class CountingWeights(Mapping[str, "torch.Tensor | QuantisedWeight"]):
    """Hands out a new tensor at each access, and counts the accesses and the tensors alive."""

    def __init__(self, weights: Stored) -> None:
        self.weights, self.reads, self.alive, self.most_alive = weights, dict.fromkeys(weights, 0), 0, 0

    def __getitem__(self, name: str) -> torch.Tensor | QuantisedWeight:
        weight = self.weights[name]
        is_tensor = isinstance(weight, torch.Tensor)
        tensor = weight.clone() if is_tensor else dataclasses.replace(weight, codes=weight.codes.clone())
        self.reads[name] += 1
        self.alive += 1
        self.most_alive = max(self.most_alive, self.alive)
        weakref.finalize(tensor, self._forget)
        return tensor

    def _forget(self) -> None:
        self.alive -= 1

    def __iter__(self) -> Iterator[str]:
        return iter(self.weights)

    def __len__(self) -> int:
        return len(self.weights)


@pytest.mark.parametrize("has_formats", [False, True])
def test_each_weight_is_read_once_and_let_go(has_formats: bool, tmp_path: Path) -> None:
    model = llama(False)
    decoder = mixed(decoder_of(model.config)) if has_formats else decoder_of(model.config)
    weights = CountingWeights(rounded(decoder, weights_of(model)))
    gc.disable()  # letting go must not wait for the collector
    try:
        write_graphs(decoder, weights, tmp_path, "fp16", VARIANTS)
    finally:
        gc.enable()
    assert set(weights.reads.values()) == {1}
    assert weights.most_alive == 3  # query, key and value of one layer
    assert weights.alive == 0


ROTARIES = [Rotary((1.0, 0.1) * 4), Rotary((1.0, 0.5) * 4, grid=Grid(1, 2))]  # which ONNX Runtime turns


layers = st.builds(
    Layer,
    st.none()
    | st.builds(
        lambda k, g, rotary, norm, bias: Attention(
            k * g, k, 16, rotary, qk_norm=norm, input_bias=bias, output_bias=not bias
        ),
        st.integers(1, 3),
        st.integers(1, 3),
        st.sampled_from([None, *ROTARIES, Rotary((1.0,))]),
        st.sampled_from([None, "head", "all"]),
        st.booleans(),
    ),
    st.none()
    | st.builds(
        Mlp,
        st.integers(1, 9),
        gated=st.booleans(),
        input_bias=st.booleans(),
        output_bias=st.booleans(),
        experts=st.none(),
    )
    | st.builds(Mlp, st.integers(1, 9), experts=st.just(Experts(3, 2))),
)


decoders = st.builds(
    Decoder,
    st.just("llama"),
    st.integers(1, 7),
    st.integers(1, 11),
    st.integers(1, 5),
    st.just(1e-5),
    st.booleans(),
    st.lists(layers, max_size=3).map(tuple),
    norm=st.sampled_from(["rms", "layer"]),
    norms=st.sampled_from(["before", "after", "both"]),
    learned_positions=st.booleans(),
)


pictures = st.builds(Picture, st.just(2), st.integers(0, 3))


decoders |= st.builds(dataclasses.replace, decoders, tie_word_embeddings=st.just(False), picture=pictures)


def table(rotary: Rotary, function: np.ufunc) -> np.ndarray:
    """The first three positions: of the grid a prefix and the first two columns of the first row."""
    if rotary.grid is None:
        return function(np.outer(np.arange(3), rotary.inverse_frequencies))
    by_column = np.outer([0, 1], rotary.inverse_frequencies[4:])
    return np.concatenate([np.zeros((1, 8)), function(np.concatenate([np.zeros((2, 4)), by_column], axis=1))])


def joined(initializer: data_module.Initializer, tensors: list[np.ndarray]) -> np.ndarray:
    """Of an expert with its rows in turn, else behind each other, and (in, out) where the initializer is so."""
    rows = np.concatenate(tensors)
    if initializer.experts:
        rows = np.stack(tensors, axis=1).reshape(rows.shape)
    return rows.T if initializer.transposed else rows


@given(decoder=decoders, precision=st.sampled_from(["fp32", "fp16"]), piece_bytes=st.integers(1, 200))
@settings(deadline=None, max_examples=60)
def test_data_files_hold_the_weights_whatever_the_piece(
    decoder: Decoder, precision: str, piece_bytes: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("data")
    weights = {name: torch.randn(shape) for name, shape in decoder.shapes().items()}
    initializers = data_module.layout(decoder, precision, 3)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data_module, "PIECE_BYTES", piece_bytes)
        data_module.write_data(decoder, weights, folder, initializers)
    ends = dict.fromkeys((data_module.EMBEDDING_FILE, data_module.LAYERS_FILE), 0)
    for initializer in initializers:
        assert initializer.offset % data_module.ALIGNMENT == 0
        assert 0 <= initializer.offset - ends[initializer.file] < data_module.ALIGNMENT
        ends[initializer.file] = initializer.offset + initializer.length
        if initializer.sources:
            blocks = [joined(initializer, [weights[source].numpy() for source in part]) for part in initializer.parts]
            wanted = np.stack(blocks) if len(blocks) > 1 else blocks[0]
        else:
            number = int(initializer.name.split(".")[1]) if initializer.name.count(".") > 1 else 0
            wanted = table(decoder.rotaries[number], np.cos if initializer.name.endswith("cos_table") else np.sin)
        dtype = np.float16 if precision == "fp16" else np.float32
        data = (folder / initializer.file).read_bytes()[initializer.offset : initializer.offset + initializer.length]
        held = np.frombuffer(data, dtype).reshape(initializer.shape)
        assert held.shape == wanted.shape
        np.testing.assert_allclose(held, wanted.astype(dtype), rtol=1e-6 if precision == "fp32" else 1e-3, atol=1e-6)
    assert {name: (folder / name).stat().st_size for name in ends} == ends


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 65520.0])
def test_a_weight_that_fp16_cannot_hold_is_named(value: float, tmp_path: Path) -> None:
    model = llama(True)
    weights = weights_of(model)
    weights["layers.1.mlp.up"] = weights["layers.1.mlp.up"].clone()
    weights["layers.1.mlp.up"][3, 5] = value
    with pytest.raises(NumericalError, match=r"layers\.1\.mlp\.up") as caught:
        write_graphs(decoder_of(model.config), weights, tmp_path, "fp16", VARIANTS)
    assert caught.value.remedy
    if np.isfinite(value):
        assert "65504" in caught.value.message
        write_graphs(decoder_of(model.config), weights, tmp_path, "fp32", VARIANTS)
        weights["layers.1.mlp.up"][3, 5] = 65504.0
        write_graphs(decoder_of(model.config), weights, tmp_path, "fp16", VARIANTS)


def test_weights_that_do_not_fit_the_decoder_are_named(tmp_path: Path) -> None:
    model = llama(True)
    decoder, weights = decoder_of(model.config), weights_of(model)
    with pytest.raises(InputError, match=r"layers\.2\.attention\.k is missing"):
        missing = {name: weight for name, weight in weights.items() if name != "layers.2.attention.k"}
        write_graphs(decoder, missing, tmp_path, "fp32", VARIANTS)
    with pytest.raises(InputError, match=r"layers\.0\.mlp\.down .*\(96, 120\).*\(96, 128\)"):
        short = weights | {"layers.0.mlp.down": weights["layers.0.mlp.down"][:, :120]}
        write_graphs(decoder, short, tmp_path, "fp32", VARIANTS)


forms, of_layers = (st.sampled_from([None, *of]) for of in (OF_WEIGHTS, OF_LAYERS))


@st.composite
def formatted_decoders(draw: st.DrawFn) -> Decoder:
    """One layer of a width that groups of 128 divide, and odd numbers of outputs."""
    experts = draw(st.sampled_from([None, Experts(3, 2)]))
    attention, mlp = draw(of_layers), draw(forms if experts else of_layers)
    layer = Layer(Attention(8, 1, 16, input_bias=True), Mlp(128, gated=draw(st.booleans()), experts=experts))
    decoder = Decoder("llama", 128, draw(st.sampled_from([3, 6])), 8, 1e-5, draw(st.booleans()), (layer,))
    return decoder.with_formats([(attention, mlp)], draw(forms), draw(forms))


def codes_of(data: bytes, shape: tuple[int, ...], form: WeightFormat) -> np.ndarray:
    """Codes of a file: bytes, or the halves of bytes, the low ones first."""
    if form.bits == 8:
        return np.frombuffer(data, np.int8).reshape(shape)
    packed = np.frombuffer(data, np.uint8)
    halves = np.stack([packed & 15, packed >> 4], axis=1).reshape(-1)[: np.prod(shape)]
    return ((halves ^ 8).astype(np.int8) - 8).reshape(shape)


def held_of(weight: QuantisedWeight, role: str) -> torch.Tensor:
    """Minima are those of a group's sum, times its mean."""
    return weight.form.group * weight.minima if role == "offsets" else getattr(weight, role)


@given(decoder=formatted_decoders(), piece_bytes=st.integers(1, 3000))
@settings(deadline=None, max_examples=40)
def test_data_files_hold_codes_scales_and_zeros_whatever_the_piece(
    decoder: Decoder, piece_bytes: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("data")
    stored = rounded(decoder, {name: torch.randn(shape) for name, shape in decoder.shapes().items()})
    initializers = data_module.layout(decoder, "fp16", None)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data_module, "PIECE_BYTES", piece_bytes)
        data_module.write_data(decoder, stored, folder, initializers)
    held, formats = set(), decoder.weight_formats
    for initializer in initializers:
        if initializer.role == "values":
            assert not set(initializer.sources) & set(formats)
            continue
        held |= set(initializer.sources)
        assert {formats[source] for source in initializer.sources} == {initializer.form}
        data = (folder / initializer.file).read_bytes()[initializer.offset : initializer.offset + initializer.length]
        parts = [[held_of(stored[source], initializer.role).numpy() for source in part] for part in initializer.parts]
        wanted = np.stack([joined(initializer, part) for part in parts])
        if initializer.role in ("scales", "offsets"):
            found = np.frombuffer(data, np.float16)
        else:
            found = codes_of(data, initializer.shape, initializer.form)
        np.testing.assert_array_equal(found.reshape(-1), wanted.reshape(-1))
        assert np.prod(initializer.shape) == wanted.size
    assert held == set(formats)
    assert graph_weight_bytes(decoder, "fp16") == sum(initializer.length for initializer in initializers)
    stored_bytes = sum(
        formats[name].stored_bytes(*shape) for name, shape in decoder.shapes().items() if name in formats
    )
    codes_and_scales = sum(initializer.length for initializer in initializers if initializer.form is not None)
    assert 0 <= codes_and_scales - stored_bytes <= 8  # halves of bytes that are left over


def test_weights_in_another_format_than_the_decoder_s_are_named(tmp_path: Path) -> None:
    model = llama(True)
    decoder = decoder_of(model.config).with_format(INT8, INT8)
    stored = rounded(decoder, weights_of(model))
    name = "layers.1.mlp.down"
    with pytest.raises(InputError, match=rf"{name} is stored in floats, .* requires int8"):
        write_graphs(decoder, stored | {name: weights_of(model)[name]}, tmp_path, "fp32", VARIANTS)
    with pytest.raises(InputError, match=r"embedding is stored in int8, .* requires floats"):
        write_graphs(decoder.with_format(INT8), stored, tmp_path, "fp32", VARIANTS)
    other = rounded(decoder.with_format(WEIGHT_FORMATS["int4-32"]), weights_of(model))
    with pytest.raises(InputError, match=rf"{name} is stored in int4-32, .* requires int8"):
        write_graphs(decoder, stored | {name: other[name]}, tmp_path, "fp32", VARIANTS)


def test_codes_that_stand_for_numbers_beyond_fp16_are_named(tmp_path: Path) -> None:
    """Whether the scale overflows or the largest product alone; a scale that is not used up is no harm."""
    model = llama(True)
    decoder = decoder_of(model.config).with_format(INT8)
    stored, name = rounded(decoder, weights_of(model)), "layers.1.mlp.up"
    weight = stored[name]
    assert weight.codes[5].abs().max() == 127
    for scale, largest in ((1024.0, "1.3e+05"), (2.0**20, "1.049e+06")):
        scales = weight.scales.clone()
        scales[5] = scale
        wrong = dataclasses.replace(weight, scales=scales)
        with pytest.raises(NumericalError, match=rf"{re.escape(name)} reaches {re.escape(largest)}"):
            write_graphs(decoder, stored | {name: wrong}, tmp_path, "fp16", VARIANTS)
        write_graphs(decoder, stored | {name: wrong}, tmp_path, "bf16", VARIANTS)
    small = dataclasses.replace(wrong, codes=weight.codes.clamp(-1, 1), scales=scales.clamp_max(32768.0))
    write_graphs(decoder, stored | {name: small}, tmp_path, "fp16", VARIANTS)


def test_groups_that_do_not_divide_are_refused(tmp_path: Path) -> None:
    model = llama(True)
    decoder = decoder_of(model.config).with_format(WEIGHT_FORMATS["int4-64"])
    with pytest.raises(InputError, match="groups of 64, which do not divide 96 inputs"):
        graph_weight_bytes(decoder, "fp16")


@pytest.mark.parametrize("tied", [True, False])
def test_tables_with_minima_are_refused(tied: bool) -> None:
    """Their rows are looked up, and the head's product has no second one beside it."""
    decoder = dataclasses.replace(decoder_of(llama(True).config), tie_word_embeddings=tied, hidden_size=64)
    with pytest.raises(InputError, match="no embedding and head in int4-offset"):
        graph_weight_bytes(decoder.with_formats([(None, None)] * 3, None, WEIGHT_FORMATS["int4-offset"]), "fp16")


def test_the_largest_matrix_counts_only_where_it_has_a_format() -> None:
    decoder = decoder_of(llama(True).config)  # the table has 200 x 96 numbers, gate and up 256 x 96
    assert data_module.largest_matrix_bytes(decoder, "fp16") == 0
    assert data_module.largest_matrix_bytes(decoder.with_format(INT8, INT8), "fp16") == 2 * 256 * 96
    assert (
        data_module.largest_matrix_bytes(decoder.with_formats([(None, None)] * 3, None, INT8), "fp32") == 4 * 200 * 96
    )
