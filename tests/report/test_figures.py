"""Numbers, intervals and statuses as a person reads them."""

from __future__ import annotations

import pytest

from edgeprune.report.figures import figure_text, number_text, perplexity_text
from tests.support.sample_reports import measured


def test_a_perplexity_beyond_floating_point_is_a_dash():
    assert [perplexity_text(value) for value in (12.344, 2.7e6, None)] == ["12.34", "2.7e+06", "–"]


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
