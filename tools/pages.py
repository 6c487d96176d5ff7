"""Pages of docs/ whose tables are written by tools: text between `<!-- NAME -->` and `<!-- end -->`."""

from __future__ import annotations

import re
from collections.abc import Mapping


def filled(page: str, tables: Mapping[str, str]) -> str:
    """Returns the page with every table replaced; its prose stays."""
    for name, text in tables.items():
        block = f"<!-- {name} -->\n\n{text}\n\n<!-- end -->"
        page = re.sub(rf"<!-- {name} -->.*?<!-- end -->", lambda _: block, page, flags=re.DOTALL)  # noqa: B023
    return page


def table(columns: list[str], rows: list[list[str]]) -> str:
    """Returns a table in Markdown."""
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows])
