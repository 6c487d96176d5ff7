"""Documents as token ids: chats through the model's template, held out, and packed into rows of equal length.

It reads no files, and knows of a model its tokenizer alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from edgeprune.chats import encode, render_whole
from edgeprune.errors import InputError
from edgeprune.pipeline.chats import Chat
from edgeprune.pipeline.documents import Document

GENERATED = 32  # samples of the model's own beside the user's, however many those are
HELD_OUT_EVERY = 5  # one document of so many is held out for evaluation
HELD_OUT_TOKENS = 1 << 16  # of those, to evaluate on: more take long and narrow an interval little
HELD_OUT_LEAST = 16  # documents, however long: an interval is that of documents


def tokenize(documents: Iterable[Document], tokenizer: Any) -> Iterator[np.ndarray]:
    """Yields the token ids (tokens,) int64 of each document; chats go through the chat template.

    Raises InputError where a chat meets a tokenizer without template, or a template that refuses it or leaves out what
    it calls: file and line are named.
    """
    for document in documents:
        if isinstance(document, str):
            ids = encode(tokenizer, document)
        else:
            ids = encode(tokenizer, _rendered(document, tokenizer), special=False)
        yield np.asarray(ids, dtype=np.int64)


def _rendered(chat: Chat, tokenizer: Any) -> str:
    """Returns the text of a chat by the model's template. Raises InputError."""
    if tokenizer.chat_template is None:
        raise InputError(
            f"{chat.place}: the samples are chats, but the model's tokenizer has no chat template",
            "Give plain text instead: lines with `text`.",
        )
    try:
        return render_whole(tokenizer, chat, chat.tools)
    except InputError as error:
        raise InputError(f"{chat.place}: {error.message}", error.remedy) from None


def shuffled(documents: Sequence[Any], seed: int) -> list[Any]:
    """Returns the documents in a drawn order: samples from all over a text stand for it better than its first pages."""
    return [documents[i] for i in np.random.default_rng(seed).permutation(len(documents))]


def hold_out(documents: Sequence[Any], seed: int) -> tuple[list[Any], list[Any]]:
    """Returns the documents for calibration and, one in five, for evaluation; shuffled, at least one each."""
    count = max(1, len(documents) // HELD_OUT_EVERY)
    mixed = shuffled(documents, seed)
    return mixed[count:], mixed[:count]


def enough_held_out(documents: Iterable[np.ndarray]) -> list[np.ndarray]:
    """Returns the first of the held-out documents (tokens,), as many as there are tokens to evaluate on."""
    taken: list[np.ndarray] = []
    tokens = 0
    for document in documents:
        if tokens >= HELD_OUT_TOKENS and len(taken) >= HELD_OUT_LEAST:
            break
        taken.append(document)
        tokens += len(document)
    return taken


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
