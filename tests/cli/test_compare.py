"""The command that compares: its table, its document, and its page, whose place is checked before any work."""

from __future__ import annotations

import html
import json
import shlex

import pytest
from typer.testing import CliRunner

from edgeprune.cli.app import app
from edgeprune.commands.result import Result
from edgeprune.errors import InputError
from edgeprune.pipeline.request import METHODS, RATIOS
from tests.support.sample_rows import row

ROWS = [row("dense", "", 0.0, 0.0), row("default", "uniform", 0.2, 0.215), row("flap", "uniform", 0.2, 0.3)]


@pytest.fixture
def asked(monkeypatch):
    """What was compared, while the rows are made up."""
    calls = []

    def compare(progress, **options):
        calls.append(options)
        return Result(None, ROWS)

    monkeypatch.setattr("edgeprune.commands.compare.compare", compare)
    return calls


def test_the_table_has_a_line_for_each_method(asked):
    result = CliRunner().invoke(app, ["compare", "my-model", "--ratios", "20", "--calibration", "notes"])
    assert result.exit_code == 0
    methods = [line.split()[0] for line in result.stdout.splitlines() if line.strip()]
    assert {"default", "flap"} <= set(methods)
    assert {name: asked[0][name] for name in ("model", "ratios", "layout", "calibration")} == {
        "model": "my-model",
        "ratios": "20",
        "layout": "uniform",
        "calibration": "notes",
    }


def test_the_document_holds_the_rows(asked):
    result = CliRunner().invoke(app, ["compare", "--json"])
    assert json.loads(result.stdout) == {"rows": json.loads(json.dumps([one.as_json() for one in ROWS]))}


def test_a_page_is_written_and_replaced_by_force_alone(asked, tmp_path):
    words = ["compare", "--html", str(tmp_path / "page.html")]
    assert CliRunner().invoke(app, words).exit_code == 0
    page = (tmp_path / "page.html").read_text()
    assert 'id="plot-' in page
    command = f"edgeprune compare demo --ratios {RATIOS} --methods {shlex.quote(METHODS)} --layout uniform"
    assert command in html.unescape(page)
    refused = CliRunner().invoke(app, words)
    assert isinstance(refused.exception, InputError)
    assert len(asked) == 1  # refused before the work
    assert CliRunner().invoke(app, [*words, "--force"]).exit_code == 0
    (tmp_path / "page.html").write_text("<p>the user's</p>")
    with pytest.raises(InputError, match="not written by edgeprune"):
        raise CliRunner().invoke(app, [*words, "--force"]).exception
    assert (tmp_path / "page.html").read_text() == "<p>the user's</p>"
