"""Figures and strict parts, as they stand in every document."""

from __future__ import annotations

import json
import math

import pytest
from pydantic import ValidationError

from edgeprune.ondevice.figures import Built, Estimate, Measured
from edgeprune.report.base import Figure
from edgeprune.report.schema import figure_of


def test_an_estimate_has_no_interval_and_a_measurement_no_basis():
    assert figure_of(Measured(2.0, "ms", "cpu", 1.5, 2.5)).model_dump(exclude_none=True) == {
        "value": 2.0,
        "unit": "ms",
        "source": "measured",
        "device": "cpu",
        "low": 1.5,
        "high": 2.5,
    }
    for kind, source in ((Built, "built"), (Estimate, "estimated")):
        assert figure_of(kind(2.0, "ms", "a2", "why")).model_dump(exclude_none=True) == {
            "value": 2.0,
            "unit": "ms",
            "source": source,
            "device": "a2",
            "basis": "why",
        }


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
def test_a_figure_beyond_floating_point_comes_back(value):
    figure = Figure(value=value, unit="%", source="measured", device="cpu")
    text = figure.model_dump_json()
    json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert str(Figure.model_validate_json(text).value) == str(value)


def test_a_part_of_a_document_is_frozen_and_knows_its_fields():
    figure = Figure(value=1.0, unit="ms", source="built", device="l4")
    with pytest.raises(ValidationError, match="frozen"):
        figure.value = 2.0
    with pytest.raises(ValidationError, match="speed"):
        Figure.model_validate(figure.model_dump() | {"speed": 3})
    with pytest.raises(ValidationError, match="source"):
        Figure.model_validate(figure.model_dump() | {"source": "guessed"})
