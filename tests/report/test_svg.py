"""Plots as elements of a page: their texts are whole and are no markup, their colours the page's, their ids its own."""

from __future__ import annotations

import re
from html import unescape
from math import inf, nan

import pytest

from edgeprune.report.svg import INK, drawing, lines_of, new_plot, reaches, shown
from tests.support.pages import ATTACK, Parsed


def drawn(text: str, name: str = "one") -> str:
    with drawing():
        plot = new_plot(200)
        plot.axes.text(0.1, 0.5, shown(text), color=INK)
        (point,) = plot.axes.plot([0], [1], "o", label=shown(text))
        plot.tip(point, text, **{"data-rung": "3"})
        plot.legend()
        return plot.svg(name, text)


@pytest.mark.parametrize("text", [ATTACK, "$x_1$ & <b>", "\0\x1b[2J", "名前 ü", "", "a\nb"])
def test_a_users_text_is_shown_as_it_is(text):
    svg = drawn(text)
    assert {tag for tag, _ in Parsed(svg).elements} <= {
        "svg",
        "g",
        "path",
        "defs",
        "use",
        "text",
        "title",
        "clippath",
        "rect",
    }
    texts = [unescape(found) for found in re.findall(r"<text[^>]*>(.*?)</text>", svg)]
    assert texts.count(shown(text)) == 2  # in the axes and in the legend
    assert not {"\0", "\x1b"} & set(svg)


def test_what_one_points_at_has_its_text_and_attributes():
    assert re.search(r'<g [^>]*data-rung="3"[^>]*><title>a tip</title>', drawn("a tip"))


def test_the_element_is_scaled_and_coloured_by_the_page():
    svg = drawn("words")
    head = svg[: svg.index(">")]
    assert 'viewBox="0 0 440 200"' in head
    assert "width=" not in head
    assert 'role="img" aria-label="words"' in head
    assert "fill: var(--ink)" in svg
    assert INK not in svg
    assert not re.search("font-family|<style|<metadata|http://www.w3.org/1999/02", svg)


def test_plots_of_one_page_share_no_ids_and_each_is_the_same_in_every_run():
    one, other = drawn("x"), drawn("x", "other")
    ids = [set(re.findall(r'\bid="([^"]+)"', svg)) for svg in (one, other)]
    assert ids[0]
    assert not ids[0] & ids[1]
    assert drawn("x") == one
    referred = set(re.findall(r"url\(#(.*?)\)", one)) | set(re.findall(r'href="#(.*?)"', one))
    assert referred <= ids[0]


def test_the_users_own_settings_of_matplotlib_do_not_count():
    import matplotlib

    plain = drawn("x")
    with matplotlib.rc_context({"svg.fonttype": "path", "font.size": 30}):
        assert drawn("x") == plain


def test_a_long_name_takes_several_lines_and_loses_nothing():
    name = "a/very/long/path/" * 9 + "end.txt"
    assert "".join(lines_of(name)) == name
    assert max(map(len, lines_of(name))) < 60
    assert lines_of("") == ["–"]


def test_a_bound_on_the_wrong_side_of_its_value_reaches_nowhere():
    """As rounding gives it, 100 % of 99.99999999999999 %, and a bootstrap of few documents."""
    intervals = [(80.0, 100.0, 99.99999999999999), (2.0, 1.0, 3.0), (None, 5.0, None), (nan, 5.0, inf)]
    assert reaches(intervals) == [[20.0, 0, 0, 0], [0, 2.0, 0, 0]]
