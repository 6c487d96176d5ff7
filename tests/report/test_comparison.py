"""The page of a comparison: a plot for each layout and text, whole and escaped."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest

from edgeprune.files import WriteError, check_output_file
from edgeprune.report.comparison import MARK, render_page, write_page
from tests.support.sample_rows import row


def test_a_method_looks_alike_in_all_plots():
    rows = [
        row("dense", "", 0.0, 0.0),
        row("default", "uniform", 0.2, 0.2),
        row("flap", "uniform", 0.2, 0.3),
        row("flap", "per-layer", 0.2, 0.3),
        row("default", "per-layer", 0.2, 0.2),
    ]
    page = render_page(rows)
    colours: dict[str, set[str]] = {}
    for colour, name in re.findall(r'"line":{"color":"(#\w+)","dash":"\w+"}.*?"name":"(\w+)"', page):
        colours.setdefault(name, set()).add(colour)
    assert set(colours) == {"default", "flap"}
    assert all(len(found) == 1 for found in colours.values())
    assert colours["default"] != colours["flap"]


def test_the_comparisons_page_is_whole_and_escapes_what_it_shows(tmp_path):
    rows = [row("dense", "", 0.0, 0.0), row("default", "uniform", 0.2, 0.215), row("default", "uniform", 0.3, 0.4)]
    rows = [replace(r, perplexity={"<script>x": 12.0}, rise={"<script>x": r.rise["[b]a.txt"]}) for r in rows]
    page = render_page(rows)
    assert "<script>x" not in page
    assert page.count('id="plot-') == 1
    assert "0.215 [0.205, 0.225]" in page
    assert "http:" not in re.sub(r"<script>.*?</script>", "", page, flags=re.DOTALL)
    assert '"type":"log"' in page
    gained = [*rows[:-1], replace(rows[-1], rise={"<script>x": (-0.1, -0.2, 0.1)})]
    assert '"type":"log"' not in render_page(gained)  # a logarithm would drop the point
    path = tmp_path / "page.html"
    write_page(path, rows)
    assert [file.name for file in tmp_path.iterdir()] == ["page.html"]
    check_output_file(path, "--html", MARK, force=True)


def test_a_full_disk_leaves_the_old_page(tmp_path, monkeypatch):
    path = tmp_path / "page.html"
    path.write_text("an old page")

    def full(path, data):
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr("pathlib.Path.write_bytes", full)
    with pytest.raises(WriteError, match="No space left on device"):
        write_page(path, [row("dense", "", 0.0, 0.0), row("default", "uniform", 0.2, 0.2)])
    assert [(file.name, file.read_text()) for file in tmp_path.iterdir()] == [("page.html", "an old page")]
