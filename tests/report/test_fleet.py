"""The document and the page of a fleet: verdicts, figures with their sources, the best model of a target."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from edgeprune.report.fleet import Fleet, Row, row_of
from edgeprune.report.fleet_page import label_of, render_fleet
from edgeprune.report.fleet_terminal import fleet_table
from tests.support.sample_reports import estimated_content, measured_content, report_of


def fleet_of(*rows: Row) -> Fleet:
    return Fleet(edgeprune="1", created="2026-05-05T12:00:00+00:00", seconds=12.0, cells=list(rows))


def row(model: str, target: str = "orin", **more) -> Row:
    fields = {"status": "met", "grade": "intact", "exit_code": 0, "rise_percent": 1.0, "headline": "It fits."}
    return Row(model=model, target=target, **fields | more)


FAILED = Row(model="bad", target="orin", exit_code=4, reason="<b>no GPU</b>", node="n", seconds=1.0)
WAITING = Row(model="late", target="orin")


@pytest.mark.parametrize("content", [measured_content, estimated_content])
def test_a_row_holds_what_the_report_says_with_the_source_of_every_figure(content):
    report = report_of(content())
    made = row_of(report, model="m", target="t", exit_code=0, bundle="m/t", seconds=2.0, node="n")
    for name in ("memory", "prefill", "decode"):
        shown = getattr(report.fitted.performance, "memory_total" if name == "memory" else name)
        assert (made.figure(name).value, made.figure(name).source) == (shown.value, shown.source)
    assert (made.status, made.grade) == (report.outcome, report.quality.grade)
    assert made.rise_percent == report.quality.rise_percent
    assert Row.model_validate_json(made.model_dump_json()) == made


def test_the_best_model_of_a_target_met_the_budget_and_lost_least():
    rows = [row("a", rise_percent=3.0), row("b", rise_percent=2.0), row("c", rise_percent=0.5, status="missed")]
    rows += [row("d", rise_percent=0.1, grade="broken"), row("e", "other", rise_percent=0.2), FAILED, WAITING]
    document = fleet_of(*rows)
    assert document.best("orin").model == "b"
    assert document.best("other").model == "e"
    assert fleet_of(FAILED, WAITING).best("orin") is None


@pytest.mark.parametrize(
    ("rows", "code"),
    [
        ([row("a"), row("b")], 0),
        ([row("a"), row("b", status="missed", exit_code=3)], 3),
        ([row("a"), WAITING], 3),
        ([row("a", status="missed", exit_code=3), FAILED], 4),
        ([row("a"), Row(model="b", target="orin", status="out_of_reach", exit_code=3, reason="below the floor")], 3),
    ],
)
def test_the_exit_code_tells_missed_budgets_from_failures(rows, code):
    assert fleet_of(*rows).exit_code == code


def test_the_page_shows_every_cell_and_escapes_what_devices_say():
    met = row_of(report_of(measured_content()), model="a", target="60 %", exit_code=0, bundle="a/60%", seconds=1.0)
    page = render_fleet(fleet_of(met, FAILED, WAITING, row("z", status="missed", exit_code=3)), "my <fleet>")
    assert "my &lt;fleet&gt;" in page and "<fleet>" not in page
    assert "&lt;b&gt;no GPU&lt;/b&gt;" in page
    assert 'href="a/60%25/report.html"' in page
    assert page.count('<tr><th scope="row">') == 4
    assert "1 of which have not ended" in page
    assert '<td class="best">' in page
    assert page.count('badge measured">measured') == 5  # three figures and two perplexities
    assert [label_of(one) for one in (met, FAILED, WAITING)] == ["met", "failed", "waiting"]


def printed(document: Fleet, running: dict[int, str], most: int) -> str:
    console = Console(file=io.StringIO(), width=160)
    console.print(fleet_table(document, running, most))
    return console.file.getvalue()


def test_a_table_of_few_lines_shows_what_runs_and_what_failed_first():
    rows = [row(f"met-{index}") for index in range(50)] + [FAILED, WAITING]
    rows += [Row(model="now", target="orin"), row("lost", status="missed", exit_code=3)]
    text = printed(fleet_of(*rows), {52: "prune, 40 %"}, 4)
    lines = [line.split()[0] for line in text.splitlines()[1:5]]
    assert lines == ["now", "bad", "lost", "met-0"]
    assert "prune, 40 %" in text
    assert "52 of 54 cells have ended, 1 run, 50 are not shown" in text
    assert "not shown" not in printed(fleet_of(*rows), {}, 54)
