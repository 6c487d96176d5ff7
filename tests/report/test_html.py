"""report.html: the verdict first, every figure with its source, nothing loaded, nothing injected."""

from __future__ import annotations

import io
import re
from functools import cache
from html import unescape

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from edgeprune.report.html import render_html
from edgeprune.report.schema import Report
from edgeprune.report.terminal import print_report
from edgeprune.report.verdict import verdict
from tests.support import MOST_PAGE_BYTES
from tests.support.pages import ATTACK, Parsed, parsed, sections
from tests.support.sample_reports import (
    CONTENTS,
    DENSE_TEXT,
    MEASUREMENT,
    PROMPT,
    broken_content,
    estimated_content,
    hostile,
    measured,
    measured_content,
    report_of,
)


@pytest.mark.slow
@pytest.mark.parametrize("content", CONTENTS)
def test_the_verdict_comes_first(content):
    report, texts = report_of(content()), parsed(content()).texts
    if report.quality.grade == "broken":
        assert texts.pop(0) == "Broken: perplexity is 42 times the dense model's. Do not deploy this model."
        assert texts.pop(0) == "broken"
    else:
        assert texts.pop(0) == "met"
    assert texts[0] == verdict(report)


@pytest.mark.slow
@pytest.mark.parametrize("content", CONTENTS)
def test_who_decides_is_answered_first_and_engineers_have_the_rest_folded(content):
    page = render_html(report_of(content()))
    heads = re.findall(r"<h2>(.*?)</h2>", page.split("<details")[0])
    assert heads == [
        "What does it cost in answers?",
        "What is the next step?",
        "Does it fit?",
        "How fast does it feel?",
        "How good are the answers?",
        "How do I ship it?",
    ]
    folded = page[page.index('<details class="card engineers"><summary>For engineers') :]
    for head in ("Where the memory goes", "What was removed", "How the search went", "What it rests on"):
        assert f"<h2>{head}</h2>" in folded


def test_the_first_screen_has_one_pair_of_answers_the_next_step_and_all_warnings():
    content = estimated_content()
    content["warnings"] = [f"warning {number}" for number in range(9)]
    cards = sections(content)
    cost = cards["What does it cost in answers?"]
    assert cost.startswith("Its answers are noticeably worse: perplexity")
    assert f"Asked: “{PROMPT}” dense {DENSE_TEXT} fitted The sky" in cost
    step = cards["What is the next step?"]
    assert step.startswith("Copy the bundle to the NVIDIA Jetson AGX Orin 64 GB developer kit")
    assert "scp -r smollm2-orin USER@DEVICE:" in step
    assert "warning 0 warning 1 warning 2 warning 3 warning 4 warning 5 warning 6 warning 7 warning 8" in step


@pytest.mark.slow
@pytest.mark.parametrize("status", ["met", "missed"])
def test_a_broken_model_has_no_green_mark(status):
    """Green is the colour of `met` and of measured figures; a broken model's page has neither of them."""
    content = broken_content() | {"status": status}
    content["budget"][0]["status"] = "met"
    page = render_html(report_of(content))
    assert '<body class="is-broken">' in page
    assert '<span class="pill missed">broken</span>' in page
    style = page.split("<style>")[1].split("</style>")[0]
    rules = re.search(r"\.is-broken { (.*?) }", style)[1]
    green = set(re.findall(r"--(?:met|measured|measured-back): (#\w+);", style))
    assert not [colour for colour in green if colour in rules or colour in page.split("</style>")[1]]
    assert {name for name, _ in re.findall(r"(--[\w-]+): ([^;]+);", rules)} == {
        "--met",
        "--measured",
        "--measured-back",
    }
    lines = io.StringIO()
    print_report(report_of(content), Console(file=lines, width=80, color_system="truecolor", force_terminal=True))
    assert "\x1b[1;31m" in lines.getvalue()
    assert not re.findall(r"\x1b\[[\d;]*32m", lines.getvalue())


@pytest.mark.slow
@pytest.mark.parametrize("content", CONTENTS)
def test_no_figure_is_a_percentage_beyond_sense(content):
    shares = [share for text in parsed(content()).texts for share in re.findall(r"(\d[\d,.]*) ?%", text)]
    assert shares
    assert not [share for share in shares if float(share.replace(",", "")) > 100]


def test_every_cell_is_named_where_tables_stack():
    page = render_html(report_of(measured_content()))
    for table in re.findall(r"<table.*?</table>", page, re.DOTALL):
        assert table.startswith('<table class="stack">')
        heads = [unescape(head) for head in re.findall(r"<th>(.*?)</th>", table)]
        for row in re.findall(r"<tr>(.*?)</tr>", table.split("<tbody>")[1], re.DOTALL):
            assert [unescape(label) for label in re.findall(r'<td[^>]*data-label="(.*?)"', row)] == heads


@pytest.mark.slow
def test_times_are_said_to_be_the_ratio_of_both_models():
    """The p50 of the fitted model's own run is another figure, which stands on the same page."""
    cards = sections(measured_content())
    said = "the dense model's p50 times the ratio of both, timed in turns (0.681 (0.671 to 0.691) per token)"
    assert said in cards["How fast does it feel?"]
    assert "per token, p50 of its own run" in cards["What it rests on"]
    assert "estimated of the device's figures" in sections(estimated_content())["How fast does it feel?"]
    content = measured_content()
    content["fitted"]["performance"] |= {"decode_ratio": None, "prefill_ratio": None}
    assert "Times are p50: half of the runs were faster." in sections(content)["How fast does it feel?"]


def test_the_stages_add_up():
    rests = sections(estimated_content())["What it rests on"]
    assert "dense 2.3 samples 61.0 candidate-1 22.1 evaluation 14.9 all of it 100.3" in rests


def test_figures_of_candidates_keep_their_source_after_the_device_was_measured():
    content = estimated_content()
    performance = content["fitted"]["performance"]
    content["budget"][0]["fitted"] = measured(performance["memory_total"].value, "bytes")
    content["measurement"] = MEASUREMENT
    search = sections(content)["How the search went"]
    assert "790.0 MiB estimated" in search
    assert "measured" not in search


@pytest.mark.slow
def test_only_a_broken_model_is_called_broken_in_the_first_line():
    assert "Broken:" in " ".join(parsed(broken_content()).texts)
    for content in (estimated_content, measured_content):
        assert "Broken:" not in " ".join(parsed(content()).texts)


def test_a_noisy_verdict_says_what_to_do():
    content = measured_content() | {"status": "noisy"}
    texts = parsed(content).texts
    assert texts[0] == "too noisy to tell: run again on an idle machine"
    assert texts[1].startswith("Not clear: whether SmolLM2-135M-Instruct fits")


@pytest.mark.slow
@pytest.mark.parametrize("content", [estimated_content, broken_content])
def test_a_model_not_to_deploy_is_not_offered_for_deployment(content):
    note = "what follows is for trying it, not for deploying it"
    assert (note in sections(content())["How do I ship it?"]) == (content is broken_content)


def test_every_constraint_stands_with_figures_sources_and_headroom():
    fit = sections(measured_content())["Does it fit?"]
    assert (
        "per token met 34.1 ms (33.4 to 34.8 ms) measured 35.1 ms 2.8 % left 50.1 ms (49.1 to 51.1 ms) measured" in fit
    )
    assert "perplexity met +24.6 % (+21.9 to +27.4 %) measured +30.0 % 18.0 % left – 30%" in fit


def test_memory_stands_there_without_a_limit_too():
    content = measured_content()
    content["budget"] = content["budget"][:1]
    assert "memory no limit 511.9 MiB measured 710.9 MiB measured" in sections(content)["Does it fit?"]


def test_what_a_user_notices_comes_before_the_technical_tables():
    cards = sections(measured_content())
    noticed = cards["How fast does it feel?"]
    assert "an answer begins after 611 ms (599 to 623 ms) measured 911 ms (893 to 929 ms) measured" in noticed
    assert "5.6 x reading speed measured 29.3 tokens/s (28.8 to 29.9 tokens/s) 3.8 x reading speed" in noticed
    assert "longest context 3,350 tokens estimated no room within the memory budget estimated" in noticed
    assert "answers at once 1 sequence estimated no room within the memory budget estimated" in noticed
    assert "likeliest next token the same 67.4 % (65.4 to 68.7 %) measured" in noticed  # the worse of two texts
    assert "about 5.3 tokens/s: 238 words per minute (Brysbaert 2019" in noticed
    assert "answers at once of 2048 tokens each, are what memory has room for: the memory budget, 572.2 MiB" in noticed


def test_a_context_that_the_model_ends_is_called_all_it_has():
    content = estimated_content()
    fitted = content["experience"]["fitted"]
    fitted["longest_context"] = fitted["longest_context"].model_copy(update={"value": 8192.0})
    assert "longest context 8,192 tokens, all it has estimated" in sections(content)["How fast does it feel?"]


def test_agreement_stands_beside_the_rise():
    quality = "How good are the answers?"
    assert (
        "+12.9 % to +21.7 % 24 9.90 11.61 4,096 73.7 % (71.5 to 75.2 %) 4,096" in sections(measured_content())[quality]
    )
    assert "16 greedy answers of each to 32 tokens of held-out text" in sections(measured_content())[quality]
    assert "measured in ONNX Runtime on AMD EPYC, 2 threads, fp32" in sections(measured_content())[quality]


@pytest.mark.slow
def test_what_a_vocabulary_leaves_out_is_said():
    content = measured_content()
    first, second = content["quality"]["texts"]
    first["agreement"] |= {"documents": 20, "places": 1234}
    second["agreement"] = None
    cards = sections(content)
    assert "67.4 % (65.4 to 68.7 %) 1,234 in 20 of 24 documents" in cards["How good are the answers?"]
    first["agreement"] = content["quality"]["answers"] = None
    cards = sections(content)
    assert "4,096 – " in cards["How good are the answers?"]
    assert "greedy answers" not in cards["How good are the answers?"]
    assert "likeliest next token" not in cards["How fast does it feel?"]


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
    quality = "How good are the answers?"
    assert "nor how it does on your data" in sections(estimated_content())[quality]
    assert "nor how it does on your data" not in sections(measured_content())[quality]


def test_one_document_has_no_interval():
    content = measured_content()
    content["quality"]["texts"][0] |= {"low_percent": 24.6, "high_percent": 24.6, "documents": 1}
    quality = sections(content)["How good are the answers?"]
    assert "manual.txt +24.6 % no interval: one document 1" in quality
    assert "held out +17.3 % +12.9 % to +21.7 %" in quality


def test_the_search_and_its_end_are_told():
    search = sections(measured_content())["How the search went"]
    assert "It ended after 3 candidates: 2.8 % of a limit is left." in search
    assert "3 chosen met 34.4 ms 34.1 ms measured" in search
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
    words = "more than 100 times the dense model&#39;s" if value == float("inf") else "not a number"
    assert f"Broken: perplexity is {words}" in render_html(report_of(content))


@pytest.mark.slow
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
def elements(text: str) -> tuple[int, set[str]]:
    """How many elements the page has outside of its plots, where a long text takes more lines, and their kinds."""
    tags = [tag for tag, _ in parsed(hostile(measured_content(), text)).elements]
    return len([tag for tag in tags if tag not in ("g", "text")]), set(tags)


@pytest.mark.slow
@settings(max_examples=12, deadline=None)
@given(st.text(alphabet="<>&\"'/{}%-!=script\n\0é", min_size=1, max_size=40))
def test_any_text_leaves_the_pages_structure_alone(text):
    assert elements(text) == elements("plain")


@pytest.mark.slow
@pytest.mark.parametrize("content", CONTENTS)
def test_one_light_file_that_opens_offline(content):
    text = render_html(report_of(content()))
    assert len(text.encode()) < MOST_PAGE_BYTES
    elements = Parsed(text).elements
    assert not [1 for _, attributes in elements if "src" in attributes or "href" in attributes]
    assert not [1 for tag, _ in elements if tag in ("link", "iframe", "img", "base", "form")]
    policy = next(a["content"] for _, a in elements if a.get("http-equiv") == "Content-Security-Policy")
    assert policy.startswith("default-src 'none'")
    assert not [1 for tag, _ in elements if tag == "script"]
    assert set(re.findall(r'xlink:href="(.)', text)) == {"#"}
    assert "url(" not in text.split("<style>")[1].split("</style>")[0]


def test_the_same_report_gives_the_same_page():
    assert render_html(report_of(measured_content())) == render_html(report_of(measured_content()))


def test_a_report_read_back_gives_the_same_page():
    report = report_of(measured_content())
    assert render_html(Report.model_validate_json(report.model_dump_json())) == render_html(report)
