"""The work of a run in passes, and how long this machine takes for it."""

from __future__ import annotations

from dataclasses import replace

import pytest

from edgeprune.model.load import load_model
from edgeprune.pipeline.duration import (
    Rates,
    Samples,
    Work,
    announced,
    comparing,
    fitting,
    generating,
    in_words,
    passing,
    probed,
    pruning,
    sensing,
)
from edgeprune.pipeline.flow import working
from edgeprune.progress import Silent
from tests.support.runs import home, setup_of


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    return home(tmp_path_factory)


@pytest.fixture(scope="module")
def decoder(small):
    return load_model(str(small / "model")).decoder


class Notes(Silent):
    """A progress that keeps what the user should read."""

    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)


def test_a_pass_is_two_operations_for_each_weight_and_token(decoder):
    assert passing(decoder, 7).passes == 14 * decoder.layer_parameters
    head = decoder.vocab_size * decoder.hidden_size
    assert generating(decoder, 7) == Work(steps=14.0 * (decoder.layer_parameters + head))
    assert pruning(decoder, 7).passes > 2 * passing(decoder, 7).passes  # both streams, and what is solved


def test_seconds_are_work_over_rates_and_the_measurements():
    assert (Work(passes=6.0, steps=8.0, seconds=1.0) * 2 + Work(seconds=0.5)).at(Rates(many=3.0, few=4.0)) == 10.5


def test_more_samples_methods_or_rungs_are_more_work(small, decoder, tmp_path):
    few, many = Samples(4, 32, 16, 100), Samples(8, 32, 16, 100)
    assert comparing(decoder, few, 2, 0).passes < comparing(decoder, many, 2, 0).passes
    assert comparing(decoder, many, 1, 1).passes < comparing(decoder, many, 2, 0).passes  # one stream, not two
    assert sensing(decoder, 12, 16) == sensing(decoder, 99, 16)  # it takes no more of them
    setup = setup_of(small, tmp_path / "out")
    assert fitting(setup, 1).passes < fitting(setup, 3).passes
    assert fitting(setup, 1).seconds > 0  # the cross-check


def test_both_rates_are_timed(decoder):
    rates = probed(decoder, 4)
    assert rates.many > 1e6
    assert rates.few > 1e6
    assert probed(replace(decoder, hidden_size=1 << 20), 4).many > 1e6  # of a cut of so wide a model


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (0.2, "about 10 s"),
        (44, "about 40 s"),
        (100, "about 2 minutes"),
        (480, "about 8 minutes"),
        (7200, "about 2 hours"),
    ],
)
def test_a_duration_in_words_is_rough(seconds, words):
    assert in_words(seconds) == words


def test_it_is_told_at_the_start_of_a_run_with_what_it_rests_on(small, decoder, tmp_path):
    progress = Notes()
    with working(setup_of(small, tmp_path / "out"), "the command", progress):
        pass
    (told,) = (note for note in progress.notes if note.startswith("duration: "))
    for part in ("about 10 s here, estimated: ", "TFLOP", "just timed", "of measurements"):
        assert part in told
    assert "of measurements" not in announced(comparing(decoder, Samples(4, 32, 16, 100), 2, 0), decoder, 32)
