from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from transformers import LlamaForCausalLM

from edgeprune.engine.onnx.graph import GraphVariant, graph_weight_bytes, write_graphs
from edgeprune.errors import InputError
from edgeprune.model.decoder import Attention, Decoder, Layer, Mlp
from tests.support.graph_models import (
    VARIANTS,
    WALKS,
    assert_same,
    check,
    llama,
    reference_logits,
    run_steps,
    sample,
    session,
    write,
)
from tests.support.reference import decoder_of, weights_of


@pytest.mark.parametrize("tied", [True, False])
def test_every_spelling_gives_transformers_logits(tied: bool, tmp_path: Path) -> None:
    check(llama(tied), tmp_path)


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
        past, total = "past", "total"
        if variant.dialect == "opset24":
            past = total = 128  # the capacity of one buffer
            wanted["write_indices"] = ["batch"]
        wanted["attention_mask"] = ["batch", total]
        parts = [f"{index}.{part}" for index in range(3) for part in ("key", "value")]
        assert inputs == wanted | {f"past_key_values.{part}": ["batch", 2, past, 16] for part in parts}
        rows = "sequence" if variant.logits == "all" else 1
        assert outputs == {"logits": ["batch", rows, 200]} | {
            f"present.{part}": ["batch", 2, total, 16] for part in parts
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
        assert {"opset24": 24, "opset23": 23, "primitive": 17, "onnxruntime": 17}[variant.dialect] == next(
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


def test_a_cache_in_place_has_the_capacity_of_the_context(tmp_path: Path) -> None:
    """The last token of it can be run; the mask is as wide, whatever the step."""
    model, batch = llama(True), sample(40)
    variant = GraphVariant("opset24", "all")
    decoder = decoder_of(model.config)
    path = write_graphs(decoder, weights_of(model), tmp_path, "fp32", [variant], max_positions=40).graphs[variant]
    shapes = {value.name: value.shape for value in session(path).get_inputs()}
    assert shapes["attention_mask"] == ["batch", 40]
    assert shapes["past_key_values.2.value"] == ["batch", 2, 40, 16]
    for walk in ([40], [20, 19, 1]):
        assert_same(run_steps(path, batch, walk), walk, variant, reference_logits(model, batch), batch, 1e-5)


def test_rows_of_a_batch_may_be_written_at_slots_of_their_own(tmp_path: Path) -> None:
    """Each row's queries begin at its own write index: a row that is behind sees none of its later slots."""
    model, batch = llama(True), sample(30, padding=0)
    variant = GraphVariant("opset24", "all")
    path = write_graphs(decoder_of(model.config), weights_of(model), tmp_path, "fp32", [variant]).graphs[variant]
    runner = session(path)
    cache = {
        value.name: np.full((2, *value.shape[1:]), 5.0, np.float32)
        for value in runner.get_inputs()
        if value.name.startswith("past")
    }
    names = ["logits", *(name.replace("past_key_values", "present") for name in cache)]
    rows, begins = np.arange(2)[:, None], np.zeros(2, np.int64)
    reference = reference_logits(model, batch)
    # Row 0 runs 4 tokens twice, row 1 its first 4 twice: the second time over the same slots.
    for begins in (np.array([0, 0]), np.array([4, 0])):
        places = begins[:, None] + np.arange(4)
        logits, *held = runner.run(
            names,
            {
                "input_ids": batch.ids[rows, places],
                "position_ids": batch.positions[rows, places],
                "attention_mask": np.ones((2, 128), np.int64),
                "write_indices": begins,
            }
            | cache,
        )
        cache = dict(zip(cache, held, strict=True))
        np.testing.assert_allclose(logits, reference[rows, places], atol=1e-4)


def test_equal_input_gives_equal_bytes(tmp_path: Path) -> None:
    model = llama(False)
    for name, variants in (("a", VARIANTS), ("b", tuple(reversed(VARIANTS)))):
        write_graphs(decoder_of(model.config), weights_of(model), tmp_path / name, "fp16", variants)
    written = sorted(path.name for path in (tmp_path / "a").iterdir())
    assert written == sorted(["embedding.data", "model.onnx.data", *(variant.filename for variant in VARIANTS)])
    for name in written:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_no_positions_to_serve_are_refused(tmp_path: Path) -> None:
    model = llama(True)
    with pytest.raises(InputError, match="max_positions is 0"):
        write_graphs(decoder_of(model.config), weights_of(model), tmp_path, "fp32", VARIANTS, max_positions=0)
