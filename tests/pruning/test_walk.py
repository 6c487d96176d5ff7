"""The walk with weight formats: what is rounded, on what, and what makes up for it."""

import math

import pytest
import torch
import torch.nn.functional as F

from edgeprune.model.decoder import Decoder
from edgeprune.model.forward import token_logits, weight_stream
from edgeprune.model.load import load_model
from edgeprune.model.model import Model
from edgeprune.model.quantised import QuantisedWeight, as_float
from edgeprune.precision import WEIGHT_FORMATS, WeightFormat
from edgeprune.pruning.grids import choose_grid
from edgeprune.pruning.methods import METHODS
from edgeprune.pruning.prune import prune, result_of
from tests.support.families import save_family
from tests.support.tiny import as_model, llama

INT8, INT4 = WEIGHT_FORMATS["int8"], WEIGHT_FORMATS["int4-32"]
DEFAULT = METHODS["default"]


def small(**changes) -> Model:
    settings = {"hidden_size": 96, "intermediate_size": 128, "num_attention_heads": 6, "head_dim": 16}
    return as_model(llama(**settings | changes))


def ids(samples: int = 16, length: int = 32, seed: int = 1) -> torch.Tensor:
    return torch.randint(0, 101, (samples, length), generator=torch.Generator().manual_seed(seed))


def walked(model: Model, target: Decoder, samples: torch.Tensor | None = None, method=DEFAULT):
    records = []
    weights = dict(prune(model, target, ids() if samples is None else samples, method, 0, records.append))
    return weights, records


def divergence(model: Model, target: Decoder, weights, samples: torch.Tensor) -> float:
    dense, fitted = (
        token_logits(decoder, stream, samples).log_softmax(-1)
        for decoder, stream in ((model.decoder, weight_stream(model)), (target, weights.items()))
    )
    return float((dense.exp() * (dense - fitted)).sum(-1).mean())


@pytest.mark.parametrize("tied", [True, False])
def test_what_the_target_says_is_rounded_and_nothing_else(tied):
    model = small(tie_word_embeddings=tied)
    target = model.decoder.with_formats([(INT8, INT4), (None, INT8)], INT8, INT8)
    weights, records = walked(model, target)
    assert list(weights) == list(target.shapes())
    formats = target.weight_formats
    for name, shape in target.shapes().items():
        weight = weights[name]
        assert tuple(weight.shape) == shape
        assert isinstance(weight, QuantisedWeight) == (name in formats), name
        if name in formats:
            assert weight.form == formats[name]
    assert [len(record.roundings) for record in records] == [2, 2, 0, 2]
    assert all(len(record.rounding_errors) == len(record.roundings) for record in records)
    assert all(0 < error < 0.1 for record in records for error in record.rounding_errors)


def test_a_walk_loses_less_than_rounding_every_weight_by_itself():
    """GPTQ, and the updates that make up for what was lost before, on text that they have not seen."""
    model = small(num_hidden_layers=4)
    target, held_out = model.decoder.with_format(INT4), ids(seed=9)
    weights, records = walked(model, target, ids(64))
    alone = {
        name: choose_grid(weight.float(), torch.ones(weight.shape[1]), INT4).nearest(weight.float())
        if name in target.weight_formats
        else weight
        for name, weight in weight_stream(model)
    }
    assert divergence(model, target, weights, held_out) < 0.9 * divergence(model, target, alone, held_out)
    assert any("gptq" in record.roundings for record in records)


def test_int8_is_nearer_than_int4():
    model, held_out = small(), ids(seed=9)
    few, many = (
        divergence(model, target, walked(model, target)[0], held_out)
        for target in (model.decoder.with_format(INT4), model.decoder.with_format(INT8))
    )
    assert many < few / 20


def test_widths_and_formats_in_one_walk():
    model = small()
    target = model.decoder.with_widths(2, 2, 96).with_format(INT8)
    weights, _ = walked(model, target)
    assert {name: tuple(weight.shape) for name, weight in weights.items()} == target.shapes()
    cut = model.decoder.with_widths(2, 2, 96)
    floats, held_out = walked(model, cut)[0], ids(seed=9)
    both, alone = divergence(model, target, weights, held_out), divergence(model, cut, floats, held_out)
    assert both < 1.1 * alone + 1e-3


def test_a_model_on_the_grid_stays_as_it_is():
    model = small(tie_word_embeddings=False)
    target = model.decoder.with_format(INT8, INT8)
    for name in target.weight_formats:
        weight = model.weights[name]
        model.weights[name] = choose_grid(weight, torch.ones(weight.shape[1]), INT8).nearest(weight).dequantised()
    weights, _ = walked(model, target)
    for name, weight in weights.items():
        assert torch.allclose(as_float(weight), model.weights[name], rtol=0, atol=1e-6), name


def test_the_embedding_is_rounded_once_and_both_streams_begin_apart():
    model = small()
    target = model.decoder.with_formats([(None, None)] * 2, INT8, INT8)
    weights, records = walked(model, target)
    expected = choose_grid(model.weights["embedding"], torch.ones(96), INT8).nearest(model.weights["embedding"])
    assert torch.equal(weights["embedding"].codes, expected.codes)
    assert "head" not in weights
    assert all(not record.roundings for record in records)
    assert all(not math.isnan(record.error_after) for record in records)  # each module makes up for the table


def test_without_an_update_the_matrices_are_rounded_all_the_same():
    model = small()
    target = model.decoder.with_format(INT4)
    weights, records = walked(model, target, method=METHODS["magnitude"])
    assert all(isinstance(weights[name], QuantisedWeight) for name in target.weight_formats)
    assert all(math.isnan(record.error_after) for record in records)


def test_few_tokens_are_rounded_to_nearest():
    model = small()
    target = model.decoder.with_format(INT4)
    _, records = walked(model, target, ids(2, 8))
    assert {rounding for record in records for rounding in record.roundings} == {"nearest"}


@pytest.mark.parametrize("case", ["qwen3_moe", "mixtral", "olmo2", "gemma2", "gpt_neox", "phi3", "granite"])
def test_every_kind_of_module_is_rounded_and_stays_near(case, tmp_path):
    save_family(tmp_path, case)
    model = load_model(str(tmp_path))
    vocabulary = model.decoder.vocab_size
    samples = torch.randint(0, vocabulary, (8, 24), generator=torch.Generator().manual_seed(0))
    target = model.decoder.with_format(INT8, INT8)
    weights, records = walked(model, target, samples)
    assert list(weights) == list(target.shapes())
    assert all(isinstance(weights[name], QuantisedWeight) for name in target.weight_formats)
    assert all(record.roundings for record in records)
    dense = token_logits(model.decoder, weight_stream(model), samples)
    fitted = token_logits(result_of(target, DEFAULT), weights.items(), samples)
    # A token whose experts are about equally likely may take others.
    assert F.cosine_similarity(dense.flatten(0, 1), fitted.flatten(0, 1), dim=-1).quantile(0.1) > 0.97


@pytest.mark.parametrize("case", ["qwen3_moe", "mixtral"])
def test_experts_in_floats_make_up_for_what_is_rounded_before_them(case, tmp_path):
    save_family(tmp_path, case)
    model = load_model(str(tmp_path))
    vocabulary, generator = model.decoder.vocab_size, torch.Generator().manual_seed(0)
    samples, held_out = (torch.randint(0, vocabulary, (48, 24), generator=generator) for _ in range(2))
    coarse = WeightFormat("coarse", 2, 8)
    target = model.decoder.with_formats([(coarse, None)] * len(model.decoder.layers), None, None)
    weights, records = walked(model, target, samples)
    downs = [name for name in weights if ".experts." in name and name.endswith(".down")]
    assert not all(torch.equal(weights[name], model.weights[name].float()) for name in downs)
    assert all(record.error_after < record.error_before for record in records)
    own = weights | {name: model.weights[name] for name in downs}
    assert divergence(model, target, weights, held_out) < divergence(model, target, own, held_out)


def test_experts_without_tokens_are_rounded_by_their_weights_alone(tmp_path):
    save_family(tmp_path, "mixtral")
    model = load_model(str(tmp_path))
    form = WeightFormat("i4", 4, 8)
    target = model.decoder.with_format(form)
    weights, records = walked(model, target, torch.zeros((2, 3), dtype=torch.int64))
    roundings = {name: weights[name] for name in target.weight_formats if ".experts." in name}
    alone = 0
    for name, rounded in roundings.items():
        weight = model.weights[name].float()
        nearest = choose_grid(weight, torch.ones(weight.shape[1]), form).nearest(weight)
        alone += torch.equal(rounded.codes, nearest.codes)
    assert 0 < alone < len(roundings)
    assert any(math.isnan(error) for record in records for error in record.rounding_errors)
