"""What a reader sees of a report, as a page and in the terminal."""

from __future__ import annotations

import io
import re
from html import unescape
from html.parser import HTMLParser

from rich.console import Console

from edgeprune.report.html import render_html
from tests.support.sample_reports import report_of

ATTACK = "</script><script>alert(1)</script><img src=x onerror=alert(2)>\"'{{ 7 * 7 }}"


class Parsed(HTMLParser):
    """Elements with their attributes, scripts, and the text that a reader sees, in order."""

    VOID = frozenset({"meta", "br", "img", "link"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[str] = []
        self.texts: list[str] = []
        self.open: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        while self.open and self.open.pop() != tag:
            pass

    def handle_data(self, data):
        if "script" in self.open:
            self.scripts.append(data)
        elif "body" in self.open and data.strip():
            self.texts.append(" ".join(data.split()))


def parsed(content) -> Parsed:
    return Parsed(render_html(report_of(content)))


def sections(content) -> dict[str, str]:
    """The visible text of each card by its heading."""
    text = render_html(report_of(content))
    cards = re.split(r"<h2>(.*?)</h2>", text.split("<main>")[1])
    visible = (re.sub(r"<script.*?</script>|<svg.*?</svg>|<[^>]+>", " ", card, flags=re.DOTALL) for card in cards[2::2])
    return dict(zip(cards[1::2], (" ".join(unescape(card).split()) for card in visible), strict=True))


def printed(show, subject, width: int = 80) -> list[str]:
    file = io.StringIO()
    show(subject, Console(file=file, width=width, color_system=None))
    return [line.rstrip() for line in file.getvalue().splitlines()]


def words(lines: list[str]) -> str:
    return " ".join(" ".join(lines).split())
