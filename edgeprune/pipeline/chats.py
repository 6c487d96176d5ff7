"""Chats among the samples: the layouts in which people keep them, as messages that a chat template takes.

Nothing of a message is dropped: tool calls, names and ids go on. It knows no template.
"""

from __future__ import annotations

import json
from typing import Any

from edgeprune.errors import InputError
from edgeprune.files import printable

ROLES = {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "bot": "assistant", "observation": "tool"}
TEXT_PARTS = ("text", "input_text", "output_text")
CHATS = 'Write chats as {"messages": [{"role": ..., "content": ...}, ...]}, with `tool_calls` and `tools` where needed.'
Message = dict[str, Any]


class Chat(list[Message]):
    """The messages of a chat, each with `role` and `content`; tools: that its record offers; place: file and line."""

    def __init__(self, messages: list[Message], tools: list[Any] | None, place: str) -> None:
        super().__init__(messages)
        self.tools, self.place = tools, place


def chat_of(record: dict[str, Any], place: str) -> Chat | None:
    """Returns the chat of a record: of its `messages` or `conversations`, or of a prompt and a completion as messages.

    None where the record is no chat. Raises InputError, with the place, for messages that are not understood.
    """
    if all(_is_messages(record.get(name)) for name in ("prompt", "completion")):
        messages = record["prompt"] + record["completion"]
    else:
        name = next((name for name in ("messages", "conversations", "conversation") if name in record), None)
        if name is None:
            return None
        messages = record[name]
        if not _is_messages(messages):
            raise InputError(f"{place}: `{name}` is not a list of messages", CHATS)
    tools = record.get("tools")
    if isinstance(tools, str):  # as some tables keep them
        tools = _parsed(tools, list)
    if tools is not None and not isinstance(tools, list):
        raise InputError(f"{place}: `tools` is not a list", CHATS)
    turns = [_message(message, place) for message in messages]
    system = record.get("system")  # as ShareGPT has it
    if isinstance(system, str) and system and turns[0]["role"] != "system":
        turns.insert(0, {"role": "system", "content": system})
    return Chat(turns, tools, place)


def is_bare(value: Any) -> bool:
    """Returns whether a value is the messages of a chat, without a record around them."""
    return _is_messages(value) and all({"role", "from"} & message.keys() for message in value)


def _is_messages(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(message, dict) for message in value)


def _message(message: Message, place: str) -> Message:
    """Returns a message with role and content as text; all its other fields are kept."""
    role = message.get("role", message.get("from"))
    if not isinstance(role, str):
        raise InputError(f"{place}: a message has no `role`, but {_fields(message)}", CHATS)
    kept = {name: value for name, value in message.items() if name not in ("role", "from", "content", "value")}
    calls = kept.pop("function_call", None)
    if calls is not None and "tool_calls" not in kept:
        kept["tool_calls"] = [{"type": "function", "function": calls}]
    if kept.get("tool_calls") is None:
        kept.pop("tool_calls", None)
    else:
        kept["tool_calls"] = _calls(kept["tool_calls"], place)
    content = message.get("content", message.get("value"))
    if content is None and not (kept.get("tool_calls") or "content" in message):
        raise InputError(f"{place}: a message has no `content`, but {_fields(message)}", CHATS)
    return {"role": ROLES.get(role, role), "content": _text(content, place), **kept}


def _fields(message: Message) -> str:
    return ", ".join(printable(name, 40) for name in list(message)[:8]) or "no fields"


def _text(content: Any, place: str) -> str:
    """Returns the text of a content: null is none, parts of text are joined. Raises InputError for other parts."""
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise InputError(f"{place}: a `content` is {printable(repr(content), 60)}, not a text", CHATS)
    texts = []
    for part in content:
        if isinstance(part, str):
            texts.append(part)
        elif isinstance(part, dict) and isinstance(part.get("text"), str) and part.get("type", "text") in TEXT_PARTS:
            texts.append(part["text"])
        else:
            kind = part.get("type") if isinstance(part, dict) else part
            raise InputError(
                f"{place}: a `content` holds a part that is no text: {printable(repr(kind), 60)}",
                "Leave such chats out: a language model is calibrated on text.",
            )
    return "".join(texts)


def _calls(calls: Any, place: str) -> list[Any]:
    """Returns tool calls with their arguments as objects, which templates write as JSON themselves."""
    if not isinstance(calls, list) or not all(isinstance(call, dict) for call in calls):
        raise InputError(f"{place}: `tool_calls` is not a list of objects", CHATS)
    return [_call(call, place) for call in calls]


def _call(call: dict[str, Any], place: str) -> dict[str, Any]:
    function = call.get("function", call)
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise InputError(f"{place}: a tool call has no name", CHATS)
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        function = {**function, "arguments": _parsed(arguments, dict)}
    return {**call, "function": function} if "function" in call else function


def _parsed(text: str, kind: type) -> Any:
    """Returns the JSON of a text where it is of that kind, else the text."""
    try:
        content = json.loads(text)
    except (ValueError, RecursionError):
        return text
    return content if isinstance(content, kind) else text
