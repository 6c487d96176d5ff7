"""The report of a real run: the run's figures and no others, and the headline of each verdict."""

from __future__ import annotations

from dataclasses import replace

import pytest

from edgeprune.engine.estimate import latency_shares
from edgeprune.engine.work import table_bytes
from edgeprune.model.decoder import ratio
from edgeprune.ondevice.budget import Budget, Limit, format_bytes, format_ms
from edgeprune.ondevice.figures import Measured
from edgeprune.ondevice.finish_report import NOT_MEASURED
from edgeprune.pipeline.results import Fitted, QualityStop
from edgeprune.pipeline.setup import with_weights
from edgeprune.precision import WEIGHT_FORMATS
from edgeprune.report.build import build_report
from tests.support.runs import finished


@pytest.fixture(scope="module")
def fitted(tmp_path_factory) -> Fitted:
    return finished(tmp_path_factory).fitted


def with_budget(fitted: Fitted, **limits: object) -> Fitted:
    return replace(fitted, setup=replace(fitted.setup, budget=replace(fitted.setup.budget, **limits)))


def with_rises(fitted: Fitted, **rises: tuple[float, float, float]) -> Fitted:
    """Texts of these rises: low, percent, high."""
    (text,) = fitted.quality.texts.values()
    texts = {name: text | dict(zip(("low", "percent", "high"), bounds, strict=True)) for name, bounds in rises.items()}
    return replace(fitted, quality=replace(fitted.quality, texts=texts))


def test_it_holds_the_figures_of_the_run(fitted):
    report = build_report(fitted, {"onnx/model.onnx": 5}, "the command")
    dense, small = fitted.setup.model.decoder, fitted.chosen.model.decoder
    for side, performance, decoder in (
        (report.dense, fitted.dense, dense),
        (report.fitted, fitted.chosen.performance, small),
    ):
        assert side.performance.memory_total.value == performance.memory.total
        assert side.performance.decode.value == performance.decode.value
        assert (side.parameters, side.layer_parameters) == (decoder.parameters, decoder.layer_parameters)
        assert sum(side.latency_shares.values()) == pytest.approx(performance.decode.value, rel=0.01)
    assert report.ratio == pytest.approx(ratio(small, dense))
    assert report.total_ratio == pytest.approx(1 - small.parameters / dense.parameters)
    assert report.fitted.widths[0]["MLP channels"] == small.layers[0].mlp.intermediate_size
    assert (report.files, report.command) == ({"onnx/model.onnx": 5}, "the command")
    assert len(report.modules) == len(fitted.chosen.records)
    assert report.cross_check["decode_ratio"].source == "measured"
    assert report.stages == fitted.seconds
    assert type(report).model_validate_json(report.model_dump_json()) == report


def test_a_relative_limit_is_told_with_what_it_is_a_share_of(fitted):
    memory = build_report(with_budget(fitted, memory=Limit(0.9, True, "90%")), {}, "").budget[0]
    dense = fitted.dense.memory
    prunable, runtime = format_bytes(dense.prunable), format_bytes(dense.runtime.value)
    assert memory.in_parts == (
        f"{format_bytes(memory.limit)} = 90 % of the dense model's {prunable} + {runtime} runtime, estimated"
    )
    absolute = build_report(with_budget(fitted, memory=Limit(1e9, False, "1GB")), {}, "").budget[0]
    assert absolute.in_parts is None


def test_the_search_shows_every_candidate_and_which_was_chosen(fitted):
    search = build_report(fitted, {}, "").search
    assert [candidate.chosen for candidate in search.candidates] == [
        index == fitted.outcome.chosen for index in range(len(fitted.outcome.trials))
    ]
    first, trial = search.candidates[0], fitted.outcome.trials[0]
    assert first.predicted == trial.predicted
    assert first.obtained == {"memory": trial.obtained.values["memory"]}
    assert first.predicted_loss == trial.allocation.loss


def test_the_limits_name_what_more_of_them_would_buy(fitted):
    report = build_report(with_budget(fitted, max_quality_loss=5.0), {}, "")
    memory, quality = report.budget
    assert memory.gain == fitted.gains["memory"]
    assert memory.limit == fitted.verdict.checks[0].limit
    assert (quality.asked, quality.unit, quality.dense) == ("5%", "%", None)


@pytest.mark.parametrize(
    ("rises", "shown", "status"),
    [
        ({"a": (1.0, 2.0, 3.0), "b": (2.0, 3.0, 4.0)}, 3.0, "met"),
        ({"a": (4.0, 4.5, 6.0), "b": (4.9, 4.9, 4.9)}, 4.5, "noisy"),  # the one that may be beyond the limit
        ({"a": (5.5, 6.0, 6.5), "b": (1.0, 20.0, 90.0)}, 6.0, "missed"),  # the one that is
    ],
)
def test_the_row_of_the_quality_is_of_the_text_that_fails_it_most(fitted, rises, shown, status):
    judged = with_rises(with_budget(fitted, max_quality_loss=5.0), **rises)
    row = build_report(judged, {}, "").budget[-1]
    assert (row.fitted.value, row.status) == (shown, status)


def test_the_headline_tells_each_verdict(fitted):
    def headline(of: Fitted) -> str:
        return build_report(of, {}, "").headline

    met = with_rises(fitted, a=(1.0, 2.0, 3.0))
    limit = f"{format_bytes(fitted.verdict.checks[0].limit)} of memory on jetson-orin"
    assert headline(met) == f"Yes, by estimate: model fits into {limit}; it was not yet tried on the device."
    assert f"fits into {limit} as it is; it was not yet" in headline(replace(met, outcome=None))
    tiny = with_budget(met, memory=Limit(1.0, False, "1B"))
    assert headline(tiny).startswith("No, by estimate: model does not fit into 1 B of memory on jetson-orin; the best")
    assert "but loses more quality than the limit of 0.5%" in headline(with_budget(met, max_quality_loss=0.5))
    assert "the text is too short to judge the quality limit of 2.5%" in headline(
        with_budget(met, max_quality_loss=2.5)
    )
    stop = QualityStop(met.chosen, with_rises(fitted, a=(8.0, 9.0, 10.0)).quality, 3)
    stopped = replace(with_budget(met, max_quality_loss=5.0), stop=stop)
    assert "within the quality limit of 5%; the smallest within it is kept" in headline(stopped)
    assert build_report(stopped, {}, "").quality_stop.tried == 3
    assert not [candidate for candidate in build_report(stopped, {}, "").search.candidates if candidate.chosen]
    noisy = Measured(fitted.chosen.performance.decode.value, "ms", "board", 1e-6, 1e6)
    performance = replace(fitted.chosen.performance, decode=noisy)
    budget = Budget(decode=Limit(1.0, False, "1ms"))
    chosen = replace(met.chosen, performance=performance)
    trials = tuple(replace(trial, predicted={"decode": 1.0}) for trial in met.outcome.trials)
    outcome = replace(met.outcome, trials=trials)
    unclear = replace(met, setup=replace(met.setup, budget=budget), chosen=chosen, outcome=outcome)
    assert headline(unclear).startswith(
        "Not clear: whether model fits into 1.00 ms per token on jetson-orin lies within"
    )


def test_what_pruning_does_not_reach_is_less_where_embedding_and_head_may_have_few_bits(fitted):
    """The figures are the estimator's, of the whole vocabulary; those of a smaller one are not among them."""
    setup = fitted.setup
    text = build_report(fitted, {}, "").unprunable
    assert "% of its weights: no narrowing of layers removes them. With embedding and head in int8," in text
    dense = setup.model.decoder
    few = replace(dense, embedding_format=WEIGHT_FORMATS["int8"], head_format=WEIGHT_FORMATS["int8"])
    shares = latency_shares(few, setup.profile, setup.workload, setup.precision)
    assert f"{format_ms(shares['overhead'] + shares['head_and_embedding'])} a token are left" in text
    sizes = {form: format_bytes(table_bytes(decoder, setup.precision)) for form, decoder in ((8, few), (16, dense))}
    assert f"{sizes[8]} of the {sizes[16]} of both" in text
    assert (
        shares["head_and_embedding"]
        < 0.6 * latency_shares(dense, setup.profile, setup.workload, "fp16")["head_and_embedding"]
    )
    floats = replace(fitted, setup=with_weights(setup, replace(setup.weights, tables=(None,))))
    assert "With embedding and head" not in build_report(floats, {}, "").unprunable


def test_what_a_reader_has_to_mind_stands_among_the_warnings(fitted):
    warnings = build_report(fitted, {}, "").warnings
    assert warnings[0] == NOT_MEASURED
    assert not [text for text in warnings if "agreement with the dense model" in text]
    hardly_known = "Estimates rest on figures of the device that are hardly known: system reserve, runtime memory,"
    assert [text for text in warnings if text.startswith(hardly_known)]
    assert not [text for text in warnings if "is of low confidence" in text]
    records = [dict(record) for record in fitted.chosen.records]
    records[0] |= {"fell_back": True, "few": [3, 5]}
    measured = Measured(1.0, "ms", "board", 0.9, 1.1)
    performance = replace(fitted.chosen.performance, decode=measured, notes=("clocks were not locked",))
    chosen = replace(fitted.chosen, records=tuple(records), performance=performance)
    samples = replace(fitted.samples, self_generated=True)
    warnings = " ".join(build_report(replace(fitted, chosen=chosen, samples=samples), {}, "").warnings)
    assert NOT_MEASURED not in warnings
    assert "measured on text generated by the dense model: agreement with the dense model, not quality" in warnings
    assert "clocks were not locked" in warnings
    assert "left out in: layer 0 attention" in warnings
    assert "Layer 0: experts 3, 5 saw fewer calibration tokens" in warnings
