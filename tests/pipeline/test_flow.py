"""The search of a run: candidates within the budget, smaller ones below it, the way back to a quality limit."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest

from edgeprune.errors import InputError
from edgeprune.ondevice.figures import Measured
from edgeprune.pipeline.flow import (
    MEASUREMENT_MARGIN,
    _furthest_met,
    _margins,
    begin,
    quality_status,
    smaller_candidates,
    within_quality,
)
from edgeprune.progress import Forwarded, Silent
from edgeprune.search.search import QualityTrial, TrialRise
from tests.support.runs import finished, setup_of


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return finished(tmp_path_factory)


def test_a_run_begins_beside_its_output_and_tells_what_was_chosen(made, tmp_path, caplog):
    setup = setup_of(made.run.setup.model.directory.parent, tmp_path / "out")
    with caplog.at_level("INFO", "edgeprune"):
        run = begin(setup, Forwarded(lambda *call: None))
    assert run.journal.folder == tmp_path / "out.work"
    assert [line.split(":")[0] for line in caplog.messages] == [choice.name for choice in setup.choices]
    run.journal.stage("one", lambda: 1)
    with pytest.raises(InputError, match="unfinished run"):
        begin(setup, Silent())
    resumed = replace(setup, request=replace(setup.request, resume=True))
    assert begin(resumed, Silent()).journal.has("one")


def test_the_chosen_candidate_is_the_best_that_fits(made):
    """The memory of every candidate is known exactly: none of less predicted loss is within the limit."""
    limits = made.run.setup.budget.absolute(made.run.dense.performance).limits
    assert made.fitted.chosen.performance.memory.total <= limits["memory"]
    assert made.allocation.loss == pytest.approx(made.planner.solve(limits).loss)
    estimate = made.planner.problem.estimate(made.allocation)["memory"]
    assert estimate == pytest.approx(made.fitted.chosen.performance.memory.total, rel=0.02)


def test_further_rungs_are_each_smaller_than_the_last(made):
    run = replace(made.run, setup=replace(made.run.setup, request=replace(made.run.setup.request, rungs=2)))
    (smaller,) = smaller_candidates(run, made.planner, made.allocation)
    assert smaller.performance.memory.total < made.fitted.chosen.performance.memory.total
    assert smaller.model.directory.parent.name == "rung-1"
    alone = replace(made.run, setup=replace(made.run.setup, request=replace(made.run.setup.request, rungs=1)))
    assert smaller_candidates(alone, made.planner, made.allocation) == []


def test_a_quality_limit_that_nothing_pruned_meets_leaves_the_dense_model(made):
    """By way of what was tried in between; the budget's own candidate is kept beside it."""
    run = replace(made.run, setup=replace(made.run.setup, budget=replace(made.run.setup.budget, max_quality_loss=5.0)))
    worse = {
        name: text | {"percent": 50.0, "low": 40.0, "high": 60.0} for name, text in made.fitted.quality.texts.items()
    }
    quality = replace(made.fitted.quality, texts=worse)
    real, run.__dict__["evaluator"] = run.evaluator, None
    run.__dict__["evaluator"] = SimpleNamespace(
        quality=lambda name, candidate: (
            real.quality(name, candidate)
            if candidate.model.decoder.parameters == run.setup.model.decoder.parameters
            else quality
        )
    )
    stop, kept, found = within_quality(run, made.planner, made.fitted.chosen, made.allocation, quality)
    assert (stop.beyond, stop.quality) == (made.fitted.chosen, quality)
    assert kept.model.decoder == run.setup.model.decoder
    assert (quality_status(run, quality), quality_status(run, found)) == ("missed", "met")


def test_figures_that_are_measured_are_kept_below_their_limits(made):
    assert set(_margins(made.run).values()) == {0.0}
    dense, noisy = made.run.dense, Measured(1.0, "ms", "board", 0.9, 1.1)
    run = replace(made.run)
    run.__dict__["dense"] = replace(dense, performance=replace(dense.performance, decode=noisy))
    assert _margins(run) == {"memory": 0.0, "prefill": 0.0, "decode": MEASUREMENT_MARGIN}


def test_the_smallest_trial_within_the_quality_limit_is_kept():
    def trials(*of: tuple[float, str]) -> tuple[QualityTrial, ...]:
        return tuple(SimpleNamespace(share=share, rise=TrialRise(0.1, status)) for share, status in of)

    assert _furthest_met(trials((1.0, "missed"), (0.5, "met"), (0.75, "met"), (0.9, "noisy"))) == 2
    assert _furthest_met(trials((1.0, "missed"), (0.5, "noisy"))) is None
