"""The data of the report's plots, against the report's figures."""

from __future__ import annotations

import json

import pytest

from edgeprune.report.plots import all_plots
from tests.support.sample_reports import broken_content, estimated_content, hostile, measured_content, report_of


def figure(plot: str) -> tuple[list[dict], dict]:
    """Traces and layout of a plot, from the call that draws it."""
    decoder, start = json.JSONDecoder(), plot.index("[", plot.index("Plotly.newPlot("))
    traces, end = decoder.raw_decode(plot, start)
    layout, _ = decoder.raw_decode(plot, plot.index("{", end))
    return traces, layout


def test_the_budget_is_drawn_against_its_limits():
    report = report_of(measured_content())
    traces, layout = figure(all_plots(report)["budget"])
    fitted = next(trace for trace in traces if trace["name"] == "fitted")
    shares = [100 * row.fitted.value / row.limit for row in reversed(report.budget)]
    assert fitted["x"] == pytest.approx(shares)
    assert [name.split("<br>")[1] for name in fitted["y"]] == ["measured"] * 3
    assert [shape["x0"] for shape in layout["shapes"]] == [100]
    highs = [100 * (row.fitted.high or row.fitted.value) / row.limit for row in reversed(report.budget)]
    assert [x + up for x, up in zip(fitted["x"], fitted["error_x"]["array"], strict=True)] == pytest.approx(highs)


def test_stacks_sum_to_the_totals():
    report = report_of(estimated_content())
    plots = all_plots(report)
    for name, total in (
        ("memory", lambda side: side.performance.memory_total.value / 2**20),
        ("latency", lambda side: sum(side.latency_shares.values())),
    ):
        traces, _ = figure(plots[name])
        assert [sum(column) for column in zip(*(trace["x"] for trace in traces), strict=True)] == pytest.approx(
            [total(report.fitted), total(report.dense)]
        )


def test_the_rise_of_each_text_is_drawn_with_its_interval():
    report = report_of(measured_content())
    (trace,), layout = figure(all_plots(report)["quality"])
    assert trace["x"] == [text.rise_percent for text in reversed(report.quality.texts)]
    assert trace["error_x"]["array"] == pytest.approx([4.4, 2.7])
    assert [shape["x0"] for shape in layout["shapes"]] == [5, 30]
    assert layout["yaxis"]["ticktext"] == ["notes, one fifth held…", "manual.txt"]


def test_identical_answers_are_drawn_with_their_intervals():
    report = report_of(measured_content())
    (trace,), _ = figure(all_plots(report)["answers"])
    steps = report.quality.answers.identical
    assert trace["x"] == ["1", "2", "4", "8", "16", "32"]
    assert trace["y"] == [step.percent for step in steps]
    assert trace["text"][3] == "7 of 16"
    for sign, array, bound in ((1, "array", "high_percent"), (-1, "arrayminus", "low_percent")):
        bounds = [y + sign * reach for y, reach in zip(trace["y"], trace["error_y"][array], strict=True)]
        assert bounds == pytest.approx([getattr(step, bound) for step in steps])


def test_the_path_shows_predicted_and_obtained_against_the_limit():
    traces, _ = figure(all_plots(report_of(measured_content()))["path"])
    by_name = {trace["name"]: trace for trace in traces}
    dense = next(row.dense.value for row in report_of(measured_content()).budget if row.name == "decode")
    measured, predicted = by_name["decode, measured"], by_name["decode, predicted"]
    assert measured["x"] == ["dense", "1", "2", "3"]
    assert measured["y"] == pytest.approx([100 * value / 35.07 for value in (dense, 37.9, 35.3, 34.1)])
    assert predicted["x"] == ["1", "2", "3"]
    assert predicted["y"] == pytest.approx([100 * value / 35.07 for value in (34.2, 34.9, 34.4)])


def test_only_plots_that_say_something_are_drawn():
    always = {"budget", "quality", "memory", "latency", "widths"}
    content = measured_content()
    assert set(all_plots(report_of(content))) == always | {"path", "errors", "answers"}
    content["quality"] |= {"answers": None}
    content |= {"search": content["search"] | {"candidates": []}, "modules": []}
    assert set(all_plots(report_of(content))) == always


def test_errors_of_pruned_modules_are_drawn_before_and_after_the_update():
    report = report_of(measured_content())
    traces, _ = figure(all_plots(report)["errors"])
    pruned = [module for module in report.modules if module.kind == "mlp" and module.kept < module.of]
    by_name = {trace["name"]: trace for trace in traces}
    assert by_name["mlp, without update"]["y"] == pytest.approx([module.error_before for module in pruned])
    assert by_name["mlp, with"]["y"] == pytest.approx([module.error_after for module in pruned])
    assert by_name["mlp, with"]["x"] == [module.layer for module in pruned]


def test_widths_that_differ_are_drawn_in_percent_of_the_dense_model():
    report = report_of(broken_content())
    traces, _ = figure(all_plots(report)["widths"])
    kept = next(trace["y"] for trace in traces if trace["name"] == "MLP channels")
    assert kept == pytest.approx([100 * layer["MLP channels"] / 1536 for layer in report.fitted.widths])


def test_plots_show_markup_as_text():
    """plotly renders some HTML in labels; a file's name must not use it."""
    plots = all_plots(report_of(hostile(broken_content(), "<b>x</b>")))
    shown = {
        "budget": figure(plots["budget"])[0][0]["y"][0].split("\N{NO-BREAK SPACE}")[0],
        "quality": figure(plots["quality"])[1]["yaxis"]["ticktext"][0],
    }
    assert shown == {"budget": "decode &lt;b&gt;x&lt;/b&gt;", "quality": "&lt;b&gt;x&lt;/b&gt;"}
