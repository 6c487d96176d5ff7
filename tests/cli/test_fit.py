"""The commands that make and measure bundles: what they print, their exit codes, what does not go together."""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

from edgeprune.cli.app import app
from edgeprune.commands.result import Result
from edgeprune.errors import InputError
from edgeprune.report.frontier import frontier_of
from edgeprune.report.verdict import verdict
from tests.support.sample_ladders import ladder
from tests.support.sample_reports import broken_content, estimated_content, measured_content, report_of


@pytest.fixture
def invoke(monkeypatch, tmp_path):
    """Runs a command line on a report that a command would give."""

    def run(content: dict, *words: str):
        result = Result(tmp_path / "bundle", report_of(content))
        for name in ("fit", "measure"):
            monkeypatch.setattr(f"edgeprune.commands.{name}.{name}", lambda *arguments, **options: result)
        return CliRunner().invoke(app, words)

    return run


@pytest.mark.parametrize(
    ("content", "words", "code"),
    [
        (measured_content, (), 0),
        (measured_content, ("--require-measured",), 0),
        (estimated_content, (), 0),
        (estimated_content, ("--require-measured",), 4),
        (broken_content, (), 3),
        (broken_content, ("--require-measured",), 3),
    ],
)
def test_the_exit_code_is_the_verdicts(invoke, tmp_path, content, words, code):
    result = invoke(content(), "fit", "--device", "cpu", *words)
    assert result.exit_code == code
    bundle = tmp_path / "bundle"
    assert result.stdout.endswith(f"\nbundle  {bundle}\nreport  {bundle / 'report.html'}\n")
    assert verdict(report_of(content()))[:40] in result.stdout


def test_the_document_is_printed_alone(invoke):
    for command in (("fit", "--device", "cpu"), ("measure", "bundle")):
        result = invoke(measured_content(), *command, "--json")
        assert json.loads(result.stdout) == json.loads(report_of(measured_content()).model_dump_json())


@pytest.mark.parametrize(("content", "code"), [(measured_content, 0), (broken_content, 3)])
def test_a_measurement_ends_as_a_fit_does(invoke, content, code):
    result = invoke(content(), "measure", "bundle")
    assert result.exit_code == code
    assert verdict(report_of(content()))[:40] in result.stdout


def test_a_frontier_prints_its_table_or_its_document(monkeypatch, tmp_path):
    frontier = frontier_of(ladder(measured_content))
    result = Result(tmp_path / "ladder", frontier)
    monkeypatch.setattr("edgeprune.commands.frontier.frontier", lambda **options: result)
    shown = CliRunner().invoke(app, ["frontier", "--device", "cpu"])
    assert shown.stdout.endswith(f"bundle  {result.bundle}\npage    {result.bundle / 'frontier.html'}\n")
    assert [line.split()[0] for line in shown.stdout.splitlines() if line[:1].isdecimal()] == list("012345")
    document = CliRunner().invoke(app, ["frontier", "--device", "cpu", "--json"])
    assert json.loads(document.stdout) == json.loads(frontier.model_dump_json())


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--from", "bundle"), "--from and --pick go together"),
        (("--pick", "1"), "--from and --pick go together"),
        (("--from", "bundle", "--pick", "0", "--seed", "0"), "--seed with --from: a rung is exported as it was"),
        (("model", "--from", "bundle", "--pick", "0", "--decode", "70%"), "MODEL, --decode with --from"),
    ],
)
def test_picking_takes_no_option_of_fitting(words, message):
    error = CliRunner().invoke(app, ["fit", *words]).exception
    assert isinstance(error, InputError)
    assert message in error.message
    assert "--pick" in error.remedy


@pytest.mark.parametrize("option", ["--memory", "--decode", "--prefill", "--max-quality-loss", "--export"])
def test_a_frontier_has_no_budget(option):
    result = CliRunner().invoke(app, ["frontier", "--device", "cpu", option, "70%"])
    assert result.exit_code == 2
    assert option in result.output
