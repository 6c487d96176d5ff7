"""The report's plots, against the report's figures: what is drawn, how its source is marked, that texts are whole."""

from __future__ import annotations

import re
from itertools import pairwise

import pytest

from edgeprune.report.plots import MOST_SHARE, all_plots, drawn_plots
from edgeprune.report.svg import Plot, drawing
from tests.support.sample_pictures import pictures_content
from tests.support.sample_reports import broken_content, estimated_content, hostile, measured_content, report_of


def plot_of(content, name: str) -> Plot:
    with drawing():
        return drawn_plots(report_of(content))[name]


def texts(plot: Plot) -> list[str]:
    return [text.get_text() for text in plot.axes.texts]


def curves(plot: Plot) -> dict[str, tuple[list[float], list[float]]]:
    return {line.get_label(): (list(line.get_xdata()), list(line.get_ydata())) for line in plot.axes.lines}


def whiskers(plot: Plot) -> list[tuple[float, float]]:
    """The ends of the intervals across, from above."""
    bars = [one for box in plot.axes.containers if hasattr(box, "has_xerr") and box.has_xerr for one in box.lines[2]]
    return [(segment[0][0], segment[1][0]) for one in bars for segment in one.get_segments()]


def test_the_budget_is_drawn_against_its_limits():
    report = report_of(measured_content())
    plot = plot_of(measured_content(), "budget")
    shares = [
        100 * figure.value / row.limit
        for row in report.budget
        for figure in (row.fitted, row.dense)
        if figure is not None
    ]
    assert [bar.get_width() for bar in plot.axes.patches] == pytest.approx(shares)
    assert whiskers(plot)[0] == pytest.approx((100 * 0.98 * 34.1 / 35.07, 100 * 1.02 * 34.1 / 35.07))
    assert texts(plot)[:3] == [
        "per token: 35.1 ms at most, asked 70%",
        "fitted: 34.1 ms, measured",
        "dense: 50.1 ms, measured",
    ]


def test_a_bar_far_beyond_its_limit_ends_with_an_arrow():
    content = estimated_content()
    content["budget"][0]["limit"] = 1e6
    plot = plot_of(content, "budget")
    assert [bar.get_width() for bar in plot.axes.patches] == [MOST_SHARE] * 2
    assert texts(plot)[1].endswith("estimated →")


@pytest.mark.parametrize("name", ["budget", "memory"])
def test_what_was_not_measured_is_drawn_otherwise(name):
    """Both in one plot: an estimate beside a measurement is pale with a dashed edge, and named as one."""
    content = measured_content()
    content["budget"] = content["budget"][1:2]
    content["budget"][0]["dense"] = estimated_content()["budget"][0]["dense"]
    content["dense"] = estimated_content()["dense"]
    plot = plot_of(content, name)
    alphas = {bar.get_facecolor()[3] for bar in plot.axes.patches}
    assert alphas == {1.0, 0.3}
    assert any("dense" in text and "estimated" in text for text in texts(plot))
    assert any("fitted" in text and "measured" in text for text in texts(plot))


def test_stacks_sum_to_the_totals():
    report = report_of(estimated_content())
    for name, total in (
        ("memory", lambda side: side.performance.memory_total.value / 2**20),
        ("latency", lambda side: sum(side.latency_shares.values())),
    ):
        plot = plot_of(estimated_content(), name)
        ends = [bar.get_x() + bar.get_width() for bar in plot.axes.patches]
        parts = len(ends) // 2
        assert [ends[parts - 1], ends[-1]] == pytest.approx([total(report.fitted), total(report.dense)])


def test_the_rise_of_each_text_is_drawn_with_its_interval():
    plot = plot_of(measured_content(), "quality")
    assert texts(plot) == ["manual.txt: +24.6 %", "notes, one fifth held out: +17.3 %"]
    assert whiskers(plot) == [pytest.approx((21.9, 27.3)), pytest.approx((12.9, 21.7))]


@pytest.mark.parametrize("content", [measured_content, broken_content, estimated_content])
@pytest.mark.parametrize("name", ["budget", "quality"])
def test_no_text_lies_on_an_interval_or_on_a_bar(content, name):
    with drawing():
        plot = drawn_plots(report_of(content()))[name]
        plot.figure.draw_without_rendering()
        drawn = [text.get_window_extent() for text in plot.axes.texts]
        bars = [bar.get_window_extent() for bar in plot.axes.patches]
        bars += [
            one.get_window_extent() for box in plot.axes.containers if hasattr(box, "has_xerr") for one in box.lines[2]
        ]
    assert drawn
    assert bars
    for text in drawn:
        assert not [bar for bar in bars if text.y0 + 1 < bar.y1 and bar.y0 < text.y1 - 1]
    for above, below in pairwise(drawn):
        assert above.y0 > below.y0  # in the order of the rows


def test_a_name_is_never_cut():
    content = measured_content()
    name = "a folder with a long name/" * 4 + "end.txt"
    content["quality"]["texts"][0]["name"] = name
    assert "".join(texts(plot_of(content, "quality"))).replace(" ", "").startswith(name.replace(" ", ""))


def test_identical_answers_are_drawn_with_their_intervals():
    report = report_of(measured_content())
    plot = plot_of(measured_content(), "answers")
    steps = report.quality.answers.identical
    assert [tick.get_text() for tick in plot.axes.get_xticklabels()] == ["1", "2", "4", "8", "16", "32"]
    (bars,) = plot.axes.containers
    ends = [(segment[0][1], segment[1][1]) for segment in bars.lines[2][0].get_segments()]
    assert ends == [pytest.approx((step.low_percent, step.high_percent)) for step in steps]
    assert [text for text, _ in plot.tips.values()][3] == "7 of 16 identical for 8 tokens"


def test_the_path_shows_predicted_and_obtained_against_the_limit():
    drawn = curves(plot_of(measured_content(), "path"))
    dense = next(row.dense.value for row in report_of(measured_content()).budget if row.name == "decode")
    across, shares = drawn["per token, measured"]
    assert across == [0, 1, 2, 3]
    assert shares == pytest.approx([100 * value / 35.07 for value in (dense, 37.9, 35.3, 34.1)])
    across, shares = drawn["per token, predicted"]
    assert across == [1, 2, 3]
    assert shares == pytest.approx([100 * value / 35.07 for value in (34.2, 34.9, 34.4)])
    names = [tick.get_text() for tick in plot_of(measured_content(), "path").axes.get_xticklabels()]
    assert names == ["dense", "1", "2", "3\nchosen"]


def test_only_plots_that_say_something_are_drawn():
    always = {"budget", "quality", "memory", "latency"}
    content = measured_content()
    with drawing():
        assert set(drawn_plots(report_of(content))) == always | {"path", "errors", "answers"}
        content["quality"] |= {"answers": None}
        content |= {"search": content["search"] | {"candidates": []}, "modules": []}
        assert set(drawn_plots(report_of(content))) == always
        assert "widths" in drawn_plots(report_of(broken_content()))


def test_errors_of_pruned_modules_are_drawn_before_and_after_the_update():
    report = report_of(measured_content())
    drawn = curves(plot_of(measured_content(), "errors"))
    pruned = [module for module in report.modules if module.kind == "mlp" and module.kept < module.of]
    assert drawn["mlp, without update"][1] == pytest.approx([module.error_before for module in pruned])
    assert drawn["mlp, with"] == ([m.layer for m in pruned], pytest.approx([m.error_after for m in pruned]))


def test_widths_that_differ_are_drawn_in_percent_of_the_dense_model():
    report = report_of(broken_content())
    kept = curves(plot_of(broken_content(), "widths"))["MLP channels"][1]
    assert kept == pytest.approx([100 * layer["MLP channels"] / 1536 for layer in report.fitted.widths])


@pytest.mark.parametrize("layers", [1, 4, 30])
def test_layers_have_whole_ticks(layers):
    content = broken_content()
    content["model"]["layers"] = layers
    for side in ("dense", "fitted"):
        content[side]["widths"] = content[side]["widths"][:layers]
    content["fitted"]["widths"] = [
        *content["fitted"]["widths"][:-1],
        content["dense"]["widths"][0] | {"MLP channels": 8},
    ]
    content["modules"] = [module for module in content["modules"] if module["layer"] < layers]
    with drawing():
        plots = drawn_plots(report_of(content))
        for name in {"widths", "errors"} & set(plots):
            ticks = plots[name].axes.get_xticks()
            assert [tick for tick in ticks if tick != round(tick)] == []


def test_plots_show_markup_as_text():
    plots = all_plots(report_of(hostile(broken_content(), "<b>x</b> $y$")))
    assert "asked &lt;b&gt;x&lt;/b&gt; $y$" in plots["budget"]
    assert re.findall(r"<text[^>]*>&lt;b&gt;x&lt;/b&gt; \$y\$: 42-fold</text>", plots["quality"])


def test_pictures_have_plots_too():
    assert "budget" in all_plots(report_of(pictures_content()))


def test_a_value_beyond_its_interval_is_drawn():
    content = measured_content()
    content["quality"]["texts"][0] |= {"low_percent": 24.7, "high_percent": 27.0}
    content["quality"]["answers"]["identical"][0] |= {"percent": 100.0, "high_percent": 99.99999999999999}
    row = content["budget"][0]
    content["budget"][0] = row | {"fitted": row["fitted"].model_copy(update={"low": 34.2})}
    assert {"quality", "answers", "budget"} <= set(all_plots(report_of(content)))
