"""What a user writes is understood exactly or refused; a verdict counts measured figures by their interval."""

from __future__ import annotations

import re
from dataclasses import replace
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgeprune.errors import InputError
from edgeprune.ondevice.budget import (
    AbsoluteBudget,
    Budget,
    Limit,
    describe,
    format_bytes,
    format_ms,
    judge,
    judge_quality,
    memory_total,
    parse_budget,
    parse_latency,
    parse_limit,
    parse_percent,
    parse_size,
)
from edgeprune.ondevice.figures import Built, Estimate, Figure, Measured, Memory, Performance


def measured(value: float, spread: float = 0.0, unit: str = "ms") -> Measured:
    return Measured(value, unit, "test", value - spread, value + spread)


def performance(memory: float = 500.0, decode: Figure | None = None, ratio: Measured | None = None) -> Performance:
    """Memory of `memory` bytes, 100 of them the runtime's; prefill 40 ms estimated; decode 10 ms measured."""

    def part(value: float) -> Built:
        return Built(value, "bytes", "test", "compiler")

    parts = Memory(part(memory - 100), part(0), part(0), part(0), Estimate(100, "bytes", "test", "assumed"))
    return Performance(parts, Estimate(40.0, "ms", "test", "formula"), decode or measured(10.0), decode_ratio=ratio)


SIZES = {"B": 1, "kB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}


@given(st.integers(1, 2**60))
def test_a_number_of_bytes_round_trips(value: int) -> None:
    assert parse_size(f"{value}B") == value


@given(st.decimals("0.01", "99999", places=2), st.sampled_from(sorted(SIZES)), st.sampled_from(["", " "]))
def test_sizes_are_understood_exactly(value: object, unit: str, space: str) -> None:
    expected = Fraction(str(value)) * SIZES[unit]
    if round(expected) > 0:
        assert parse_size(f"{value}{space}{unit}") == round(expected)


def test_gib_and_gb_are_apart() -> None:
    assert parse_size("1.5GiB") - parse_size("1.5GB") == 1.5 * (2**30 - 10**9)
    assert parse_size("0.5 GB") == 500_000_000
    assert parse_size(".5gib") == 2**29


@given(st.floats(1e-3, 1e6), st.sampled_from([("ms", 1.0), ("s", 1000.0), ("us", 1e-3)]))
def test_latencies_round_trip(value: float, unit: tuple[str, float]) -> None:
    assert parse_latency(f"{value!r}{unit[0]}") == pytest.approx(value * unit[1], rel=1e-15)


@given(st.integers(1, 10000))
def test_percentages_round_trip(hundredths: int) -> None:
    text = f"{hundredths / 100}%"
    assert parse_percent(text) == pytest.approx(hundredths / 1e4, rel=1e-12)
    assert parse_limit("decode", f" {text} ") == Limit(parse_percent(text), relative=True)


@pytest.mark.parametrize(
    ("constraint", "text", "reason"),
    [
        ("memory", "1.5", "understood 1.5, but it has no unit"),
        ("memory", "12parsecs", "understood 12 parsecs, but 'parsecs' is not a unit of size"),
        ("memory", "10ms", "'ms' is not a unit of size"),
        ("memory", "1,5GiB", "not a number with a unit"),
        ("memory", "GiB", "not a number"),
        ("memory", "", "not a number"),
        ("memory", "nan", "not a number"),
        ("memory", "infGB", "not a number"),
        ("memory", "-1GiB", "is negative"),
        ("memory", "0GiB", "is zero"),
        ("memory", "0.2B", "less than a byte"),
        ("memory", "1e999GB", "is too large"),
        ("memory", "1e-999999999GB", "is zero"),
        ("memory", "101%", "more than 100 %"),
        ("memory", "0%", "is zero"),
        ("memory", "%", "not a number"),
        ("decode", "10", "it has no unit"),
        ("decode", "10 minutes", "'minutes' is not a unit of latency"),
        ("decode", "10MB", "'MB' is not a unit of latency"),
        ("decode", "nan%", "not a number"),
        ("prefill", "-5ms", "is negative"),
        ("prefill", "1e308s", "is too large"),
    ],
)
def test_a_malformed_budget_says_what_was_understood_and_a_form_that_works(
    constraint: str, text: str, reason: str
) -> None:
    with pytest.raises(InputError, match=re.escape(reason)) as caught:
        parse_budget(**{"memory": None, "prefill": None, "decode": None, constraint: text})
    assert caught.value.message.startswith(f"{constraint} budget: ")
    assert repr(text) in caught.value.message
    assert "%" in caught.value.remedy


@given(st.one_of(st.text(max_size=12), st.from_regex(r"[-+]?[0-9.]{0,6}(e[-+]?[0-9]{1,9})?[ a-zA-Z%]{0,4}")))
def test_no_text_gets_past_as_a_senseless_limit(text: str) -> None:
    for constraint in ("memory", "decode"):
        try:
            limit = parse_limit(constraint, text)
        except InputError:
            continue
        assert 0 < limit.value < float("inf")
        assert limit.value <= 1 or not limit.relative


@pytest.mark.parametrize(
    ("given_as", "percent"), [("10%", 10.0), ("2.5", 2.5), (10.0, 10.0), (0, 0.0), (None, 30.0), ("off", None)]
)
def test_the_quality_limit_is_a_percentage(given_as: str | float | None, percent: float | None) -> None:
    assert parse_budget(None, None, None, given_as).max_quality_loss == percent


@pytest.mark.parametrize("value", [-1.0, float("nan"), float("inf"), "much", "-5%"])
def test_senseless_quality_limits_are_refused(value: str | float) -> None:
    with pytest.raises(InputError):
        parse_budget(None, None, None, value)


def test_what_was_understood_is_said() -> None:
    budget = parse_budget("1.5GiB", None, "70%")
    assert describe(budget) == "memory 1610612736 bytes (1.50 GiB), decode 70% of the dense model"


def test_a_relative_memory_limit_leaves_the_runtime_alone() -> None:
    absolute = parse_budget("50%", "50%", "5ms").absolute(performance())
    assert absolute == AbsoluteBudget(memory=0.5 * 400 + 100, prefill=20.0, decode=5.0)
    assert parse_budget(None, None, None).absolute(performance()).limits == {}


@pytest.mark.parametrize(
    ("rises", "status"),
    [
        ([(2.0, 4.9), (1.0, 5.0)], "met"),
        ([(2.0, 3.0), (4.0, 6.0)], "noisy"),
        ([(4.0, 6.0), (5.1, 7.0)], "missed"),
        ([(float("nan"), float("nan"))], "missed"),
        ([(float("inf"), float("inf"))], "missed"),
    ],
)
def test_quality_counts_by_the_interval_on_every_text(rises, status):
    assert judge_quality(Budget(max_quality_loss=5.0), rises) == status
    assert judge_quality(Budget(), rises) == "met"


@pytest.mark.parametrize(("decode", "status"), [(6.5, "met"), (6.6, "noisy"), (7.4, "noisy"), (7.6, "missed")])
@pytest.mark.parametrize("asked", ["70%", "7ms"])
def test_a_measured_figure_counts_by_its_interval(asked: str, decode: float, status: str) -> None:
    verdict = judge(parse_budget(None, None, asked), performance(), performance(decode=measured(decode, 0.5)))
    (check,) = verdict.checks
    assert (check.status, check.limit, check.asked) == (status, pytest.approx(7.0), asked)
    assert verdict.met == (status == "met")
    assert verdict.source == "measured"


@given(st.floats(0.1, 100), st.floats(0, 10), st.floats(0.1, 100))
def test_the_interval_decides_as_its_three_cases_say(value: float, spread: float, limit: float) -> None:
    figure = measured(value, spread)
    (check,) = judge(parse_budget(None, None, f"{limit!r}ms"), performance(), performance(decode=figure)).checks
    assert (check.status == "met") == (figure.high <= check.limit)
    assert (check.status == "missed") == (figure.low > check.limit)


@pytest.mark.parametrize(("ratio", "status"), [(0.66, "met"), (0.70, "noisy"), (0.74, "missed")])
def test_a_relative_latency_counts_by_the_ratio_of_the_same_run(ratio: float, status: str) -> None:
    """The machine slowed down meanwhile: by itself the figure would be far too slow."""
    slow = performance(decode=measured(50.0, 20.0), ratio=measured(ratio, 0.03, "1"))
    (check,) = judge(parse_budget(None, None, "70%"), performance(), slow).checks
    assert (check.status, check.ratio) == (status, slow.decode_ratio)


def test_an_absolute_latency_is_the_dense_ones_times_the_ratio() -> None:
    dense = performance(decode=measured(10.0, 0.1))
    slow = performance(decode=measured(50.0, 20.0), ratio=measured(0.6, 0.01, "1"))
    (check,) = judge(parse_budget(None, None, "7ms"), dense, slow).checks
    assert check.status == "met"
    assert (check.figure.value, check.figure.low, check.figure.high) == pytest.approx((6.0, 9.9 * 0.59, 10.1 * 0.61))
    (check,) = judge(parse_budget(None, None, "6ms"), dense, slow).checks
    assert check.status == "noisy"


def test_the_dense_model_is_all_of_itself() -> None:
    dense = performance(decode=measured(10.0, 2.0))
    assert judge(parse_budget("100%", "100%", "100%"), dense, dense).met
    assert judge(parse_budget(None, None, "99%"), dense, dense).status == "missed"


def test_the_worst_constraint_decides() -> None:
    budget, dense = parse_budget("90%", None, "70%"), performance()
    assert judge(budget, dense, performance(400, measured(6.0))).status == "met"
    assert judge(budget, dense, performance(400, measured(7.0, 0.1))).status == "noisy"
    assert judge(budget, dense, performance(490, measured(7.0, 0.1))).status == "missed"


def test_memory_is_labelled_by_its_weakest_part() -> None:
    verdict = judge(parse_budget("1KiB", None, "20ms"), performance(), performance())
    assert [check.figure.source for check in verdict.checks] == ["estimated", "measured"]
    assert verdict.checks[0].figure.value == 500
    assert verdict.source == "estimated"
    parts = {name: measured(10.0, 1.0, "bytes") for name in performance().memory.parts}
    total = memory_total(replace(performance(), memory=Memory(**parts)))
    assert (total.source, total.value, total.low, total.high) == ("measured", 50.0, 45.0, 55.0)


def test_no_constraint_is_met_and_rests_on_nothing_measured() -> None:
    verdict = judge(parse_budget(None, None, None), performance(), performance())
    assert (verdict.met, verdict.source) == (True, "estimated")


@given(st.integers(0, 2**50))
def test_bytes_are_written_in_binary_units_to_the_last_digit_shown(value: int) -> None:
    number, unit = format_bytes(value).split()
    factor = SIZES[unit]
    digits = {"GiB": 2, "MiB": 1, "KiB": 1, "B": 0}[unit]
    assert abs(float(number) - value / factor) <= 0.51 * 10**-digits
    assert float(number) < 1024 or unit == "GiB" or float(number) == 1024.0


def test_figures_are_written_short() -> None:
    assert [format_bytes(x) for x in (1.5 * 2**30, 270 * 2**20, 1536, 12)] == [
        "1.50 GiB",
        "270.0 MiB",
        "1.5 KiB",
        "12 B",
    ]
    assert [format_ms(x) for x in (6.154, 9.999, 52.63, 99.96, 1384.2)] == [
        "6.15 ms",
        "10.0 ms",
        "52.6 ms",
        "100 ms",
        "1384 ms",
    ]
