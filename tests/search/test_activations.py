"""The format that rounds activations, in the search: what it is predicted to lose, and when it is taken."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from edgeprune.engine.onnx.graph import GraphVariant, write_graphs
from edgeprune.ondevice.figures import Workload
from edgeprune.ondevice.onnxruntime import GraphRunner
from edgeprune.precision import WEIGHT_FORMATS
from edgeprune.profiles import load_profile
from edgeprune.pruning.methods import METHODS
from edgeprune.pruning.score import numerical
from edgeprune.search.estimated_costs import estimated_costs, memory_costs
from edgeprune.search.latency_table import RandomWeights, TimedModel, design
from edgeprune.search.response import measure_response, probes_of
from edgeprune.search.sensitivity import decoded, encoded, measure_sensitivities
from edgeprune.search.solve import Problem, per_layer, uniform
from edgeprune.search.widths import RoundingLosses, Sensitivities, dense_widths
from tests.support.shapes import SMOLLM2
from tests.support.tiny import as_model, llama

INT8, W8A8 = WEIGHT_FORMATS["int8"], WEIGHT_FORMATS["w8a8"]
ROUNDING = (W8A8, WEIGHT_FORMATS["fp8"], WEIGHT_FORMATS["nvfp4"])
FORMATS = (None, INT8, W8A8)
RTX = load_profile("rtx-4090")
WORKLOAD = Workload(1, 512, 1024)


def ids(samples: int = 8) -> torch.Tensor:
    return torch.randint(0, 101, (samples, 20), generator=torch.Generator().manual_seed(0))


def small(**config):
    settings = {"hidden_size": 96, "intermediate_size": 96, "num_attention_heads": 6, "head_dim": 16}
    return as_model(llama(**settings | config))


def test_the_predicted_loss_counts_the_rounding_of_activations():
    """It is most of the loss; floats of 4 bits lose more than any of 8."""
    model = small()
    found = measure_sensitivities(model, ids(4), numerical, 0, (INT8, *ROUNDING)).roundings
    for kind in ("mlp", "attention"):
        int8, w8a8, fp8, nvfp4 = (getattr(found[form.name], kind) for form in (INT8, *ROUNDING))
        assert (w8a8 > int8).all()
        assert (fp8 > int8).all()
        assert (nvfp4 > 2 * np.maximum(w8a8, fp8)).all()


def test_a_probe_of_its_own_corrects_it():
    model = small(num_hidden_layers=7)
    formats, calls = (INT8, *ROUNDING), []
    raw = measure_sensitivities(model, ids(), numerical, 0, formats)
    found = measure_response(model, ids(), raw, METHODS["default"], 0, formats, on_probe=lambda: calls.append(1))
    responses = {name: losses.response for name, losses in found.roundings.items()}
    assert len(set(responses.values())) == len(formats)
    assert len(calls) == probes_of(formats, ()) == 6
    again = decoded(encoded(found), model.decoder, formats)
    assert {name: losses.response for name, losses in again.roundings.items()} == responses


def problem(least: float) -> Problem:
    """SmolLM2's shape on a GPU, floats costing nothing, int8 next to nothing, and w8a8 more in some modules."""
    layers = len(SMOLLM2.layers)
    generator, widths = np.random.default_rng(0), dense_widths(SMOLLM2)
    attention = np.full((layers, widths.num_key_value_heads + 1, widths.heads_per_group), 9.0)
    mlp = np.full((layers, widths.intermediate_size + 1), 9.0)
    attention[:, -1, -1] = mlp[:, -1] = 0.0
    roundings = {
        "int8": RoundingLosses(np.full(layers, 1e-5), np.full(layers, 1e-5), np.inf, np.inf),
        "w8a8": RoundingLosses(
            least * (1 + generator.random(layers)), least * (1 + generator.random(layers)), np.inf, np.inf
        ),
    }
    latency = estimated_costs(SMOLLM2, RTX, WORKLOAD, "fp16", FORMATS)
    costs = {"memory": memory_costs(SMOLLM2, RTX, WORKLOAD, "fp16", FORMATS), "prefill": latency.prefill}
    sensitivities = Sensitivities(attention, mlp, roundings=roundings)
    return Problem(widths, sensitivities, costs, 64, {SMOLLM2.vocab_size: 0.0}, FORMATS, (0, 1, 2), (0,))


@pytest.mark.slow
@pytest.mark.parametrize("solve", [uniform, per_layer])
def test_a_prefill_budget_that_floats_and_int8_do_not_meet_takes_it_where_it_loses_least(solve):
    own = problem(1e-3)
    dense = own.estimate(own.everything)
    every = own.estimate(replace(own.everything, formats=((W8A8, W8A8),) * own.depth))["prefill"]
    limits = {"prefill": (dense["prefill"] + every) / 2}
    found = solve(own, limits)
    assert own.estimate(found)["prefill"] <= limits["prefill"]
    chosen = [form for pair in found.formats for form in pair]
    assert set(found.layers) == {own.dense}  # nothing is cut
    assert 0 < chosen.count(W8A8) < len(chosen)
    # The MLPs among those taken lose less than the MLPs that stay floats.
    losses = own.sensitivities.roundings["w8a8"].mlp
    taken = np.array([mlp == W8A8 for _, mlp in found.formats])
    assert losses[taken].mean() < losses[~taken].mean()
    # Without the format no widths of the same loss fit, and a budget of memory alone takes int8.
    without = solve(replace(own, layer_formats=(0, 1)), limits)
    assert without is None or without.loss > 100 * found.loss
    few = solve(own, {"memory": 0.8 * dense["memory"]})
    assert {form for pair in few.formats for form in pair} <= {None, INT8}


def test_the_table_measures_it_on_graphs_that_run(tmp_path):
    """Its models have random weights, and scales of what these read."""
    decoder = small().decoder
    points = design(decoder, "fp32", 32, (None, W8A8), (None,))
    named = {name for name in points if name.startswith("w8a8")}
    assert {"w8a8 attention", "w8a8 mlp", "w8a8 mix 0", "w8a8 mix 1"} <= named
    assert "w8a8 head" not in named
    point: TimedModel = points["w8a8 mix 0"]
    model, variant = point.decoder(decoder), GraphVariant("onnxruntime", "last")
    files = write_graphs(model, RandomWeights(model), tmp_path, "fp32", [variant], 64)
    logits = GraphRunner(files.graphs[variant], 1, 64).run(ids(1).numpy())
    assert np.isfinite(logits).all()
