"""Checks that stand for themselves: whatever one raises or however long it takes, the others are made."""

from __future__ import annotations

import time
from typing import Any

import pytest

from edgeprune.engine.checks import Checks, NotApplicable
from edgeprune.errors import EngineError, Unreachable
from edgeprune.ondevice.worker import quiet
from tests.support.durations import durations


class Recording:
    """A double of a session that keeps the limits of its tasks."""

    def __init__(self) -> None:
        self.limits: list[float] = []

    def run(self, request: dict[str, Any], timeout_seconds: float, on_progress: Any) -> dict[str, Any]:
        self.limits.append(timeout_seconds)
        return {}


def raising(error: Exception):
    def look(_: Any) -> str:
        raise error

    return look


def outcomes(checks: Checks) -> list[tuple[str, str, str]]:
    return [(check.state, check.detail, check.remedy) for check in checks.outcomes]


def test_an_error_a_bug_and_what_does_not_apply_leave_the_next_one():
    checks = Checks(Recording(), quiet)
    assert not checks.run("one", raising(EngineError("it is broken", "Mend it.")))
    assert not checks.run("two", raising(NotApplicable("there is none")))
    assert not checks.run("three", raising(ZeroDivisionError("a bug")))
    assert checks.run("four", lambda _: "as it should be")
    assert outcomes(checks) == [
        ("failed", "it is broken", "Mend it."),
        ("not applicable", "there is none", ""),
        ("failed", "ZeroDivisionError: a bug", "This is a bug: please report it."),
        ("passed", "as it should be", ""),
    ]


def test_a_device_that_is_away_is_tried_once_more_and_then_no_longer():
    checks = Checks(Recording(), quiet)
    away = raising(Unreachable("it went away", "Find it."))
    checks.run("one", away)
    checks.run("two", lambda _: "it is back")
    checks.run("three", away)
    checks.run("four", away)
    checks.run("five", lambda _: "never asked")
    assert [state for state, _, _ in outcomes(checks)] == ["failed", "passed", "failed", "failed", "not applicable"]
    assert "not reached" in checks.outcomes[-1].detail


def test_a_task_ends_with_its_own_limit_or_that_of_a_check(monkeypatch: pytest.MonkeyPatch):
    for name, value in durations(check_seconds=5.0, checkup_seconds=60.0).items():
        monkeypatch.setenv(name, value)
    session = Recording()
    checks = Checks(session, quiet)
    for limit in (3600.0, 2.0):
        checks.run("task", lambda limited, limit=limit: str(limited.run({}, limit, quiet)))
    assert session.limits == [5.0, 2.0]


def test_no_check_begins_after_the_whole_time(monkeypatch: pytest.MonkeyPatch):
    for name, value in durations(checkup_seconds=0.05).items():
        monkeypatch.setenv(name, value)
    checks = Checks(Recording(), quiet)
    assert checks.run("one", lambda _: time.sleep(0.1) or "slow")
    assert not checks.run("two", lambda _: "never asked")
    assert checks.outcomes[1].state == "failed"
    assert "not begun" in checks.outcomes[1].detail
