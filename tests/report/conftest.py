"""What the tests of all documents share."""

import pytest


@pytest.fixture(autouse=True)
def small_library(monkeypatch):
    """Without the 4 MB of plotly.js; one test brings it back."""
    monkeypatch.setattr("plotly.offline.get_plotlyjs", lambda: "/* plotly.js */")
