"""What a format that rounds activations does to modules: channels of like size, scales, and what the walk makes of
them."""

from dataclasses import replace

import ml_dtypes
import numpy as np
import pytest
import torch

from edgeprune.model.attention import Tables
from edgeprune.model.forward import (
    OUTPUT,
    add_module,
    embed,
    layer_weights,
    module_inputs,
    module_states,
    modules_of,
    token_logits,
    weight_stream,
)
from edgeprune.model.load import load_model
from edgeprune.model.model import Model
from edgeprune.model.quantised import QuantisedWeight, rounded_inputs, storable
from edgeprune.precision import WEIGHT_FORMATS
from edgeprune.pruning.activations import ALPHA, input_scale_for, largest_of, names_before, smoothed
from edgeprune.pruning.methods import METHODS
from edgeprune.pruning.prune import prune
from tests.support.families import CASES, save_family
from tests.support.tiny import as_model, llama

W8A8 = WEIGHT_FORMATS["w8a8"]


def ids(model: Model, samples: int = 8, length: int = 24) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, model.decoder.vocab_size, (samples, length), generator=generator)


def with_outliers(model: Model) -> Model:
    """The same function, with one channel of what each matrix reads sixty-four times as large as it was."""
    weights = {name: model.weights[name].float().clone() for name in model.decoder.shapes()}
    for index in range(len(model.decoder.layers)):
        prefix = f"layers.{index}."
        for kind, names in (("attention", "qkv"), ("mlp", ("gate", "up"))):
            weights[f"{prefix}{kind}.norm"][3] *= 64
            for name in names:
                weights[f"{prefix}{kind}.{name}"][:, 3] /= 64
        weights[f"{prefix}mlp.up"][5] *= 64
        weights[f"{prefix}mlp.down"][:, 5] /= 64
    return replace(model, weights=weights)


def walked(model: Model, target) -> dict:
    return dict(prune(model, target, ids(model), METHODS["default"], 0))


def distance(model: Model, target, weights) -> float:
    """Divergence of the logits from the dense model's, in nats."""
    samples = ids(model, 4) + 1
    samples %= model.decoder.vocab_size
    dense, fitted = (
        token_logits(decoder, stream, samples).log_softmax(-1)
        for decoder, stream in ((model.decoder, weight_stream(model)), (target, weights.items()))
    )
    return float((dense.exp() * (dense - fitted)).sum(-1).mean())


@pytest.mark.parametrize("case", [case for case in CASES if case not in ("qwen3_moe", "mixtral", "olmoe", "gpt_oss")])
def test_a_module_with_channels_of_like_size_is_the_same_function(case, tmp_path):
    """For every kind of norm, bias, activation and group of heads; to the last bit but for the order of sums."""
    save_family(tmp_path, case)
    model = load_model(str(tmp_path))
    decoder, samples = model.decoder, ids(model)
    hidden, tables = embed(model, samples), Tables(decoder, samples.shape[1])
    changed = {name: model.weights[name].float() for name in decoder.shapes()}
    moved = set()
    for index in range(len(decoder.layers)):
        source = hidden.clone()
        for kind in modules_of(decoder, index):
            weights = layer_weights(model, index)
            # Channels of very different size.
            read = module_states(decoder, kind, weights, source) * torch.logspace(-3, 3, decoder.hidden_size)
            inputs = module_inputs(decoder, index, kind, weights, source, tables)
            spread = torch.logspace(-2, 2, inputs.shape[-1])
            new, _ = smoothed(decoder, index, kind, weights, largest_of(read), spread * largest_of(inputs))
            moved |= {kind + ("" if torch.equal(new[OUTPUT[kind]], weights[OUTPUT[kind]]) else " output")}
            changed |= {f"layers.{index}.{name}": weight for name, weight in new.items() if name.startswith(kind)}
            add_module(decoder, index, kind, weights, hidden, tables, source=source)
            source = source if decoder.parallel else hidden.clone()
    assert "attention output" in moved
    wanted = token_logits(decoder, weight_stream(model), samples)
    found = token_logits(decoder, ((name, changed[name]) for name in decoder.shapes()), samples)
    assert float((found - wanted).abs().max()) <= 2e-6 * float(wanted.abs().max())


def test_factors_are_powers_of_two_and_move_most_of_the_unlikeness_into_the_weights():
    model = as_model(llama(hidden_size=96, intermediate_size=96, num_attention_heads=6, head_dim=16))
    weights = layer_weights(model, 0)
    read, inputs = torch.logspace(-2, 2, 96), torch.logspace(-2, 2, 96)
    new, factors = smoothed(model.decoder, 0, "mlp", weights, read, inputs)
    assert torch.equal(factors.log2(), factors.log2().round())
    assert torch.equal(
        new["mlp.up"] * factors[:, None], smoothed(model.decoder, 0, "mlp", weights, read, inputs * 0 + 1)[0]["mlp.up"]
    )
    of_weight = weights["mlp.down"].abs().amax(0)
    exact = inputs**ALPHA / of_weight ** (1 - ALPHA)
    off = (factors / exact).log2()
    assert float(off.max() - off.min()) <= 1.001  # to the nearest power, but for one factor of all


def test_the_scale_reaches_to_the_largest_value_and_codes_are_the_nearest():
    """Against every code by brute force."""
    inputs = torch.randn(3, 7, 11, generator=torch.Generator().manual_seed(0)) * 5
    scale = input_scale_for(inputs, W8A8)
    assert torch.equal(storable(scale), scale)
    assert float(inputs.abs().max() / scale) == pytest.approx(127, rel=1 / 128)
    grid = torch.arange(-128, 128) * scale
    nearest = grid[(inputs[..., None] - grid).abs().argmin(-1)]
    assert torch.equal(rounded_inputs(inputs, scale, W8A8), nearest)
    assert rounded_inputs(torch.tensor([1e9, -1e9]), scale, W8A8).tolist() == [127 * float(scale), -128 * float(scale)]
    assert rounded_inputs(inputs, None) is inputs


def test_floats_have_a_power_of_two_and_groups_a_scale_of_their_own():
    """Against ml_dtypes; what the samples did not reach is cut off, and groups of zeros stay so."""
    inputs = torch.randn(3, 7, 64, generator=torch.Generator().manual_seed(0)) * 50
    inputs[0, 0, :16] = 0
    fp8, nvfp4 = WEIGHT_FORMATS["fp8"], WEIGHT_FORMATS["nvfp4"]
    scale = input_scale_for(inputs, fp8)
    assert float(scale.log2()) % 1 == 0
    assert 0.5 < float(inputs.abs().max() / (448 * scale)) <= 1
    theirs = (inputs / scale).numpy().astype(ml_dtypes.float8_e4m3fn).astype(np.float32) * float(scale)
    assert np.array_equal(rounded_inputs(inputs, scale, fp8).numpy(), theirs)
    assert rounded_inputs(torch.tensor([1e9, -1e9]), scale, fp8).tolist() == [448 * float(scale), -448 * float(scale)]
    unit = input_scale_for(inputs, nvfp4)
    assert 0.5 < float(inputs.abs().max() / (6 * 448 * unit)) <= 1
    groups = inputs.unflatten(2, (-1, 16)).numpy()
    scales = (np.abs(groups).max(-1, keepdims=True) / (6 * float(unit))).astype(ml_dtypes.float8_e4m3fn)
    scales = scales.astype(np.float32) * float(unit)
    with np.errstate(invalid="ignore"):
        theirs = np.nan_to_num(groups / scales).astype(ml_dtypes.float4_e2m1fn).astype(np.float32) * scales
    assert np.array_equal(rounded_inputs(inputs, unit, nvfp4).numpy(), theirs.reshape(inputs.shape))


@pytest.mark.parametrize(
    ("case", "form", "bound"),
    [
        ("llama", "w8a8", 0.05),
        ("qwen2", "w8a8", 0.05),
        ("gpt2", "w8a8", 0.05),
        ("gemma3_text", "w8a8", 0.05),
        ("llama", "fp8", 0.15),
        ("gemma3_text", "fp8", 0.05),
        ("qwen2", "nvfp4", 1.0),
        ("gpt2", "nvfp4", 0.2),
    ],
)
def test_the_walk_rounds_what_modules_read_and_stays_near(case, form, bound, tmp_path):
    save_family(tmp_path, case)
    model = load_model(str(tmp_path))
    target = model.decoder.with_format(WEIGHT_FORMATS[form])
    weights = walked(model, target)
    assert list(weights) == list(target.shapes())
    for index in range(len(target.layers)):
        for kind in modules_of(target, index):
            module = getattr(target.layers[index], kind)
            scales = {float(weights[f"layers.{index}.{name}"].input_scale) for name in names_before(module)}
            assert len(scales) == 1  # they read the same
            assert float(weights[f"layers.{index}.{OUTPUT[kind]}"].input_scale) > 0
    without = {n: replace(w, input_scale=None) if isinstance(w, QuantisedWeight) else w for n, w in weights.items()}
    assert 0 < distance(model, target, without) < distance(model, target, weights) < bound


def test_smoothing_saves_a_model_of_large_channels():
    """Its loss stays within twice that of the model without such channels, whose function is the same."""
    model = as_model(llama(hidden_size=96, intermediate_size=128, num_attention_heads=6, head_dim=16))
    outliers, target = with_outliers(model), model.decoder.with_format(W8A8)
    plain = distance(model, target, walked(model, target))
    assert distance(outliers, target, walked(outliers, target)) < 2 * plain
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("edgeprune.pruning.activations.MOST_DOUBLINGS", 0)
        assert distance(outliers, target, walked(outliers, target)) > 4 * plain


def test_floats_of_8_bits_need_no_smoothing():
    """Channels of all sizes are within their range: the weights stay as they are, and so does the loss."""
    model = as_model(llama(hidden_size=96, intermediate_size=128, num_attention_heads=6, head_dim=16))
    outliers, target = with_outliers(model), model.decoder.with_format(WEIGHT_FORMATS["fp8"])
    weights = walked(outliers, target)
    assert torch.equal(weights["layers.0.mlp.norm"], outliers.weights["layers.0.mlp.norm"].float())
    assert distance(outliers, target, weights) < 2 * distance(model, target, walked(model, target))


def test_widths_and_activations_are_rounded_in_one_walk():
    model = as_model(llama(hidden_size=96, intermediate_size=128, num_attention_heads=6, head_dim=16))
    narrow = model.decoder.with_layer_widths([(groups, heads, 96) for groups, heads, _ in model.decoder.layer_widths])
    pruned = distance(model, narrow, walked(model, narrow))
    rounded = distance(model, narrow.with_format(W8A8), walked(model, narrow.with_format(W8A8)))
    assert rounded < 1.2 * pruned + 1e-3
