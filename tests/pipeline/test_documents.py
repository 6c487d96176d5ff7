import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgeprune.errors import InputError
from edgeprune.pipeline.documents import hold_out, pack, read_documents, tokenize


class WordTokenizerDouble:
    """One id per word."""

    chat_template = None
    eos_token_id = 0

    def __call__(self, text, **options):
        return {"input_ids": [1 + len(word) for word in text.split()]}


def test_a_folder_is_read_in_order_without_duplicates(tmp_path):
    (tmp_path / "b.txt").write_text("second")
    (tmp_path / "a.txt").write_text("first")
    (tmp_path / "c.md").write_text("first")
    (tmp_path / "ignored.bin").write_bytes(b"\0")
    (tmp_path / "d.jsonl").write_text('{"text": "third"}\n\n"fourth"\n')
    assert read_documents(tmp_path) == ["first", "second", "third", "fourth"]


def test_long_text_is_cut_at_paragraphs(tmp_path):
    path = tmp_path / "long.txt"
    path.write_text("\n\n".join(f"paragraph {n} " + "x" * 900 for n in range(6)))
    documents = read_documents(path)
    assert len(documents) == 2
    assert all(document.startswith("paragraph") for document in documents)


def test_chats_are_read_and_need_a_template(tmp_path):
    path = tmp_path / "chat.jsonl"
    path.write_text(json.dumps({"messages": [{"role": "user", "content": "hi"}]}))
    documents = read_documents(path)
    assert documents == [[{"role": "user", "content": "hi"}]]
    with pytest.raises(InputError, match="chat template"):
        list(tokenize(documents, WordTokenizerDouble()))


BAD = {"missing": None, "empty": b"", "blank": b"\n \n\n", "binary": b"abc\0def", "not utf-8": b"\xff\xfe\x00a"}


@pytest.mark.parametrize("content", BAD.values(), ids=BAD)
def test_bad_files_are_refused_by_name(tmp_path, content):
    path = tmp_path / "samples.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(InputError, match=r"samples\.txt"):
        read_documents(path)


@pytest.mark.parametrize("line", ["{", "3", '{"txt": "a"}', '{"text": 3}', '{"messages": [{"role": "user"}]}'])
def test_a_malformed_line_is_named(tmp_path, line):
    path = tmp_path / "samples.jsonl"
    path.write_text('{"text": "fine"}\n' + line)
    with pytest.raises(InputError, match="line 2"):
        read_documents(path)


def test_an_empty_folder_is_refused(tmp_path):
    with pytest.raises(InputError, match="holds no"):
        read_documents(tmp_path)


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
