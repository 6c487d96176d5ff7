"""The report's part about odd input: when a variant is far worse, and the places that name it."""

from __future__ import annotations

import io
import json

import pytest
from rich.console import Console

from edgeprune.ondevice import finish_report
from edgeprune.report.html import render_html
from edgeprune.report.robustness import robustness_part
from edgeprune.report.tables import all_tables
from edgeprune.report.terminal import print_report
from edgeprune.report.verdict import verdict
from tests.support.sample_reports import broken_content, measured_content, report_of


def row(name: str, percent: float, width: float = 2.0, words: str = "changed somehow") -> dict:
    return {
        "name": name,
        "words": words,
        "dense": 20.0,
        "fitted": 20.0 * (1 + percent / 100),
        "documents": 8,
        "tokens": 760,
        "percent": percent,
        "low": percent - width,
        "high": percent + width,
        "agreement": {"share": 0.7, "low": 0.6, "high": 0.8, "places": 760, "documents": 8, "of": 8},
    }


def finding(*rows: dict) -> str:
    return robustness_part(rows).finding


def test_only_what_is_beyond_twice_the_rise_in_nats_is_far_worse():
    clean = row("unchanged", 20.0)  # up to 22 %: twice as many nats are 48.8 %
    assert finding(clean, row("typos", 50.0)) == ""
    assert "`typos` (changed somehow), +20.0 % on the same" in finding(clean, row("typos", 51.0))
    assert finding(clean, row("typos", 80.0, width=35.0)) == ""


def test_a_model_that_hardly_loses_is_not_far_worse_by_a_little():
    assert finding(row("unchanged", 0.0, width=0.5), row("code", 5.0, width=0.1)) == ""
    assert "`code`" in finding(row("unchanged", 0.0, width=0.5), row("code", 6.0, width=0.1))
    assert "`code`" in finding(row("unchanged", -4.0, width=0.5), row("code", 6.0, width=0.1))


def test_the_worst_of_several_is_named():
    text = finding(row("unchanged", 10.0), row("typos", 80.0), row("code", 120.0), row("long", 60.0))
    assert "`code`" in text
    assert "`typos`" not in text


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_a_rise_that_is_no_number_is_far_worse_and_survives_json(value):
    report = report_of(measured_content() | {"robustness": odd(row("unchanged", 10.0), row("code", value))})
    assert "`code`" in report.robustness.finding
    assert type(report).model_validate_json(report.model_dump_json()).robustness.variants[1].name == "code"


def odd(*rows: dict) -> dict:
    return robustness_part(rows).model_dump()


def test_headline_page_terminal_and_device_name_what_is_far_worse():
    report = report_of(measured_content() | {"robustness": odd(row("unchanged", 10.0), row("code", 99.0))})
    sentence = "On odd input it is far worse: perplexity +99.0 % on `code` (changed somehow), +10.0 % on the same text"
    assert sentence in verdict(report)
    page = render_html(report)
    assert "Odd input" in page
    assert "+99.0" in page
    output = io.StringIO()
    print_report(report, Console(file=output, width=200))
    assert sentence in output.getvalue()
    assert "code +99.0 %; the same text as it is +10.0 %, measured" in output.getvalue()


def test_of_a_broken_model_odd_input_is_no_news():
    content = broken_content() | {"robustness": odd(row("unchanged", 10.0), row("code", 99.0))}
    assert "odd input" not in verdict(report_of(content))


def test_a_report_without_it_has_no_section():
    assert "odd" not in all_tables(report_of(measured_content()))


def test_the_device_keeps_the_finding_in_its_headline():
    report = json.loads(
        report_of(measured_content() | {"robustness": odd(row("unchanged", 9.0), row("code", 99.0))}).model_dump_json()
    )
    chosen = finish_report.MeasuredRung(0, "met", None, type("Verdict", (), {"checks": ()})())
    line = finish_report._headline(report, {"machine": "a board", "rests_on": "measured"}, chosen)
    assert line.startswith("Yes, measured there")
    assert line.endswith(report["robustness"]["finding"])
