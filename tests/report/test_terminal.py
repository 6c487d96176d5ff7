"""What the command line prints: the verdict first, 80 columns, sources named, nothing that steers a terminal."""

from __future__ import annotations

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgeprune.report.html import render_html
from edgeprune.report.terminal import print_comparison, print_report
from edgeprune.report.verdict import cost_text, next_step, verdict
from tests.support.pages import printed, words
from tests.support.sample_reports import (
    CONTENTS,
    broken_content,
    estimated,
    estimated_content,
    measured_content,
    report_of,
)
from tests.support.sample_rows import row


@pytest.mark.parametrize("content", CONTENTS)
def test_the_verdict_comes_first(content):
    report = report_of(content())
    lines = printed(print_report, report)
    if report.quality.grade == "broken":
        assert lines.pop(0) == "Broken: perplexity is 42 times the dense model's. Do not deploy this model."
    assert words(lines).startswith(f"{verdict(report)} {cost_text(report)}")


@pytest.mark.parametrize("content", CONTENTS)
def test_fits_80_columns_but_for_commands(content):
    report = report_of(content())
    lines = printed(print_report, report)
    commands = next_step(report).command.splitlines()
    assert set(commands) <= set(lines)  # unbroken, to be copied
    assert max(len(line) for line in lines if line not in commands) <= 80


def test_constraints_with_source_headroom_and_verdict():
    lines = [line.split() for line in printed(print_report, report_of(measured_content()))]
    assert ["per", "token", "35.1", "ms", "50.1", "ms", "34.1", "ms", "measured", *["2.8", "%", "left", "met"]] in lines
    assert ["perplexity", "+30.0", "%", "+24.6", "%", "measured", "18.0", "%", "left", "met"] in lines
    assert ["first", "token", "911", "ms", "611", "ms", "measured"] in lines  # not limited


def test_a_relative_limit_is_told_with_what_it_is_a_share_of():
    content = measured_content()
    content["budget"][0]["in_parts"] = "35.1 ms = 70 % of the dense model's 50.1 ms, measured"
    told = words(printed(print_report, report_of(content)))
    assert "decode 35.1 ms = 70 % of the dense model's 50.1 ms, measured" in told


def test_a_dense_figure_of_another_source_names_its_own():
    content = measured_content()
    content["budget"][0]["dense"] = estimated(50.1)
    assert "50.1 ms (estimated)" in words(printed(print_report, report_of(content)))


def test_noise_and_estimates_are_said():
    assert "Yes, by estimate: SmolLM2" in words(printed(print_report, report_of(estimated_content())))
    noisy = words(printed(print_report, report_of(measured_content() | {"status": "noisy"})))
    assert "lies within the noise of the measurement" in noisy
    assert "Next: Measure again while nothing else runs on the machine:" in noisy


def test_times_say_what_they_are():
    assert "p50 times the ratio of both, timed in turns" in words(printed(print_report, report_of(measured_content())))
    assert "nothing was timed on it" in words(printed(print_report, report_of(estimated_content())))


def test_a_noisy_constraint_keeps_its_figures_whole_at_80_columns():
    content = estimated_content()
    content["budget"][0]["status"] = "noisy"
    lines = printed(print_report, report_of(content))
    assert [line for line in lines if "786.6 MiB  826.3 MiB  757.5 MiB  estimated  3.7 % left" in line]
    assert max(map(len, lines)) <= 80


def test_quality_says_of_which_text_and_what_it_is():
    text = words(printed(print_report, report_of(measured_content())))
    assert "rises by 24.6 %, measured on the worst of 2 held-out texts (+21.9 % to +27.3 %)" in text
    assert "degraded, measured; manual.txt: perplexity 12.80 (dense) to 15.95, 24 documents; notes, one" in text
    assert "agreement with the dense model" in words(printed(print_report, report_of(estimated_content())))


def test_what_a_user_notices_in_two_rows():
    text = words(printed(print_report, report_of(measured_content())))
    assert "speed first token after 611 ms, then 29.3 tokens/s: 5.6 x reading speed (dense 3.8 x), measured" in text
    assert "room context up to 3,350 tokens (dense: no room within the memory budget); at context 2048: 1 seq" in text


def test_agreement_and_answers():
    content = measured_content()
    text = words(printed(print_report, report_of(content)))
    assert "the likeliest next token is the dense model's at 67.4 % (65.4 to 68.7 %) of places" in text
    assert "11 of 16 answers begin with the same 4 tokens" in text  # the longest that half of them share
    assert "2 of 16 answers begin with the same 1 token," in words(printed(print_report, report_of(broken_content())))
    content["quality"] |= {"answers": None, "texts": [one | {"agreement": None} for one in content["quality"]["texts"]]}
    text = words(printed(print_report, report_of(content)))
    assert "likeliest" not in text
    assert "begin with" not in text


def with_gains(**gains):
    content = measured_content()
    rows = [row | {"gain": gains.get(row["name"])} for row in content["budget"]]
    return content | {"budget": rows}


def test_the_limit_that_decides_and_what_more_of_it_would_buy():
    shown = words(printed(print_report, report_of(with_gains(decode=0.05, memory=0.0))))
    assert (
        "What decides is time per token: 5 % more of time per token would lower perplexity by 4.9 %, as predicted."
        in shown
    )
    assert "More of memory alone would buy nothing." in shown
    both = words(printed(print_report, report_of(with_gains(decode=0.0, memory=0.0))))
    assert "No limit decides alone" in both
    assert "decides" not in words(printed(print_report, report_of(with_gains())))


@pytest.mark.parametrize(("status", "said"), [("met", "the budget: met"), ("missed", "the budget: missed")])
def test_both_points_where_budget_and_quality_cannot_be_had(status, said):
    content = measured_content()
    other = {
        "widths": content["dense"]["widths"],
        "performance": content["fitted"]["performance"],
        "rise_percent": 88.0,
        "tried": 2,
    }
    report = report_of(content | {"quality_stop": other | {"status": status}})
    shown = words(printed(print_report, report))
    assert f"it; {said}: perplexity +88.0 %" in shown
    assert "the quality limit, smallest: perplexity +24.6 %" in shown
    page = render_html(report)
    assert "smallest model within the quality limit" in page
    assert ("model nearest to the budget, which meets it" in page) == (status == "met")


def test_the_page_says_where_costs_of_widths_come_from():
    content = measured_content()
    search = content["search"] | {"costs": "models of random weights on onnxruntime", "cost_error": {"decode": 0.03}}
    page = render_html(report_of(content | {"search": search}))
    assert "Costs of widths come from models of random weights on onnxruntime; at most off by decode 3.0 %" in page


def test_one_document_has_no_interval():
    content = measured_content()
    one = {"low_percent": 24.6, "high_percent": 24.6, "documents": 1}
    content["quality"]["texts"] = [content["quality"]["texts"][0] | one]
    shown = words(printed(print_report, report_of(content)))
    assert "rises by 24.6 %, measured on held-out text (no interval: one document)" in shown
    assert "manual.txt: perplexity 12.80 (dense) to 15.95, 1 document " in shown


def test_long_samples_are_cut_and_long_lists_of_warnings_counted():
    content = broken_content() | {"warnings": [f"warning {number}." for number in range(7)]}
    content["quality"]["fitted_sample"] = "x" * 10_000
    text = words(printed(print_report, report_of(content)))
    assert 100 < text.count("x") < 200
    assert "warning 2. and 4 more in the report" in text
    assert "warning 3." not in text


def test_three_warnings_are_not_counted():
    content = estimated_content() | {"warnings": ["one", "two", "three"]}
    text = words(printed(print_report, report_of(content)))
    assert "mind three" in text
    assert "more in the report" not in text


def test_markup_and_control_characters_stay_text():
    content = estimated_content()
    content["model"] |= {"name": "[red]\x1b[2J\x07 gone[/red]"}
    content["quality"] |= {"prompt": "[bold]p[/bold]", "dense_sample": "\x1b]0;title\x07", "fitted_sample": "[/]"}
    text = "\n".join(printed(print_report, report_of(content)))
    assert "[red]\N{REPLACEMENT CHARACTER}[2J\N{REPLACEMENT CHARACTER} gone[/red]" in text
    assert "[bold]p[/bold]" in text
    assert not {"\x1b", "\x07"} & set(text)


@settings(max_examples=50, deadline=None)
@given(st.text(max_size=60))
def test_any_sample_prints_without_control_characters(sample):
    content = estimated_content()
    content["quality"] |= {"prompt": sample, "fitted_sample": sample, "dense_sample": sample}
    assert all(c.isprintable() for line in printed(print_report, report_of(content)) for c in line)


def test_comparison_by_layout_method_and_text():
    rows = [
        row("dense", "", 0.0, 0.0),
        row("default", "uniform", 0.2, 0.215),
        row("flap", "per-layer", 0.2, 0.3, fell_back=2),
    ]
    lines = printed(print_comparison, rows, width=200)
    assert "[b]a.txt 12.30" in lines[0]
    assert "[95 % interval]" in lines[1]
    uniform, free = (
        next(n for n, line in enumerate(lines) if line == f"layout {name}") for name in ("uniform", "per-layer")
    )
    heads = re.split(r"\s{2,}", lines[uniform + 1])
    assert heads[:3] == ["method", "removed %", "of all %"]
    assert "[b]a.txt: perplexity, rise in nats" in lines[uniform + 1]
    assert heads[-3:] == ["per token MiB", "pruned in s", "peak GiB"]
    assert next(line for line in lines if line.startswith("default")).split() == [
        "default",
        "20.0",
        "16.0",
        "15.25",
        "0.215",
        "[0.205,",
        "0.225]",
        "256.0",
        "31.0",
        "2.00",
    ]
    assert uniform < free < next(n for n, line in enumerate(lines) if line.startswith("flap"))
    assert "no update helped in 2 modules" in lines[-1]
