"""The page of methods says what was measured."""

from tests.support import DOCS
from tools.quality import WRITERS, fill, read_cells


def test_the_tables_are_those_of_the_figures_beside_them():
    page = (DOCS / "quality.md").read_text(encoding="utf-8")
    assert all(f"<!-- {name} -->" in page for name in WRITERS)
    assert fill(page, read_cells(DOCS / "quality.jsonl")) == page
