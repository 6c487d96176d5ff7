"""The durations in force: the usual ones, and those that the environment names."""

from __future__ import annotations

import json
from dataclasses import fields

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from edgeprune.errors import InputError
from edgeprune.ondevice.durations import VARIABLE, Timing, timing


def test_the_usual_ones_hold_where_nothing_is_named(monkeypatch):
    monkeypatch.delenv(VARIABLE, raising=False)
    assert timing() == Timing()


@settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.dictionaries(st.sampled_from([field.name for field in fields(Timing)]), st.floats(0, 1e6)))
def test_what_the_environment_names_is_changed_and_nothing_else(monkeypatch, changes):
    monkeypatch.setenv(VARIABLE, json.dumps(changes))
    assert timing().__dict__ == Timing().__dict__ | changes


@pytest.mark.parametrize("text", ["", "{", "[1]", "null", '{"no_duration": 1}', '{"block_ms": "a while"}'])
def test_what_is_malformed_is_refused(monkeypatch, text):
    monkeypatch.setenv(VARIABLE, text)
    with pytest.raises(InputError) as caught:
        timing()
    assert caught.value.message == f"EDGEPRUNE_TIMING is malformed: {text!r}"
    assert caught.value.remedy == "Leave it out: it is for tests alone."
