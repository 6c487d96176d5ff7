"""Pruning methods side by side: widths that remove what was asked for, rows whose rise is the evaluation's."""

from __future__ import annotations

import time

import numpy as np
import pytest
import torch

from edgeprune.errors import InputError
from edgeprune.evaluate.perplexity import document_losses, log_rise
from edgeprune.model.decoder import ratio
from edgeprune.pipeline.comparison import (
    DENSE_KEY,
    RATIO_TOLERANCE,
    Comparison,
    Layout,
    TimedStream,
    WidthRule,
    generate_samples,
)
from edgeprune.pipeline.kind import Language
from edgeprune.progress import Silent
from edgeprune.pruning.slicegpt import slice_model, sliced_states, widest_slice
from tests.support.runs import home
from tests.support.tiny import as_model, llama


@pytest.fixture(scope="module")
def comparison() -> Comparison:
    random = np.random.default_rng(0)
    ids = torch.from_numpy(random.integers(0, 101, (4, 16)))
    texts = {name: [random.integers(0, 101, 20) for _ in range(3)] for name in ("a", "b")}
    return Comparison(as_model(llama(intermediate_size=512)), ids, None, texts, 64, 0, Silent())


@pytest.mark.parametrize("layout", Layout)
@pytest.mark.parametrize("rule", WidthRule)
@pytest.mark.parametrize("wanted", [0.2, 0.5])
def test_widths_remove_what_was_asked_for_within_half_a_point(comparison, layout, rule, wanted):
    target = comparison.target(wanted, layout, rule)
    assert abs(ratio(target, comparison.model.decoder) - wanted) <= RATIO_TOLERANCE
    if layout is Layout.UNIFORM and rule is WidthRule.SENSITIVITY:
        assert len(set(target.layer_widths)) == 1


def test_a_ratio_that_no_widths_reach_is_refused(comparison):
    with pytest.raises(InputError, match=r"no uniform widths of this model remove 99.9 % within 0.5 points") as caught:
        comparison.target(0.999, Layout.UNIFORM, WidthRule.SENSITIVITY)
    assert "Try another ratio" in caught.value.remedy


def test_the_dense_model_is_the_reference_of_every_rise(comparison):
    dense = comparison.dense
    assert dense.key == DENSE_KEY
    assert (dense.ratio, dense.total_ratio, dense.fell_back) == (0, 0, 0)
    assert set(dense.rise.values()) == {(0.0, 0.0, 0.0)}
    for name, documents in comparison.texts.items():
        own = document_losses(comparison.model, documents, comparison.window)
        assert dense.perplexity[name] == pytest.approx(own.perplexity)


def test_a_row_holds_what_was_removed_and_the_rise_over_the_default(comparison):
    rows = {name: comparison.run(name, 0.3, Layout.UNIFORM, WidthRule.SENSITIVITY) for name in ("default", "random")}
    row = rows["random"]
    assert row.key == ("random", "uniform", "0.3")
    assert row.ratio == pytest.approx(0.3, abs=RATIO_TOLERANCE)
    assert 0 < row.total_ratio < row.ratio  # the embedding stays
    assert row.parameters == comparison.model.decoder.parameters * (1 - row.total_ratio)
    assert row.decode_bytes < comparison.dense.decode_bytes
    assert row.seconds > 0
    for name in comparison.texts:
        value, low, high = row.rise[name]
        assert low <= value <= high
        assert value == pytest.approx(np.log(row.perplexity[name] / comparison.dense.perplexity[name]), abs=1e-6)
    losses = [comparison.losses[rows[name].key] for name in rows]
    expected = {name: log_rise(losses[0][name], losses[1][name], 0) for name in comparison.texts}
    assert comparison.over_default(row).over_default == expected
    assert comparison.over_default(rows["default"]).over_default == {}
    assert rows["random"].as_json()["asked"] == 0.3


def test_what_slicegpt_adds_counts_too(comparison):
    """Shortcuts and a head of its own: a tied model of this size has more parameters than before."""
    row, dense = comparison.run("slicegpt", 0.2, Layout.UNIFORM, WidthRule.EVEN), comparison.dense
    decoder = comparison.model.decoder
    width = widest_slice(decoder, int(0.8 * decoder.layer_parameters))
    weights = dict(slice_model(comparison.model, width, comparison.ids))
    in_layers = [weight for name, weight in weights.items() if name.startswith("layers.")]
    kept = sum(weight.numel() for weight in in_layers if weight.ndim == 2)
    assert row.key == ("slicegpt", "uniform", "0.2")
    assert row.ratio == pytest.approx(1 - kept / decoder.layer_parameters)
    assert 0.2 <= row.ratio < 0.25  # one feature of so few is more than half a point
    assert row.parameters == sum(weight.numel() for weight in weights.values())
    assert row.total_ratio == 1 - row.parameters / dense.parameters
    # Two bytes less for every parameter of the layers that went; head, norm and KV cache are read as before.
    norms = 2 * len(decoder.layers) * decoder.hidden_size
    of_layers = decoder.layer_parameters + norms - sum(weight.numel() for weight in in_layers)
    assert dense.decode_bytes - row.decode_bytes == 2 * of_layers
    for name, documents in comparison.texts.items():
        ids = torch.from_numpy(np.stack(documents))
        states, head = sliced_states(decoder, weights.items(), ids)
        losses = torch.nn.functional.cross_entropy(states @ head.T, ids[:, 1:].flatten())
        assert row.perplexity[name] == pytest.approx(float(losses.exp()), rel=1e-4)


def test_a_ratio_that_no_slice_reaches_is_refused(comparison):
    with pytest.raises(InputError, match=r"one feature of this model's residual stream is more than 1 %") as caught:
        comparison.run("slicegpt", 0.99, Layout.UNIFORM, WidthRule.EVEN)
    assert "lower ratio" in caught.value.remedy


@pytest.mark.timing
def test_a_stream_counts_the_seconds_of_its_maker_alone():
    def slow():
        for number in range(3):
            time.sleep(0.02)
            yield number

    stream, items = TimedStream(slow()), []
    for item in stream:
        time.sleep(0.1)
        items.append(item)
    assert items == [0, 1, 2]
    assert 0.06 <= stream.seconds < 0.3


def test_the_dense_model_draws_its_own_samples(tmp_path_factory):
    from edgeprune.model.load import load_model

    model = load_model(str(home(tmp_path_factory) / "model"))
    ids = generate_samples(model, Language(), 3, 12, 0, Silent())
    assert (tuple(ids.shape), ids.dtype) == ((3, 12), torch.int64)
    assert len({tuple(row) for row in ids.tolist()}) == 3
    assert torch.equal(ids, generate_samples(model, Language(), 3, 12, 0, Silent()))
