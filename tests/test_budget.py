import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgeprune.budget import absolute_limits, check, format_bytes, overall, parse_budget, parse_milliseconds, parse_size
from edgeprune.engine.base import Built, Estimate, Measured, Memory, Performance
from edgeprune.errors import InputError


def performance(memory: float = 500.0, decode: float = 10.0, spread: float = 0.0) -> Performance:
    def part(value: float) -> Built:
        return Built(value, "bytes", "test", "test")

    parts = Memory(part(memory - 100), part(0), part(0), part(0), Estimate(100, "bytes", "test", "test"))
    return Performance(
        parts, Estimate(40.0, "ms", "test", "test"), Measured(decode, "ms", "test", decode - spread, decode + spread)
    )


@pytest.mark.parametrize(
    ("text", "value"),
    [("1.5GiB", 1.5 * 2**30), ("1.5GB", 1.5e9), ("900 MB", 9e8), ("64KiB", 65536), (".5GiB", 2**29), ("1e3MB", 1e9)],
)
def test_sizes_are_understood_as_written(text, value):
    assert parse_size(text) == value


@given(st.floats(1e-3, 1e6), st.sampled_from(["ms", "s"]))
def test_latencies_round_trip(value, unit):
    assert parse_milliseconds(f"{value!r}{unit}") == pytest.approx(value * (1000 if unit == "s" else 1))


@pytest.mark.parametrize(
    "arguments",
    [
        ("1.5", None, None), ("GiB", None, None), ("-1GiB", None, None), ("0GiB", None, None), ("nan", None, None),
        ("12parsecs", None, None), ("101%", None, None), ("0%", None, None), ("%", None, None), ("1e999GB", None, None),
        (None, None, "10"), (None, None, "10 minutes"), (None, "-5ms", None), (None, None, "10MB"), ("10ms", None, None),
    ],
)  # fmt: skip
def test_malformed_budgets_are_refused_with_a_form_that_works(arguments):
    with pytest.raises(InputError) as caught:
        parse_budget(*arguments)
    assert "%" in caught.value.remedy


@given(st.text(max_size=12))
def test_no_text_crashes_the_parser(text):
    try:
        assert parse_size(text) > 0
    except InputError:
        pass


@pytest.mark.parametrize("value", [-1.0, float("nan"), float("inf")])
def test_senseless_quality_limits_are_refused(value):
    with pytest.raises(InputError):
        parse_budget(None, None, None, value)


def test_a_relative_memory_limit_leaves_the_runtime_alone():
    limits = absolute_limits(parse_budget("50%", "50%", "5ms"), performance())
    assert limits == {"memory": 0.5 * 400 + 100, "prefill": 20.0, "decode": 5.0}


@pytest.mark.parametrize(("decode", "status"), [(6.5, "met"), (6.8, "noisy"), (7.2, "noisy"), (7.6, "missed")])
def test_a_measured_figure_counts_by_its_interval(decode, status):
    budget = parse_budget(None, None, "70%")
    (result,) = check(budget, performance(), performance(decode=decode, spread=0.5))
    assert (result.status, result.limit) == (status, 7.0)


def test_the_worst_constraint_decides():
    budget = parse_budget("90%", None, "70%")
    assert overall(check(budget, performance(), performance(400, 6.0))) == "met"
    assert overall(check(budget, performance(), performance(400, 7.0, 0.1))) == "noisy"
    assert overall(check(budget, performance(), performance(490, 6.0))) == "missed"


def test_memory_is_labelled_by_its_weakest_part():
    (result,) = check(parse_budget("1KiB", None, None), performance(), performance())
    assert result.figure.source == "estimated"
    assert result.figure.value == 500


def test_bytes_are_written_in_binary_units():
    assert format_bytes(1.5 * 2**30) == "1.50 GiB"
    assert format_bytes(270 * 2**20) == "270.0 MiB"
