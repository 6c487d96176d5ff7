"""A list of checks, each of which stands for itself: it has a deadline, and its failure does not hide the others.

It does not know what is checked.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, Literal

from edgeprune.errors import EdgepruneError, Unreachable
from edgeprune.ondevice.durations import timing
from edgeprune.ondevice.measure import Session
from edgeprune.ondevice.worker import OnProgress

MOST_LOST = 2  # checks in a row that do not reach the device, after which no further one tries
State = Literal["passed", "failed", "not applicable"]


@dataclass(frozen=True)
class Check:
    """The outcome of one check. detail: what was found, why it failed, or why it does not apply; remedy: what to do."""

    name: str
    state: State
    detail: str
    remedy: str
    seconds: float

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


class NotApplicable(Exception):
    """A check that has no meaning on this device; the reason in words."""


@dataclass(frozen=True)
class _Limited:
    """A session whose tasks end after some seconds."""

    session: Session
    seconds: float

    def run(self, request: dict[str, Any], timeout_seconds: float, on_progress: OnProgress) -> dict[str, Any]:
        """Runs a task as the session does, with its own limit where that is shorter. Raises EngineError."""
        return self.session.run(request, min(timeout_seconds, self.seconds), on_progress)


class Checks:
    """The outcomes so far, in the order in which they were asked for."""

    def __init__(self, session: Session, on_progress: OnProgress) -> None:
        self._session, self._on_progress = session, on_progress
        self._begin = time.monotonic()
        self._lost = 0
        self._stopped = ""
        self.outcomes: list[Check] = []

    @property
    def seconds(self) -> float:
        """Returns the seconds since the first check began."""
        return time.monotonic() - self._begin

    def run(self, name: str, look: Callable[[Session], str]) -> bool:
        """Adds one check, and returns whether it passed.

        look: returns what it found, in words. It raises EdgepruneError where that is wrong, NotApplicable where there
        is nothing to look at.
        """
        self._on_progress(f"check {name}", len(self.outcomes), 0)
        begin = time.monotonic()
        state, detail, remedy = self._outcome(look)
        self.outcomes.append(Check(name, state, detail, remedy, round(time.monotonic() - begin, 2)))
        return state == "passed"

    def stop(self, reason: str) -> None:
        """Lets no further check run; they do not apply, for this reason."""
        self._stopped = reason

    def _outcome(self, look: Callable[[Session], str]) -> tuple[State, str, str]:
        """Returns the state of a check, its detail and its remedy."""
        # Where nothing can come of it, nothing is tried.
        left = timing().checkup_seconds - self.seconds
        if self._lost >= MOST_LOST:
            self.stop("the device is not reached any more")
        if self._stopped:
            return "not applicable", self._stopped, ""
        if left <= 0:
            passed = f"not begun: the checks before it took {self.seconds:.0f} s"
            return "failed", passed, "See which of them took long, and check again."
        # Whatever one check raises, the next one is made.
        lost, self._lost = self._lost, 0
        try:
            return "passed", look(_Limited(self._session, min(left, timing().check_seconds))), ""
        except NotApplicable as reason:
            self._lost = lost
            return "not applicable", str(reason), ""
        except Unreachable as error:
            self._lost = lost + 1
            return "failed", error.message, error.remedy
        except EdgepruneError as error:
            return "failed", error.message, error.remedy
        except Exception as error:
            return "failed", f"{type(error).__name__}: {error}", "This is a bug: please report it."
