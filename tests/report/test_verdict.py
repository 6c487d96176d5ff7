"""The verdict in plain words: whether it fits and how that is known, what it costs, what to do next."""

from __future__ import annotations

import pytest

from edgeprune.report.verdict import broken_text, cost_text, made_text, next_step, rise_text, verdict
from tests.support.sample_pictures import pictures_content
from tests.support.sample_reports import (
    broken_content,
    estimated_content,
    hostile,
    measured_content,
    quality,
    report_of,
    text,
)

ORIN = "SmolLM2-135M-Instruct fits into 786.6 MiB of memory on jetson-orin"
CPU = "SmolLM2-135M-Instruct fits into 35.1 ms per token and 572.2 MiB of memory on cpu"


def stopped() -> dict:
    """The budget lies beyond the quality limit."""
    content = measured_content() | {"status": "missed"}
    stop = {
        "widths": content["dense"]["widths"],
        "performance": content["fitted"]["performance"],
        "status": "met",
        "rise_percent": 88.0,
        "tried": 2,
    }
    return content | {"quality_stop": stop}


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (estimated_content(), f"Yes, by estimate: {ORIN}; it was not yet tried on the device."),
        (measured_content(), f"Yes, measured: {CPU}."),
        (
            estimated_content() | {"search": estimated_content()["search"] | {"ending": "dense"}},
            f"Yes, by estimate: {ORIN} as it is; it was not yet tried on the device.",
        ),
        (estimated_content() | {"rests_on": "built"}, f"Yes, by the built engine's figures: {ORIN}; it was not yet"),
        (
            measured_content() | {"status": "missed"},
            f"No, measured: {CPU.replace('fits', 'does not fit')}; the best that was found is kept.",
        ),
        (
            measured_content() | {"status": "noisy"},
            f"Not clear: whether {CPU} lies within the noise of the measurement.",
        ),
        (
            measured_content() | {"quality_status": "noisy"},
            f"Not clear: {CPU}, measured, but the text is too short to judge the quality limit of 30%.",
        ),
        (
            measured_content() | {"quality_status": "missed"},
            f"No: {CPU}, measured, but loses more quality than the limit of 30%.",
        ),
        (
            stopped(),
            f"No, measured: {CPU.replace('fits', 'does not fit')} within the quality limit of 30%; the smallest",
        ),
        (
            broken_content(),
            "No: SmolLM2-135M-Instruct is broken: its answers are of no use, and it does not fit into 534.1 MiB of "
            "memory and 2.50 ms per token on jetson-orin, by estimate; it was not yet tried on the device.",
        ),
        (
            broken_content() | {"status": "met"},
            "No: SmolLM2-135M-Instruct is broken: its answers are of no use, though it",
        ),
        (estimated_content() | {"budget": []}, "Yes, by estimate: SmolLM2-135M-Instruct fits into what was asked on"),
    ],
)
def test_whether_it_fits_and_how_that_is_known(content, said):
    assert verdict(report_of(content)).startswith(said)


def test_what_is_out_of_reach_says_what_the_smallest_size_needs():
    content = broken_content()
    content["quality"] = measured_content()["quality"]
    report = report_of(content)
    assert "not even at its smallest size; it was not yet tried on the device." in verdict(report)
    assert "The smallest size needs 539.9 MiB of memory, estimated." in next_step(report).title


def test_what_it_costs_in_answers():
    assert cost_text(report_of(measured_content())) == (
        "Its answers are noticeably worse: perplexity, which says how badly a model predicts text, rises by 24.6 %, "
        "measured on the worst of 2 held-out texts (+21.9 % to +27.3 %); the likeliest next token is the dense model's "
        "at 67.4 % (65.4 to 68.7 %) of places."
    )
    assert "measured on text that the dense model wrote itself" in cost_text(report_of(estimated_content()))
    assert "are of no use: perplexity, which says how badly a model predicts text, is 42 times the dense" in cost_text(
        report_of(broken_content())
    )
    pictures = cost_text(report_of(pictures_content()))
    assert "Its pictures are noticeably worse" in pictures
    assert "measured on the worst of 2 held-out sets of pictures (" in pictures
    assert "the likeliest next code is" in pictures


@pytest.mark.parametrize(
    ("documents", "rise", "said"),
    [
        (1, 2.0, "(no interval: one document)"),
        (1, 0.0, "Nothing: it is the same model"),
        (12, 0.0, "Nothing: it is the same model"),
        (12, 2.0, "(no interval: all 12 documents rise alike)"),
    ],
)
def test_a_missing_interval_has_its_true_reason(documents, rise, said):
    content = measured_content()
    content["quality"] = quality([text("a.txt", 10.0, rise, 0.0) | {"documents": documents}], "an answer")
    assert said in cost_text(report_of(content))


@pytest.mark.parametrize(
    ("percent", "words"),
    [
        (24.6, "rises by 24.6 %"),
        (-1.2, "falls by 1.2 %"),
        (0.0, "rises by 0.0 %"),
        (120.0, "is 2.2 times the dense model's"),
        (4127.0, "is 42 times the dense model's"),
        (float("inf"), "is more than 100 times the dense model's"),
        (float("nan"), "is not a number"),
    ],
)
def test_no_rise_is_a_percentage_beyond_sense(percent, words):
    assert rise_text(percent) == words


def test_a_broken_model_is_called_so():
    assert broken_text(report_of(broken_content())) == (
        "Broken: perplexity is 42 times the dense model's. Do not deploy this model."
    )


def test_how_it_was_made_smaller():
    assert made_text(report_of(measured_content())) == "9.1 % of all weights removed"
    content = measured_content()
    content["fitted"] |= {"formats": {"int8": 42, "float": 3}, "parameters": content["dense"]["parameters"]}
    assert made_text(report_of(content)) == "nothing removed, weights in int8"


@pytest.mark.parametrize(
    ("content", "title", "command"),
    [
        (estimated_content(), "Copy the bundle to the NVIDIA", "scp -r smollm2-orin"),
        (measured_content(), "Try it on this machine", "edgeprune run smollm2-orin"),
        (
            measured_content() | {"status": "noisy"},
            "Measure again while nothing else",
            "edgeprune fit demo --device cpu",
        ),
        (measured_content() | {"quality_status": "noisy"}, "Judge it on more of your own data", "edgeprune fit demo"),
        (broken_content(), "Do not deploy it. ", "edgeprune frontier demo --device jetson-orin"),
        (
            measured_content() | {"status": "missed"},
            "Do not deploy it. See what",
            "edgeprune frontier demo --device cpu",
        ),
        (measured_content() | {"deploy": []}, "Nothing is left to do", ""),
    ],
)
def test_the_next_step(content, title, command):
    step = next_step(report_of(content))
    assert step.title.startswith(title)
    assert step.command.startswith(command)


def test_a_command_of_no_model_is_given_again():
    report = report_of(hostile(broken_content(), "it's"))
    assert next_step(report).command == "it's --force"
