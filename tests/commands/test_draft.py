"""A draft made of a bundle's own model: a real ladder of a small model, its guesses, and `run` with it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

import edgeprune.commands.draft as command
from edgeprune.cli.app import app
from edgeprune.commands.draft import draft
from edgeprune.errors import InputError
from edgeprune.generate.text import stream_text
from edgeprune.ondevice.bundle import open_bundle, sha256
from edgeprune.report.draft import DraftReport
from edgeprune.search import latency_table
from edgeprune.search.drafts import LEAST_GAIN
from tests.support.bundles import copy_of, fitted, rewrite
from tests.support.commands import FEW_POINTS, run
from tests.support.sample_reports import measured_content, report_of
from tests.support.small_bundles import write_report

PROMPT = "the quick brown fox"
CHEAP = {"2": 1.01, "4": 1.03, "9": 1.1}  # steps of the target on more tokens


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fitted(tmp_path_factory)


@pytest.fixture(scope="module")
def made(bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, DraftReport]:
    """As on an engine where a step on several tokens costs as much as on one, and a draft's nearly nothing."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(command, "steps_of", lambda target, small, seconds: CHEAP if small is None else {"draft": 0.01})
        patch.setattr(command, "LEAST_GAIN", 0.0)
        for name, value in FEW_POINTS.items():
            patch.setattr(latency_table, name, value)
        result = draft(bundle, rungs=2, output=tmp_path_factory.mktemp("made") / "draft")
    return result.bundle, result.report


@pytest.mark.slow
def test_it_becomes_a_whole_bundle_that_knows_its_guesses(made: tuple[Path, DraftReport]) -> None:
    folder, report = made
    hashes = open_bundle(folder)["sha256"]
    assert {name: sha256(folder / name) for name in hashes} == hashes
    assert DraftReport.model_validate_json((folder / "draft.json").read_text()) == report
    assert (folder / "model" / "config.json").is_file()
    assert not list(folder.parent.glob("*.ladder*"))


@pytest.mark.slow
def test_its_figures_are_measured_and_agree_with_each_other(made: tuple[Path, DraftReport]) -> None:
    _, report = made
    assert [one.rung for one in report.candidates] == list(range(len(report.candidates)))
    best = max(report.candidates, key=lambda one: one.speed)
    assert (report.rung, report.guesses) == (best.rung, best.guesses)
    for one in report.candidates:
        assert 1 <= one.tokens_per_round <= one.guesses + 1
        cost = CHEAP[str(one.guesses + 1)] + 0.01 * one.guesses
        assert one.speed == pytest.approx(one.tokens_per_round / cost)
        assert 0 <= min(one.accepted_greedy, one.accepted_drawn) <= max(one.accepted_greedy, one.accepted_drawn) <= 1
    for figure in (report.greedy, report.drawn):
        assert figure.source == "measured"
        assert figure.low <= figure.value <= figure.high
    assert 0 < report.same <= 1


@pytest.mark.slow
@pytest.mark.parametrize("sampling", [(0.0, 0, 1.0, 0), (0.9, 40, 0.9, 5)], ids=["greedy", "drawn"])
def test_run_answers_with_it(made: tuple[Path, DraftReport], bundle: Path, sampling: tuple) -> None:
    """The same every time; that it is what the target alone answers is tested in floats (test_speculation.py), since
    products of few bits round a step on several tokens in another way."""
    first, again = ("".join(stream_text(bundle, PROMPT, 20, *sampling, pytest.fail, made[0])) for _ in range(2))
    assert first == again != ""
    result = CliRunner().invoke(
        app, ["run", str(bundle), "--draft", str(made[0]), "--prompt", PROMPT, "--max-new-tokens", "5"]
    )
    assert result.exit_code == 0, result.output


@pytest.mark.slow
def test_where_none_pays_nothing_is_written_and_the_figures_are_told(bundle: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(command, "steps_of", lambda target, small, seconds: CHEAP if small is None else {"draft": 1.0})
    result = run("draft", bundle, "--rungs", "2", "--output", "d", "--json", cwd=tmp_path)
    assert result.returncode == 3, result.stderr
    report = DraftReport.model_validate_json(result.stdout)
    assert (report.rung, report.greedy) == (None, None)
    assert max(one.speed for one in report.candidates) < LEAST_GAIN
    assert not list(tmp_path.glob("d*"))


@pytest.mark.slow
def test_what_cannot_have_a_draft_is_refused_before_any_work(bundle: Path, tmp_path: Path) -> None:
    other = write_report(tmp_path / "other", report_of(measured_content()))
    rewrite(other, "manifest.json", json.dumps(open_bundle(other) | {"engine": "tensorrt"}).encode())
    own = copy_of(bundle, tmp_path / "own")
    text = (own / "run.toml").read_text().replace('vocabulary = "full"', 'vocabulary = "samples"')
    rewrite(own, "run.toml", text.encode())
    full = tmp_path / "full"
    full.mkdir()
    (full / "mine.txt").touch()
    for given, output, message in (
        (tmp_path / "none", None, "is not a bundle"),
        (own, None, "has a vocabulary of its own"),
        (bundle, full, "is not empty"),
    ):
        with pytest.raises(InputError, match=message):
            draft(given, output=output or tmp_path / "d")
    assert not list(tmp_path.glob("d*"))


@pytest.mark.slow
def test_a_draft_of_other_tokens_is_refused(made: tuple[Path, DraftReport], bundle: Path, tmp_path: Path) -> None:
    other = copy_of(made[0], tmp_path / "other")
    changed = (other / "tokenizer" / "tokenizer.json").read_text() + "\n"
    rewrite(other, "tokenizer/tokenizer.json", changed.encode())
    with pytest.raises(InputError, match="has other tokens than"):
        list(stream_text(bundle, PROMPT, 5, 0.0, 0, 1.0, 0, pytest.fail, other))


def test_the_speed_is_of_all_answers_together() -> None:
    trials = [command.Trial("greedy", alone, drafted, 1.0) for alone, drafted in ((2.0, 1.0), (4.0, 1.0), (3.0, 1.0))]
    figure = command._speed(trials)
    assert figure.value == pytest.approx(3.0)
    assert 2.0 <= figure.low < 3.0 < figure.high <= 4.0
    assert np.isfinite([figure.low, figure.high]).all()
