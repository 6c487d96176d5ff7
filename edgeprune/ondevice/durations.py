"""The durations of measurements and waits, in one value. Python 3.10, standard library only.

The environment variable EDGEPRUNE_TIMING overrides single durations as a JSON object, {"measure_seconds": 0.3}, here
and in every process that is started from here. It is for tests and for debugging: a shorter measurement is noisier
and has a wider interval. This file does not know what is measured.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass

from edgeprune.errors import InputError

VARIABLE = "EDGEPRUNE_TIMING"


@dataclass(frozen=True)
class Timing:
    """The durations in seconds, but for block_ms. Of limits that only a failure reaches, those of checks are here."""

    measure_seconds: float = 40.0  # of one model, or of two in turn, prefill and decode together, at most
    survey_seconds: float = 3.0  # of each of many models in turn, prefill and decode together, at most
    cross_check_seconds: float = 10.0  # of the fitted and the dense model on the workstation, at most
    probe_seconds: float = 0.4  # of each of five kinds of work, of which the duration of a run is estimated
    warm_up_seconds: float = 0.2  # of each model before it is timed
    block_ms: float = 150.0  # of one model before another one's turn
    alive_seconds: float = 15.0  # between two signs of life, of the workstation and of the device
    silence_seconds: float = 90.0  # without a sign of life, after which either side gives the other up
    greeting_seconds: float = 150.0  # until a device's first word, its login included
    answer_seconds: float = 600.0  # of an answer that takes no work, whatever signs of life there are
    grace_seconds: float = 60.0  # that a task may take longer than its own limit, which the device keeps
    leave_seconds: float = 10.0  # in which a process that is to end may end by itself
    check_seconds: float = 120.0  # of each check of `doctor --deep`, at most
    checkup_seconds: float = 600.0  # of all of them together, after which no further one begins
    fresh_seconds: float = 60.0  # after a file or folder was made on the device, in which no other run removes it


def timing() -> Timing:
    """Returns the durations in force. Raises InputError where the environment's are malformed."""
    try:
        return Timing(**{name: float(value) for name, value in json.loads(os.environ.get(VARIABLE, "{}")).items()})
    except (ValueError, TypeError, AttributeError):
        raise InputError(
            f"{VARIABLE} is malformed: {os.environ[VARIABLE]!r}", "Leave it out: it is for tests alone."
        ) from None
