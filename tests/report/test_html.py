"""report.html: the verdict first, every figure with its source, nothing loaded, nothing injected."""

from __future__ import annotations

from functools import cache

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgeprune.report.html import render_html
from edgeprune.report.schema import Report
from tests.support.pages import ATTACK, Parsed, parsed, sections
from tests.support.sample_reports import (
    CONTENTS,
    broken_content,
    estimated_content,
    hostile,
    measured_content,
    report_of,
)


@pytest.mark.parametrize("content", CONTENTS)
def test_the_verdict_comes_first(content):
    report, texts = report_of(content()), parsed(content()).texts
    if report.quality.grade == "broken":
        assert texts.pop(0) == "Broken: perplexity rises by 4127 %. Do not deploy this model."
    assert texts[0] == {"met": "met", "out_of_reach": "out of reach"}[report.outcome]
    assert texts[1] == report.headline


def test_only_a_broken_model_is_called_broken_in_the_first_line():
    assert "Broken:" in " ".join(parsed(broken_content()).texts)
    for content in (estimated_content, measured_content):
        assert "Broken:" not in " ".join(parsed(content()).texts)


def test_a_noisy_verdict_says_what_to_do():
    content = measured_content() | {"status": "noisy"}
    assert parsed(content).texts[0] == "too noisy to tell: run again on an idle machine"


@pytest.mark.parametrize("content", [estimated_content, broken_content])
def test_a_model_not_to_deploy_is_not_offered_for_deployment(content):
    note = "what follows is for trying it, not for deploying it"
    assert (note in sections(content())["How do I deploy it?"]) == (content is broken_content)


def test_every_constraint_stands_with_figures_sources_and_headroom():
    fit = sections(measured_content())["Does it fit?"]
    assert "decode met 34.1 ms (33.4 to 34.8 ms) measured 35.1 ms +2.8 % 50.1 ms (49.1 to 51.1 ms) measured 70%" in fit
    assert "quality met +24.6 % (+21.9 to +27.4 %) measured +30.0 % +18.0 % – 30%" in fit


def test_what_a_user_notices_comes_before_the_technical_tables():
    cards = sections(measured_content())
    assert list(cards)[:3] == ["What you will notice", "Does it fit?", "How much quality did it cost?"]
    noticed = cards["What you will notice"]
    assert "an answer begins after 611 ms (599 to 623 ms) measured 911 ms (893 to 929 ms) measured" in noticed
    assert "5.6 x reading speed 29.3 tokens/s (28.8 to 29.9 tokens/s) measured 3.8 x reading speed" in noticed
    assert "longest context 3,350 tokens estimated no room estimated" in noticed
    assert "at once 1 sequence estimated no room estimated" in noticed
    assert "likeliest next token the same 67.4 % (65.4 to 68.7 %) measured" in noticed  # the worse of two texts
    assert "about 5.3 tokens/s: 238 words per minute (Brysbaert 2019" in noticed
    assert "sequences of 2048 tokens at once, are what memory has room for: the memory budget, 572.2 MiB" in noticed


def test_a_context_that_the_model_ends_is_called_all_it_has():
    content = estimated_content()
    fitted = content["experience"]["fitted"]
    fitted["longest_context"] = fitted["longest_context"].model_copy(update={"value": 8192.0})
    assert "longest context 8,192 tokens, all it has estimated" in sections(content)["What you will notice"]


def test_agreement_stands_beside_the_rise():
    quality = "How much quality did it cost?"
    assert "+12.9 % to +21.7 % 9.90 11.61 4,096 73.7 % (71.5 to 75.2 %) 4,096" in sections(measured_content())[quality]
    assert "16 greedy answers of each to 32 tokens of held-out text" in sections(measured_content())[quality]
    assert "measured in ONNX Runtime on AMD EPYC, 2 threads, fp32" in sections(measured_content())[quality]


def test_what_a_vocabulary_leaves_out_is_said():
    content = measured_content()
    first, second = content["quality"]["texts"]
    first["agreement"] |= {"documents": 20, "places": 1234}
    second["agreement"] = None
    cards = sections(content)
    assert "67.4 % (65.4 to 68.7 %) 1,234 in 20 of 24 documents" in cards["How much quality did it cost?"]
    first["agreement"] = content["quality"]["answers"] = None
    cards = sections(content)
    assert "4,096 – " in cards["How much quality did it cost?"]
    assert "greedy answers" not in cards["How much quality did it cost?"]
    assert "likeliest next token" not in cards["What you will notice"]


def test_each_source_has_its_own_badge_beside_its_figure():
    content = estimated_content()
    weights = content["fitted"]["performance"]["memory"]["weights"]
    content["fitted"]["performance"]["memory"] |= {"weights": weights.model_copy(update={"source": "built"})}
    cards = sections(content)
    assert "weights built ; cache, activations, buffers, runtime estimated" in cards["Where the memory goes"]
    assert "weights 256.6 MiB estimated 233.4 MiB built" in cards["What it rests on"]


def test_a_measured_figure_of_a_cross_check_is_not_the_devices():
    assert "Cross-check, not the device's figure" in sections(estimated_content())["Does it fit?"]
    assert "Cross-check" not in sections(measured_content())["Does it fit?"]


def test_self_generated_text_is_not_called_quality():
    quality = "How much quality did it cost?"
    assert "nor how it does on your data" in sections(estimated_content())[quality]
    assert "nor how it does on your data" not in sections(measured_content())[quality]


def test_one_document_has_no_interval():
    content = measured_content()
    content["quality"]["texts"][0] |= {"low_percent": 24.6, "high_percent": 24.6}
    quality = sections(content)["How much quality did it cost?"]
    assert "manual.txt +24.6 % none: one document" in quality
    assert "held out +17.3 % +12.9 % to +21.7 %" in quality


def test_the_search_and_its_end_are_told():
    search = sections(measured_content())["How the search went"]
    assert "It ended after 3 candidates: 2.8 % of a limit is left." in search
    assert "3 chosen met 34.4 ms 34.1 ms" in search
    assert "539.9 MiB" in search  # the floor


def test_a_dense_model_that_fits_has_no_search():
    content = estimated_content() | {
        "search": {"ending": "dense", "reason": "the dense model already meets the budget", "candidates": []},
        "modules": [],
        "cross_check": None,
    }
    content["fitted"] = content["dense"]
    assert "after 0 candidates: the dense model already meets the budget" in sections(content)["How the search went"]


@pytest.mark.parametrize("change", [{"budget": []}, {"deploy": []}, {"files": {}, "stages": {}, "versions": {}}])
def test_what_may_be_empty_may_be_empty(change):
    assert "</html>" in render_html(report_of(estimated_content() | change))


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_numbers_beyond_floating_point_are_shown(value):
    content = broken_content()
    content["quality"]["texts"][0] |= {"fitted": value, "rise_percent": value, "high_percent": value}
    content["quality"]["rise_percent"] = value
    assert f"Broken: perplexity rises by {value:.0f} %" in render_html(report_of(content))


@pytest.mark.parametrize("content", CONTENTS)
def test_texts_cannot_inject_markup(content):
    safe, attacked = parsed(content()), parsed(hostile(content(), ATTACK))
    assert not [tag for tag, _ in attacked.elements if tag == "img"]
    assert not [attributes for _, attributes in attacked.elements if any(a.startswith("on") for a in attributes)]
    scripts = [sum(tag == "script" for tag, _ in one.elements) for one in (safe, attacked)]
    assert scripts[0] == scripts[1]
    assert not [script for script in attacked.scripts if "<" + "img" in script or "<" + "/script" in script]
    assert "{{ 7 * 7 }}" in " ".join(attacked.texts)


@cache
def count_of_elements(text: str) -> int:
    return len(parsed(hostile(measured_content(), text)).elements)


@settings(max_examples=12, deadline=None)
@given(st.text(alphabet="<>&\"'/{}%-!=script\n\0é", min_size=1, max_size=40))
def test_any_text_leaves_the_pages_structure_alone(text):
    assert count_of_elements(text) == count_of_elements("plain")


def test_one_file_that_opens_offline(monkeypatch):
    monkeypatch.undo()
    text = render_html(report_of(estimated_content()))
    elements = Parsed(text).elements
    assert not [1 for _, attributes in elements if "src" in attributes or "href" in attributes]
    assert not [1 for tag, _ in elements if tag in ("link", "iframe", "img", "base", "form")]
    policy = next(a["content"] for _, a in elements if a.get("http-equiv") == "Content-Security-Policy")
    assert policy.startswith("default-src 'none'")
    assert text.count("plotly.js v") == 1
    assert "url(" not in text.split("<style>")[1].split("</style>")[0]


def test_the_same_report_gives_the_same_page():
    assert render_html(report_of(measured_content())) == render_html(report_of(measured_content()))


def test_a_report_read_back_gives_the_same_page():
    report = report_of(measured_content())
    assert render_html(Report.model_validate_json(report.model_dump_json())) == render_html(report)
