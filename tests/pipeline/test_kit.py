"""The kit: long texts in parts that lose nothing, records with their origin, chats whole."""

from __future__ import annotations

import json

from hypothesis import given
from hypothesis import strategies as st

from edgeprune.pipeline.chats import chat_of
from edgeprune.pipeline.documents import read
from edgeprune.pipeline.kit import BYTES_PER_TOKEN, MARK, Sample, _cut, text_of


@given(st.text(alphabet="ab \n語", min_size=1, max_size=400), st.integers(2, 40))
def test_the_parts_of_a_text_are_all_of_it_and_of_about_one_size(text: str, length: int) -> None:
    parts = list(_cut(Sample(text, "a", "a.txt", {}), length))
    joined = "".join("".join(part.text.split()) for part in parts)
    assert joined == "".join(text.split())
    assert all(part.bytes <= 3 * (BYTES_PER_TOKEN * length + 3) for part in parts)
    for part in parts:
        if part.place != "a.txt":
            start = int(part.place.rpartition(" ")[2]) - 1
            assert text[start:].lstrip().startswith(part.text)


def test_parts_end_at_white_space_and_count_what_is_masked_in_them() -> None:
    text = "one two [EMAIL] three four " * 20
    parts = list(_cut(Sample(text, "a", "a.txt", {"emails": 20}), 16))
    assert len(parts) > 5
    words = [word for part in parts for word in part.text.split()]
    assert words == text.split()
    assert sum(part.masked.get("emails", 0) for part in parts) == 20
    sizes = [len(part.text) for part in parts]
    assert min(sizes) > max(sizes) / 2  # no short rest


def test_a_chat_stays_whole_and_its_record_is_read_as_it_was(tmp_path) -> None:
    record = {
        "messages": [{"role": "user", "content": "Where is it? " * 100}, {"role": "assistant", "content": "Here."}],
        "tools": [{"type": "function", "function": {"name": "look", "parameters": {}}}],
    }
    chat = chat_of(record, "chats.jsonl, line 1")
    (sample,) = _cut(Sample(chat, "chats.jsonl", "chats.jsonl, line 1", {}, "en"), 16)
    line = json.dumps(sample.as_record("calibration"))
    assert MARK in line[:60]
    (tmp_path / "out.jsonl").write_text(line)
    (again,) = read(tmp_path / "out.jsonl").documents
    assert (list(again), again.tools) == (list(chat), chat.tools)
    assert json.loads(line)["provenance"]["source"] == "chats.jsonl, line 1"


def test_the_text_of_a_chat_has_its_calls() -> None:
    call = {"function": {"name": "look", "arguments": {"where": "here"}}}
    messages = [{"role": "user", "content": "Look."}, {"role": "assistant", "content": None, "tool_calls": [call]}]
    text = text_of(chat_of({"messages": messages}, "a"))
    assert text.startswith("Look.\n\n")
    assert '"here"' in text
