"""The work of a run in passes, and how long this machine takes for it."""

from __future__ import annotations

import re
from dataclasses import asdict, replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from edgeprune.model.decoder import Experts, Layer, Mlp
from edgeprune.model.load import load_model
from edgeprune.pipeline.comparison import compared_method
from edgeprune.pipeline.duration import (
    Samples,
    Work,
    announced,
    comparing,
    fitting,
    generating,
    in_words,
    passing,
    pruning,
    recovering,
    sensing,
)
from edgeprune.pipeline.flow import working
from edgeprune.pipeline.rates import Rates, probed
from edgeprune.precision import CACHE_FORMATS, WEIGHT_FORMATS
from edgeprune.progress import Silent
from edgeprune.pruning.effort import Effort
from edgeprune.pruning.methods import method_named
from edgeprune.pruning.prune import prune
from edgeprune.pruning.recover import HELD_OUT, Rows, Student, Teacher, Training
from edgeprune.search.response import measure_response
from edgeprune.search.sensitivity import measure_sensitivities
from tests.support.checkpoints import save_llama
from tests.support.questions import write_questions
from tests.support.runs import home, setup_of

FORMATS = tuple(WEIGHT_FORMATS[name] for name in ("int8", "int4-32", "w8a8"))
CACHES = (CACHE_FORMATS["int8"],)


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
    assert passing(decoder, 7) == Work(passes=14.0 * decoder.layer_parameters)
    head = decoder.vocab_size * decoder.hidden_size
    assert passing(decoder, 7, head=True).products == 14.0 * head
    assert generating(decoder, 7) == Work(steps=14.0 * (decoder.layer_parameters + head))


def test_of_experts_a_token_meets_its_own(decoder):
    mlp = Mlp(intermediate_size=8, experts=Experts(num_experts=4, num_experts_per_tok=2))
    alone = replace(decoder, layers=(Layer(attention=None, mlp=mlp),))
    weights = 2 * 3 * 8 * decoder.hidden_size + 4 * decoder.hidden_size  # two experts of four, and the router
    assert passing(alone, 1).passes == 2.0 * weights


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    """A model of widths that real ones have, so that what grows with them decides its work; few layers."""
    folder = tmp_path_factory.mktemp("wide")
    shape = {"hidden_size": 256, "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 32}
    save_llama(folder, **shape, intermediate_size=768, num_hidden_layers=2, vocab_size=640)
    return load_model(str(folder))


@pytest.mark.slow
@pytest.mark.parametrize("rounds", [False, True])
def test_products_of_a_pruning_are_those_that_torch_counts(wide, rounds):
    decoder, ids = wide.decoder, torch.randint(0, 640, (8, 128))
    widths = decoder.with_layer_widths([(3, 2, 640)] * 2)
    target = widths.with_format(WEIGHT_FORMATS["int8"]) if rounds else widths
    work = pruning(decoder, ids.numel(), rounds)
    with FlopCounterMode(display=False) as counter:
        list(prune(wide, target, ids, method_named("default"), 0))
    assert work.passes + work.products == pytest.approx(counter.get_total_flops(), rel=0.25)


def test_products_of_the_sensitivities_are_those_that_torch_counts(wide):
    ids = torch.randint(0, 640, (12, 128))
    probes = passing(wide.decoder, (8 + 4 + 2 * 4) * 128) + pruning(wide.decoder, 8 * 128)
    work = sensing(wide.decoder, 16, 128) + probes * -1
    with FlopCounterMode(display=False) as counter:
        measure_sensitivities(wide, ids, method_named("default").score, 0)
    assert work.passes + work.products == pytest.approx(counter.get_total_flops(), rel=0.25)


@pytest.mark.slow
def test_products_of_all_probes_are_those_that_torch_counts(wide):
    ids, how = torch.randint(0, 640, (24, 128)), method_named("default")
    work = sensing(wide.decoder, 24, 128, FORMATS, CACHES)
    with FlopCounterMode(display=False) as counter:
        sensitivities = measure_sensitivities(wide, ids[:12], how.score, 0, FORMATS, (), CACHES)
        measure_response(wide, ids, sensitivities, how, 0, FORMATS, CACHES)
    assert work.passes + work.products == pytest.approx(counter.get_total_flops(), rel=0.25)


def test_products_of_a_step_of_a_recovery_are_those_that_torch_counts(wide, tmp_path):
    rows = Rows(None, lambda first, count: torch.randint(0, 640, (count, 129)), 129, 0)
    student, teacher = Student(wide, wide, None, torch.float32, 128), Teacher(wide, None)
    training = Training(student, teacher, rows, Effort(2), tmp_path)
    training._own_rows(HELD_OUT, 2)  # they and the dense model's pass are apart
    work = recovering(wide.decoder, Effort(1), 128) + (generating(wide.decoder, 128) + passing(wide.decoder, 128)) * -1
    with FlopCounterMode(display=False) as counter:
        training._step()
    assert work.passes + work.products == pytest.approx(counter.get_total_flops(), rel=0.25)
    assert recovering(wide.decoder, None, 128) == Work()
    assert recovering(wide.decoder, Effort(minutes=2.0), 128) == Work(seconds=120.0)


def test_seconds_are_work_over_rates_and_the_measurements():
    rates = Rates(passes=3.0, products=1.0, factors=2.0, steps=4.0, weights=5.0)
    assert (Work(passes=6.0, steps=8.0, seconds=1.0) * 2 + Work(seconds=0.5)).at(rates) == 10.5
    assert Work(products=3.0, factors=4.0, weights=10.0).at(rates) == 7.0


def test_more_samples_methods_formats_or_rungs_are_more_work(small, decoder, tmp_path):
    few, many = Samples(4, 32, 16, 100), Samples(8, 32, 16, 100)
    whole, plain, rounded = (compared_method(name, decoder) for name in ("default", "wanda", "default+int8"))
    assert comparing(decoder, few, [whole], 2).flops < comparing(decoder, many, [whole], 2).flops
    for less, more in ((plain, whole), (whole, rounded)):  # one stream, not two; and what is rounded as well
        assert comparing(decoder, many, [less], 2).flops < comparing(decoder, many, [more], 2).flops
    assert sensing(decoder, 24, 16) == sensing(decoder, 99, 16)  # it takes no more of them
    assert pruning(decoder, 16).flops < pruning(decoder, 16, rounds=True).flops
    assert sensing(decoder, 24, 16).flops < sensing(decoder, 24, 16, FORMATS).flops
    setup = setup_of(small, tmp_path / "out")
    assert fitting(setup, 1).flops < fitting(setup, 3).flops
    assert fitting(setup, 1).seconds > 0  # the cross-check
    own = str(write_questions(tmp_path / "own.jsonl"))
    few, many = (setup_of(small, tmp_path / "out", tasks=own, questions=count) for count in (2, 8))
    assert fitting(setup, 1).flops < fitting(few, 1).flops < fitting(many, 1).flops


def test_all_rates_are_timed(decoder):
    wide = replace(decoder, hidden_size=1 << 20)  # whose layer is too large to be made for it
    for each in (decoder, wide):
        assert all(rate > 1e5 for rate in asdict(probed(each, 4)).values())


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
    assert re.match(r"duration: about \d+ (s|minutes) here, estimated: ", told)
    for part in ("TFLOP", "just timed", "through a layer", "of measurements"):
        assert part in told
    assert "of measurements" not in announced(comparing(decoder, Samples(4, 32, 16, 100), [], 1), decoder, 32)
