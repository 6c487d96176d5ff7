"""Texts and chats of a user as token ids: the one place where a tokenizer meets them, and its chat template.

A template is a program of the model's author: it may refuse a chat, by whatever error. The texts may hold anything.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import chain, product
from typing import Any

import numpy as np

from edgeprune.errors import InputError
from edgeprune.files import printable

Message = Mapping[str, Any]  # role, content (a text, None, or text parts), and whatever else the template reads
MARK = "called_to_mark_it"  # the name of a function that no chat has
NAMED_TOKENS = 5  # in a message
OTHER_CHATS = "Change this chat, or give plain text: lines with `text`."


def encode(tokenizer: Any, text: str, special: bool = True) -> list[int]:
    """Returns the token ids of a text; halves of characters, which no tokenizer takes, become U+FFFD.

    special: with the tokens that the tokenizer puts around a text. Raises InputError, with the tokenizer's own words,
    for a text that it has no tokens for.
    """
    whole = text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
    try:
        return tokenizer(whole, add_special_tokens=special)["input_ids"]
    except Exception as error:  # of the tokenizers package, whose exceptions have no class of their own
        raise InputError(
            f"the model's tokenizer cannot split {printable(repr(whole), 60)}: {printable(error)}",
            "Give the tokenizer an unknown token (unk_token), or texts that it has tokens for.",
        ) from None


def render(
    tokenizer: Any, messages: Sequence[Message], tools: Sequence[Any] | None = None, prompted: bool = False
) -> str:
    """Returns a chat as the template writes it; prompted: with the opening of an answer.

    Raises InputError, with the template's own words, where it refuses the chat or is broken.
    """
    named = tokenizer.chat_template
    if isinstance(named, dict) and not named.keys() & {"default", *(["tool_use"] if tools else [])}:
        raise InputError(
            f"none of the model's chat templates ({printable(', '.join(map(str, named)))}) is the default",
            "Name one of them `default` in tokenizer_config.json, or give plain text: lines with `text`.",
        )
    try:
        text = tokenizer.apply_chat_template(
            messages, tools=tools or None, tokenize=False, add_generation_prompt=prompted
        )
    except Exception as error:  # the template's own, jinja's, or those of Python's operators within it
        reason = printable(error) or type(error).__name__
        raise InputError(f"the model's chat template refuses it: {reason}", OTHER_CHATS) from None
    return str(text)


def render_whole(
    tokenizer: Any, messages: Sequence[Message], tools: Sequence[Any] | None = None, prompted: bool = False
) -> str:
    """Returns a chat as the template writes it, with every call of a tool in it; prompted: as of `render`.

    Templates differ in what they take for a call's arguments (an object or its text) and for the content of a message
    that only calls (none or an empty text): the first form is taken that leaves no call out and shows no value of
    Python's. Raises InputError where there is none.
    """
    calls = [call for message in messages for call in message.get("tool_calls") or ()]
    if not calls:
        return render(tokenizer, messages, tools, prompted)
    rendered, refusal = [], None
    for is_object, content in product((True, False), (None, "")):
        form, marked = ([_form(message, is_object, content, name) for message in messages] for name in (None, MARK))
        try:
            text = render(tokenizer, form, tools, prompted)
            is_whole = render(tokenizer, marked, tools, prompted).count(MARK) >= len(calls)
        except InputError as error:
            refusal = refusal or error
            continue
        if is_whole:
            rendered.append((_slips(text, form), text))
    if rendered:
        return min(rendered, key=lambda pair: pair[0])[1]
    raise refusal or InputError(
        "the model's chat template leaves its calls of tools out",
        "Give chats without tool calls, or a model whose template has them.",
    )


def _form(message: Message, is_object: bool, content: str | None, name: str | None) -> Message:
    """Returns a message with its calls' arguments as an object or as text, and with what stands for no content.

    name: that all calls get, None for their own.
    """
    if not message.get("tool_calls"):
        return message
    calls = []
    for call in message["tool_calls"]:
        function = dict(function_of(call))
        function["name"] = name or function["name"]
        arguments = function.get("arguments", {})
        if not is_object and not isinstance(arguments, str):
            function["arguments"] = json.dumps(arguments, ensure_ascii=False)
        calls.append({**call, "function": function} if "function" in call else function)
    return {**message, "content": message.get("content") or content, "tool_calls": calls}


def function_of(call: Mapping[str, Any]) -> Mapping[str, Any]:
    """Returns name and arguments of a call, which some data sets hold without what stands around them."""
    return call.get("function", call)


def _slips(text: str, messages: Sequence[Message]) -> int:
    """Returns how often a text shows Python's None, or its writing of an object."""
    arguments = [function_of(call).get("arguments") for message in messages for call in message.get("tool_calls") or ()]
    return text.count("None") + sum(text.count(repr(value)) for value in arguments if isinstance(value, dict) and value)


def check_ids(ids: Iterable[np.ndarray | Sequence[int]], vocab_size: int, tokenizer: Any, origin: str) -> None:
    """Raises InputError for tokens that the model has no embedding for; origin: whose they are, for the message."""
    unique: Iterator[int] = chain.from_iterable(np.unique(np.asarray(part, np.int64)).tolist() for part in ids)
    if beyond := sorted({number for number in unique if number >= vocab_size}):
        names = tokenizer.convert_ids_to_tokens(beyond[:NAMED_TOKENS])
        shown = ", ".join(f"{name} ({number})" for name, number in zip(names, beyond, strict=False))
        raise InputError(
            f"{origin} holds tokens without a row in the model's embedding of {vocab_size}: {printable(shown)}"
            + (", ..." if len(beyond) > NAMED_TOKENS else ""),
            "Resize and train the model's embedding (resize_token_embeddings of transformers), or remove these tokens.",
        )
