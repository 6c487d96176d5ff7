"""What the tests share: models, devices, bundles, reports, and the doubles of what no test machine has."""

from pathlib import Path

ROOT = Path(__file__).parents[2]
DATA = ROOT / "tests" / "data"
DOCS = ROOT / "docs"
MOST_PAGE_BYTES = 400_000  # of report.html, frontier.html and the page of a comparison
