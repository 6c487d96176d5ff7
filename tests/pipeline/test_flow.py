"""The search of a run: candidates within the budget, smaller ones below it, the way back to a quality limit."""

from __future__ import annotations

import errno
import json
from dataclasses import replace
from types import SimpleNamespace

import onnx
import pytest

from edgeprune.engine.engines import TensorRT
from edgeprune.errors import InputError
from edgeprune.files import WriteError
from edgeprune.ondevice.figures import Measured
from edgeprune.pipeline import flow
from edgeprune.pipeline.flow import (
    MEASUREMENT_MARGIN,
    _furthest_met,
    _margins,
    quality_status,
    smaller_candidates,
    with_packed_formats,
    within_quality,
    working,
)
from edgeprune.pipeline.provenance import manifest_of
from edgeprune.pipeline.setup import Setup
from edgeprune.progress import Forwarded, Silent
from edgeprune.search.search import QualityTrial, TrialRise
from tests.support.doubles.install import IN_PLACE_VERSION, InProcess, install
from tests.support.runs import finished, setup_of

pytest_plugins = ("tests.support.doubles.fixtures",)

COMMAND = "edgeprune fit demo --device jetson-orin"


class Stopped(Exception):
    """Ends a run where a test wants it."""


def asked(setup: Setup, **changes: bool) -> Setup:
    return replace(setup, request=replace(setup.request, **changes))


def _told() -> Forwarded:
    return Forwarded(lambda *call: None)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return finished(tmp_path_factory)


@pytest.mark.slow
def test_a_run_begins_beside_its_output_and_tells_what_was_chosen(made, tmp_path, caplog):
    setup = setup_of(made.run.setup.model.directory.parent, tmp_path / "out")
    caplog.set_level("INFO", "edgeprune")
    with pytest.raises(Stopped), working(setup, COMMAND, _told()) as run:
        assert run.journal.folder == tmp_path / "out.work"
        run.journal.stage("one", lambda: 1)
        raise Stopped
    told = [line.split(":")[0] for line in caplog.messages]
    assert told == [*(choice.name for choice in setup.choices), "duration"]
    caplog.clear()
    with pytest.raises(InputError, match="unfinished run"), working(setup, COMMAND, Silent()):
        pass
    with working(asked(setup, resume=True), COMMAND, _told()) as run:
        assert run.journal.has("one")
    assert not any(line.startswith("duration") for line in caplog.messages)  # a part of the work is done
    assert not list(tmp_path.iterdir())


def test_to_go_on_keeps_what_no_run_made(made, tmp_path):
    setup = setup_of(made.run.setup.model.directory.parent, tmp_path / "out")
    with pytest.raises(Stopped), working(setup, COMMAND, Silent()) as run:
        run.journal.stage("one", lambda: 1)
        raise Stopped
    (tmp_path / "out.work" / "notes.txt").write_text("mine")
    with working(asked(setup, resume=True, force=True), COMMAND, Silent()) as run:
        assert run.journal.has("one")
    assert [str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")] == ["out.work", "out.work/notes.txt"]


def test_a_run_that_ends_before_its_first_stage_leaves_nothing(made, tmp_path):
    setup = setup_of(made.run.setup.model.directory.parent, tmp_path / "out")
    with pytest.raises(Stopped), working(setup, COMMAND, Silent()):
        raise Stopped
    assert not list(tmp_path.iterdir())


def bundle_of(setup: Setup, run_id: str, command: str = COMMAND) -> None:
    """Stands for the bundle that a run writes at its end: its manifest."""
    setup.output.mkdir()
    manifest = {**manifest_of(setup, command, run_id), "sha256": {}}
    (setup.output / "manifest.json").write_text(json.dumps(manifest))


def test_a_run_that_was_killed_while_its_work_was_removed_is_done(made, tmp_path, caplog):
    setup = setup_of(made.run.setup.model.directory.parent, tmp_path / "out")
    with pytest.raises(Stopped), working(setup, COMMAND, Silent()) as run:
        run.journal.stage("one", lambda: 1)
        bundle_of(setup, run.journal.id)
        raise Stopped
    with caplog.at_level("INFO", "edgeprune"), working(asked(setup, resume=True), COMMAND, _told()) as run:
        assert run is None
    assert "is complete already" in caplog.messages[-1]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    with working(asked(setup, resume=True), COMMAND, Silent()) as run:  # nor is there anything to go on with
        assert run is None


@pytest.mark.parametrize("other", [{"seed": 1}, {"checkpoint": False}])
def test_to_go_on_never_replaces_the_bundle_of_another_run(made, tmp_path, other):
    home = made.run.setup.model.directory.parent
    bundle_of(setup_of(home, tmp_path / "out", **other), "of another", "edgeprune fit --other")
    before = (tmp_path / "out" / "manifest.json").read_bytes()
    setup = setup_of(home, tmp_path / "out", resume=True)
    with pytest.raises(InputError, match="bundle of another run"), working(setup, COMMAND, Silent()):
        pass
    assert (tmp_path / "out" / "manifest.json").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    with working(asked(setup, force=True), COMMAND, Silent()) as run:
        assert run is not None


def test_a_full_disk_says_how_to_go_on(made, tmp_path):
    setup = setup_of(made.run.setup.model.directory.parent, tmp_path / "out")
    with pytest.raises(WriteError, match="No space left") as caught, working(setup, COMMAND, Silent()) as run:
        run.journal.stage("one", lambda: 1)
        raise OSError(errno.ENOSPC, "full")
    assert caught.value.remedy.endswith("go on with --resume.")
    assert (tmp_path / "out.work").is_dir()


def test_the_chosen_candidate_is_the_best_that_fits(made):
    """The memory of every candidate is known exactly: none of less predicted loss is within the limit."""
    limits = made.run.setup.budget.absolute(made.run.dense.performance).limits
    assert made.fitted.chosen.performance.memory.total <= limits["memory"]
    assert made.allocation.loss == pytest.approx(made.planner.solve(limits).loss)
    estimate = made.planner.problem.estimate(made.allocation)["memory"]
    assert estimate == pytest.approx(made.fitted.chosen.performance.memory.total, rel=0.02)


@pytest.mark.slow
def test_what_no_builder_dequantises_stays_as_it_was_chosen(made, tmp_path):
    """TensorRT for RTX where it is installed; nothing is built where there is no builder."""
    setup = setup_of(made.run.setup.model.directory.parent, tmp_path / "out")
    with working(setup, COMMAND, Silent()) as run:
        assert with_packed_formats(run) is run
        assert run.journal.has("formats") == setup.engine.compiles


@pytest.mark.parametrize("layer", ["pycuda"])
@pytest.mark.parametrize("weights", ["auto", "int8"])
def test_on_a_double_that_dequantises_int8_auto_goes_on_without_it(
    made, device, layer, weights, monkeypatch, tmp_path, caplog
):
    """What was asked for stays. Both say so, and both are the runs that were begun."""
    install(monkeypatch, device, (layer,), IN_PLACE_VERSION)  # of the profile's graphs
    device.dequantised = {onnx.TensorProto.INT8}
    setup = setup_of(made.run.setup.model.directory.parent, tmp_path / "out", weights=weights)
    engine = TensorRT(setup.profile, setup.workload, setup.precision, "", "tensorrt", InProcess())
    setup = replace(setup, engine=engine)
    caplog.set_level("INFO", "edgeprune")
    with pytest.raises(Stopped), working(setup, COMMAND, _told()) as run:
        run = with_packed_formats(run)
        chosen = {choice.name: choice for choice in run.setup.choices}["weights"]
        assert "int8" in chosen.reason.split("dequantises into copies at each step: ")[1]
        assert chosen.reason in caplog.text
        assert run.setup.fingerprint == setup.fingerprint
        kept = run.setup.weights
        assert kept.names == chosen.value == {"auto": "float, int4-64", "int8": "int8"}[weights]
        assert kept.tables == setup.weights.tables  # a copy of so small a table would not show
        raise Stopped
    with working(asked(setup, resume=True), COMMAND, Silent()) as run:
        assert with_packed_formats(run).setup.weights == kept
    assert engine.session.done == ["build"] * {"auto": 5, "int8": 3}[weights]  # not again


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
            real.quality(name, candidate) if candidate.model.decoder == run.setup.model.decoder else quality
        )
    )
    stop, kept, allocation, found = within_quality(run, made.planner, made.fitted.chosen, made.allocation, quality)
    assert (stop.beyond, stop.quality) == (made.fitted.chosen, quality)
    assert kept.model.decoder == run.setup.model.decoder
    assert allocation == made.planner.problem.everything
    assert (quality_status(run, quality), quality_status(run, found)) == ("missed", "met")


@pytest.mark.parametrize(("limit", "percent"), [(21.0, 5.0), (None, 500.0)])
def test_a_task_beyond_its_limit_counts_as_that_share_of_the_limit_on_perplexity(made, monkeypatch, limit, percent):
    """Here one and a half times; where perplexity has no limit, its rise does not count at all."""
    seen, budget = [], replace(made.run.setup.budget, max_quality_loss=limit, max_task_drop=4.0)
    run = replace(made.run, setup=replace(made.run.setup, budget=budget))
    texts = {"a": {"percent": percent, "low": percent, "high": percent}}
    tasks = {"own": {"difference": {"value": -0.05, "low": -0.06, "high": -0.045}}}
    quality = replace(made.fitted.quality, texts=texts, tasks=tasks)
    run.__dict__["evaluator"] = SimpleNamespace(quality=lambda name, candidate: quality)
    monkeypatch.setattr(flow, "search_quality", lambda at, limit, beyond, obtain: seen.append((limit, beyond[1])) or ())
    within_quality(run, made.planner, made.fitted.chosen, made.allocation, quality)
    ((nats, rise),) = seen
    assert rise.nats == pytest.approx(1.5 * nats)
    assert rise.status == "missed"


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
