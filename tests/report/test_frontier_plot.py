"""The ladder's plots, against the document's figures: values, intervals, thresholds, and the marks of sources."""

from __future__ import annotations

import pytest

from edgeprune.report.frontier import Frontier, Rung, frontier_of
from edgeprune.report.frontier_plot import AXES, MARKERS, frontier_plot, frontier_plots
from edgeprune.report.svg import Plot, drawing
from tests.support.sample_ladders import RISES, estimated_ladder, ladder, measured_ladder
from tests.support.sample_reports import estimated_content, measured


def plot_of(frontier: Frontier, field: str = "decode") -> Plot:
    with drawing():
        return frontier_plot(frontier, field)


def marks(plot: Plot) -> dict[str, tuple[float, float, bool]]:
    """Where each point stands and whether it is filled, by its name."""
    points = [line for line in plot.axes.lines if line.get_label() in MARKERS]
    return {
        name.get_text(): (*line.get_xydata()[0], line.get_markerfacecolor() != "none")
        for name, line in zip(plot.axes.texts, points, strict=True)
    }


def intervals(plot: Plot, axis: int) -> list[tuple[float, float]]:
    """The ends of the intervals across (0) or upright (1), in the order of the points."""
    return [
        (segments[0][0][axis], segments[0][1][axis])
        for box in plot.axes.containers
        for segments in [box.lines[2][axis].get_segments()]
    ]


def test_each_point_stands_where_its_figures_are():
    frontier = measured_ladder(rises=(-1.0, *RISES))
    plot = plot_of(frontier)
    drawn = marks(plot)
    for rung in frontier.rungs:
        assert drawn[str(rung.index)] == (rung.decode.value, rung.rise_percent, True)
    assert drawn["dense"] == (frontier.dense.decode.value, 0, True)
    upright, across = intervals(plot, 1)[1:], intervals(plot, 0)[1:]
    assert upright == [pytest.approx((rung.low_percent, rung.high_percent)) for rung in frontier.rungs]
    assert across == [pytest.approx((rung.decode.low, rung.decode.high)) for rung in frontier.rungs]


def test_the_axis_is_linear_below_5_percent_and_logarithmic_beyond():
    plot = plot_of(measured_ladder())
    height = plot.axes.yaxis.get_transform().transform
    heights = [float(height(value)) for value in (0, 1, 2, 1000, 10_000, 100_000)]
    assert heights[2] - heights[1] == pytest.approx(heights[1] - heights[0], rel=0.05)
    assert heights[5] - heights[4] == pytest.approx(heights[4] - heights[3], rel=0.01)
    labels = {
        tick.get_text(): place for tick, place in zip(plot.axes.get_yticklabels(), plot.axes.get_yticks(), strict=True)
    }
    assert (labels["+10 %"], labels["2-fold"], labels["0"]) == (10, 100, 0)


@pytest.mark.parametrize("rises", [(0.1, 0.2), RISES])
def test_both_thresholds_are_in_sight(rises):
    plot = plot_of(measured_ladder(rises=rises))
    bottom, top = plot.axes.get_ylim()
    assert bottom < 0
    assert top > 30
    names = {line.get_label(): line.get_ydata()[0] for line in plot.axes.lines}
    assert (names["degraded from 5 %"], names["broken from 30 %"]) == (5, 30)


@pytest.mark.parametrize("rise", [1e9, 1e280])
def test_a_rise_beyond_all_reason_leaves_a_few_ticks(rise):
    ticks = plot_of(measured_ladder(rises=(1.0, rise))).axes.get_yticks()
    assert 4 < len(ticks) < 200
    assert 10 in ticks


@pytest.mark.parametrize("field", AXES)
def test_other_quantities_can_stand_across(field):
    frontier = measured_ladder()
    plot = plot_of(frontier, field)
    assert plot.axes.get_xlabel() == f"{AXES[field][1]}, measured"
    unit = 2**20 if field == "memory" else 1
    expected = [getattr(point, field).value / unit for point in (frontier.dense, *frontier.rungs)]
    assert [x for x, _, _ in marks(plot).values()] == pytest.approx(expected)


def test_a_quantity_that_was_not_measured_is_hollow():
    reports = ladder(estimated_content)
    performance = reports[2].fitted.performance.model_copy(update={"decode": measured(3.0)})
    fitted = reports[2].fitted.model_copy(update={"performance": performance})
    reports[2] = reports[2].model_copy(update={"fitted": fitted})
    plot = plot_of(frontier_of(reports))
    assert [name for name, (_, _, filled) in marks(plot).items() if filled] == ["2"]
    assert plot.axes.get_xlabel() == "ms per token, estimated and measured; point at one to see its own"


def test_no_name_lies_on_the_intervals_of_its_point():
    with drawing():
        plot = frontier_plot(measured_ladder(), "decode")
        plot.figure.draw_without_rendering()
        for name, box in zip(plot.axes.texts, plot.axes.containers, strict=True):
            extent = name.get_window_extent()
            across, upright = (bars.get_window_extent() for bars in box.lines[2])
            assert extent.y0 > across.y1
            assert extent.x0 > upright.x1


def test_pointing_at_a_rung_shows_all_of_it_with_sources():
    text, attributes = plot_of(estimated_ladder()).tips["tip-1"]
    assert attributes == {"data-rung": "0", "class": "rung"}
    assert text.splitlines() == [
        "rung 0",
        "per token 3.64 ms, estimated",
        "tokens/s 275 tokens/s, estimated",
        "memory 743.7 MiB, estimated",
        "first token 6.63 ms, estimated",
        "10.0 % of attention and MLP pruned",
        "perplexity +1.4 % (+0.9 to +1.9 %), measured: intact",
        "the dense model's next token at 92.8 %, measured",
    ]


def test_a_point_without_the_quantity_is_left_out():
    frontier = estimated_ladder()
    rungs: list[Rung] = [frontier.rungs[0].model_copy(update={"tokens_per_second": None}), *frontier.rungs[1:]]
    drawn = marks(plot_of(frontier.model_copy(update={"rungs": rungs}), "tokens_per_second"))
    assert "0" not in drawn
    assert "1" in drawn


def test_there_is_a_plot_for_each_quantity():
    assert list(frontier_plots(estimated_ladder(rises=(1.0,)))) == list(AXES)


def test_a_value_beyond_its_interval_is_drawn():
    frontier = measured_ladder(rises=(1.0, 2.0))
    rung = frontier.rungs[0]
    odd = rung.model_copy(update={"low_percent": 1.1, "decode": rung.decode.model_copy(update={"high": 1.0})})
    assert len(frontier_plots(frontier.model_copy(update={"rungs": [odd, frontier.rungs[1]]}))) == len(AXES)
