"""Rows of a comparison made up for tests."""

from __future__ import annotations

from edgeprune.pipeline.comparison import Row


def row(method: str, layout: str, ratio: float, value: float, **changes) -> Row:
    text = "[b]a.txt"
    rise = (value, value - 0.01, value + 0.01)
    settings = {
        "method": method,
        "layout": layout,
        "allocation": "sensitivity" if layout else "",
        "asked": ratio,
        "ratio": ratio,
        "total_ratio": 0.8 * ratio,
        "perplexity": {text: 12.3 * 2.718281828**value},
        "rise": {text: rise},
        "over_default": {},
        "parameters": 134_515_008,
        "decode_bytes": 2**28,
        "seconds": 31.04,
        "peak_bytes": 2**31,
        "fell_back": 0,
    }
    return Row(**(settings | changes))
