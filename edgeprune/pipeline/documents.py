"""Calibration data: documents from text, jsonl or a folder; packed into rows of equal length.

It reads and splits text. It knows nothing about models but their tokenizer; texts that the model
generates itself come in as documents of token ids.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from edgeprune.errors import InputError

TEXT_SUFFIXES = (".txt", ".md", ".rst")
DOCUMENT_CHARACTERS = 2000  # paragraphs of one text file are joined up to this size
GENERATED = 32  # samples of the model's own beside the user's, however many those are
HELD_OUT_EVERY = 5  # one document of so many is held out for evaluation
READABLE = "Give a UTF-8 text file, a .jsonl file (lines with `text` or `messages`), or a folder of such files."

Document = str | list[dict[str, str]]  # plain text, or the messages of a chat


def read_documents(path: Path) -> list[Document]:
    """Returns the documents of a text file, a jsonl file or a folder, duplicates removed, in a fixed order.

    Raises InputError for what is missing, empty, binary or malformed.
    """
    if path.is_dir():
        files = sorted(f for f in path.rglob("*") if f.suffix in (*TEXT_SUFFIXES, ".jsonl") and f.is_file())
        if not files:
            raise InputError(f"{path} holds no {', '.join(TEXT_SUFFIXES)} or .jsonl file", READABLE)
        documents = [document for file in files for document in _read_file(file)]
    elif path.is_file():
        documents = _read_file(path)
    else:
        raise InputError(f"no such file or folder of samples: {path}", READABLE)
    unique = {json.dumps(document): document for document in documents}
    if not unique:
        raise InputError(f"{path} holds no text", READABLE)
    return list(unique.values())


def _read_file(path: Path) -> list[Document]:
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}", READABLE) from None
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 text (byte {error.start})", READABLE) from None
    if "\0" in text:
        raise InputError(f"{path} is a binary file (byte {text.index(chr(0))} is 0)", READABLE)
    return _read_jsonl(path, text) if path.suffix == ".jsonl" else _join_paragraphs(text)


def _join_paragraphs(text: str) -> list[Document]:
    documents: list[Document] = []
    current: list[str] = []
    for paragraph in text.split("\n\n"):
        if paragraph.strip():
            current.append(paragraph.strip("\n"))
        if sum(map(len, current)) >= DOCUMENT_CHARACTERS:
            documents.append("\n\n".join(current))
            current = []
    return documents + (["\n\n".join(current)] if current else [])


def _read_jsonl(path: Path, text: str) -> list[Document]:
    documents: list[Document] = []
    for number, line in enumerate(text.splitlines(), 1):
        if line.strip():
            try:
                documents.append(_document(json.loads(line)))
            except (ValueError, KeyError, TypeError):
                raise InputError(
                    f'{path}, line {number}: neither {{"text": ...}} nor '
                    '{"messages": [{"role": ..., "content": ...}, ...]}',
                    READABLE,
                ) from None
    return [document for document in documents if document]


def _document(record: Any) -> Document:
    if isinstance(record, dict) and "messages" in record:
        return [{"role": str(m["role"]), "content": str(m["content"])} for m in record["messages"]]
    text = record if isinstance(record, str) else record["text"]
    if not isinstance(text, str):
        raise TypeError
    return text


def tokenize(documents: Iterable[Document], tokenizer: Any) -> Iterator[np.ndarray]:
    """Yields the token ids (tokens,) int64 of each document; chats go through the chat template.

    Raises InputError where a chat meets a tokenizer without template.
    """
    for document in documents:
        if isinstance(document, str):
            ids = tokenizer(document, verbose=False)["input_ids"]
        elif tokenizer.chat_template is None:
            raise InputError(
                "the samples are chats, but the model's tokenizer has no chat template",
                "Give plain text instead: lines with `text`.",
            )
        else:
            text = tokenizer.apply_chat_template(document, tokenize=False)
            ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        yield np.asarray(ids, dtype=np.int64)


def shuffled(documents: Sequence[Any], seed: int) -> list[Any]:
    """Returns the documents in a drawn order: samples from all over a text stand for it better than its first pages."""
    return [documents[i] for i in np.random.default_rng(seed).permutation(len(documents))]


def hold_out(documents: Sequence[Any], seed: int) -> tuple[list[Any], list[Any]]:
    """Returns the documents for calibration and, one in five, for evaluation; shuffled, at least one each."""
    count = max(1, len(documents) // HELD_OUT_EVERY)
    mixed = shuffled(documents, seed)
    return mixed[count:], mixed[:count]


def pack(documents: Iterable[np.ndarray], samples: int, length: int, separator: int | None) -> np.ndarray:
    """Joins documents, the separator token between, and cuts them into rows: (samples, length) int64.

    Documents are taken until there are enough tokens. Raises InputError with the number that is missing.
    """
    pieces: list[np.ndarray] = []
    needed, available = samples * length, 0
    for document in documents:
        pieces += [document] if separator is None else [document, np.array([separator])]
        available += len(document) + (separator is not None)
        if available >= needed:
            return np.concatenate(pieces)[:needed].reshape(samples, length).astype(np.int64)
    possible = available // length
    raise InputError(
        f"{samples} samples of {length} tokens need {needed} tokens, the calibration text has "
        f"{available}: {needed - available} are missing",
        f"Add text, or try --samples {possible}."
        if possible
        else f"Add text, or try --samples 1 --length {max(1, available)}.",
    )
