"""Durations that tests shorten, for this process, those that it starts, and a device's."""

from __future__ import annotations

import json
import os

from edgeprune.ondevice.durations import VARIABLE


def durations(**seconds: float) -> dict[str, str]:
    """Returns the variable of the environment that puts these in force, beside those that already are."""
    return {VARIABLE: json.dumps(json.loads(os.environ.get(VARIABLE, "{}")) | seconds)}


def durations_there(**seconds: float) -> str:
    """Returns the line of shell that puts them in force for a login on a device."""
    return f"export {VARIABLE}='{durations(**seconds)[VARIABLE]}'"
