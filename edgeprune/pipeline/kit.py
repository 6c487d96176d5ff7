"""The calibration kit: texts and chats of any origin as documents that are masked, cut, unlike each other and labelled.

It knows no model: which of them are taken is decided elsewhere.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from edgeprune import __version__
from edgeprune.errors import InputError
from edgeprune.pipeline.balance import Group, languages_of
from edgeprune.pipeline.chats import Chat
from edgeprune.pipeline.documents import READABLE, Document, read
from edgeprune.pipeline.masking import PLACEHOLDERS, Masker
from edgeprune.pipeline.near_duplicates import near_duplicates
from edgeprune.pipeline.samples import Source
from edgeprune.progress import Progress

MARK = '"by": "edgeprune samples"'  # near the beginning of every file that is written
BYTES_PER_TOKEN = 4  # of UTF-8, about, of most languages and tokenizers; exact where a model is named


@dataclass(frozen=True)
class Sample:
    """A document with its origin: source, of the balance; file and place in it; masked: how much of each kind."""

    document: Document
    source: str
    place: str
    masked: dict[str, int]
    language: str = ""

    @property
    def group(self) -> Group:
        return self.source, self.language

    @property
    def text(self) -> str:
        """Returns the text alone, of a chat that of all its messages."""
        return text_of(self.document)

    @property
    def bytes(self) -> int:
        return len(self.text.encode("utf-8", "replace"))

    def as_record(self, role: str) -> dict[str, Any]:
        """Returns the line of a file: what it holds, and where that is from; role: what it was chosen for."""
        origin = {"by": "edgeprune samples", "version": __version__, "source": self.place, "language": self.language}
        provenance = {**origin, "role": role, "masked": self.masked}
        if isinstance(self.document, str):
            return {"provenance": provenance, "text": self.document}
        tools = {"tools": self.document.tools} if self.document.tools else {}
        return {"provenance": provenance, "messages": list(self.document), **tools}


@dataclass
class Collection:
    """The samples that are unlike each other, and what was done to them.

    sources: what was read in words; masked: of each kind; masked_documents: that had any; exact, near: duplicates that
    were removed.
    """

    samples: list[Sample] = field(default_factory=list)
    sources: list[Source] = field(default_factory=list)
    masked: Counter[str] = field(default_factory=Counter)
    masked_documents: int = 0
    exact: int = 0
    near: int = 0


def text_of(document: Document) -> str:
    """Returns the text of a document; of a chat its messages' contents and calls of tools, a paragraph each."""
    if isinstance(document, str):
        return document
    parts = [message.get("content") or "" for message in document]
    parts += [json.dumps(message["tool_calls"], ensure_ascii=False) for message in document if "tool_calls" in message]
    return "\n\n".join(part for part in parts if part)


def collect(paths: Sequence[Path], masker: Masker, column: str | None, length: int, progress: Progress) -> Collection:
    """Reads files and folders; masks, cuts texts to about `length` tokens, removes duplicates, tells languages.

    A chat stays whole. column: as of `documents.read`. Raises InputError for what cannot be read.
    """
    collection = Collection()
    advance = progress.stage("read and mask", len(paths))
    for path in paths:
        for sample in _read(path, masker, column, len(paths) == 1, collection):
            collection.samples += _cut(sample, length)
        progress.note(str(collection.sources[-1]))
        advance()
    _drop_duplicates(collection, progress)
    if not collection.samples:
        raise InputError("the samples hold no text", READABLE)
    texts = [sample.text for sample in collection.samples]
    advance = progress.stage("tell languages", len(texts))
    languages = languages_of(texts, [sample.source for sample in collection.samples], advance)
    collection.samples = [
        Sample(sample.document, sample.source, sample.place, sample.masked, language)
        for sample, language in zip(collection.samples, languages, strict=True)
    ]
    return collection


def _read(path: Path, masker: Masker, column: str | None, is_only: bool, collection: Collection) -> Iterator[Sample]:
    """Yields the masked documents of a path. Where it is the only one, its folders are the sources, else itself."""
    reading = read(path, column)
    name = path.resolve().name
    collection.sources.append(Source(f"read {name}", str(reading), reading.dropped))
    collection.exact += reading.duplicates
    for document, (file, place) in zip(reading.documents, reading.places, strict=True):
        inner = file.relative_to(path).parts if path.is_dir() else ()
        source = "/".join((name, *inner[:1])) if is_only and len(inner) > 1 else name
        masked, counts = masker.document(document)
        collection.masked.update(counts)
        collection.masked_documents += bool(counts)
        yield Sample(masked, source, ", ".join(filter(None, ("/".join((name, *inner)), place))), dict(counts))


def _cut(sample: Sample, length: int) -> Iterator[Sample]:
    """Yields a text in equal parts of about `length` tokens at most, cut at white space where there is some."""
    document = sample.document
    count = -(-sample.bytes // (BYTES_PER_TOKEN * length))
    if isinstance(document, Chat) or count <= 1:
        yield sample
        return
    start = 0
    for left in range(count, 0, -1):
        size = -(-(len(document) - start) // left)
        space = max(document.rfind(character, start + size // 2, start + size) for character in " \n")
        end = start + size if space < 0 or left == 1 else space + 1
        if part := document[start:end].strip():
            masked = {kind: number for kind in sample.masked if (number := part.count(PLACEHOLDERS[kind]))}
            yield Sample(part, sample.source, f"{sample.place}, from character {start + 1}", masked)
        start = end


def _drop_duplicates(collection: Collection, progress: Progress) -> None:
    """Keeps the first of equal and of nearly equal samples."""
    unique: dict[str, Sample] = {}
    for sample in collection.samples:
        if sample.text.strip():
            tools = None if isinstance(sample.document, str) else sample.document.tools
            unique.setdefault(json.dumps([sample.document, tools]), sample)
    collection.exact += len(collection.samples) - len(unique)
    samples = list(unique.values())
    advance = progress.stage("find near duplicates", len(samples))
    firsts = near_duplicates([sample.text for sample in samples], advance)
    collection.samples = [sample for number, sample in enumerate(samples) if firsts[number] == number]
    collection.near = len(samples) - len(collection.samples)
