"""What the command line prints: the verdict first, 80 columns, sources named, nothing that steers a terminal."""

from __future__ import annotations

import json
import re
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgeprune.cli.tables import print_doctor, print_plan, print_plans, print_profile, print_profiles
from edgeprune.commands.doctor import Finding
from edgeprune.commands.plan import Question, plan_all, plan_one
from edgeprune.errors import InputError
from edgeprune.pipeline.comparison import Row
from edgeprune.profiles import list_profiles, load_profile
from edgeprune.report.comparison import check_page, render_page, write_page
from edgeprune.report.figures import figure_text, number_text, perplexity_text
from edgeprune.report.html import render_html
from edgeprune.report.terminal import print_comparison, print_report
from tests.support.pages import printed, words
from tests.support.sample_reports import (
    CONTENTS,
    broken_content,
    estimated,
    estimated_content,
    measured,
    measured_content,
    report_of,
)


@pytest.mark.parametrize("content", CONTENTS)
def test_the_verdict_comes_first(content):
    report = report_of(content())
    lines = printed(print_report, report)
    if report.quality.grade == "broken":
        assert lines.pop(0) == "Broken: perplexity +4127 %. Do not deploy this model."
    assert words(lines).startswith(f"{report.headline} Verdict: ")


@pytest.mark.parametrize("content", CONTENTS)
def test_fits_80_columns_but_for_commands(content):
    report = report_of(content())
    lines = printed(print_report, report)
    commands = report.deploy[0].command.splitlines()
    assert set(commands) <= set(lines)  # unbroken, to be copied
    assert max(len(line) for line in lines if line not in commands) <= 80


def test_constraints_with_source_headroom_and_verdict():
    lines = [line.split() for line in printed(print_report, report_of(measured_content()))]
    assert ["decode", "35.1", "ms", "50.1", "ms", "34.1", "ms", "measured", "+2.8", "%", "met"] in lines
    assert ["quality", "+30.0", "%", "+24.6", "%", "measured", "+18.0", "%", "met"] in lines
    assert ["prefill", "911", "ms", "611", "ms", "measured"] in lines  # not limited


def test_a_dense_figure_of_another_source_names_its_own():
    content = measured_content()
    content["budget"][0]["dense"] = estimated(50.1)
    assert "50.1 ms (estimated)" in words(printed(print_report, report_of(content)))


def test_noise_and_estimates_are_said():
    assert "Verdict: met, from estimated figures." in printed(print_report, report_of(estimated_content()))
    noisy = words(printed(print_report, report_of(measured_content() | {"status": "noisy"})))
    assert "Verdict: too noisy to tell: run again on an idle machine, from measured figures." in noisy


def test_a_noisy_constraint_keeps_its_figures_whole_at_80_columns():
    content = estimated_content()
    content["budget"][0]["status"] = "noisy"
    lines = printed(print_report, report_of(content))
    assert [line for line in lines if "786.6 MiB  826.3 MiB  757.5 MiB  estimated  +3.7 %" in line]
    assert max(map(len, lines)) <= 80


def test_quality_says_of_which_text_and_what_it_is():
    text = words(printed(print_report, report_of(measured_content())))
    assert "degraded: perplexity +24.6 % on the worst of 2 texts, measured (95 % interval +21.9 % to +27.3 %)" in text
    assert "agreement with the dense model" in words(printed(print_report, report_of(estimated_content())))


def test_what_a_user_notices_in_two_rows():
    text = words(printed(print_report, report_of(measured_content())))
    assert "speed first token after 611 ms, then 29.3 tokens/s: 5.6 x reading speed (dense 3.8 x), measured" in text
    assert "room context up to 3,350 tokens (dense no room); at context 2048 1 sequence (dense no room)" in text


def test_agreement_and_answers():
    content = measured_content()
    text = words(printed(print_report, report_of(content)))
    assert "the likeliest next token is the dense model's at 67.4 % (65.4 to 68.7 %) on the worst text" in text
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
    assert "What decides is decode: 5 % more of decode would lower perplexity by 4.9 %, as predicted." in shown
    assert "More of memory alone would buy nothing." in shown
    both = words(printed(print_report, report_of(with_gains(decode=0.0, memory=0.0))))
    assert "No limit decides alone" in both
    assert "decides" not in words(printed(print_report, report_of(with_gains())))


@pytest.mark.parametrize(("status", "said"), [("met", "the budget: met"), ("missed", "the budget: missed")])
def test_both_points_where_budget_and_quality_cannot_be_had(status, said):
    content = measured_content()
    other = {"widths": [], "performance": content["fitted"]["performance"], "rise_percent": 88.0, "tried": 2}
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
    content["quality"]["texts"] = [content["quality"]["texts"][0] | {"low_percent": 24.6, "high_percent": 24.6}]
    assert "+24.6 %, measured (one document, so no interval)" in words(printed(print_report, report_of(content)))


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
    content = estimated_content() | {"headline": "[red]\x1b[2J\x07 gone[/red]"}
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


def test_every_device_is_listed_whole():
    lines = printed(print_profiles, list_profiles())
    assert max(map(len, lines)) <= 80
    names = {line.split()[0] for line in lines[1:] if line[:1].strip()}
    assert names == {profile.name for profile in list_profiles()}


@pytest.mark.parametrize("profile", list_profiles(), ids=lambda profile: profile.name)
def test_one_device_with_source_and_confidence_of_each_figure(profile):
    lines = printed(print_profile, profile)
    text = words(lines)
    assert max(map(len, lines)) <= 80
    assert lines[0].startswith(f"{profile.name}: ")
    for name, figure in profile.hardware.items():
        assert f"{name.replace('_', ' ')} {figure.value:g}" in text
        assert figure.confidence in text
    assert ("probed on first use" in text) == (not profile.is_probed)


def test_a_figures_source_is_printed_in_full():
    source = load_profile("jetson-orin").bandwidth.source
    assert source in words(printed(print_profile, load_profile("jetson-orin")))


@pytest.fixture
def shape(tmp_path) -> str:
    sizes = {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "vocab_size": 49152}
    heads = {"num_attention_heads": 9, "num_key_value_heads": 3, "max_position_embeddings": 8192}
    path = tmp_path / "[bold]small.json"
    path.write_text(json.dumps({"model_type": "llama", **sizes, **heads}))
    return str(path)


def test_a_plan_says_whether_it_fits_by_part_and_on_what_it_rests(shape):
    lines = printed(print_plan, plan_one(Question(shape, "jetson-orin-nano-4gb", precision="int4")))
    assert max(map(len, lines)) <= 80
    shown = words(lines)
    assert shown.startswith("[bold]small on jetson-orin-nano-4gb: 0.163 B parameters, int4, batch 1, prompt 512, past")
    for text in (
        "It fits: ",
        "2.79 GiB that the system leaves",
        "All figures are estimated.",
        "weights",
        "cache copies",
        "decode in place",
        "Orin Nano 8 GB",
        "TensorRT-Edge-LLM 0.10",
        "mind int4 is weight-only",
        "low confidence in the profile, which gives the reasons: ",
    ):
        assert text in shown
    shown = words(printed(print_plan, plan_one(Question(shape, "jetson-orin-nano-4gb", batch=64))))
    assert re.search(r"It does not fit: [\d.]+ GiB, but 2.79 GiB that the system leaves", shown)


def test_plans_of_all_devices_fit_80_columns_with_whole_names(shape):
    plans = plan_all(Question(shape, batch=24))
    lines = printed(print_plans, plans)
    assert max(map(len, lines)) <= 80
    rows = {line.split()[0]: line.split() for line in lines if line}
    for found in plans:
        assert ("yes" if found.fits else "no") in rows[found.profile.name]
        assert (rows[found.profile.name][-1] == "ms") == found.fits
    held = [found for found in plans if found.fits]
    guessed = [found for found in held if found.profile.decode_efficiency.confidence == "low"]
    assert 0 < len(guessed) < len(held) < len(plans)
    text = f"{len(held)} of {len(plans)} devices hold it, {len(guessed)} of them with no or few published points."
    assert text in words(lines)


def test_findings_say_how_to_get_what_is_missing():
    findings = [Finding("torch", True, "2.13.0"), Finding("engine x", False, "none", 'pip install "edgeprune[x]"')]
    lines = printed(print_doctor, findings)
    assert lines[1].split() == ["yes", "torch", "2.13.0"]
    assert lines[2].split() == ["no", "engine", "x", "none", "pip", "install", '"edgeprune[x]"']


def row(method: str, layout: str, ratio: float, value: float, **changes) -> Row:
    text = "[b]a.txt"
    rise = (value, value - 0.01, value + 0.01)
    settings = {
        "method": method,
        "layout": layout,
        "allocation": "sensitivity" if layout else "",
        "asked": ratio,
        "ratio": ratio,
        "total_ratio": 0.8 * ratio,
        "perplexity": {text: 12.3 * 2.718281828**value},
        "rise": {text: rise},
        "over_default": {},
        "parameters": 134_515_008,
        "decode_bytes": 2**28,
        "seconds": 31.04,
        "peak_bytes": 2**31,
        "fell_back": 0,
    }
    return Row(**(settings | changes))


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
    assert "[b]a.txt: perplexity, rise" in lines[uniform + 1]
    assert next(line for line in lines if line.startswith("default")).split() == [
        "default",
        "20.0",
        "%",
        "16.0",
        "%",
        "15.25",
        "0.215",
        "[0.205,",
        "0.225]",
        "256.0",
        "MiB",
        "31.0",
        "2.00",
        "GiB",
    ]
    assert uniform < free < next(n for n, line in enumerate(lines) if line.startswith("flap"))
    assert "no update helped in 2 modules" in lines[-1]


def test_a_method_looks_alike_in_all_plots():
    rows = [
        row("dense", "", 0.0, 0.0),
        row("default", "uniform", 0.2, 0.2),
        row("flap", "uniform", 0.2, 0.3),
        row("flap", "per-layer", 0.2, 0.3),
        row("default", "per-layer", 0.2, 0.2),
    ]
    page = render_page(rows)
    colours: dict[str, set[str]] = {}
    for colour, name in re.findall(r'"line":{"color":"(#\w+)","dash":"\w+"}.*?"name":"(\w+)"', page):
        colours.setdefault(name, set()).add(colour)
    assert set(colours) == {"default", "flap"}
    assert all(len(found) == 1 for found in colours.values())
    assert colours["default"] != colours["flap"]


def test_a_perplexity_beyond_floating_point_is_a_dash():
    assert [perplexity_text(value) for value in (12.344, 2.7e6, None)] == ["12.34", "2.7e+06", "–"]


def test_the_comparisons_page_is_whole_and_escapes_what_it_shows(tmp_path):
    rows = [row("dense", "", 0.0, 0.0), row("default", "uniform", 0.2, 0.215), row("default", "uniform", 0.3, 0.4)]
    rows = [replace(r, perplexity={"<script>x": 12.0}, rise={"<script>x": r.rise["[b]a.txt"]}) for r in rows]
    page = render_page(rows)
    assert "<script>x" not in page
    assert page.count('id="plot-') == 1
    assert "0.215 [0.205, 0.225]" in page
    assert "http:" not in re.sub(r"<script>.*?</script>", "", page, flags=re.DOTALL)
    assert '"type":"log"' in page
    gained = [*rows[:-1], replace(rows[-1], rise={"<script>x": (-0.1, -0.2, 0.1)})]
    assert '"type":"log"' not in render_page(gained)  # a logarithm would drop the point
    path = tmp_path / "page.html"
    write_page(path, rows)
    assert [file.name for file in tmp_path.iterdir()] == ["page.html"]
    with pytest.raises(InputError, match="exists"):
        check_page(path, force=False)
    check_page(path, force=True)
    with pytest.raises(InputError, match="no folder"):
        check_page(tmp_path / "none" / "page.html", force=False)


@pytest.mark.parametrize(
    ("value", "unit", "text"),
    [
        (3 * 2**30, "bytes", "3.00 GiB"),
        (6.149, "ms", "6.15 ms"),
        (4.96, "%", "+5.0 %"),
        (-3.0, "%", "-3.0 %"),
        (4127.4, "%", "+4127 %"),
        (2.34, "tokens/s", "2.34 tokens/s"),
        (277.8, "tokens/s", "278 tokens/s"),
        (0.7128, "1", "0.713"),
        (8192.0, "tokens", "8,192 tokens"),
        (1.0, "sequences", "1 sequence"),
    ],
)
def test_numbers_in_their_units(value, unit, text):
    assert number_text(value, unit) == text


def test_an_interval_names_its_unit_once_where_it_is_the_same():
    assert figure_text(measured(50.0)) == "50.0 ms (49.0 to 51.0 ms)"
    assert figure_text(measured(1000 * 2**20, "bytes", 0.05)) == "1000.0 MiB (950.0 MiB to 1.03 GiB)"
    assert figure_text(measured(0.7, "1", 0.1)) == "0.700 (0.630 to 0.770)"
    assert figure_text(None) == "–"
