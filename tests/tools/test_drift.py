"""The page of drift: its tables are made of the figures beside it."""

from __future__ import annotations

import json

from tests.support import ROOT
from tools.drift import WRITERS
from tools.pages import filled

LINES = [json.loads(line) for line in (ROOT / "docs/drift.jsonl").read_text().splitlines()]


def test_the_page_is_made_of_its_figures():
    page = (ROOT / "docs/drift.md").read_text(encoding="utf-8")
    assert filled(page, {name: write(LINES) for name, write in WRITERS.items()}) == page


def test_texts_are_separated_without_overlap_and_new_speeches_are_no_drift():
    draws = {line["text"]: line["draws"] for line in LINES if line["draws"]}
    speeches, handbook, japanese = (draws[name] for name in ("speeches", "handbook", "handbook, Japanese"))
    assert max(speeches) < min(handbook)
    assert max(handbook) < min(japanese)
    (new,) = (line for line in LINES if line["text"] == "speeches")
    assert new["distance"] <= new["limit"]
    assert len(LINES) >= 8
