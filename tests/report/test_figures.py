"""Numbers, intervals and statuses as a person reads them."""

from __future__ import annotations

import math

import pytest

from edgeprune.report.figures import (
    alone_text,
    deciding_text,
    difference_text,
    figure_text,
    headroom_text,
    interval_text,
    levers_text,
    number_text,
    perplexity_text,
    recovery_text,
    rivals_text,
    room_text,
)
from edgeprune.report.images import Interval
from edgeprune.report.schema import Lever, Levers, Recovery, Rival
from tests.support.sample_reports import estimated_content, measured, measured_content, report_of


def test_a_perplexity_beyond_floating_point_is_a_dash():
    assert [perplexity_text(value) for value in (12.344, 2.7e6, None)] == ["12.34", "2.7e+06", "–"]


@pytest.mark.parametrize(
    ("value", "unit", "text"),
    [
        (3 * 2**30, "bytes", "3.00 GiB"),
        (6.149, "ms", "6.15 ms"),
        (4.96, "%", "+5.0 %"),
        (-3.0, "%", "-3.0 %"),
        (4127.4, "%", "42-fold"),
        (99.94, "%", "+99.9 %"),
        (120.0, "%", "2.2-fold"),
        (1e5, "%", "more than 100-fold"),
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


@pytest.mark.parametrize(
    ("bounds", "text"),
    [
        ((0.01234, 0.0101, 0.015), "0.0123 (0.0101 to 0.0150)"),
        ((-0.00007, -0.00026, 0.00011), "-0.00007 (-0.00026 to 0.00011)"),
        ((1234.5, 1200.0, 1270.0), "1234 (1200 to 1270)"),
        ((1.0, 1.0, 1.0), "1.000 (1.000 to 1.000)"),
        ((0.5, 0.5, 0.5 + 1e-30), "0.500 (0.500 to 0.500)"),
    ],
)
def test_an_interval_to_two_digits_of_its_width(bounds, text):
    assert interval_text(Interval(value=bounds[0], low=bounds[1], high=bounds[2])) == text


@pytest.mark.parametrize(
    ("low", "high", "said"), [(0.1, 0.2, "farther off"), (-0.2, -0.1, "nearer"), (-0.1, 0.1, "no difference")]
)
def test_what_a_paired_difference_says(low, high, said):
    assert said in difference_text(Interval(value=(low + high) / 2, low=low, high=high))


@pytest.mark.parametrize(("value", "text"), [(0.43215, "0.432 s"), (12.34, "12.3 s"), (1234.5, "1234 s")])
def test_seconds(value, text):
    assert number_text(value, "s") == text


@pytest.mark.parametrize(
    ("value", "text"), [(0.9, "10.0 % left"), (1.0, "0.0 % left"), (1.4, "40.0 % over"), (137.6, "138 x the limit")]
)
def test_what_is_left_of_a_limit(value, text):
    content = estimated_content()
    row = content["budget"][0]
    content["budget"][0] = row | {"fitted": row["fitted"].model_copy(update={"value": value * row["limit"]})}
    assert headroom_text(report_of(content).budget[0]) == text


@pytest.mark.parametrize("value", [float("inf"), float("nan"), 1e9])
def test_what_is_far_beyond_a_limit_is_said_in_words(value):
    content = measured_content()
    row = content["budget"][2]
    content["budget"][2] = row | {"fitted": row["fitted"].model_copy(update={"value": value})}
    assert headroom_text(report_of(content).budget[2]) == "far over"


def test_no_room_names_the_limit_that_leaves_none():
    noticed = report_of(estimated_content()).experience["dense"]
    assert room_text(noticed.sequences, noticed) == "no room within the memory budget"
    room = noticed.room.model_copy(update={"reason": "what the system leaves on jetson-orin"})
    noticed = noticed.model_copy(update={"room": room})
    assert room_text(noticed.sequences, noticed) == "no room within what the system leaves on jetson-orin"


def test_levers_are_named_by_their_formats():
    names = ("pruning", "q3_k", "int4-offset")
    levers = Levers(
        parts=[Lever(name=name, saved_bytes=2**20, nats=0.01) for name in names],
        pruning_alone=None,
        precision_alone=None,
    )
    of_each = ", ".join(f"{name} 1.0 MiB (+1 % perplexity)" for name in names)
    assert levers_text(levers) == f"{of_each}; memory saved as estimated, perplexity as predicted"


def test_what_one_lever_alone_would_cost():
    levers = Levers(parts=[], pruning_alone=2.4, precision_alone=0.03)
    text = "Pruning alone would raise perplexity 11-fold, weight formats alone would raise perplexity by 3.0 %"
    assert alone_text(levers) == f"{text}, as predicted"


@pytest.mark.parametrize(
    ("gain", "bought"),
    [
        (0.05, "lower perplexity by 4.9 %"),
        (math.log(12), "divide perplexity by 12"),
        (9.0, "divide perplexity by more than 100"),
    ],
)
def test_what_more_of_a_limit_would_buy(gain, bought):
    rows = [row.model_copy(update={"gain": gain}) for row in report_of(estimated_content()).budget[:1]]
    assert f"5 % more of {rows[0].name} would {bought}" in deciding_text(rows)


def recovery(taken: int, minutes: float = 12.4) -> Recovery:
    before, after = (
        {"value": value, "unit": "nats", "source": "measured", "device": "text"}
        for value in (0.6104, 0.4521 if taken else 0.6104)
    )
    counts = {"steps": 240, "rows": 480, "held_out": 16, "row_tokens": 256, "memory_bytes": 2e9}
    return Recovery(taken=taken, before=before, after=after, minutes=minutes, **counts)


@pytest.mark.parametrize(
    ("before", "words"),
    [
        ((5.0, 6.0, 7.0), "the ranking of 3 candidates within the budget stayed as it was"),
        ((5.0, 7.0, 6.0), "the best of 3 candidates within the budget stayed the best, others changed places"),
        ((6.0, 5.0, 7.0), "another of 3 candidates within the budget became the best"),
    ],
)
def test_a_ranking_says_what_the_training_changed(before, words):
    rivals = [Rival(name=f"c{i}", before=loss, after=loss - 3 if i == 0 else loss) for i, loss in enumerate(before)]
    report = report_of(estimated_content())
    trained = recovery(240).model_copy(update={"rivals": sorted(rivals, key=lambda rival: rival.name)})
    text = rivals_text(report.model_copy(update={"recovery": trained}))
    assert text.startswith(f"{words} (worst loss without and with the training: c0: {before[0]:+.1f} to ")
    assert text.endswith("c2: +7.0 to +7.0 %)") or text.endswith("c2: +6.0 to +6.0 %)")
    assert rivals_text(report) == ""


def test_a_recovery_says_what_it_won_and_what_judged_it():
    assert recovery_text(recovery(240)) == (
        "divergence from the dense model 0.610 to 0.452 nats a token, measured on 16 unseen rows of its text; "
        "240 steps in 12 minutes"
    )
    words = recovery_text(recovery(0, 0.5))
    assert words.startswith("no step bettered the divergence of 0.610 nats a token: the weights stayed as they were")
    assert words.endswith("240 steps in 30 s")
