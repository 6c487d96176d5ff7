"""Chats in the layouts that people keep them in: nothing of a message vanishes, and null is no word."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from edgeprune.errors import InputError
from edgeprune.pipeline.chats import Chat
from edgeprune.pipeline.documents import read_documents

FUNCTION = {"name": "weather", "arguments": {"city": "Paris"}}
AS_TEXT = {"name": "weather", "arguments": '{"city": "Paris"}'}
CALL = {"id": "1", "type": "function", "function": FUNCTION}
USER = {"role": "user", "content": "weather?"}


def chat_of(tmp_path: Path, **record: Any) -> Chat:
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": "first"}) + "\n" + json.dumps(record) + "\n")
    _, chat = read_documents(tmp_path / "a.jsonl")
    assert isinstance(chat, Chat)
    assert chat.place == f"{tmp_path / 'a.jsonl'}, line 2"
    return chat


@pytest.mark.parametrize(
    "message",
    [
        {"role": "assistant", "content": None, "tool_calls": [CALL]},
        {"role": "assistant", "tool_calls": [CALL]},
        {"role": "assistant", "tool_calls": [{**CALL, "function": AS_TEXT}]},
    ],
)
def test_a_turn_that_only_calls_has_no_text_and_keeps_its_call(tmp_path: Path, message: dict) -> None:
    chat = chat_of(tmp_path, messages=[USER, message], tools=[{"type": "function", "function": FUNCTION}])
    assert chat[1] == {"role": "assistant", "content": "", "tool_calls": [CALL]}
    assert chat.tools == [{"type": "function", "function": FUNCTION}]


def test_a_call_of_the_older_form_is_one_too(tmp_path: Path) -> None:
    chat = chat_of(tmp_path, messages=[USER, {"role": "assistant", "content": None, "function_call": AS_TEXT}])
    assert chat[1]["tool_calls"] == [{"type": "function", "function": FUNCTION}]


def test_all_other_fields_of_a_message_go_on(tmp_path: Path) -> None:
    answer = {"role": "tool", "content": "sunny", "tool_call_id": "1", "name": "weather"}
    assert chat_of(tmp_path, messages=[USER, answer])[1] == answer


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ([{"type": "text", "text": "one "}, {"type": "text", "text": "two"}], "one two"),
        ([{"type": "input_text", "text": "one"}, " two"], "one two"),
        ([], ""),
        (None, ""),
        ("plain", "plain"),
    ],
)
def test_parts_of_text_are_joined(tmp_path: Path, content: Any, text: str) -> None:
    assert chat_of(tmp_path, messages=[{"role": "user", "content": content}])[0]["content"] == text


@pytest.mark.parametrize("name", ["conversations", "conversation", "messages"])
def test_other_names_of_the_same(tmp_path: Path, name: str) -> None:
    turns = [("system", "Be brief."), ("human", "hi"), ("gpt", "hello"), ("observation", "sunny")]
    chat = chat_of(tmp_path, **{name: [{"from": role, "value": text} for role, text in turns]})
    assert [(message["role"], message["content"]) for message in chat] == [
        ("system", "Be brief."),
        ("user", "hi"),
        ("assistant", "hello"),
        ("tool", "sunny"),
    ]


def test_a_prompt_and_a_completion_of_messages_are_one_chat(tmp_path: Path) -> None:
    answer = {"role": "assistant", "content": "sunny"}
    assert chat_of(tmp_path, prompt=[USER], completion=[answer]) == [USER, answer]


BAD = {
    "no list": ({"messages": "hi"}, "is not a list of messages"),
    "none": ({"messages": []}, "is not a list of messages"),
    "texts": ({"messages": ["hi"]}, "is not a list of messages"),
    "no role": ({"messages": [{"content": "hi"}]}, "no `role`, but content"),
    "no content": ({"messages": [{"role": "user", "body": "x"}]}, "no `content`, but role, body"),
    "a number": ({"messages": [{"role": "user", "content": 3}]}, "`content` is 3"),
    "a picture": (
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}]},
        "no text: 'image_url'",
    ),
    "calls": ({"messages": [{"role": "user", "tool_calls": "x"}]}, "not a list of objects"),
    "a call": ({"messages": [{"role": "user", "tool_calls": [{"function": {}}]}]}, "no name"),
    "tools": ({"messages": [USER], "tools": 3}, "`tools` is not a list"),
}


@pytest.mark.parametrize(("record", "message"), BAD.values(), ids=list(BAD))
def test_what_is_not_understood_is_named_by_line(tmp_path: Path, record: dict, message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        chat_of(tmp_path, **record)
    assert "line 2" in caught.value.message
    assert "\n" not in caught.value.message


def test_a_system_text_beside_the_turns_comes_first(tmp_path: Path) -> None:
    chat = chat_of(tmp_path, system="Be brief.", conversations=[{"from": "human", "value": "hi"}])
    assert chat == [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "hi"}]
