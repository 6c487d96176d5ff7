"""A ladder's page: nothing but the reports' figures, each with its source, nothing injected."""

from __future__ import annotations

import re
import shlex
from html import unescape
from math import inf, nan

import pytest

from edgeprune.report.frontier import frontier_of
from edgeprune.report.frontier_page import render_frontier
from tests.support import MOST_PAGE_BYTES
from tests.support.pages import ATTACK, Parsed
from tests.support.sample_ladders import BUNDLE, estimated_ladder, hostile, ladder, measured_ladder, printed, with_tasks
from tests.support.sample_reports import built, estimated_content


def rows(page: str) -> list[list[str]]:
    """The visible words of each row of the table to pick from, by cell."""
    table = re.search(r'<table id="rungs" class="stack">(.*?)</table>', page, re.DOTALL)[1]
    return [
        [" ".join(unescape(re.sub(r"<[^>]+>", " ", cell)).split()) for cell in re.findall(r"<td.*?>(.*?)</td>", row)]
        for row in re.findall(r"<tr[^>]*>(.*?)</tr>", table.split("<tbody>")[1], re.DOTALL)
    ]


def headings(page: str) -> list[str]:
    head = re.search(r'<table id="rungs" class="stack">\s*<thead>(.*?)</thead>', page, re.DOTALL)[1]
    return [" ".join(re.sub(r"<[^>]+>", " ", cell).split()) for cell in re.findall(r"<th>(.*?)</th>", head)]


def test_the_table_has_a_column_for_each_task():
    page = render_frontier(with_tasks(measured_ladder(rises=(1.4, 4.6)), "arc_easy"), BUNDLE)
    column = headings(page).index("arc_easy, measured")
    assert [row[column] for row in rows(page)] == [
        "42.5 %",
        "40.5 % -2.0 points (-4.5 to +0.5)",
        "38.5 % -4.0 points (-6.5 to -1.5)",
    ]
    assert page.count("none is far worse") == 1
    assert page.count("On odd input it is far worse.") == 1


def test_the_table_has_every_figure_under_its_source():
    page = render_frontier(measured_ladder(texts=("a.txt", "b.txt")), BUNDLE)
    assert headings(page) == [
        "",
        "rung",
        "quality",
        "perplexity, a.txt, measured",
        "perplexity, b.txt, measured",
        "same next token, measured",
        "per token, measured",
        "of dense, measured",
        "tokens/s, measured",
        "first token, measured",
        "memory, measured",
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
    assert "per token, first token: estimated; rise: measured." in lines


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


def test_what_cannot_be_drawn_is_said():
    page = render_frontier(measured_ladder(rises=(1.0, 50.0, inf, nan)), BUNDLE)
    assert "beyond floating point: rung 2, rung 3." in page
    for row, text in zip(rows(page)[3:], ("more than 100-fold", "not a number"), strict=True):
        assert row[3].startswith(text)
    drawn = re.findall(r'<g [^>]*data-rung="(\d)"', page)
    assert drawn == ["0", "1"] * 4  # in each of the four plots
    assert "not drawn" not in render_frontier(measured_ladder(), BUNDLE).lower()


def test_a_rung_is_picked_from_any_plot_by_what_the_script_looks_for():
    page = render_frontier(estimated_ladder(), BUNDLE)
    plots = re.findall(r'<div class="plot wide" data-plot="(\w+)"( hidden)?>', page)
    assert plots == [("decode", ""), ("tokens_per_second", " hidden"), ("memory", " hidden"), ("prefill", " hidden")]
    assert re.findall(r'<button type="button" data-axis="(\w+)"', page) == [name for name, _ in plots]
    points = re.findall(r'<g ([^>]*data-rung="\d"[^>]*)>', page)
    assert len(points) == 4 * 6
    assert all('class="rung"' in attributes for attributes in points)
    (script,) = Parsed(page).scripts
    for word in ('"svg [data-rung]"', "[data-plot]", "#rungs tr[data-rung]", 'getElementById("command")'):
        assert word in script
    assert len(script) < 3000


def test_a_broken_rung_has_no_green_mark():
    page = render_frontier(estimated_ladder(), BUNDLE)
    assert "#rungs tr.is-broken { --measured: var(--ink); --measured-back: var(--code); }" in page
    (row,) = re.findall(r'<tr data-rung="5" class="is-broken">(.*?)</tr>', page, re.DOTALL)
    assert "intact" not in row


def test_self_generated_text_is_not_called_quality():
    assert "nor how it does on your data" in render_frontier(estimated_ladder(), BUNDLE)
    assert "nor how it does on your data" not in render_frontier(measured_ladder(), BUNDLE)


@pytest.mark.slow
@pytest.mark.parametrize("made", [estimated_ladder, measured_ladder])
def test_texts_cannot_inject_markup(made):
    ladder = with_tasks(made(), "own")
    safe = Parsed(render_frontier(ladder, BUNDLE))
    attacked = Parsed(render_frontier(hostile(ladder, ATTACK), ATTACK))
    assert [tag for tag, _ in attacked.elements] == [tag for tag, _ in safe.elements]
    assert not [attributes for _, attributes in attacked.elements if any(a.startswith("on") for a in attributes)]
    assert attacked.scripts == safe.scripts  # no text of a user is in a script
    assert "{{ 7 * 7 }}" in " ".join(attacked.texts)


@pytest.mark.parametrize("made", [estimated_ladder, measured_ladder])
def test_one_light_file_that_opens_offline(made):
    page = render_frontier(made(texts=("a.txt", "b.txt")), BUNDLE)
    assert len(page.encode()) < MOST_PAGE_BYTES
    elements = Parsed(page).elements
    assert not [1 for _, attributes in elements if "src" in attributes or "href" in attributes]
    policy = next(a["content"] for _, a in elements if a.get("http-equiv") == "Content-Security-Policy")
    assert policy.startswith("default-src 'none'")
    assert set(re.findall(r'xlink:href="(.)', page)) == {"#"}


@pytest.mark.parametrize(
    ("rise", "documents", "cell", "line"),
    [
        (2.0, 1, "+2.0 % no interval: one document", "no interval: one document."),
        (0.0, 12, "+0.0 % no rise: the same model", "rung 0: no rise: the same model."),
    ],
)
def test_a_missing_interval_has_its_true_reason(rise, documents, cell, line):
    frontier = estimated_ladder(rises=(rise,))
    rung = frontier.rungs[0]
    same = {"low_percent": rise, "high_percent": rise}
    text = rung.texts[0].model_copy(update={**same, "documents": documents})
    frontier = frontier.model_copy(update={"rungs": [rung.model_copy(update={"texts": [text], **same})]})
    assert rows(render_frontier(frontier, BUNDLE))[1][3] == cell
    lines = printed(frontier)
    assert line in lines
    assert [line for line in lines if f"+{rise} %" in line][0].split()[-3:] == [f"+{rise}", "%", "intact"]
    assert not [line for line in printed(estimated_ladder()) if "interval:" in line or "same model" in line]


def test_pictures_of_the_models_own_are_not_called_text():
    frontier = estimated_ladder()
    dense = frontier.dense.model_copy(update={"grid": "data:image/png;base64,AA=="})
    frontier = frontier.model_copy(update={"dense": dense, "prompt": None})
    page = render_frontier(frontier, BUNDLE)
    assert "The dense model drew the pictures itself" in page
    assert "Quality is agreement with the dense model, on pictures of its own." in printed(frontier)
