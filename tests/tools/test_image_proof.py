"""The proof for image generators, on a tiny one; and its page says what was measured."""

import json
import shutil

import numpy as np
import pytest

from edgeprune.errors import InputError
from edgeprune.evaluate.features import Network
from edgeprune.generate.pixels import to_images
from edgeprune.progress import Silent
from tests.support import DOCS
from tests.support.image_model import idx
from tools import images as tool
from tools.images_page import DENSE, REAL, TABLES, THROUGH_CODEC, Cell, Ledger, fill

pytestmark = pytest.mark.slow

PICTURES = 20
SHARE = 0.214  # of the parameters: what whole steps of the tiny widths can remove
CELLS = [REAL, THROUGH_CODEC, DENSE, Cell("default", SHARE), Cell("wanda", SHARE)]


def means(images):
    """Features (n, 48): of every colour in patches of 7 x 7."""
    return images.reshape(len(images), 3, 4, 7, 4, 7).mean(axis=(3, 5)).reshape(len(images), -1).astype(np.float32)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dataset")
    generator = np.random.default_rng(0)
    for part, count in (("train", 30), ("t10k", 60)):
        idx(folder, part, generator.bytes(count * 784), bytes(row % 10 for row in range(count)))
    return folder


@pytest.fixture(scope="module")
def proof(trained, dataset, tmp_path_factory):
    """The studio, the ledger's path and what it held at the end."""
    folder = tmp_path_factory.mktemp("proof") / "model"
    shutil.copytree(trained, folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tool, "load_network", lambda: Network("means", means, None))
        patch.setattr(tool, "HEADS", 4)
        patch.setattr(tool, "HELD_OUT_CODES", 10)
        patch.setattr(tool, "SCALES", (1.0, 2.0))
        studio = tool.Studio(folder, dataset, PICTURES, 12, 0, Silent())
        ledger = Ledger(folder / "cells.jsonl")
        tool.run(studio, ledger, CELLS)
        yield studio, ledger


def test_every_cell_is_a_line_and_is_run_once(proof):
    studio, ledger = proof
    lines = ledger.path.read_text().splitlines()
    names = ["setting", "guidance 1", "guidance 2", *(cell.name for cell in CELLS)]
    names += [cell.generator_name for cell in CELLS[2:]]
    assert [json.loads(line)["name"] for line in lines] == names
    again = Ledger(ledger.path)
    assert again.rows == ledger.rows
    tool.run(studio, again, CELLS)
    assert ledger.path.read_text().splitlines() == lines


def test_pruned_rows_say_what_was_removed_and_how_far_it_is_from_the_default(proof):
    _, ledger = proof
    default, wanda = (ledger.rows[Cell(method, SHARE).name] for method in ("default", "wanda"))
    for row in (default, wanda):
        assert abs(row["realised"] - SHARE) <= 0.005
        assert row["parameters"] < ledger.rows["dense"]["parameters"]
        assert row["rise"][0] == pytest.approx(np.log(row["perplexity"] / ledger.rows["dense"]["perplexity"]))
    assert wanda["over_default"][0] == pytest.approx(wanda["kernel"][0] - default["kernel"][0])
    assert "over_default" not in default
    assert wanda["widths"] == default["widths"]


def test_pictures_are_the_same_from_the_same_seeds(proof):
    studio, _ = proof
    model = studio.model
    again = studio.drawn(model.decoder, model.weights, studio.sampling, PICTURES)
    assert np.array_equal(again, studio.pixels_of(DENSE))
    assert np.array_equal(again[:7], studio.drawn(model.decoder, model.weights, studio.sampling, 7))


def test_no_image_is_compared_with_itself(proof):
    studio, _ = proof
    images = studio.test_images
    assert np.array_equal(to_images(studio.pixels_of(REAL)), images.pixels[PICTURES : 2 * PICTURES].numpy())
    codes = {tuple(document) for document in studio.held_out}
    assert len(codes) == 10


def test_the_pictures_stand_below_each_other(proof, tmp_path, monkeypatch):
    from PIL import Image

    studio, _ = proof
    monkeypatch.setattr(tool, "SHOWN", ("dense", "default", "wanda"))
    monkeypatch.setattr(tool, "RATIOS", (SHARE,))
    monkeypatch.setattr(tool, "COLUMNS", 10)
    tool.show(studio, tmp_path / "pictures")
    sheet = np.asarray(Image.open(tmp_path / "pictures" / "21.png"))
    assert sheet.shape == (3 * 56, 10 * 56, 3)
    first = studio.labels.index(0)
    assert np.array_equal(sheet[:56:2, :56:2], studio.pixels_of(DENSE)[first])


def test_rows_of_another_model_are_refused(proof):
    studio, ledger = proof
    with pytest.raises(InputError, match="holds rows of pictures 20, not of 21"):
        ledger.begin(studio.fingerprint | {"pictures": 21}, studio.folder / "training.jsonl")


def test_a_model_that_was_not_trained_is_said(tmp_path, dataset):
    with pytest.raises(InputError) as missing:
        tool.Studio(tmp_path, dataset, PICTURES, 12, 0, Silent())
    assert "tools.train_image_model" in missing.value.remedy


def test_the_default_comes_first_at_every_ratio():
    cells = list(tool.pruned_cells())
    assert len(set(cells)) == len(cells)
    for cell in cells:
        assert cells.index(cell.default) <= cells.index(cell)


def test_the_tables_are_those_of_the_figures_beside_them():
    page = (DOCS / "images.md").read_text(encoding="utf-8")
    assert all(f"<!-- {name} -->" in page for name in TABLES)
    assert fill(page, Ledger(DOCS / "images.jsonl").rows) == page
