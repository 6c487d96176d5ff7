"""Figures and strict parts, as they stand in every document."""

from __future__ import annotations

from edgeprune.ondevice.figures import Built, Estimate, Measured
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
