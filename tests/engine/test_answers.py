"""The schema of what a device says: the true answers pass, and no lie becomes a figure."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest

from edgeprune.engine.answers import (
    Hello,
    Left,
    Missing,
    Ran,
    Refusal,
    Size,
    Step,
    ThisMachine,
    read_answer,
    read_message,
)
from edgeprune.errors import BadAnswer, EngineError
from edgeprune.ondevice.lines import document_of
from edgeprune.ondevice.measure import LocalSession
from edgeprune.ondevice.worker import quiet
from tests.support.lying_device import ESCAPES, TRUE, lie, line_of

ROUNDS = 60


@pytest.mark.parametrize("name", list(TRUE))
def test_a_true_answer_comes_through_as_it_is(name: str) -> None:
    request, answer = TRUE[name]
    assert read_answer(request, json.loads(json.dumps(answer)), "board") == answer


def numbers(value: Any) -> list[float]:
    if isinstance(value, dict):
        return [number for part in value.values() for number in numbers(part)]
    if isinstance(value, list):
        return [number for part in value for number in numbers(part)]
    return [value] if isinstance(value, int | float) and not isinstance(value, bool) else []


@pytest.mark.parametrize("name", list(TRUE))
def test_a_lie_is_refused_or_harmless(name: str) -> None:
    request, answer = TRUE[name]
    refused = 0
    for seed in range(ROUNDS):
        _, changed = lie(answer, seed)
        try:
            said = read_answer(request, document_of(line_of(changed)), "board")
        except EngineError as error:
            refused += 1
            assert error.message.startswith("board answers")
            assert len(error.message) < 600
            assert error.message.isprintable()
            continue
        assert all(math.isfinite(number) and abs(number) <= 1e300 for number in numbers(said))
        assert json.dumps(said, allow_nan=False, ensure_ascii=False).isprintable()
        assert len(json.dumps(said)) < 50_000
    assert refused > ROUNDS / 2


def changed(name: str, place: tuple[Any, ...], value: Any) -> tuple[dict, dict]:
    request, answer = TRUE[name]
    answer = json.loads(json.dumps(answer))
    holder = answer
    for key in place[:-1]:
        holder = holder[key]
    holder[place[-1]] = value
    return request, answer


@pytest.mark.parametrize("value", [-5, -5.0, 0, 0.0, float("nan"), float("inf"), None, "2", True])
def test_a_latency_is_a_positive_number(value: Any) -> None:
    for place in (("decode", "candidate", "median", "value"), ("prefill", "candidate", "percentiles", "p50")):
        request, answer = changed("measure on a GPU", place, value)
        with pytest.raises(EngineError, match=r"\.".join(place)):
            read_answer(request, answer, "board")


def test_an_interval_holds_its_median_and_names_are_those_that_were_asked() -> None:
    request, answer = changed("measure", ("decode", "dense", "median"), {"value": 2.0, "low": 2.1, "high": 2.2})
    with pytest.raises(EngineError, match="does not hold its median"):
        read_answer(request, answer, "board")
    request, answer = TRUE["measure"]
    with pytest.raises(EngineError, match="other graphs"):
        read_answer({**request, "files": {"dense": "a", "another": "b"}}, answer, "board")
    request, answer = changed("measure", ("decode", "candidate", "ratio"), None)
    with pytest.raises(EngineError, match="other graphs"):
        read_answer(request, answer, "board")


def test_texts_lose_what_would_steer_a_terminal() -> None:
    request, answer = changed("describe", ("machine",), f"a {ESCAPES}board\nof two lines")
    assert read_answer(request, document_of(line_of(answer)), "board")["machine"] == "a [2J ]0;gone board of two lines"


@pytest.mark.parametrize(
    ("kind", "document"),
    [
        (Hello, {"protocol": "1", "python": "3.10", "work": "/x"}),
        (Hello, {"protocol": 1, "python": "3.10"}),
        (Missing, {"missing": ["../../etc/passwd"]}),
        (Missing, {"missing": ["0" * 64] * 10_001}),
        (Size, {"size": 1 << 62}),
        (Size, {"size": -1}),
        (Size, {"size": 1.5}),
        (Size, {"size": True}),
        (Left, {"left": 3}),
        (Ran, {"answer": [], "made": {}}),
        (Ran, {"answer": {}, "made": {"plan": "x"}}),
        (Step, {"progress": ["stage", 1]}),
        (Step, {"progress": ["stage", float("nan"), 0]}),
        (Step, {"progress": [None, 1, 2]}),
        (Step, {"progress": ["stage", -1, 2]}),
        (Refusal, {"error": "x"}),
        (Refusal, {"error": 3, "remedy": "x"}),
        (Size, {"nothing": 1}),
        (Size, None),
        (Size, [[[[]]]]),
    ],
)
def test_messages_that_are_none(kind: Any, document: Any) -> None:
    with pytest.raises(EngineError, match="board answers what cannot be") as caught:
        read_message(kind, document, "board")
    assert caught.value.exit_code == 4


def test_a_step_is_told_in_clean_words() -> None:
    step = document_of(line_of({"progress": [f"build{ESCAPES}", 1, 2]}))
    assert read_message(Step, step, "x").state == ("build [2J ]0;gone", 1, 2)


def test_a_description_tells_of_every_module() -> None:
    for place, value in ((("modules",), {"numpy": "1"}), (("missing",), {}), (("modules", "numpy"), None)):
        request, answer = changed("describe", place, value)
        with pytest.raises(BadAnswer, match="modules"):
            read_answer(request, answer, "board")


def test_tasks_of_this_machine_are_held_to_the_schema(monkeypatch: pytest.MonkeyPatch) -> None:
    request, answer = changed("memory", ("peak",), -1)
    monkeypatch.setattr(LocalSession, "run", lambda self, *words: answer)
    with pytest.raises(BadAnswer, match="this machine answers what cannot be: peak should be .* it is -1"):
        ThisMachine().run(request, 1.0, quiet)
    request, answer = TRUE["memory"]
    assert ThisMachine().run(request, 1.0, quiet) == answer
