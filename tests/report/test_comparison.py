"""The page of a comparison: a plot for each layout and text, whole and escaped."""

from __future__ import annotations

import re
from dataclasses import replace
from datetime import datetime
from html import unescape

import pytest

from edgeprune import __version__
from edgeprune.files import WriteError, check_output_file
from edgeprune.pipeline.request import request_of
from edgeprune.report.comparison import MARK, curves, made_of, render_page, write_page
from edgeprune.report.svg import drawing
from tests.support import MOST_PAGE_BYTES
from tests.support.sample_rows import row

MADE = {"model": "demo", "seed": "0"}


def curve(rows, layout: str, method: str):
    with drawing():
        plot = curves([one for one in rows if one.layout == layout], "[b]a.txt", ["default", "flap"])
    return next(box.lines[0] for box in plot.axes.containers if box.get_label() == method)


def test_a_method_looks_alike_in_all_plots():
    rows = [
        row("default", "uniform", 0.2, 0.2),
        row("flap", "uniform", 0.2, 0.3),
        row("flap", "per-layer", 0.2, 0.3),
        row("default", "per-layer", 0.2, 0.2),
    ]
    looks = {
        (layout, method): (curve(rows, layout, method).get_color(), curve(rows, layout, method).get_marker())
        for layout in ("uniform", "per-layer")
        for method in ("default", "flap")
    }
    assert looks["uniform", "default"] == looks["per-layer", "default"] != looks["uniform", "flap"]
    assert looks["uniform", "flap"] == looks["per-layer", "flap"]


def test_curves_have_their_values_and_intervals():
    rows = [row("default", "uniform", 0.3, 0.4), row("default", "uniform", 0.2, 0.215)]
    line = curve(rows, "uniform", "default")
    assert list(line.get_xdata()) == [20, 30]  # by growing ratio
    assert list(line.get_ydata()) == [0.215, 0.4]


@pytest.mark.parametrize(("lowest", "scale"), [(0.1, "log"), (-0.1, "linear")])
def test_a_logarithm_is_not_taken_where_it_would_drop_a_point(lowest, scale):
    rows = [row("default", "uniform", 0.2, 0.2), row("default", "uniform", 0.3, lowest)]
    with drawing():
        plot = curves(rows, "[b]a.txt", ["default"])
        assert plot.axes.get_yscale() == scale
        assert "mathdefault" not in plot.svg("x", "x")


def test_the_comparisons_page_is_whole_and_escapes_what_it_shows(tmp_path):
    rows = [row("dense", "", 0.0, 0.0), row("default", "uniform", 0.2, 0.215), row("default", "uniform", 0.3, 0.4)]
    rows = [replace(r, perplexity={"<script>x": 12.0}, rise={"<script>x": r.rise["[b]a.txt"]}) for r in rows]
    page = render_page(rows, MADE | {"model": "<script>y"})
    assert not {"<script>x", "<script>y"} & {page[at.start() : at.start() + 9] for at in re.finditer("<script>", page)}
    assert page.count('id="plot-') == 1
    assert "0.215 [0.205, 0.225]" in page
    assert not re.findall(r'(?:src|href)="[^#]', page)
    assert len(page.encode()) < MOST_PAGE_BYTES
    path = tmp_path / "page.html"
    write_page(path, rows, MADE)
    assert [file.name for file in tmp_path.iterdir()] == ["page.html"]
    check_output_file(path, "--html", MARK, force=True)


def test_the_page_of_all_methods_is_light():
    rows = [row("dense", "", 0.0, 0.0)]
    rows += [
        row(f"method-{number}", layout, ratio, ratio + number / 10)
        for number in range(14)
        for layout in ("uniform", "per-layer")
        for ratio in (0.1, 0.2, 0.3, 0.5)
    ]
    assert len(render_page(rows, MADE).encode()) < MOST_PAGE_BYTES


def test_the_page_names_what_it_is_of_and_how_it_was_made():
    request = request_of(model="my-model", calibration="my notes", seed=3, samples=64)
    made = made_of(request, ratios="20,30", methods="all", layout="both")
    assert made["model"] == "my-model"
    assert made["seed"] == "3"
    assert made["samples"] == "64 of my notes to calibrate on; judged on documents of it that were held out"
    assert made["command"] == (
        "edgeprune compare my-model --calibration 'my notes' --samples 64 --seed 3 --ratios 20,30 --methods all "
        "--layout both"
    )
    assert made["version"].startswith(f"edgeprune {__version__}, python")
    assert made["device"].startswith("this machine: ")
    assert datetime.fromisoformat(made["date"])
    page = render_page([row("dense", "", 0.0, 0.0), row("default", "uniform", 0.2, 0.2)], made)
    text = " ".join(unescape(re.sub("<[^>]+>", " ", page)).split())
    assert all(f"{name} {value}" in text for name, value in made.items())


def test_samples_of_the_models_own_are_called_so():
    own = made_of(request_of(model="m", calibration="self", evaluate="a.txt"))
    assert own["samples"].endswith("that the dense model makes itself to calibrate on; judged on a.txt")


def test_a_full_disk_leaves_the_old_page(tmp_path, monkeypatch):
    path = tmp_path / "page.html"
    path.write_text("an old page")

    def full(path, data):
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr("pathlib.Path.write_bytes", full)
    with pytest.raises(WriteError, match="No space left on device"):
        write_page(path, [row("dense", "", 0.0, 0.0), row("default", "uniform", 0.2, 0.2)], MADE)
    assert [(file.name, file.read_text()) for file in tmp_path.iterdir()] == [("page.html", "an old page")]
