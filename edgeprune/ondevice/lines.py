"""The lines of JSON that come from other processes: of bounded length, with texts that are safe to print and to keep.

This file also runs on the device: Python 3.10, standard library only. It does not know what the lines mean.
"""

from __future__ import annotations

import json
from typing import Any

from edgeprune.files import printable

MOST_LINE = 1 << 20  # bytes or characters; answers have some thousands
MOST_TEXT = 4000  # characters; the middle of a longer text is left out


def document_of(line: bytes | str) -> dict[str, Any]:
    """Returns the JSON object in a line, every text in it without control characters; empty for any other line."""
    try:
        document = _clean(json.loads(line))
    except (ValueError, RecursionError):
        return {}
    return document if isinstance(document, dict) else {}


def one_line(text: object) -> str:
    """Returns a stranger's text in one line that is safe to print."""
    return " ".join(printable(text, MOST_TEXT).split())


def _clean(value: Any) -> Any:
    """Returns a JSON value whose texts, keys included, are safe to print."""
    if isinstance(value, str):
        return one_line(value)
    if isinstance(value, list):
        return [_clean(item) for item in value]
    if isinstance(value, dict):
        return {one_line(key): _clean(item) for key, item in value.items()}
    return value
