"""`--recover` from the request to the bundle, on a small run."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from edgeprune.commands.fit import fit
from edgeprune.commands.frontier import frontier
from edgeprune.errors import InputError
from edgeprune.model.load import load_model
from edgeprune.ondevice import machine
from edgeprune.pipeline import setup as preparing
from edgeprune.pipeline.journal import open_journal
from edgeprune.pipeline.stages import Run
from edgeprune.precision import CACHE_FORMATS, WEIGHT_FORMATS
from edgeprune.progress import Silent
from edgeprune.pruning import recover as training
from edgeprune.pruning.effort import RANK, Effort, effort_of, needed_bytes
from edgeprune.search.solve import Allocation
from edgeprune.search.widths import dense_widths
from tests.support.checkpoints import save_llama
from tests.support.runs import options, setup_of, short_durations
from tests.support.vocabularies import CORPUS, byte_level

SIZES = {"hidden_size": 256, "num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 64, "num_hidden_layers": 2}


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A folder with `model`, which a cut changes by much, and `notes.txt`."""
    folder = tmp_path_factory.mktemp("recovery")
    save_llama(folder / "model", **SIZES, intermediate_size=512, vocab_size=602, initializer_range=0.15)
    byte_level(folder / "model")
    (folder / "notes.txt").write_text("\n\n".join(CORPUS * 4))
    with short_durations():
        yield folder


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """A tiny model bears a larger rate: a few steps are enough."""
    monkeypatch.setattr(training, "RATE", 1e-3)
    monkeypatch.setattr(training, "WARM_UP", 4)


def fitted(small: Path, output: Path, progress=None, **changes):
    return fit(progress=progress, **options(small, output, max_quality_loss="off", recover="12", **changes))


@pytest.mark.slow
def test_a_run_that_was_ended_goes_on_to_the_same_model(small, tmp_path, monkeypatch):
    monkeypatch.setattr(training, "SAVE_SECONDS", 0.0)
    whole = fitted(small, tmp_path / "whole", weights="float")

    class Ended(Exception):
        pass

    def end(stage: str, done: int, total: int) -> None:
        if stage == "recover" and done == 7:
            raise Ended

    with pytest.raises(Ended):
        fitted(small, tmp_path / "again", progress=end, weights="float")
    steps = []
    again = fitted(
        small,
        tmp_path / "again",
        progress=lambda stage, done, _: steps.append((stage, done)),
        resume=True,
        weights="float",
    )
    assert min(done for stage, done in steps if stage == "recover") == 7  # the state of the sixth step was saved
    assert not (tmp_path / "again.work").exists()
    one, other = ((result.bundle / "model" / "model.safetensors").read_bytes() for result in (whole, again))
    assert one == other
    # What the report states is what the bundle's model is.
    recovery = whole.report.recovery
    assert (recovery.steps, recovery.rows, recovery.row_tokens) == (12, 24, 24)
    assert 0 < recovery.after.value < recovery.before.value
    assert [choice.value for choice in whole.report.choices if choice.name == "recovery"] == ["12 steps"]
    assert "KL" in type(recovery).model_fields["before"].description
    page = (whole.bundle / "report.html").read_text()
    assert "unseen rows of its text; 12 steps" in page
    assert json.loads((whole.bundle / "report.json").read_text())["recovery"]["taken"] == recovery.taken


@pytest.mark.slow
def test_a_model_of_codes_and_a_smaller_vocabulary_is_recovered_as_it_is_deployed(small, tmp_path):
    setup = setup_of(small, tmp_path / "out", weights="int8", cache="int8", vocabulary="samples", recover="12")
    run = Run(setup, open_journal(tmp_path / "out.work", setup.fingerprint, False, False), Silent())
    int8, size = WEIGHT_FORMATS["int8"], min(run.vocabularies)
    widths = dense_widths(setup.model.decoder)._replace(intermediate_size=256)
    cut = Allocation((widths,) * 2, size, 0.0, ((int8, int8),) * 2, (int8, int8), CACHE_FORMATS["int8"])
    candidate = run.candidate("candidate-1", cut)
    recovered = run.recovered(candidate)
    assert recovered.model.decoder == candidate.model.decoder
    assert recovered.decoder == candidate.decoder  # its cache too, whose scales are those of the trained model
    assert (size, recovered.decoder.vocab_size) == (recovered.decoder.vocab_size, candidate.decoder.vocab_size)
    assert size < setup.model.decoder.vocab_size
    assert recovered.recovery["after"] < recovered.recovery["before"]
    assert recovered.records == candidate.records and recovered.scales.keys() == candidate.scales.keys()
    name = "layers.1.mlp.down"
    before, after = (one.model.quantised[name] for one in (candidate, recovered))
    assert not torch.equal(before.scales, after.scales)
    # Nothing is trained twice, and nothing that was not pruned.
    assert run.recovered(candidate).model.fingerprint == recovered.model.fingerprint
    assert run.recovered(replace(candidate, records=())).recovery is None


@pytest.mark.parametrize(
    ("text", "effort"),
    [("off", None), ("60", Effort(steps=60)), ("20min", Effort(minutes=20.0)), (" 1.5 MIN ", Effort(minutes=1.5))],
)
def test_efforts(text, effort):
    assert effort_of(text) == effort


@pytest.mark.parametrize("text", ["", "0", "-3", "0min", "minutes", "1e9", "12345678901", "20 h", "\u0663"])
def test_bad_efforts_are_refused_before_any_work(small, tmp_path, text):
    with pytest.raises(InputError, match="--recover") as caught:
        setup_of(small, tmp_path / "out", recover=text)
    assert "20min" in caught.value.remedy
    assert not list(tmp_path.iterdir())


def with_memory(monkeypatch, total: int) -> None:
    monkeypatch.setattr(preparing, "memory_state", lambda: machine.memory_state() | {"total": total})


def test_a_machine_of_too_little_memory_is_told_before_any_work(small, tmp_path, monkeypatch):
    with_memory(monkeypatch, needed_bytes(load_model(str(small / "model")).decoder, 24, RANK) - 1)
    with pytest.raises(InputError, match="--recover holds about"):
        setup_of(small, tmp_path / "out", recover="60")
    setup_of(small, tmp_path / "out")


@pytest.mark.slow
def test_where_memory_is_short_matrices_are_changed_by_products_of_low_rank(small, tmp_path, monkeypatch):
    whole, low = (needed_bytes(load_model(str(small / "model")).decoder, 24, rank) for rank in (None, RANK))
    assert low < 0.6 * whole
    with_memory(monkeypatch, whole - 1)
    report = fitted(small, tmp_path / "out", weights="float").report
    assert (report.recovery.rank, report.recovery.memory_bytes) == (RANK, pytest.approx(low, rel=0.5))
    assert report.recovery.after.value < report.recovery.before.value
    [choice] = [choice for choice in report.choices if choice.name == "recovery"]
    assert "they are changed by products of rank 16" in choice.reason
    assert "12 steps of products of rank 16, for want of memory, in" in (tmp_path / "out" / "report.html").read_text()


@pytest.mark.slow
def test_every_rung_of_a_frontier_is_trained(small, tmp_path):
    seen = []
    given = options(small, tmp_path / "out", memory=None, recover="12", weights="float")
    result = frontier(**given, rungs=2, progress=lambda stage, done, total: seen.append((stage, done, total)))
    assert seen.count(("recover", 12, 12)) == len(result.report.rungs) == 2
    assert result.bundle is not None


@pytest.mark.slow
def test_the_best_of_several_candidates_after_their_recovery_is_kept(small, tmp_path):
    """All are within the budget; what ranked them before and afterwards stands in the report."""
    whole = fitted(small, tmp_path / "out", memory="90%", weights="auto", recover_candidates=3)
    assert whole.met
    rivals, [text] = whole.report.recovery.rivals, whole.report.quality.texts
    assert {rival.name for rival in rivals} == {"chosen by the search", "pruned alone"}
    assert [rival.after for rival in rivals] == sorted(rival.after for rival in rivals)
    assert any(rival.after != rival.before for rival in rivals)
    assert (text.low_percent + text.high_percent) / 2 == pytest.approx(rivals[0].after)  # which is the bundle's
    assert "of 2 candidates within the budget" in (whole.bundle / "report.html").read_text()
    assert "--recover-candidates 3" in whole.report.command


@pytest.mark.parametrize(("count", "recover", "message"), [(2, "off", "without --recover"), (0, "12", "from 1 to 8")])
def test_candidates_that_nothing_trains_are_refused(small, tmp_path, count, recover, message):
    with pytest.raises(InputError, match=message):
        setup_of(small, tmp_path / "out", recover=recover, recover_candidates=count)
