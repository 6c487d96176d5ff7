"""A ladder's page: nothing but the reports' figures, each with its source, nothing injected."""

from __future__ import annotations

import re
import shlex
from html import unescape
from math import inf, nan, sinh

import pytest

from edgeprune.report.frontier import frontier_of
from edgeprune.report.frontier_page import frontier_axes, frontier_plot, render_frontier
from tests.support.pages import ATTACK, Parsed
from tests.support.sample_ladders import BUNDLE, RISES, estimated_ladder, hostile, ladder, measured_ladder, printed
from tests.support.sample_reports import built, estimated_content


def rows(page: str) -> list[list[str]]:
    """The visible words of each row of the table to pick from, by cell."""
    table = re.search(r'<table id="rungs">(.*?)</table>', page, re.DOTALL)[1]
    return [
        [" ".join(unescape(re.sub(r"<[^>]+>", " ", cell)).split()) for cell in re.findall(r"<td.*?>(.*?)</td>", row)]
        for row in re.findall(r"<tr[^>]*>(.*?)</tr>", table.split("<tbody>")[1], re.DOTALL)
    ]


def headings(page: str) -> list[str]:
    head = re.search(r'<table id="rungs">\s*<thead>(.*?)</thead>', page, re.DOTALL)[1]
    return [" ".join(re.sub(r"<[^>]+>", " ", cell).split()) for cell in re.findall(r"<th>(.*?)</th>", head)]


def test_the_table_has_every_figure_under_its_source():
    page = render_frontier(measured_ladder(texts=("a.txt", "b.txt")), BUNDLE)
    assert headings(page) == [
        "",
        "rung",
        "quality",
        "perplexity, a.txt measured",
        "perplexity, b.txt measured",
        "same next token measured",
        "per token measured",
        "of dense measured",
        "tokens/s measured",
        "first token measured",
        "memory measured",
        "pruned",
        "of all",
    ]
    dense, first, *_ = rows(page)
    assert dense[1:8] == ["dense", "", "10.00", "10.00", "", "50.1 ms 49.1 to 51.1 ms", ""]
    assert first[1:] == [
        "0",
        "intact",
        "+1.4 % +0.9 to +1.9 %",
        "+0.7 % +0.2 to +1.2 %",
        "92.8 % 90.0 to 94.7 %",
        "45.1 ms 44.2 to 46.0 ms",
        "0.900 0.891 to 0.909",
        "22.2",
        "820 ms 804 to 836 ms",
        "639.8 MiB",
        "10.0 %",
        "8.0 %",
    ]


def test_a_vocabulary_that_leaves_nothing_to_compare_has_no_agreement():
    frontier = measured_ladder(rises=(1.0, 2.0))
    bare = [rung.texts[0].model_copy(update={"agreement": None}) for rung in frontier.rungs]
    rungs = [
        rung.model_copy(update={"texts": [text]}) if rung.index else rung
        for rung, text in zip(frontier.rungs, bare, strict=True)
    ]
    page = render_frontier(frontier.model_copy(update={"rungs": rungs}), BUNDLE)
    assert [row[4][:6] for row in rows(page)] == ["", "93.4 %", ""]
    rungs = [rung.model_copy(update={"texts": [text]}) for rung, text in zip(rungs, bare, strict=True)]
    page = render_frontier(frontier.model_copy(update={"rungs": rungs}), BUNDLE)
    assert "next token" not in page
    assert len({len(row) for row in rows(page)} | {len(headings(page))}) == 1


def test_a_column_of_several_sources_labels_every_cell():
    reports = ladder(estimated_content)
    performance = reports[2].fitted.performance.model_copy(update={"memory_total": built(2**29)})
    reports[2] = reports[2].model_copy(
        update={"fitted": reports[2].fitted.model_copy(update={"performance": performance})}
    )
    page = render_frontier(frontier_of(reports), BUNDLE)
    assert "memory" in headings(page)
    assert [row[-3].split()[-1] for row in rows(page)] == ["estimated"] * 3 + ["built"] + ["estimated"] * 3
    lines = printed(frontier_of(reports))
    assert re.findall(r"\((\w+)\)", "\n".join(lines)) == ["estimated"] * 3 + ["built"] + ["estimated"] * 3
    assert max(map(len, lines)) <= 80
    assert "decode, prefill: estimated; rise: measured." in lines


def test_broken_rungs_are_marked_and_a_grade_in_doubt_says_so():
    page = render_frontier(estimated_ladder(), BUNDLE)
    assert re.findall(r'<tr data-rung="(\d)"( class="is-broken")?', page) == [
        (str(index), ' class="is-broken"' if index > 3 else "") for index in range(6)
    ]
    assert [row[2] for row in rows(page)[1:]] == [
        "intact",
        "intact interval: intact to degraded",
        "degraded",
        "degraded",
        "broken",
        "broken",
    ]
    tiles = " ".join(" ".join(Parsed(page).texts).split())
    assert "Fastest intact rung 1 3.23 ms per token estimated" in tiles
    assert "Fastest not broken rung 3 2.42 ms per token estimated" in tiles
    none = " ".join(Parsed(render_frontier(estimated_ladder(rises=(31.0,)), BUNDLE)).texts)
    assert "Fastest not broken none every rung's perplexity rises by 30 % or more" in none


def test_each_rung_has_the_command_that_exports_it():
    page = render_frontier(estimated_ladder(), "it's a <b>ladder</b>")
    commands = [unescape(text) for text in re.findall(r"<pre hidden data-command=\"\d\">(.*?)</pre>", page)]
    assert [shlex.split(command) for command in commands] == [
        ["edgeprune", "fit", "--from", "it's a <b>ladder</b>", "--pick", str(index)] for index in range(6)
    ]
    assert [row[0] for row in rows(page)] == [""] * 7
    assert len(re.findall(r'<input type="radio" name="rung" value="\d"', page)) == 6


def test_the_plot_is_linear_below_5_percent_and_logarithmic_beyond():
    frontier = measured_ladder(rises=(-1.0, *RISES))
    figure = frontier_plot(frontier)
    by_name = {trace.name: trace for trace in figure.data}
    drawn = {
        index: (x, 5 * sinh(y))
        for grade in ("intact", "degraded", "broken")
        for index, x, y in zip(by_name[grade].customdata, by_name[grade].x, by_name[grade].y, strict=True)
    }
    for rung in frontier.rungs:
        assert drawn[rung.index] == pytest.approx((rung.decode.value, rung.rise_percent))
    assert (by_name["dense"].x[0], by_name["dense"].y[0]) == (frontier.dense.decode.value, 0)
    trace = by_name["degraded"]
    high = [5 * sinh(y + up) for y, up in zip(trace.y, trace.error_y.array, strict=True)]
    low = [5 * sinh(y - down) for y, down in zip(trace.y, trace.error_y.arrayminus, strict=True)]
    own = [rung for rung in frontier.rungs if rung.grade == "degraded"]
    assert high == pytest.approx([rung.high_percent for rung in own])
    assert low == pytest.approx([rung.low_percent for rung in own])
    assert list(trace.error_x.array) == pytest.approx([rung.decode.high - rung.decode.value for rung in own])
    lines = [5 * sinh(shape.y0) for shape in figure.layout.shapes if shape.y0 == shape.y1]
    assert lines == pytest.approx([5, 30])
    bottom, top = figure.layout.yaxis.range
    assert bottom < min(min(trace.y) for trace in figure.data)
    assert top > max(max(trace.y) for trace in figure.data)
    labels = dict(zip(figure.layout.yaxis.ticktext, figure.layout.yaxis.tickvals, strict=True))
    assert 5 * sinh(labels["+100 %"]) == pytest.approx(100)


def test_both_thresholds_are_in_sight_of_a_ladder_that_is_all_intact():
    figure = frontier_plot(measured_ladder(rises=(0.1, 0.2)))
    bottom, top = figure.layout.yaxis.range
    assert bottom < 0 < 5 * sinh(top) > 30


@pytest.mark.parametrize("rise", [1e9, 1e280])
def test_a_rise_beyond_all_reason_leaves_a_few_ticks(rise):
    figure = frontier_plot(measured_ladder(rises=(1.0, rise)))
    assert 4 < len(figure.layout.yaxis.tickvals) < 200
    assert "+10 %" in figure.layout.yaxis.ticktext


def test_what_cannot_be_drawn_is_said():
    page = render_frontier(measured_ladder(rises=(1.0, 50.0, inf, nan)), BUNDLE)
    assert "beyond floating point: rung 2, rung 3." in page
    for row, text in zip(rows(page)[3:], ("more than 100-fold", "not a number"), strict=True):
        assert row[3].startswith(text)
    (plot,) = re.findall(r"Plotly\.newPlot\((.*?)\);?\s*}?;?\s*</script>", page, re.DOTALL)
    assert "NaN" not in plot
    assert "not drawn" not in render_frontier(measured_ladder(), BUNDLE).lower()


def test_other_quantities_can_stand_across():
    frontier = measured_ladder()
    figure, axes = frontier_plot(frontier), frontier_axes(frontier)
    assert [label for label, *_ in axes.values()] == ["per token", "tokens/s", "memory", "first token"]
    for field, (_, data, layout) in axes.items():
        assert layout["xaxis.title.text"].endswith(", measured")
        assert len(data["x"]) == len(data["error_x.array"]) == len(figure.data)
        unit = 2**20 if field == "memory" else 1
        path = [getattr(point, field).value / unit for point in (frontier.dense, *frontier.rungs)]
        assert data["x"][0] == pytest.approx(path)
    assert [list(trace.x) for trace in figure.data] == axes["decode"][1]["x"]
    assert figure.layout.xaxis.title.text == axes["decode"][2]["xaxis.title.text"]
    rung = frontier.rungs[0]
    intact = [trace.name for trace in figure.data].index("intact")
    assert axes["tokens_per_second"][1]["error_x.array"][intact][0] == pytest.approx(
        rung.tokens_per_second.high - rung.tokens_per_second.value
    )


def test_pointing_at_a_rung_shows_all_of_it_with_sources():
    (trace,) = [trace for trace in frontier_plot(estimated_ladder()).data if trace.name == "intact"]
    assert trace.hovertext[0].split("<br>") == [
        "<b>rung 0</b>",
        "per token 3.64 ms, estimated",
        "tokens/s 275 tokens/s, estimated",
        "memory 743.7 MiB, estimated",
        "first token 6.63 ms, estimated",
        "10.0 % of attention and MLP pruned",
        "perplexity +1.4 % (+0.9 to +1.9 %), measured: intact",
        "the dense model's next token at 92.8 %, measured",
    ]


def test_self_generated_text_is_not_called_quality():
    assert "nor how it does on your data" in render_frontier(estimated_ladder(), BUNDLE)
    assert "nor how it does on your data" not in render_frontier(measured_ladder(), BUNDLE)


@pytest.mark.parametrize("made", [estimated_ladder, measured_ladder])
def test_texts_cannot_inject_markup(made):
    safe = Parsed(render_frontier(made(), BUNDLE))
    attacked = Parsed(render_frontier(hostile(made(), ATTACK), ATTACK))
    assert [tag for tag, _ in attacked.elements] == [tag for tag, _ in safe.elements]
    assert not [attributes for _, attributes in attacked.elements if any(a.startswith("on") for a in attributes)]
    assert attacked.scripts == safe.scripts  # no text of a user is in a script
    assert "{{ 7 * 7 }}" in " ".join(attacked.texts)


def test_one_file_that_opens_offline(monkeypatch):
    monkeypatch.undo()
    page = render_frontier(estimated_ladder(), BUNDLE)
    elements = Parsed(page).elements
    assert not [1 for _, attributes in elements if "src" in attributes or "href" in attributes]
    policy = next(a["content"] for _, a in elements if a.get("http-equiv") == "Content-Security-Policy")
    assert policy.startswith("default-src 'none'")
    assert page.count("plotly.js v") == 1


def test_one_document_has_no_interval():
    frontier = estimated_ladder(rises=(2.0,))
    rung = frontier.rungs[0]
    same = {"low_percent": 2.0, "high_percent": 2.0}
    text = rung.texts[0].model_copy(update=same)
    frontier = frontier.model_copy(update={"rungs": [rung.model_copy(update={"texts": [text], **same})]})
    assert rows(render_frontier(frontier, BUNDLE))[1][3] == "+2.0 % one document"
    lines = printed(frontier)
    assert "No interval: one document alone." in lines
    assert [line for line in lines if "+2.0 %" in line][0].split()[-3:] == ["+2.0", "%", "intact"]
    assert "No interval: one document alone." not in printed(estimated_ladder())
