"""The report of an image generator: its pictures side by side, their distances with what they rest on, its words."""

import json
import re

import jsonschema
import pytest
from pydantic import ValidationError

from edgeprune.report.frontier import frontier_of
from edgeprune.report.frontier_page import render_frontier
from edgeprune.report.html import render_html
from edgeprune.report.images import Interval, pictures_part
from edgeprune.report.quality import quality_part
from edgeprune.report.schema import Report
from edgeprune.report.terminal import print_report
from tests.support.pages import ATTACK, parsed, printed, sections, words
from tests.support.sample_pictures import REFERENCE, distances, found, pictures_content
from tests.support.sample_reports import estimated_content, report_of

FEW = (
    "500 pictures of each model against 600 of the dense model's other samples, seen by EfficientNet-lite0 57934424: "
    "figures of other networks or other counts do not compare. The Frechet distance has a bias that grows as pictures "
    "get fewer: 300 of the reference and 300 others of it are 11.2 apart. The kernel distance has none."
)
MISSING = {
    "dense": None,
    "fitted": None,
    "difference": None,
    "missing": "torchmetrics is not installed. pip install it",
}


def test_an_evaluation_as_it_stands_in_the_report():
    part = pictures_part(json.loads(json.dumps(found())))
    assert part.fitted.kernel == Interval(value=0.0123, low=0.0123 - 0.002, high=0.0123 + 0.003)
    assert (part.fitted.frechet.value, part.fitted.frechet.floor) == (14.75, 11.234)
    assert (part.dense.recall.value, part.difference.value, part.images) == (0.79, 0.0122, 500)
    assert pictures_part(found(**MISSING)).dense is None
    losses = {
        "dense": 10.0,
        "fitted": 11.0,
        "percent": 10.0,
        "low": 8.0,
        "high": 12.0,
        "documents": 5,
        "tokens": 9,
        "agreement": None,
    }
    none = dict.fromkeys(("prompt", "dense_sample", "fitted_sample"))
    assert quality_part("perplexity", {"a": losses}, None, pictures=found(), **none).pictures == part


@pytest.mark.parametrize("grid", ["http://x/y.png", 'data:image/png;base64,AA"onerror=', "data:text/html;base64,AA"])
def test_a_grid_is_an_image_and_nothing_else(grid):
    with pytest.raises(ValidationError, match="fitted_grid"):
        pictures_part(found(fitted_grid=grid))


@pytest.mark.slow
@pytest.mark.parametrize("changes", [{}, MISSING, {"difference": None, "classes": []}])
def test_it_reads_back_equal_and_follows_the_schema(changes):
    report = report_of(pictures_content(**changes))
    assert Report.model_validate_json(report.model_dump_json()) == report
    jsonschema.validate(json.loads(report.model_dump_json()), Report.model_json_schema())
    assert render_html(report)


def test_both_grids_stand_side_by_side_with_seeds_and_classes():
    page, card = parsed(pictures_content()), sections(pictures_content())["What does it cost in pictures?"]
    shown = [attributes for tag, attributes in page.elements if tag == "img"]
    assert [(of["src"], of["alt"]) for of in shown] == [
        (found()["dense_grid"], "pictures of the dense model"),
        (found()["fitted_grid"], "pictures of the fitted model"),
    ]
    assert "The same seeds and classes in both, of 28 pixels each, temperature 1, guidance 1.75." in card
    assert "Classes, row by row: 207, 360, 387, 974, 88, 979, 417, 279." in card
    assert "Asked:" not in card
    unguided = sections(pictures_content(cfg=1.0, classes=[]))["What does it cost in pictures?"]
    assert "The same seeds in both, of 28 pixels each, temperature 1, no guidance." in unguided


@pytest.mark.parametrize(("side", "pixelated"), [(28, True), (256, False)])
def test_small_pictures_are_scaled_up_by_whole_pixels(side, pixelated):
    classes = [a.get("class") or "" for tag, a in parsed(pictures_content(side=side)).elements if tag == "div"]
    assert any("pixelated" in name for name in classes) == pixelated


def test_distances_stand_with_intervals_network_counts_and_the_floor():
    card = sections(pictures_content())["How good are the pictures?"]
    assert f"to {REFERENCE} fitted dense" in card
    assert "kernel distance 0.0123 (0.0103 to 0.0153) measured 0.0001 (-0.0019 to 0.0031) measured" in card
    assert "Frechet distance 14.8 measured 11.5 measured" in card
    assert "recall: as diverse as it 0.66 (0.61 to 0.71) measured" in card
    assert "the fitted model's pictures are farther off than the dense model's. " + FEW in card


def test_what_is_missing_is_said():
    assert f"No distances: {MISSING['missing']}" in sections(pictures_content(**MISSING))["How good are the pictures?"]
    text = words(printed(print_report, report_of(pictures_content(**MISSING))))
    assert f"no distances: {MISSING['missing']}" in text


def test_an_image_generator_is_described_in_a_pictures_words():
    cards = sections(pictures_content())
    noticed = cards["How fast does it feel?"]
    takes = "fitted dense a picture takes 0.432 s estimated 0.643 s estimated"
    assert noticed.startswith(f"{takes} pictures at once 10 pictures estimated 10 pictures estimated")
    assert "4 pictures of 256 codes each are drawn at once, with guidance 1.75; the time of a picture" in noticed
    assert not {"reader", "answer", "longest context"} & set(re.findall("reader|answer|longest context", noticed))
    assert "4 pictures at once, guided by 1.75, each of 256 codes, fp32" in " ".join(parsed(pictures_content()).texts)
    cost = cards["How good are the pictures?"]
    assert "held-out pictures rise 95 % interval pictures dense fitted codes same next code" in cost
    assert "its pictures are noticeably worse" in " ".join(parsed(pictures_content()).texts).lower()
    assert "Perplexity per code, and" in cost


def one_text(content):
    return {"quality": content["quality"] | {"texts": content["quality"]["texts"][:1]}}


def test_pictures_that_the_model_drew_itself_are_agreement():
    content = pictures_content()
    content["quality"]["label"] = "agreement with the dense model"
    card = sections(content)["How good are the pictures?"]
    assert "The dense model drew these pictures itself" in card
    assert "wrote these texts" not in card
    assert (
        "measured on pictures that the dense model drew itself"
        in sections(content | one_text(content))["What does it cost in pictures?"]
    )
    assert "agreement with the dense model, on pictures of its own" in words(printed(print_report, report_of(content)))


def test_the_terminal_says_the_same():
    lines = printed(print_report, report_of(pictures_content()))
    text = words(lines)
    assert "a picture takes 0.432 s (dense 0.643 s), with 4 pictures at once and without the codec, estimated" in text
    assert "room 10 pictures at once (dense: 10 pictures); estimated, for memory alone" in text
    assert (
        f"kernel distance to {REFERENCE} 0.0123 (0.0103 to 0.0153), dense 0.0001 (-0.0019 to 0.0031), measured" in text
    )
    assert "0.0122 (0.0101 to 0.0151) more, paired: the fitted model's pictures are farther off" in text
    assert "Frechet distance 14.8 (dense 11.5), precision 0.74 (dense 0.81), recall 0.66 (dense 0.79)" in text
    assert FEW in text
    assert not {"prompt", "answer", "None", "reading speed"} & set(re.findall("prompt|answer|None|reading speed", text))
    assert max(len(line) for line in lines if not line.startswith("edgeprune run")) <= 80


@pytest.mark.parametrize("room", [0, 1])
def test_no_room_for_both_sequences_of_a_guided_picture_is_no_room(room):
    content = pictures_content()
    for noticed in content["experience"].values():
        noticed["sequences"] = noticed["sequences"].model_copy(update={"value": room})
    assert "at once no room within the memory budget estimated no room" in sections(content)["How fast does it feel?"]


def test_a_language_model_has_no_word_of_pictures():
    page = render_html(report_of(estimated_content())).split("<main>")[1]
    assert "picture" not in page
    assert "picture" not in words(printed(print_report, report_of(estimated_content())))


@pytest.mark.slow
def test_texts_of_the_pictures_cannot_inject_markup():
    hostile = distances(0.01, 12.0, 0.5, 0.5) | {"network": ATTACK}
    for changes in ({"reference": ATTACK, "fitted": hostile}, MISSING | {"missing": ATTACK}):
        page = parsed(pictures_content(**changes))
        assert len(page.scripts) == len(parsed(pictures_content()).scripts)
        assert sum(tag == "img" for tag, _ in page.elements) == 2
        assert "{{ 7 * 7 }}" in " ".join(page.texts)


def test_a_ladder_shows_every_rungs_pictures():
    reports = [report_of(pictures_content()), report_of(pictures_content(fitted_grid=found()["dense_grid"]))]
    frontier = frontier_of(reports)
    assert frontier.dense.grid == frontier.rungs[1].grid == found()["dense_grid"] != frontier.rungs[0].grid
    assert render_frontier(frontier, "bundle").count("<img src=") == 3
