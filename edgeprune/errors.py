"""The errors of edgeprune, as one small tree. The exit code is an attribute of the class.

    EdgepruneError      1   the base, which is never raised itself
    ├── InputError      2   a bad argument, file, model, profile or sample
    │   ├── NumericalError  the model's weights or activations are not usable numbers
    │   └── BusyError       another process has what is needed, and may give it back
    ├── BudgetError     3   the budget, or budget and quality together, is out of reach
    └── EngineError     4   an engine or a device failed
        ├── WrongEngine     an engine that computes something else than its graph
        ├── Unreachable     the device went away, or never answered
        └── BadAnswer       the device answered with something that no device can mean

Every error names what is wrong and what to do about it. This file knows none of the places that raise them.
"""

from __future__ import annotations


class EdgepruneError(Exception):
    """An error that a user can act on: `message` names what is wrong, `remedy` what to do next."""

    exit_code = 1

    def __init__(self, message: str, remedy: str) -> None:
        super().__init__(message)
        self.message = message
        self.remedy = remedy


class InputError(EdgepruneError):
    """A bad argument, file, model, profile or sample; nothing was written."""

    exit_code = 2


class NumericalError(InputError):
    """Weights or activations that are not finite, or moments that cannot be solved."""


class BusyError(InputError):
    """A work folder that another process has: the same may succeed when that has ended."""


class BudgetError(EdgepruneError):
    """The budget cannot be reached on this device with this model."""

    exit_code = 3


class EngineError(EdgepruneError):
    """An engine could not be built or run, or the device failed."""

    exit_code = 4


class WrongEngine(EngineError):
    """An engine that computes something else than its graph. It is neither timed nor written into a bundle."""


class Unreachable(EngineError):
    """A place to run tasks that cannot be reached, or no longer: every other task would fail there as well."""


class BadAnswer(EngineError):
    """A message that is malformed, or a figure that cannot be: nothing else from its sender is believed either."""
