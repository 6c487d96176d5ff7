"""The differences of two bundles: what stands there, what changed, and which guards fail."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from edgeprune.cli.app import app
from edgeprune.errors import InputError
from edgeprune.report.diff import DiffReport, Made, diff_of
from edgeprune.report.schema import Report
from tests.support.sample_reports import broken_content, estimated_content, measured_content, report_of
from tests.support.small_bundles import write_ladder, write_report

MANIFEST = {"fingerprint": {"model": "a" * 64, "samples": "b" * 64}}


def made(report: Report, name: str = "old", options: dict[str, Any] | None = None) -> Made:
    return Made(name, report, MANIFEST, options or {})


def slower(report: Report, factor: float, name: str = "decode") -> Report:
    """The report with a figure of the fitted model's so many times as large."""
    performance = report.fitted.performance
    figure = getattr(performance, name)
    changed = performance.model_copy(update={name: figure.model_copy(update={"value": factor * figure.value})})
    return report.model_copy(update={"fitted": report.fitted.model_copy(update={"performance": changed})})


def worse(report: Report, factor: float) -> Report:
    """The report with a perplexity so many times as large."""
    texts = [text.model_copy(update={"fitted": factor * text.fitted}) for text in report.quality.texts]
    return report.model_copy(update={"quality": report.quality.model_copy(update={"texts": texts})})


def row(report: DiffReport, name: str) -> Any:
    (found,) = [one for one in report.differences if one.name == name]
    return found


def test_a_bundle_does_not_differ_from_itself():
    one = made(report_of(measured_content()))
    report = diff_of(one, one, {"memory": 0, "latency": 0, "quality": 0})
    assert not [row for row in report.differences if row.is_change]
    assert not report.failed
    assert {row.group for row in report.differences} == {"verdict", "figures", "quality"}


def test_what_changed_is_told_with_its_percent():
    old = report_of(measured_content())
    report = diff_of(made(old), made(worse(slower(old, 1.25), 1.1), "new"), {})
    assert row(report, "decode").percent == pytest.approx(25)
    assert "(measured)" in row(report, "decode").second
    assert row(report, f"perplexity of {old.quality.texts[0].name}").percent == pytest.approx(10)
    assert row(report, "prefill").percent == 0


def test_verdict_widths_options_and_versions_are_compared():
    old, new = (report_of(content()) for content in (measured_content, broken_content))
    new = new.model_copy(update={"versions": old.versions | {"torch": "9.9"}})
    report = diff_of(made(old, options={"memory": "90%"}), made(new, "new", {"memory": "60%", "rungs": 2}), {})
    assert row(report, "quality").second == "broken"
    assert (row(report, "--memory").first, row(report, "--memory").second) == ("90%", "60%")
    assert (row(report, "--rungs").first, row(report, "--rungs").second) == ("–", "2")
    assert row(report, "version of torch").second == "9.9"


@pytest.mark.parametrize(
    ("change", "guard", "percent", "fails"),
    [
        (lambda report: slower(report, 1.04), "latency", 5, False),
        (lambda report: slower(report, 1.06), "latency", 5, True),
        (lambda report: slower(report, 1.06, "prefill"), "latency", 5, True),
        (lambda report: slower(report, 0.5), "latency", 0, False),
        (lambda report: slower(report, 1.06, "memory_total"), "memory", 5, True),
        (lambda report: slower(report, 1.06, "memory_total"), "latency", 0, False),
        (lambda report: worse(report, 1.03), "quality", 2, True),
        (lambda report: worse(report, 1.03), "quality", 4, False),
        (lambda report: worse(report, float("inf")), "quality", 4, True),
        (lambda report: worse(report, float("nan")), "quality", 4, True),
    ],
)
def test_a_guard_fails_where_the_second_is_worse_by_more(change, guard, percent, fails):
    old = report_of(measured_content())
    report = diff_of(made(old), made(change(old), "new"), {guard: percent})
    assert bool(report.failed) == fails
    assert all("above old's" in words for words in report.failed)


def test_what_cannot_be_compared_is_no_pass():
    old, other = (report_of(content()) for content in (measured_content, estimated_content))
    with pytest.raises(InputError, match="cannot be guarded"):
        diff_of(made(old), made(other, "new"), {"latency": 5})
    texts = [text.model_copy(update={"tokens": 7}) for text in old.quality.texts]
    another = old.model_copy(update={"quality": old.quality.model_copy(update={"texts": texts})})
    with pytest.raises(InputError, match="judged on different texts"):
        diff_of(made(old), made(another, "new"), {"quality": 5})
    assert row(diff_of(made(old), made(another, "new"), {}), f"perplexity of {texts[0].name}").percent is None


def test_the_command_prints_a_table_or_the_document_and_ends_with_the_guards_code(tmp_path: Path) -> None:
    old = report_of(measured_content())
    first, second = write_report(tmp_path / "old", old), write_report(tmp_path / "new", slower(old, 1.5))
    shown = CliRunner().invoke(app, ["diff", str(first), str(second)])
    assert shown.exit_code == 0, shown.output
    assert "+50.0 %" in shown.stdout
    failed = CliRunner().invoke(app, ["diff", str(first), str(second), "--fail-on", "latency=5%", "--json"])
    assert failed.exit_code == 3
    assert DiffReport.model_validate(json.loads(failed.stdout)).failed


@pytest.mark.parametrize(
    ("guard", "message"), [("speed=5", "no guard"), ("latency", "is not NAME=PERCENT"), ("latency=-1", "no guard")]
)
def test_a_guard_that_is_none_is_refused(tmp_path: Path, guard: str, message: str) -> None:
    bundle = write_report(tmp_path / "old", report_of(measured_content()))
    result = CliRunner().invoke(app, ["diff", str(bundle), str(bundle), "--fail-on", guard])
    assert isinstance(result.exception, InputError)
    assert message in result.exception.message


def test_a_ladder_has_no_one_model_to_compare(tmp_path: Path) -> None:
    ladder = write_ladder(tmp_path / "ladder", [report_of(measured_content())])
    result = CliRunner().invoke(app, ["diff", str(ladder), str(ladder)])
    assert isinstance(result.exception, InputError)
