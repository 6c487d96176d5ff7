"""The document of drift: what it concludes from distance and cost, and what the terminal shows."""

from __future__ import annotations

import io
import shlex
from pathlib import Path

import pytest
from rich.console import Console

from edgeprune.report.drift import DriftReport, concluded, print_drift
from tests.support.sample_reports import text

LARGER = "edgeprune fit --from the-bundle --pick 0"


def report(distance: float, rise: float | None, documents: str = "first words") -> DriftReport:
    """Against a limit of 20 % and a rise of 10 % (8.5 to 11.5 %) on the held-out text."""
    return DriftReport(
        bundle="the-bundle",
        model="a model",
        texts="new.jsonl",
        since="the calibration data of the fit",
        reader="fitted",
        samples=16,
        calibration_samples=32,
        length=256,
        distance_percent=distance,
        limit_percent=20.0,
        p=0.5 if distance <= 20 else 0.0005,
        drifted=distance > 20,
        modules=[
            {"layer": 7, "kind": "mlp", "distance_percent": 3 * distance, "limit_percent": 30.0, "drifted": False},
            {"layer": 3, "kind": "mlp", "distance_percent": 2 * distance, "limit_percent": 30.0, "drifted": True},
        ],
        cost=None if rise is None else text("new", 20.0, rise),
        no_cost="" if rise is not None else "the dense model is elsewhere",
        reference=text("held out", 20.0, 10.0),
        covering=[{"distance_percent": distance, "documents": [documents]}],
        verdict="",
        steps=[],
    )


@pytest.mark.parametrize(
    ("distance", "rise", "words", "steps"),
    [
        (10.0, 11.0, "No drift: 10 % from the calibration data, limit 20 %; perplexity +11.0 % over", []),
        (50.0, 11.0, "Drift: 50 % from the calibration data, limit 20 %; perplexity +11.0 % over", []),
        (50.0, 30.0, "+30.0 % over the dense model, more than on the held-out text of the fit (+10.0 %)", ["R", "Or"]),
        (10.0, 30.0, "No drift: 10 %", ["T"]),
        (50.0, None, "what that costs is not known: the dense model is elsewhere", ["R", "Or"]),
        (10.0, None, "what that costs is not known", []),
    ],
)
def test_advice_follows_from_distance_and_cost(distance, rise, words, steps):
    found = concluded(report(distance, rise), Path("the bundle"), LARGER)
    assert words in found.verdict
    assert len(found.steps) == len(steps)
    assert all(step.title.startswith(start) for step, start in zip(found.steps, steps, strict=True))
    if steps:
        assert found.steps[-1].command == LARGER
    if len(steps) == 2:
        assert shlex.split(found.steps[0].command)[:4] == ["edgeprune", "fit", "--config", "the bundle/run.toml"]


def shown(of: DriftReport) -> str:
    output = io.StringIO()
    print_drift(concluded(of, Path("b"), LARGER), Console(file=output, width=160))
    return output.getvalue()


def test_the_terminal_shows_the_farthest_module_first_and_the_documents():
    printed = shown(report(50.0, 30.0))
    assert printed.index("layer 7 mlp") < printed.index("layer 3 mlp")
    assert "1 of 2 modules are beyond their limit" in printed
    assert "28.5 % to +31.5 %" in printed
    assert "first words" in printed
    assert LARGER in printed


def test_words_of_documents_neither_colour_the_terminal_nor_move_its_cursor():
    printed = shown(report(50.0, 30.0, documents="[red]\x1b[2Jgone"))
    assert "\x1b" not in printed
    assert "[red]" in printed


def test_where_nothing_is_to_be_done_it_says_so():
    assert "Nothing is to be done." in shown(report(10.0, 11.0))
