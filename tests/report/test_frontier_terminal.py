"""A ladder in the terminal: 80 columns, where quality ends, sources, nothing that steers it."""

from __future__ import annotations

import re

import pytest

from tests.support.sample_ladders import RISES, estimated_ladder, hostile, measured_ladder, printed, with_tasks


@pytest.mark.parametrize("made", [estimated_ladder, measured_ladder])
def test_the_terminal_shows_it_in_80_columns(made):
    frontier = made(rises=(-0.3, *RISES))
    lines = printed(frontier, "a/" * 60 + "ladder")
    command = f"Pick rung K:  edgeprune fit --from {'a/' * 60}ladder --pick K"
    assert lines[-1] == command  # unbroken, to be copied
    assert max(map(len, lines[:-1])) <= 80
    table = lines[lines.index(next(line for line in lines if line.startswith("rung "))) :]
    assert [line.split()[0] for line in table[1:9]] == ["dense", *map(str, range(7))]
    assert table[8].split()[-5:] == ["42-fold", "38", "to", "46-fold", "broken"]
    assert re.split(r"\s{2,}", table[0]) == [
        "rung",
        "ms/token",
        "ms to first",
        "MiB",
        "pruned",
        "rise",
        "interval",
        "quality",
    ]


def test_the_terminal_says_where_quality_ends_and_what_it_rests_on():
    lines = printed(estimated_ladder())
    for line in (
        "Fastest intact: rung 1, 3.23 ms; fastest not broken: rung 3, 2.42 ms.",
        "per token, first token, memory: estimated; rise: measured.",
        "rise: of perplexity, with its 95 % interval.",
        "Quality is agreement with the dense model, on text of its own.",
        "?: the interval reaches into another grade.",
    ):
        assert line in lines
    assert "Fastest intact: no rung; fastest not broken: no rung." in printed(estimated_ladder(rises=(70.0,)))
    several = printed(measured_ladder(texts=("a.txt", "b.txt"), rises=(1.0,)))
    assert "per token, first token, memory, rise: measured." in several
    assert "rise: of perplexity on the worst text, with its 95 % interval." in several
    assert not [line for line in several if line.startswith(("?:", "Quality is agreement"))]


def test_the_terminal_shows_scores_on_tasks_and_the_odd_input_that_a_rung_fails_on():
    lines = printed(with_tasks(estimated_ladder(rises=(1.4, 4.6)), "arc_easy", "own"))
    assert max(map(len, lines[:-1])) <= 80
    table = lines[lines.index(next(line for line in lines if "arc_easy" in line)) :]
    assert [re.split(r"\s{2,}", line) for line in table[:4]] == [
        ["rung", "arc_easy", "own"],
        ["dense", "42.5 %", "42.5 %"],
        ["0", *["40.5 %, -2.0 points (-4.5 to +0.5)"] * 2],
        ["1", *["38.5 %, -4.0 points (-6.5 to -1.5)"] * 2],
    ]
    assert "rung 1: On odd input it is far worse." in lines
    assert not [line for line in lines if line.startswith("rung 0: ")]
    assert not [line for line in printed(estimated_ladder()) if "Task scores" in line]


def test_the_terminal_is_not_steered():
    text = "\n".join(printed(hostile(estimated_ladder(), "[red]\x1b[2J\x07")))
    assert "[red]" in text
    assert not {"\x1b", "\x07"} & set(text)
