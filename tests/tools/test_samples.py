"""The tables of the calibration kit: made of cells, subsets drawn and chosen as they say."""

from __future__ import annotations

import json

import numpy as np
import pytest

from tests.support import DOCS
from tests.support.tiny import as_model, llama
from tools import samples
from tools.quality import Texts, read_cells
from tools.samples import Bench, Cell, coverage_cells, coverage_table, difference, fill, fitting_cells, fitting_table


@pytest.fixture
def bench(monkeypatch):
    """A tiny model on texts of its own."""
    for name, value in {"LENGTH": 16, "DRAWN": 16, "CANDIDATES": 8, "COVERED": (4,), "RATIO": 0.25}.items():
        monkeypatch.setattr(samples, name, value)
    monkeypatch.setattr("tools.quality.LENGTH", 32)
    generator = np.random.default_rng(0)
    texts = [generator.integers(101, size=200) for _ in range(3)]
    evaluation = {name: [generator.integers(101, size=32) for _ in range(3)] for name in samples.TEXTS}
    return Bench(Texts(texts, evaluation), as_model(llama(num_hidden_layers=4)))


def test_subsets_are_of_the_same_candidates_and_the_chosen_one_is_closer(bench):
    random, covering = (bench.run(Cell(choice, 4)) for choice in (samples.RANDOM, samples.COVERAGE))
    assert random["chosen"] == [0, 1, 2, 3]
    assert sorted(set(covering["chosen"])) == sorted(covering["chosen"])
    assert max(covering["chosen"]) < 8
    assert covering["distance"] <= random["distance"] + 1e-6  # they may be the same four
    assert set(covering["rise"]) == set(samples.TEXTS) == set(covering["nats"])
    assert [len(nats) for nats in covering["nats"].values()] == [3, 3]
    assert random["ratio"] == pytest.approx(0.25, abs=0.005)
    json.dumps([random, covering, bench.dense()])


def made(values: dict[Cell, float]) -> dict[str, dict]:
    """Cells whose rise on each text is a number of nats a token, above a dense model of 1."""
    return {
        cell.key: {
            "rise": dict.fromkeys(samples.TEXTS, (value, value, value)),
            "nats": {text: [255 * (1 + value)] * 10 for text in samples.TEXTS},
            "distance": 0.5,
        }
        for cell, value in values.items()
    }


def test_the_tables_take_seeds_that_are_whole():
    cells = made({cell: 0.4 + 0.1 * (cell.choice == samples.RANDOM) for cell in coverage_cells()})
    row = "| 8 | speeches | 3 | 0.50 | 0.50 | 0.500 (0.500, 0.500, 0.500) | 0.400 (0.400, 0.400, 0.400) | -0.100"
    assert row in coverage_table(cells)
    del cells[Cell(samples.COVERAGE, 8, 2).key]
    assert "| 8 | speeches | 2 | 0.50 | 0.50 | 0.500 (0.500, 0.500) |" in coverage_table(cells)
    assert "| 8 | 2,048 | 0.500 [0.500, 0.500] | 0.500 [0.500, 0.500] |" in fitting_table(
        made({Cell("random", 8): 0.5})
    )
    assert [cell.samples for cell in fitting_cells()] == [8, 32, 128]


def test_a_difference_has_the_interval_of_its_excerpts():
    generator = np.random.default_rng(0)
    gaps = generator.normal(0.05, 0.01, size=(3, 10))
    zero = {"nats": {"speeches": [0.0] * 10}}
    text = difference([(zero, {"nats": {"speeches": (255 * row).tolist()}}) for row in gaps], "speeches")
    value, low, high = (float(part.strip("[],")) for part in text.split())
    assert value == pytest.approx(gaps.mean(), abs=1e-3)
    assert low < value < high < value + 0.02


def test_the_page_says_what_was_measured():
    page = (DOCS / "samples.md").read_text(encoding="utf-8")
    assert fill(page, read_cells(DOCS / "samples.jsonl")) == page
