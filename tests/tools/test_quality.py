"""The page of methods says what was measured; checkpoints of other programs are scored as they are, beside ours."""

from __future__ import annotations

import argparse

import numpy as np
import pytest

from edgeprune.evaluate.perplexity import document_losses
from edgeprune.model.decoder import ratio
from edgeprune.model.load import load_model
from tests.support import DOCS
from tests.support.checkpoints import save_llama
from tests.support.families import save_family
from tools import quality
from tools.quality import (
    WRITERS,
    Bench,
    CheckpointCell,
    Texts,
    checkpoints_table,
    fill,
    named_folder,
    read_cells,
    score_checkpoints,
)


def test_the_tables_are_those_of_the_figures_beside_them():
    page = (DOCS / "quality.md").read_text(encoding="utf-8")
    assert all(f"<!-- {name} -->" in page for name in WRITERS)
    assert fill(page, read_cells(DOCS / "quality.jsonl")) == page


def test_a_checkpoint_stands_beside_ours_at_its_own_ratio(tmp_path, monkeypatch):
    for name, value in (("LENGTH", 24), ("CALIBRATION", 4), ("GENERATED", 2)):
        monkeypatch.setattr(quality, name, value)
    save_llama(tmp_path / "dense", intermediate_size=512)
    save_llama(tmp_path / "theirs", intermediate_size=384)
    dense, theirs = (load_model(str(tmp_path / name)) for name in ("dense", "theirs"))
    random = np.random.default_rng(0)
    documents = [random.integers(0, dense.decoder.vocab_size, 200) for _ in range(3)]
    texts = Texts(documents, {name: [row[:24] for row in documents] for name in quality.EXCERPTS})
    # Scored, then ours with as many parameters in both layouts; the lines are read back.
    given, path = [CheckpointCell("theirs", tmp_path / "theirs")], tmp_path / "cells.jsonl"
    score_checkpoints(Bench(texts, dense), given, {}, path)
    cells = read_cells(path)
    line = cells[given[0].key]
    assert line["ratio"] == pytest.approx(ratio(theirs.decoder, dense.decoder), abs=1e-4)
    expected = document_losses(theirs, texts.evaluation["speeches"], 24)
    assert line["nats"]["speeches"] == pytest.approx(expected.nats.tolist(), abs=1e-3)
    rise = np.log(expected.perplexity / document_losses(dense, texts.evaluation["speeches"], 24).perplexity)
    assert line["rise"]["speeches"][0] == pytest.approx(rise, abs=1e-6)
    ours = [cell for cell in cells.values() if "method" in cell and cell["method"] == "default"]
    assert [cell["layout"] for cell in ours] == ["uniform", "per-layer"]
    assert all(abs(cell["ratio"] - line["ratio"]) <= 0.005 for cell in ours)
    # The table: theirs, and by how much it lies above each of ours.
    rows = [row.split(" | ") for row in checkpoints_table(["theirs"], cells).splitlines()[2:]]
    assert [row[1] for row in rows] == ["theirs", "default", "default"]
    over = line["rise"]["speeches"][0] - ours[0]["rise"]["speeches"][0]
    assert float(rows[1][6].split()[0]) == pytest.approx(over, abs=2e-3)


def test_what_is_no_checkpoint_of_the_model_is_refused_at_once(tmp_path):
    save_family(tmp_path / "other", "llama")
    (tmp_path / "empty").mkdir()
    for text, message in (
        ("theirs", "is not NAME=FOLDER"),
        (f"theirs={tmp_path / 'none'}", "with a folder that exists"),
        (f"theirs={tmp_path / 'other'}", "another vocabulary than the demo model"),
        (f"theirs={tmp_path / 'empty'}", "config.json"),
    ):
        with pytest.raises(argparse.ArgumentTypeError, match=message):
            named_folder(text)
