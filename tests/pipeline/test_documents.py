"""Samples of text, read as their author meant them, whatever system and format they come from."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgeprune.errors import InputError
from edgeprune.pipeline.documents import Reading, _split, read, read_documents


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


def paragraphs(count: int = 60, size: int = 400) -> list[str]:
    return [(f"paragraph {number} " + "river stone lamp " * size)[:size] for number in range(count)]


JOINTS = {
    "blank lines": "\n\n",
    "of Windows": "\r\n\r\n",
    "of an old Mac": "\r\r",
    "blank lines that hold a space": "\n \n",
    "with a tab": "\r\n\t\r\n",
    "form feeds": "\f",
    "paragraph separators": "\u2029",
}


@pytest.mark.parametrize("joint", JOINTS.values(), ids=list(JOINTS))
def test_paragraphs_are_those_of_every_system(tmp_path: Path, joint: str) -> None:
    (tmp_path / "a.txt").write_bytes(joint.join(paragraphs()).encode())
    (tmp_path / "b.txt").write_bytes("\n\n".join(paragraphs()).encode())
    assert read_documents(tmp_path / "a.txt") == read_documents(tmp_path / "b.txt")
    assert len(read_documents(tmp_path / "a.txt")) == 12


@pytest.mark.parametrize("joint", ["\n", "\r\n", "\r", "\u2028", "\x85"], ids=repr)
def test_a_document_on_each_line(tmp_path: Path, joint: str) -> None:
    (tmp_path / "a.txt").write_bytes(joint.join(paragraphs()).encode())
    assert read_documents(tmp_path / "a.txt") == paragraphs()
    assert str(read(tmp_path / "a.txt")).startswith("text, a document on each line; 60 documents of 24,0")


def test_short_lines_are_joined(tmp_path: Path) -> None:
    lines = paragraphs(200, 60)
    (tmp_path / "a.txt").write_text("\n".join(lines))
    documents = read_documents(tmp_path / "a.txt")
    assert "\n".join(documents).split("\n") == lines
    assert all(2000 <= len(document) < 2100 for document in documents[:-1])


@pytest.mark.parametrize("space", [" ", ""], ids=["with spaces", "without"])
def test_one_long_line_is_cut_by_length(tmp_path: Path, space: str) -> None:
    text = space.join(f"word{number}" for number in range(3000))
    (tmp_path / "a.txt").write_text(text)
    documents = read_documents(tmp_path / "a.txt")
    assert space.join(documents) == text
    assert len(documents) > 5
    assert max(map(len, documents)) <= 4000
    assert "split by length" in str(read(tmp_path / "a.txt"))


ROWS = [{"text": text} for text in paragraphs(5)]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.jsonl", LINES),
        ("a.JSONL", LINES),
        ("a.ndjson", LINES.replace("\n", "\r\n")),
        ("a.txt", LINES),
        ("a", "\ufeff\n" + LINES),
        ("a.json", LINES),
        ("a.json", json.dumps(ROWS)),
        ("a.json", json.dumps(ROWS, indent=2)),
        ("a.txt", json.dumps(ROWS)),
        ("a.json", json.dumps([row["text"] for row in ROWS])),
        ("a.json", json.dumps({"version": 1, "data": ROWS})),
        ("a.jsonl", "".join(json.dumps({"content": row["text"], "id": 1}) + "\n" for row in ROWS)),
        ("a.csv", "id,Text\n" + "".join(f'{number},"{row["text"]}"\n' for number, row in enumerate(ROWS))),
        ("a.TSV", "text\tid\n" + "".join(f"{row['text']}\t1\n" for row in ROWS)),
        ("a.csv", "prompt,completion\n" + "".join(f"{row['text'][:9]},{row['text'][9:]}\n" for row in ROWS)),
        (
            "a.jsonl",
            "".join(json.dumps({"prompt": row["text"][:9], "completion": row["text"][9:]}) + "\n" for row in ROWS),
        ),
    ],
)
def test_a_format_is_known_by_its_content(tmp_path: Path, name: str, text: str) -> None:
    (tmp_path / name).write_bytes(text.encode())
    assert read_documents(tmp_path / name) == paragraphs(5)


def test_a_line_is_one_only_where_the_file_ends_it(tmp_path: Path) -> None:
    texts = [f"one\u2028two\u2029three\x85four\x0bfive\x1csix {number}" for number in range(3)]
    lines = "".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts)
    (tmp_path / "a.jsonl").write_text(lines, encoding="utf-8", newline="")
    assert read_documents(tmp_path / "a.jsonl") == texts


PROSE = [
    "[Chapter 1] It was late.",
    "{sic} he said",
    '"Quoted" at once.',
    "[1] A reference\n[2] Another",
    "{}\nA brace",
]


@pytest.mark.parametrize("text", PROSE)
def test_prose_that_begins_like_json_stays_prose(tmp_path: Path, text: str) -> None:
    (tmp_path / "a.txt").write_text(text)
    if text.startswith("{}"):
        with pytest.raises(InputError, match="line 2"):
            read_documents(tmp_path / "a.txt")
    else:
        assert read_documents(tmp_path / "a.txt") == [text]


REFUSED = {
    "an unknown field": ("a.jsonl", b'{"instruction": "a", "output": "b"}\n', "instruction, output"),
    "an unknown column": ("a.csv", b"question,answer\n1,2\n", "question, answer"),
    "a number as text": ("a.jsonl", b'{"text": 3}\n', "line 1: `text` is 3"),
    "null as text": ("a.jsonl", b'{"text": "x"}\n{"text": null}\n', "line 2: `text` is None"),
    "a cut line": ("a.jsonl", b'{"text": "x"}\n{"text": ', "line 2, is not JSON"),
    "no JSON": ("a.json", b"hello", "is not JSON"),
    "parquet": ("a.parquet", b"PAR1\x00\x00", "a Parquet file"),
    "gzip": ("a.txt", b"\x1f\x8b\x08\x00", "gzip"),
    "UTF-16": ("a.txt", "text".encode("utf-16"), "UTF-16"),
    "Latin 1": ("a.txt", "café".encode("latin-1"), "byte 3"),
    "nested": ("a.json", b"[" * 200_000, "nested too deeply"),
}


@pytest.mark.parametrize(("name", "data", "message"), REFUSED.values(), ids=list(REFUSED))
def test_what_is_no_sample_is_named(tmp_path: Path, name: str, data: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(data)
    with pytest.raises(InputError, match=re.escape(message)) as caught:
        read_documents(tmp_path / name)
    assert caught.value.remedy


def test_a_folder_says_what_it_left_out(tmp_path: Path) -> None:
    files = {
        "a.TXT": "upper",
        "b.txt": "lower",
        "deep/c.Md": "deep",
        "d.txt": "lower",
        "e.jsonl": '{"text": "row"}\n{"text": "  "}\n',
    }
    left_out = {"x.pdf": "%PDF", "package.json": '{"name": "shop"}', "table.csv": "a,b\n1,2\n"}
    hidden = {"._a.txt": "\0\5", ".git/notes.txt": "hidden", ".DS_Store": "\0"}
    for name, text in (files | left_out | hidden).items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    reading = read(tmp_path)
    assert reading.documents == ["upper", "lower", "deep", "row"]
    assert (reading.duplicates, reading.empty) == (1, 1)
    assert reading.dropped == (
        "1 duplicate removed; 1 without text; not read: package.json (line 1 has neither `text` nor `messages`, "
        "but name), table.csv (no column `text`, the columns are: a, b), x.pdf"
    )
    assert str(reading) == "4 of text, JSON; 4 documents of 17 characters"


def test_a_folder_of_other_files_alone_names_them(tmp_path: Path) -> None:
    (tmp_path / "x.pdf").write_text("%PDF")
    with pytest.raises(InputError, match=r"only x\.pdf"):
        read(tmp_path)


@given(st.text(max_size=300))
def test_splitting_loses_no_word(text: str) -> None:
    _, documents = _split(text.replace("\r\n", "\n").replace("\r", "\n"))
    assert " ".join(documents).split() == text.split()


def test_a_reading_is_told_in_words() -> None:
    assert Reading(Path("x"), ["a"], Counter({"text": 1})).dropped == "nothing was left out"


def test_a_chat_without_a_record_around_it_is_one(tmp_path):
    turns = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]
    (tmp_path / "one.json").write_text(json.dumps(turns))
    (tmp_path / "two.json").write_text(json.dumps([turns, turns[:1]]))
    assert read_documents(tmp_path / "one.json") == [turns]
    assert read_documents(tmp_path / "two.json") == [turns, turns[:1]]


@pytest.mark.parametrize("text", ['{"text": "cut', "{'text': 'of Python'}", '[{"text": "a"}, {"te', '[[{"role": "us'])
def test_json_that_is_broken_is_not_read_as_prose(tmp_path, text):
    (tmp_path / "a.txt").write_text(text)
    with pytest.raises(InputError, match=r"a\.txt begins as JSON does, but is none"):
        read_documents(tmp_path / "a.txt")


@pytest.mark.parametrize("text", ["[[a link]] and prose", "{{ jinja }}", "{\\bf bold}", "[1] a footnote"])
def test_prose_may_begin_with_a_bracket(tmp_path, text):
    (tmp_path / "a.md").write_text(text)
    assert read_documents(tmp_path / "a.md") == [text]


def test_a_table_may_be_separated_by_semicolons_and_hold_long_texts(tmp_path):
    (tmp_path / "a.csv").write_text(f"id;text\n1;{'long, ' * 50000}\n2;b\n")
    assert [len(document) for document in read_documents(tmp_path / "a.csv")] == [300000, 1]


def test_halves_of_characters_are_counted(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "cut \\ud83d"}\n{"text": "whole \\ud83d\\ude00"}\n')
    assert "halves of characters in 1 document" in read(tmp_path / "a.jsonl").dropped


def test_a_pointer_of_git_lfs_is_no_text(tmp_path):
    (tmp_path / "a.txt").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 3\n")
    with pytest.raises(InputError, match="Git LFS pointer") as caught:
        read_documents(tmp_path / "a.txt")
    assert "git lfs pull" in caught.value.remedy


def test_every_document_has_its_place(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "one"}\n\n{"text": " "}\n{"text": "two"}\n')
    (tmp_path / "b.csv").write_text("text\nthree\none\nfour\n")
    (tmp_path / "c.log").write_text("\n\n".join(paragraphs(12)))
    reading = read(tmp_path)
    places = [(file.name, place) for file, place in reading.places]
    assert places == [
        ("a.jsonl", "line 1"),
        ("a.jsonl", "line 4"),
        ("b.csv", "row 1"),
        ("b.csv", "row 3"),
        *(("c.log", f"part {number}") for number in (1, 2, 3)),
    ]
    assert reading.documents[:4] == ["one", "two", "three", "four"]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.csv", 'id,Reply Text,text\n1,"yes, we can",no\n'),
        ("a.jsonl", '{"Reply Text": "yes, we can", "text": "no", "messages": []}\n'),
        ("a.json", '[{"Reply Text": "yes, we can"}]'),
    ],
)
def test_a_named_column_is_taken_in_place_of_all_others(tmp_path: Path, name: str, text: str) -> None:
    (tmp_path / name).write_text(text)
    assert read(tmp_path / name, "Reply Text").documents == ["yes, we can"]
    with pytest.raises(InputError, match="`answer`") as error:
        read(tmp_path / name, "answer")
    assert "Reply Text" in error.value.message


def test_a_named_field_may_hold_a_chat(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"log": [{"role": "user", "content": "hello"}], "text": "no"}\n')
    (chat,) = read(tmp_path / "a.jsonl", "log").documents
    assert list(chat) == [{"role": "user", "content": "hello"}]
