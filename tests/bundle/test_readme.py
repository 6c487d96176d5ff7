"""README.md of a bundle: the headline, every step, the files of its kind; of a ladder a row for each rung."""

from __future__ import annotations

import re

import pytest

from edgeprune.bundle.readme import frontier_readme, readme
from edgeprune.report.figures import number_text
from edgeprune.report.frontier import frontier_of
from tests.support.sample_ladders import ladder
from tests.support.sample_pictures import pictures_content
from tests.support.sample_reports import CONTENTS, estimated_content, measured_content, report_of


def tables(text: str) -> list[list[list[str]]]:
    """The cells of each table's rows, without the line below its head."""
    found = re.findall(r"(?:^\|.*\n?)+", text, re.MULTILINE)
    split = [[[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines()] for table in found]
    return [[row for row in rows if set("".join(row)) != {"-"}] for rows in split]


@pytest.mark.parametrize("content", CONTENTS)
def test_the_headline_comes_first_and_every_step_with_its_command(content):
    report = report_of(content())
    text = readme(report)
    lines = text.splitlines()
    assert lines[:3] == [f"# {report.model.name} for {report.device.description}", "", report.headline]
    for step in report.deploy:
        assert f"## {step.title}\n\n```\n{step.command}\n```\n" in text
    assert f"context {report.workload.context} at most" in text


@pytest.mark.parametrize(("content", "kind"), [(measured_content, "texts"), (pictures_content, "pictures")])
def test_the_files_are_those_of_the_kind(content, kind):
    text = readme(report_of(content()))
    (rows,) = tables(text)
    assert {len(row) for row in rows} == {2}
    files = {row[0] for row in rows}
    assert {"`onnx/model.onnx`", "`finish.pyz`", "`deployment.json`", "`manifest.json`"} <= files
    assert ("`codec/codec.onnx`" in files) == ("To draw, feed" in text) == (kind == "pictures")
    assert ("`onnx/genai_config.json`" in files) == ("`serve.pyz`" in files) == (kind == "texts")


def test_graphs_that_read_embeddings_are_listed_where_there_are_some():
    report = report_of(measured_content())
    names = ["`onnx/*embeddings.last.onnx`", "`onnx/embedding*.onnx`"]
    assert [name in readme(report, of_embeddings=True) for name in names] == [True, True]
    assert [name in readme(report) for name in names] == [False, False]


def test_a_model_in_ggmls_formats_is_a_gguf_file():
    report = report_of(measured_content())
    fitted = report.fitted.model_copy(update={"formats": {"float": 1, "q4_k": 3}})
    (rows,) = tables(readme(report.model_copy(update={"fitted": fitted})))
    files = dict(rows)
    assert 'from_pretrained("model", gguf_file="model.gguf")' in files["`model/`"]
    assert dict(tables(readme(report))[0])["`model/`"].startswith("a standard checkpoint for `from_pretrained`")


@pytest.mark.parametrize("content", [estimated_content, measured_content])
def test_a_ladder_has_a_row_for_each_rung_with_the_source_of_every_figure(content):
    frontier = frontier_of(ladder(content))
    text = frontier_readme(frontier, "a ladder")
    rows, files = tables(text)
    assert [row[0] for row in rows] == ["rung", "dense", *map(str, range(6))]
    assert {len(row) for row in rows} == {7}
    for row, point in zip(rows[1:], (frontier.dense, *frontier.rungs), strict=True):
        for cell, figure in zip(row[1:4], (point.decode, point.prefill, point.memory), strict=True):
            assert cell == f"{number_text(figure.value, figure.unit)} ({figure.source})"
    assert [row[-1] for row in rows[2:]] == [rung.grade for rung in frontier.rungs]
    assert "6 sizes of one model" in text
    assert "edgeprune fit --from 'a ladder' --pick K" in text
    assert "`rungs/K/report.json`" in {row[0] for row in files}
