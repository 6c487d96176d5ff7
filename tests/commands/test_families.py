"""The page of families for the terminal: each one's figures as they were measured, where it is stored and run."""

import json

import pytest

from edgeprune.commands.families import PARITY, families
from edgeprune.model.checkpoint.families import FAMILIES
from edgeprune.model.gguf.names import ARCHITECTURES
from tests.support.commands import run


def test_every_family_has_a_row_with_the_largest_of_its_errors():
    rows, measured = families(), json.loads(PARITY.read_text())
    assert {row.family for row in rows} == set(FAMILIES)
    for row in rows:
        cases = [case for case in measured if case["family"] == row.family]
        assert row.dense == max(case["dense"] for case in cases)
        assert row.llama_cpp in {None, *ARCHITECTURES}
        assert not row.by_layer or ARCHITECTURES[row.by_layer].by_layer
    by_name = {row.family: row for row in rows}
    assert (by_name["llama"].by_layer, by_name["gemma2"].by_layer) == ("deci", None)
    assert (by_name["gpt2"].packed, by_name["opt"].llama_cpp) == (False, None)


def test_the_command_shows_all_of_them():
    shown = run("doctor", "--families")
    assert (shown.returncode, shown.stderr) == (0, "")
    assert all(f"{name} " in shown.stdout for name in FAMILIES)
    rows = json.loads(run("doctor", "--families", "--json").stdout)
    assert [row["family"] for row in rows] == [row.family for row in families()]


@pytest.mark.parametrize("option", [("--deep",), ("--target", "ssh://me@there"), ("--model", "6GiB")])
def test_it_goes_with_no_check_of_a_device(option):
    result = run("doctor", "--families", *option)
    assert (result.returncode, result.stdout) == (2, "")
    assert f"--families with {option[0]}" in result.stderr
