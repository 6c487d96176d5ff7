"""The results of a run: where a candidate's graph is, what decides on quality, whether there is a checkpoint."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest

from edgeprune.ondevice.budget import Budget, Limit
from edgeprune.pipeline.results import Quality, has_checkpoint
from tests.support.runs import finished


@pytest.fixture(scope="module")
def fitted(tmp_path_factory):
    return finished(tmp_path_factory).fitted


def quality(**percents: tuple[float, float, float]) -> Quality:
    texts = {name: dict(zip(("low", "percent", "high"), bounds, strict=True)) for name, bounds in percents.items()}
    return Quality(texts, None, None, None, None)


def test_the_graph_that_runs_here_is_in_fp32_whatever_the_devices_is(fitted):
    assert fitted.chosen.exported.graphs.name == "onnx-fp16"
    assert fitted.chosen.runnable_graph.parent.name == "onnx-fp32"
    assert fitted.chosen.runnable_graph.is_file()


def test_the_text_that_rises_most_counts():
    of = quality(a=(1.0, 2.0, 3.0), b=(-9.0, 4.0, 20.0), c=(0.0, 0.5, 1.0))
    assert of.worst_percent == 4.0
    assert of.losses("perplexity") == [(1.0, 3.0), (-9.0, 20.0), (0.0, 1.0)]


@pytest.mark.parametrize(("limit", "status"), [(None, "met"), (20.0, "met"), (10.0, "noisy"), (0.5, "missed")])
def test_the_quality_limit_is_judged_by_every_texts_interval(fitted, limit, status):
    setup = replace(fitted.setup, budget=replace(fitted.setup.budget, max_quality_loss=limit))
    judged = replace(fitted, setup=setup, quality=quality(a=(1.0, 2.0, 3.0), b=(-9.0, 4.0, 20.0)))
    assert judged.quality_status == status


def test_the_verdict_is_of_the_chosen_model_against_the_budget(fitted):
    """The dense model needs more than its share of 90 %."""
    assert fitted.verdict.status == "met"
    (check,) = fitted.verdict.checks
    assert check.figure.value == fitted.chosen.performance.memory.total
    assert check.limit == pytest.approx(0.9 * fitted.dense.memory.prunable + fitted.dense.memory.runtime.value)
    assert replace(fitted, chosen=replace(fitted.chosen, performance=fitted.dense)).verdict.status == "missed"
    tiny = replace(fitted.setup, budget=Budget(memory=Limit(1.0, False, "1B")))
    assert replace(fitted, setup=tiny).verdict.status == "missed"


@pytest.mark.parametrize("asked", [True, False])
@pytest.mark.parametrize("is_uniform", [True, False])
def test_a_checkpoint_is_written_where_it_was_asked_for_and_can_hold_the_widths(fitted, asked, is_uniform):
    setup = replace(fitted.setup, request=replace(fitted.setup.request, checkpoint=asked))
    model = SimpleNamespace(decoder=SimpleNamespace(is_uniform=is_uniform))
    changed = replace(fitted, setup=setup, chosen=replace(fitted.chosen, model=model))
    assert has_checkpoint(changed) == (asked and is_uniform)


@pytest.mark.parametrize(("limit", "status"), [(None, "met"), (5.0, "met"), (4.0, "noisy"), (0.5, "missed")])
def test_the_limit_on_tasks_is_judged_by_every_tasks_interval(fitted, limit, status):
    """Beside the limit on perplexity, which is met."""
    budget = replace(fitted.setup.budget, max_quality_loss=30.0, max_task_drop=limit)
    tasks = {
        name: {"difference": dict(zip(("low", "value", "high"), bounds, strict=True))}
        for name, bounds in {"a": (-0.05, -0.03, -0.01), "b": (0.01, 0.02, 0.03)}.items()
    }
    judged = replace(fitted, setup=replace(fitted.setup, budget=budget))
    judged = replace(judged, quality=replace(quality(a=(1.0, 2.0, 3.0)), tasks=tasks))
    assert sum(judged.quality.drops, ()) == pytest.approx((1.0, 5.0, -3.0, -1.0))
    assert judged.quality_status == status


def test_the_chosen_metric_judges_the_limit_on_quality(fitted):
    text = {"percent": 50.0, "low": 40.0, "high": 60.0, "agreement": {"share": 0.95, "low": 0.93, "high": 0.97}}
    for metric, status in (("perplexity", "missed"), ("agreement", "met")):
        request = replace(fitted.setup.request, quality_metric=metric)
        setup = replace(fitted.setup, request=request, budget=replace(fitted.setup.budget, max_quality_loss=10.0))
        assert Quality({"a": text}, None, None, None, None).status(setup) == status
