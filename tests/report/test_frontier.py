"""The document of a ladder: nothing but the figures of its reports."""

from __future__ import annotations

import json
from math import inf, nan

import jsonschema
import pytest

from edgeprune.report.frontier import Frontier, frontier_of
from tests.support.sample_ladders import estimated_ladder, ladder, measured_ladder
from tests.support.sample_reports import estimated_content, measured_content


def test_it_holds_the_reports_figures():
    reports = ladder(measured_content, texts=("a.txt", "b.txt"))
    frontier = frontier_of(reports)
    for rung, report in zip(frontier.rungs, reports, strict=True):
        performance = report.fitted.performance
        assert (rung.memory, rung.prefill, rung.decode) == (
            performance.memory_total,
            performance.prefill,
            performance.decode,
        )
        assert (rung.ratio, rung.texts, rung.grade) == (report.ratio, report.quality.texts, report.quality.grade)
        assert (rung.rise_percent, rung.sample) == (report.quality.rise_percent, report.quality.fitted_sample)
        assert rung.tokens_per_second.value == pytest.approx(1000 / rung.decode.value)
        assert rung.asked == f"decode {90 - 10 * rung.index}%"
        assert rung.decode_ratio == performance.decode_ratio  # interleaved
        assert rung.prefill_ratio.value == pytest.approx(performance.prefill.value / frontier.dense.prefill.value)
        assert rung.prefill_ratio.source == "measured"
    assert frontier.dense.decode == reports[0].dense.performance.decode
    assert [rung.index for rung in frontier.rungs] == list(range(6))
    assert frontier.warnings == ["the same for all", *(f"of rung {index}" for index in range(6))]


def test_it_reads_back_equal_and_follows_its_schema():
    frontier = measured_ladder(rises=(1.0, inf, nan))
    text = frontier.model_dump_json()
    assert Frontier.model_validate_json(text).model_dump_json() == text
    jsonschema.validate(json.loads(measured_ladder().model_dump_json()), Frontier.model_json_schema())


def test_the_worst_text_counts_even_where_it_is_no_number():
    frontier = measured_ladder(rises=(3.0, nan), texts=("a.txt", "b.txt"))
    assert frontier.rungs[0].rise_percent == 3.0
    assert [rung.grade for rung in frontier.rungs] == ["intact", "broken"]
    assert frontier.rungs[1].texts[0].rise_percent != frontier.rungs[1].rise_percent  # both are not a number


def test_a_ratio_of_two_sources_is_none():
    reports = ladder(estimated_content)
    performance = reports[0].fitted.performance
    mixed = performance.model_copy(update={"decode": performance.decode.model_copy(update={"source": "measured"})})
    reports[0] = reports[0].model_copy(update={"fitted": reports[0].fitted.model_copy(update={"performance": mixed})})
    frontier = frontier_of(reports)
    assert frontier.rungs[0].decode_ratio is None
    assert frontier.rungs[1].decode_ratio.value == pytest.approx(0.8)
    assert frontier.sources("decode") == ["estimated", "measured"]
    assert frontier.sources("prefill") == ["estimated"]


def test_where_quality_ends():
    frontier = estimated_ladder()
    assert [rung.grade for rung in frontier.rungs] == ["intact", "intact", "degraded", "degraded", "broken", "broken"]
    assert frontier.fastest(("intact",)).index == 1
    assert frontier.fastest(("intact", "degraded")).index == 3
    assert estimated_ladder(rises=(50.0,)).fastest(("intact",)) is None
    # 4.6 % with an interval of 4.1 to 5.1 %
    assert [len(rung.grades) for rung in frontier.rungs] == [1, 2, 1, 1, 1, 1]
    assert frontier.rungs[1].grades == ("intact", "degraded")
