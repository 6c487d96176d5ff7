from __future__ import annotations

import dataclasses
import gc
import weakref
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaForCausalLM

from edgeprune.engine.onnx import data as data_module
from edgeprune.engine.onnx.graph import GraphVariant, graph_weight_bytes, write_graphs
from edgeprune.errors import InputError, NumericalError
from edgeprune.model.decoder import Attention, Decoder, Experts, Grid, Layer, Mlp, Picture, Rotary
from tests.support.graph_models import VARIANTS, Sample, llama, reference_logits, run_steps, sample, session, write
from tests.support.reference import decoder_of, weights_of

PREFILL = 20
WALKS = {"decode": [PREFILL, *[1] * 32], "chunks": [PREFILL, 7, 2, 23]}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 32}


def assert_same(
    logits: list[np.ndarray],
    walk: list[int],
    variant: GraphVariant,
    reference: np.ndarray,
    batch: Sample,
    tolerance: float,
) -> None:
    """max|a - b| / max|b| over all real positions, and the same argmax but for near ties."""
    wanted, real, start = [], [], 0
    for length in walk:
        first = start if variant.logits == "all" else start + length - 1
        wanted.append(reference[:, first : start + length])
        real.append(batch.mask[:, first : start + length] > 0)
        start += length
    ours = np.concatenate(logits, axis=1).astype(np.float32)[np.concatenate(real, axis=1)]
    theirs = np.concatenate(wanted, axis=1)[np.concatenate(real, axis=1)]
    assert ours.shape == theirs.shape
    assert np.abs(ours - theirs).max() / np.abs(theirs).max() < tolerance
    top = np.sort(theirs, axis=-1)
    clear = top[:, -1] - top[:, -2] >= max(1e-3, 2 * tolerance * np.abs(theirs).max())
    assert clear.mean() > 0.5
    assert (ours.argmax(-1) == theirs.argmax(-1))[clear].all()


def check(model: LlamaForCausalLM, folder: Path, decoder: Decoder | None = None) -> None:
    files = write(model, folder, "fp32", decoder)
    batch = sample(sum(WALKS["decode"]))
    reference = reference_logits(model, batch)
    for variant, path in files.graphs.items():
        for walk in WALKS.values():
            for capacity in (None, 64) if variant.dialect == "onnxruntime" else (None,):
                logits = run_steps(path, batch, walk, capacity)
                assert_same(logits, walk, variant, reference, batch, 1e-5)


@pytest.mark.parametrize("tied", [True, False])
def test_every_spelling_gives_transformers_logits(tied: bool, tmp_path: Path) -> None:
    check(llama(tied), tmp_path)


@pytest.mark.parametrize("rope", [LLAMA3, YARN], ids=["llama3", "yarn"])
def test_rope_scaling(rope: dict[str, object], tmp_path: Path) -> None:
    model = llama(True, rope_parameters=rope)
    assert decoder_of(model.config).rotaries != decoder_of(llama(True).config).rotaries
    check(model, tmp_path)


def test_multi_head_and_single_key_head(tmp_path: Path) -> None:
    for heads in (6, 1):
        check(llama(True, num_key_value_heads=heads), tmp_path / str(heads))


class NoAttention(torch.nn.Module):
    def forward(self, hidden_states: torch.Tensor, **_: object) -> tuple[torch.Tensor, None]:
        return torch.zeros_like(hidden_states), None


class NoMlp(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.zeros_like(x)


def widths_differ() -> tuple[LlamaForCausalLM, Decoder]:
    """Heads 4/4 and 2/1, MLP 80 and 48; the second layer has no attention, the fourth no MLP."""
    model = llama(False, num_hidden_layers=4)
    (angles,) = decoder_of(model.config).rotaries
    layers = (
        Layer(Attention(4, 4, 16, angles), Mlp(80)),
        Layer(None, Mlp(128)),
        Layer(Attention(2, 1, 16, angles), Mlp(48)),
        Layer(Attention(6, 2, 16, angles), None),
    )

    def linear(inputs: int, outputs: int) -> torch.nn.Linear:
        layer = torch.nn.Linear(inputs, outputs, bias=False)
        torch.nn.init.normal_(layer.weight, std=0.2)
        return layer

    for module, layer in zip(model.model.layers, layers, strict=True):
        if (attention := layer.attention) is None:
            module.self_attn = NoAttention()
        else:
            module.self_attn.num_key_value_groups = attention.heads_per_group
            module.self_attn.q_proj = linear(96, attention.query_size)
            module.self_attn.k_proj = linear(96, attention.key_value_size)
            module.self_attn.v_proj = linear(96, attention.key_value_size)
            module.self_attn.o_proj = linear(attention.query_size, 96)
        if layer.mlp is None:
            module.mlp = NoMlp()
        else:
            module.mlp.gate_proj = linear(96, layer.mlp.intermediate_size)
            module.mlp.up_proj = linear(96, layer.mlp.intermediate_size)
            module.mlp.down_proj = linear(layer.mlp.intermediate_size, 96)
    return model.eval(), dataclasses.replace(decoder_of(model.config), layers=layers)


def test_layers_of_different_widths(tmp_path: Path) -> None:
    model, decoder = widths_differ()
    assert set(weights_of(model)) == set(decoder.shapes())
    check(model, tmp_path, decoder)
    names = [value.name for value in session(tmp_path / "model.onnx").get_inputs()]
    assert [name for name in names if name.endswith(".key")] == [f"past_key_values.{i}.key" for i in (0, 2, 3)]


def test_fp16_is_near_the_fp32_reference(tmp_path: Path) -> None:
    """fp16 has 11 bits (4.9e-4); some 20 roundings in sequence stay below 1e-2 of the largest logit."""
    model = llama(True)
    batch = sample(sum(WALKS["chunks"]))
    reference = reference_logits(model, batch)
    for variant, path in write(model, tmp_path, "fp16").graphs.items():
        logits = run_steps(path, batch, WALKS["chunks"])
        assert logits[0].dtype == np.float16
        assert_same(logits, WALKS["chunks"], variant, reference, batch, 1e-2)


def test_names_and_dimensions_of_the_contract(tmp_path: Path) -> None:
    for variant, path in write(llama(True), tmp_path).graphs.items():
        assert path.name == variant.filename
        runner = session(path)
        inputs = {value.name: value.shape for value in runner.get_inputs()}
        outputs = {value.name: value.shape for value in runner.get_outputs()}
        wanted = {"input_ids": ["batch", "sequence"], "position_ids": ["batch", "sequence"]}
        wanted["attention_mask"] = ["batch", "total"]
        parts = [f"{index}.{part}" for index in range(3) for part in ("key", "value")]
        assert inputs == wanted | {f"past_key_values.{part}": ["batch", 2, "past", 16] for part in parts}
        rows = "sequence" if variant.logits == "all" else 1
        assert outputs == {"logits": ["batch", rows, 200]} | {
            f"present.{part}": ["batch", 2, "total", 16] for part in parts
        }


def test_graphs_are_valid_small_and_named_by_layer(tmp_path: Path) -> None:
    for variant, path in write(llama(True), tmp_path).graphs.items():
        assert path.stat().st_size < 64 * 1024
        model = onnx.load(path, load_external_data=False)
        assert model.producer_name == "edgeprune"
        names = [node.name for node in model.graph.node]
        assert len(set(names)) == len(names)
        assert {f"layers.{i}.{part}" for i in range(3) for part in ("attention.o", "mlp.down")} <= set(names)
        if variant.dialect != "onnxruntime":
            onnx.checker.check_model(path, full_check=True)
            assert {node.domain for node in model.graph.node} == {""}
            assert all(len(node.output) == 1 for node in model.graph.node if node.op_type != "Split")
        assert {"opset23": 23, "primitive": 17, "onnxruntime": 17}[variant.dialect] == next(
            opset.version for opset in model.opset_import if not opset.domain
        )


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_weight_bytes_without_writing(tied: bool, precision: str, tmp_path: Path) -> None:
    decoder = decoder_of(llama(tied).config)
    files = write(llama(tied), tmp_path, precision)
    element = {"fp32": 4, "fp16": 2}[precision]
    for variant, path in files.graphs.items():
        external = [
            tensor
            for tensor in onnx.load(path, load_external_data=False).graph.initializer
            if tensor.data_location == onnx.TensorProto.EXTERNAL
        ]
        entries = [{entry.key: entry.value for entry in tensor.external_data} for tensor in external]
        assert {entry["location"] for entry in entries} == {path.name for path in files.data}
        length = sum(int(entry["length"]) for entry in entries)
        assert length == graph_weight_bytes(decoder, precision, variant.dialect)
    assert graph_weight_bytes(decoder, precision) == decoder.parameters * element  # the tied matrix counts once
    tables = 2 * 40 * 8 * element
    assert graph_weight_bytes(decoder, precision, "onnxruntime", max_positions=40) == (
        decoder.parameters * element + tables
    )
    assert files.data[tmp_path / "embedding.data"] == decoder.vocab_size * 96 * element * (1 if tied else 2)
    assert sum(files.data.values()) == sum(path.stat().st_size for path in files.data)


def test_max_positions_caps_the_tables(tmp_path: Path) -> None:
    model, batch = llama(True), sample(40)
    variant = GraphVariant("onnxruntime", "all")
    decoder = dataclasses.replace(decoder_of(model.config), max_position_embeddings=1 << 17)
    files = write_graphs(decoder, weights_of(model), tmp_path, "fp32", [variant], max_positions=64)
    assert sum(files.data.values()) < 4 * decoder.parameters + 4 * 2 * 64 * 8 + 64 * 64
    logits = run_steps(files.graphs[variant], batch, [40])
    assert_same(logits, [40], variant, reference_logits(model, batch), batch, 1e-5)


def test_equal_input_gives_equal_bytes(tmp_path: Path) -> None:
    model = llama(False)
    for name, variants in (("a", VARIANTS), ("b", tuple(reversed(VARIANTS)))):
        write_graphs(decoder_of(model.config), weights_of(model), tmp_path / name, "fp16", variants)
    written = sorted(path.name for path in (tmp_path / "a").iterdir())
    assert written == sorted(["embedding.data", "model.onnx.data", *(variant.filename for variant in VARIANTS)])
    for name in written:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


class CountingWeights(Mapping[str, torch.Tensor]):
    """Hands out a new tensor at each access, and counts the accesses and the tensors alive."""

    def __init__(self, weights: dict[str, torch.Tensor]) -> None:
        self.weights, self.reads, self.alive, self.most_alive = weights, dict.fromkeys(weights, 0), 0, 0

    def __getitem__(self, name: str) -> torch.Tensor:
        tensor = self.weights[name].clone()
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


def test_each_weight_is_read_once_and_let_go(tmp_path: Path) -> None:
    model = llama(False)
    weights = CountingWeights(weights_of(model))
    gc.disable()  # letting go must not wait for the collector
    try:
        write_graphs(decoder_of(model.config), weights, tmp_path, "fp16", VARIANTS)
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
            blocks = [np.concatenate([weights[source].numpy() for source in part]) for part in initializer.parts]
            blocks = [block.T if initializer.transposed else block for block in blocks]
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


@pytest.mark.parametrize("head_dim", [24, 20, 6])
def test_heads_of_any_size(head_dim: int, tmp_path: Path) -> None:
    """ONNX Runtime's operator takes multiples of 8 and turns multiples of 16: others turn before, without tables."""
    model, batch = llama(True, head_dim=head_dim), sample(30)
    decoder, reference = decoder_of(model.config), reference_logits(model, batch)
    files = write_graphs(decoder, weights_of(model), tmp_path, "fp32", VARIANTS)
    assert graph_weight_bytes(decoder, "fp32", "onnxruntime") == graph_weight_bytes(decoder, "fp32")
    for variant, path in files.graphs.items():
        width = -(-head_dim // 8) * 8 if variant.dialect == "onnxruntime" else head_dim
        (past,) = {tuple(value.shape) for value in session(path).get_inputs() if "past" in value.name}
        assert past == ("batch", 2, "past", width)
        for walk in ([30], [20, 3, *[1] * 7]):
            logits = run_steps(path, batch, walk, 40 if variant.dialect == "onnxruntime" else None)
            assert_same(logits, walk, variant, reference, batch, 1e-5)


def test_no_positions_to_serve_are_refused(tmp_path: Path) -> None:
    model = llama(True)
    with pytest.raises(InputError, match="max_positions is 0"):
        write_graphs(decoder_of(model.config), weights_of(model), tmp_path, "fp32", VARIANTS, max_positions=0)
