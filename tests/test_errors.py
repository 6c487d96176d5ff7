"""The tree of errors: what catches what, and what each of them tells."""

from __future__ import annotations

import pytest

from edgeprune.errors import (
    BudgetError,
    EdgepruneError,
    EngineError,
    InputError,
    NumericalError,
    Unreachable,
    WrongEngine,
)


@pytest.mark.parametrize(
    ("kind", "caught_as", "code"),
    [
        (InputError, EdgepruneError, 2),
        (NumericalError, InputError, 2),
        (BudgetError, EdgepruneError, 3),
        (EngineError, EdgepruneError, 4),
        (WrongEngine, EngineError, 4),
        (Unreachable, EngineError, 4),
    ],
)
def test_an_error_is_caught_as_its_kind_and_tells_what_to_do(kind, caught_as, code):
    with pytest.raises(caught_as) as caught:
        raise kind("the graph is broken", "Write it again.")
    assert str(caught.value) == caught.value.message == "the graph is broken"
    assert (caught.value.remedy, caught.value.exit_code) == ("Write it again.", code)


def test_bad_input_an_unreachable_budget_and_a_failed_engine_are_apart():
    kinds = (InputError, BudgetError, EngineError)
    assert not [(one, other) for one in kinds for other in kinds if one is not other and issubclass(one, other)]
    assert not issubclass(WrongEngine, Unreachable)
    assert not issubclass(Unreachable, WrongEngine)
