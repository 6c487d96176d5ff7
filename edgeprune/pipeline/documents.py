"""Samples of text as documents: files and folders read as their author meant them, and what was read in words.

Formats are recognised by their content. It knows nothing about models and tokenizers.
"""

from __future__ import annotations

import csv
import io
import json
import re
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from edgeprune.errors import InputError
from edgeprune.files import printable
from edgeprune.pipeline.chats import Chat, chat_of, is_bare

TEXT_SUFFIXES = (".txt", ".md", ".rst", ".text", ".log")
RECORD_SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv")
JSON_SUFFIXES = (".jsonl", ".ndjson", ".json")
DOCUMENT_CHARACTERS = 2000  # paragraphs, or lines, are joined up to this size
LONG_LINE = 160  # characters; where most lines are longer and none is blank, each is a document
TEXT_FIELDS = ("text", "content")
READABLE = "Give UTF-8 text, JSON lines with `text` or `messages`, a table with a column `text`, or a folder of these."
SHOWN = 5  # names in a message
# What a file may be that is no text, by its first bytes.
BINARY = {
    b"PAR1": ("a Parquet file", "Write its text column as JSON lines, such as pandas.read_parquet(...).to_json(...)"),
    b"\x1f\x8b": ("a gzip archive", "Unpack it with gunzip"),
    b"PK\x03\x04": ("a zip archive, or an office document", "Unpack it, or save it as text"),
    b"(\xb5/\xfd": ("a zstd archive", "Unpack it with unzstd"),
    b"BZh": ("a bzip2 archive", "Unpack it with bunzip2"),
    b"\xfd7zXZ": ("an xz archive", "Unpack it with unxz"),
    b"%PDF": ("a PDF", "Make text of it with pdftotext"),
    b"version https://git-lfs": ("a Git LFS pointer", "Fetch the file itself with git lfs pull"),
    b"\xff\xfe": ("UTF-16", "Write it as UTF-8: iconv -f UTF-16 -t UTF-8"),
    b"\xfe\xff": ("UTF-16", "Write it as UTF-8: iconv -f UTF-16 -t UTF-8"),
}
_BEGINS_AS_JSON = re.compile(r"""\{\s*["']|\[\s*(?:\[\s*)?[{"]""")  # LaTeX, jinja and links begin otherwise
_HALF_CHARACTER = re.compile("[\ud800-\udfff]")

Document = str | Chat


@dataclass
class Reading:
    """The content of a file or a folder: its documents, duplicates removed, and how they came about.

    places: of each document, the file and the line or number in it; formats: files of each; duplicates, empty:
    documents that were dropped; halved: documents with half of a surrogate pair in them, which becomes U+FFFD;
    left_out: files, with the reason.
    """

    path: Path
    documents: list[Document] = field(default_factory=list)
    places: list[tuple[Path, str]] = field(default_factory=list)
    formats: Counter[str] = field(default_factory=Counter)
    duplicates: int = 0
    empty: int = 0
    halved: int = 0
    left_out: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        files = ", ".join(f"{count} of {name}" if count > 1 else name for name, count in self.formats.items())
        characters = sum(len(document) for document in self.documents if isinstance(document, str))
        size = f" of {characters:,} characters" if characters else ""
        return f"{files}; {plural(len(self.documents), 'document')}{size}"

    @property
    def dropped(self) -> str:
        """Returns what was not taken and why, in words."""
        parts = [f"{plural(self.duplicates, 'duplicate')} removed"] if self.duplicates else []
        parts += [f"{self.empty} without text"] if self.empty else []
        parts += [f"halves of characters in {plural(self.halved, 'document')}"] if self.halved else []
        if self.left_out:
            more = f" and {len(self.left_out) - SHOWN} more" if len(self.left_out) > SHOWN else ""
            parts.append(f"not read: {', '.join(self.left_out[:SHOWN])}{more}")
        return "; ".join(parts) or "nothing was left out"


def plural(count: int, noun: str) -> str:
    """Returns a number of things in words."""
    return f"{count:,} {noun}" + ("" if count == 1 else "s")


def read_documents(path: Path) -> list[Document]:
    """Returns the documents of a file or a folder, as `read` finds them."""
    return read(path).documents


def read(path: Path, column: str | None = None) -> Reading:
    """Reads a file, or the files of a folder in a fixed order; what is hidden there, or of other kinds, is left out.

    column: of tables, or field of records, that holds the text; None: those of TEXT_FIELDS, prompt and completion.
    Raises InputError, which names file and line, for what is missing, empty, binary or malformed.
    """
    reading = Reading(path)
    if path.is_dir():
        for file in sorted(path.rglob("*")):
            if not file.is_file():
                continue
            name = str(file.relative_to(path))
            if any(part.startswith(".") for part in Path(name).parts):
                continue
            if file.suffix.lower() not in (*TEXT_SUFFIXES, *RECORD_SUFFIXES):
                reading.left_out.append(name)
                continue
            try:
                _add(reading, file, column)
            except _NoSamples as error:
                reading.left_out.append(f"{name} ({error.reason})")
        if not reading.formats:
            raise InputError(f"{path} holds no file of text or records{_but(reading.left_out)}", READABLE)
    elif path.exists():
        _add(reading, path, column)
    else:
        raise InputError(f"no such file or folder of samples: {path}", READABLE)
    _drop_duplicates(reading)
    if not reading.documents:
        raise InputError(f"{path} holds no text", READABLE)
    return reading


def _but(left_out: list[str]) -> str:
    return f", only {', '.join(left_out[:SHOWN])}" if left_out else ""


class _NoSamples(InputError):
    """A file that is well-formed, but holds something else than samples; a folder may hold it beside them."""

    def __init__(self, path: Path, reason: str, remedy: str = READABLE) -> None:
        super().__init__(f"{path}: {reason}", remedy)
        self.reason = reason


def _drop_duplicates(reading: Reading) -> None:
    """Keeps the first of equal documents, and those that hold text."""
    unique: dict[str, tuple[Document, tuple[Path, str]]] = {}
    for document, place in zip(reading.documents, reading.places, strict=True):
        tools = document.tools if isinstance(document, Chat) else None
        unique.setdefault(json.dumps([document, tools], ensure_ascii=False), (document, place))
    reading.halved = sum(1 for content in unique if _HALF_CHARACTER.search(content))
    kept = [pair for pair in unique.values() if not isinstance(pair[0], str) or pair[0].strip()]
    reading.duplicates = len(reading.documents) - len(unique)
    reading.empty += len(unique) - len(kept)
    reading.documents, reading.places = [document for document, _ in kept], [place for _, place in kept]


def _add(reading: Reading, path: Path, column: str | None) -> None:
    """Adds the documents of a file, by the format that its content shows."""
    text = _decoded(path)
    # Line ends of every system; a form feed and a paragraph separator end a paragraph.
    text = re.sub(r"\r\n?", "\n", text)
    suffix = path.suffix.lower()
    if suffix in (".csv", ".tsv"):
        kind, documents = "table", _of_table(path, text, "\t" if suffix == ".tsv" else ",", column)
        places = [f"row {number}" for number in range(1, len(documents) + 1)]
    elif (records := _records(path, text, suffix)) is not None:
        kind, documents = "JSON", [_document(record, place, path, column) for place, record in records]
        places = [place.removeprefix(f"{path}").removeprefix(", ") for place, _ in records]
    else:
        kind, documents = _split(text)
        places = [f"part {number}" for number in range(1, len(documents) + 1)]
    reading.formats[kind] += 1
    reading.documents += documents
    reading.places += [(path, place) for place in places]


def _decoded(path: Path) -> str:
    """Returns the text of a file. Raises InputError, which says what it is instead."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}", READABLE) from None
    for head, (kind, remedy) in BINARY.items():
        if data.startswith(head):
            raise InputError(f"{path} is {kind}, not UTF-8 text", f"{remedy}, and give that.")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(
            f"{path} is not UTF-8 text (byte {error.start})", f"{READABLE} iconv -f LATIN1 -t UTF-8 may help."
        ) from None
    if "\0" in text:
        raise InputError(f"{path} is a binary file (byte {text.index(chr(0))} is 0)", READABLE)
    return text


def _records(path: Path, text: str, suffix: str) -> list[tuple[str, Any]] | None:
    """Returns the records of JSON or of JSON lines, each with its place; None for text that is neither.

    Raises InputError for a line that is none, once the first one is or the suffix says that all are.
    """
    is_named = suffix in JSON_SUFFIXES
    if not text.strip():
        return [] if is_named else None
    if not is_named and text.lstrip()[0] not in "{[":
        return None
    try:
        content = _json(text)
    except ValueError as error:
        whole_error = error
    else:
        if is_bare(content):
            return [(str(path), content)]
        if isinstance(content, list) and (is_named or all(isinstance(record, dict | list) for record in content)):
            return _numbered(path, content)
        if isinstance(content, dict):
            lists = [value for value in content.values() if isinstance(value, list) and _all_dicts(value)]
            is_record = {"messages", "conversations", *TEXT_FIELDS} & content.keys()
            if len(lists) == 1 and not is_record:
                return _numbered(path, lists[0])
            return [(f"{path}, line 1", content)]
        return [(f"{path}, line 1", content)] if is_named else None
    # Not one document: a line each.
    lines = [(number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
    records = []
    for number, line in lines:
        try:
            records.append((f"{path}, line {number}", _json(line)))
        except ValueError as error:
            if records and (is_named or isinstance(records[0][1], dict)):
                raise InputError(f"{path}, line {number}, is not JSON: {error}", READABLE) from None
            if is_named:
                raise InputError(f"{path} is not JSON: {whole_error}", READABLE) from None
            if _BEGINS_AS_JSON.match(text.lstrip()[:100]):
                raise InputError(f"{path} begins as JSON does, but is none: {whole_error}", READABLE) from None
            return None
    return records


def _numbered(path: Path, records: list[Any]) -> list[tuple[str, Any]]:
    return [(f"{path}, record {number}", record) for number, record in enumerate(records, 1)]


def _all_dicts(values: list[Any]) -> bool:
    return bool(values) and all(isinstance(value, dict) for value in values)


def _json(text: str) -> Any:
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def _document(record: Any, place: str, path: Path, column: str | None) -> Document:
    """Returns the document of a record: its text, a prompt with its completion, or a chat; or the named field alone."""
    if isinstance(record, str):
        return record
    if is_bare(record):
        record = {"messages": record}
    if not isinstance(record, dict):
        raise InputError(f"{place}, is neither an object nor a text: {printable(repr(record), 60)}", READABLE)
    fields = ", ".join(printable(name, 40) for name in list(record)[:8]) or "no fields"
    if column is not None:
        if column not in record:
            reason = f"{place.rpartition(', ')[2]} has no `{printable(column, 40)}`, but {fields}"
            raise _NoSamples(path, reason, "Name the field that holds the text.")
        is_chat = is_bare(record[column])
        record = {"messages": record[column], "tools": record.get("tools")} if is_chat else {column: record[column]}
    if (chat := chat_of(record, place)) is not None:
        return chat
    for name in TEXT_FIELDS if column is None else (column,):
        if name in record:
            if not isinstance(record[name], str):
                raise InputError(f"{place}: `{name}` is {printable(repr(record[name]), 60)}, not a text", READABLE)
            return record[name]
    if all(isinstance(record.get(name), str) for name in ("prompt", "completion")):
        return record["prompt"] + record["completion"]
    raise _NoSamples(
        path,
        f"{place.rpartition(', ')[2]} has neither `text` nor `messages`, but {fields}",
        "Rename the field that holds the text to `text`, or write chats as `messages` of `role` and `content`.",
    )


def _of_table(path: Path, text: str, delimiter: str, column: str | None) -> list[Document]:
    """Returns the named column of a table; None: `text` or `content`, or `prompt` and `completion` joined."""
    first = text.partition("\n")[0]
    if delimiter not in first and ";" in first:  # as spreadsheets write it where the comma is decimal
        delimiter = ";"
    csv.field_size_limit(sys.maxsize)  # else of 131072 characters
    try:
        rows = list(csv.DictReader(io.StringIO(text, newline=""), delimiter=delimiter))
    except csv.Error as error:
        raise InputError(f"{path} is not a table: {error}", READABLE) from None
    columns = [name for name in (rows[0] if rows else {}) if name is not None]
    known = {name.strip().lower(): name for name in columns}
    wanted = (("text",), ("content",), ("prompt", "completion")) if column is None else ((column.strip().lower(),),)
    chosen = next((names for names in wanted if {*names} <= {*known}), None)
    if chosen is None:
        held = ", ".join(printable(name, 40) for name in columns[:8]) or "none"
        name = "text" if column is None else printable(column, 40)
        remedy = "Name one of these." if column else "Rename the column that holds the text to `text`."
        raise _NoSamples(path, f"no column `{name}`, the columns are: {held}", remedy)
    return ["".join(row[known[name]] or "" for name in chosen) for row in rows]


def _split(text: str) -> tuple[str, list[Document]]:
    """Returns how a text was split, and its documents: at blank lines, else at lines, else by length."""
    text = re.sub(r"[\f\u2029]", "\n\n", text.replace("\x85", "\n").replace("\u2028", "\n"))
    paragraphs = [part for part in (part.strip("\n") for part in re.split(r"\n[^\S\n]*\n", text)) if part.strip()]
    if len(paragraphs) == 1:
        lines = [line for line in paragraphs[0].split("\n") if line.strip()]
        if len(lines) > 1 and sorted(map(len, lines))[len(lines) // 2] >= LONG_LINE:
            return "text, a document on each line", list(lines)
    pieces = [piece for paragraph in paragraphs for piece in _pieces(paragraph)]
    how = "text" if len(pieces) == len(paragraphs) else "text, split by length"
    return how, list(_joined(pieces, "\n\n"))


def _pieces(paragraph: str) -> list[str]:
    """Returns a paragraph, or where it is a document's size twice its lines joined; a line of that size in parts."""
    if len(paragraph) <= 2 * DOCUMENT_CHARACTERS:
        return [paragraph]
    parts = [part for line in paragraph.split("\n") if line.strip() for part in _parts(line)]
    return list(_joined(parts, "\n"))


def _parts(line: str) -> Iterator[str]:
    """Yields a line in parts of about a document's size, cut at a space where there is one."""
    while len(line) > 2 * DOCUMENT_CHARACTERS:
        space = line.find(" ", DOCUMENT_CHARACTERS, DOCUMENT_CHARACTERS * 3 // 2)
        end = DOCUMENT_CHARACTERS if space < 0 else space + 1
        yield line[:end].rstrip()
        line = line[end:]
    yield line


def _joined(pieces: list[str], separator: str) -> Iterator[str]:
    """Yields pieces joined up to a document's size."""
    current: list[str] = []
    for piece in pieces:
        current.append(piece)
        if sum(map(len, current)) >= DOCUMENT_CHARACTERS:
            yield separator.join(current)
            current = []
    if current:
        yield separator.join(current)
