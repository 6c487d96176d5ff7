"""Documents as token ids: chats through the template, what is held out, rows of equal length."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgeprune.errors import InputError
from edgeprune.pipeline.chats import Chat
from edgeprune.pipeline.packing import HELD_OUT_LEAST, HELD_OUT_TOKENS, enough_held_out, hold_out, pack, tokenize


class WordTokenizerDouble:
    """One id per word."""

    chat_template = None
    eos_token_id = 0

    def __call__(self, text, **options):
        return {"input_ids": [1 + len(word) for word in text.split()]}


class ChatTokenizerDouble(WordTokenizerDouble):
    """One id per character, and a template that writes role and content, and calls where it is told to."""

    chat_template = "a template"
    with_calls = False

    def __call__(self, text, **options):
        return {"input_ids": [ord(character) for character in text]}

    def apply_chat_template(self, chat, tools=None, tokenize=True, **options):
        text = "".join(f"[{message['role']}]{message['content']}" for message in chat)
        if self.with_calls:
            text += "".join(str(message.get("tool_calls", "")) for message in chat)
        return text + (str(tools) if tools else "")


CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Paris"}}}


def text_of(chat, tokenizer):
    (ids,) = tokenize([chat], tokenizer)
    return "".join(map(chr, ids))


def test_a_chat_goes_through_the_template_whole():
    chat = Chat([{"role": "user", "content": "hi"}], [{"name": "weather"}], "a.jsonl, line 3")
    assert text_of(chat, ChatTokenizerDouble()) == "[user]hi[{'name': 'weather'}]"
    with pytest.raises(InputError, match="a.jsonl, line 3: .*no chat template"):
        list(tokenize([chat], WordTokenizerDouble()))


def test_a_call_that_the_template_leaves_out_is_told():
    chat = Chat([{"role": "assistant", "content": "", "tool_calls": [CALL]}], None, "a.jsonl, line 3")
    tokenizer = ChatTokenizerDouble()
    with pytest.raises(InputError, match="a.jsonl, line 3: .* leaves its calls of tools out"):
        text_of(chat, tokenizer)
    tokenizer.with_calls = True
    assert "Paris" in text_of(chat, tokenizer)


@given(st.integers(2, 60), st.integers(0, 100))
def test_held_out_documents_are_apart(count, seed):
    kept, held_out = hold_out(list(range(count)), seed)
    assert sorted(kept + held_out) == list(range(count))
    assert len(held_out) == max(1, count // 5)


@given(st.lists(st.integers(1, 30), min_size=1, max_size=8), st.integers(1, 4), st.integers(1, 16))
def test_packing_joins_cuts_and_counts_what_is_missing(sizes, samples, length):
    documents = [np.full(size, number + 1) for number, size in enumerate(sizes)]
    available, needed = sum(sizes) + len(sizes), samples * length
    if available < needed:
        with pytest.raises(InputError, match=f"{needed - available} are missing"):
            pack(documents, samples, length, separator=0)
    else:
        rows = pack(documents, samples, length, separator=0)
        joined = np.concatenate([[*document, 0] for document in documents])
        assert rows.shape == (samples, length)
        assert np.array_equal(rows.ravel(), joined[:needed])


@given(st.lists(st.integers(0, HELD_OUT_TOKENS), max_size=4 * HELD_OUT_LEAST))
def test_documents_are_evaluated_until_they_have_enough_tokens_and_are_enough(lengths):
    documents = [np.zeros(length, np.int64) for length in lengths]
    taken = enough_held_out(iter(documents))
    assert all(one is other for one, other in zip(taken, documents, strict=False))
    if len(taken) < len(documents):
        assert len(taken) >= HELD_OUT_LEAST
        assert sum(map(len, taken)) >= HELD_OUT_TOKENS
        assert len(taken) == HELD_OUT_LEAST or sum(map(len, taken[:-1])) < HELD_OUT_TOKENS
