"""A line of another process becomes a document whose texts a terminal can show, or nothing."""

from __future__ import annotations

import json

import pytest

from edgeprune.ondevice.lines import MOST_TEXT, document_of, one_line


@pytest.mark.parametrize(
    "line",
    [b"", b"\n", b"[]", b"null", b"what?", b'{"a": ', b"\xff\xfe", b"[" * 100_000, b'{"a": ' + b"9" * 5000 + b"}"],
)
def test_what_is_no_object_is_empty(line: bytes) -> None:
    assert document_of(line) == {}


def test_nesting_that_json_takes_and_we_do_not_is_empty() -> None:
    for depth in range(50, 1000, 50):
        assert document_of(b'{"a": ' + b"[" * depth + b"]" * depth + b"}") in ({}, {"a": nested(depth)})


def nested(depth: int) -> list:
    value: list = []
    for _ in range(depth - 1):
        value = [value]
    return value


def test_texts_and_keys_are_clean_and_short_and_numbers_stay() -> None:
    document = {"a\x1b[2J": ["x\r\ny\u202e", {"b": "z\x9b" * MOST_TEXT}], "n": [1, 2.5, True, None]}
    clean = document_of(json.dumps(document))
    assert clean["n"] == [1, 2.5, True, None]
    assert clean["a [2J"][0] == "x y"
    assert len(clean["a [2J"][1]["b"]) <= MOST_TEXT + 10
    assert one_line("a\x07\n\n b") == "a b"
