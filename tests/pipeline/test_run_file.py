"""run.toml: options written and read back, paths whole, slips refused."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgeprune.errors import InputError
from edgeprune.pipeline.request import request_of
from edgeprune.pipeline.run_file import read_run_file, run_file, toml_of
from tests.support.runs import home, options, setup_of

NAMES = st.from_regex(r"[a-z]{1,8}(_[a-z]{1,8})?", fullmatch=True).filter(
    lambda name: name not in ("output", "resume", "force", "model", "calibration")
)
VALUES = st.booleans() | st.integers(-(2**40), 2**40) | st.floats(allow_nan=False, allow_infinity=False) | st.text()


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    return tmp_path_factory.mktemp("run-file") / "run.toml"


@given(st.dictionaries(NAMES, VALUES | st.lists(st.text(), min_size=1).map(tuple)))
def test_options_come_back_as_they_were(file, values):
    file.write_text(toml_of(values), encoding="utf-8")
    lists = {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}
    assert read_run_file(file) == lists


def test_what_is_left_out_or_belongs_to_the_next_run_is_not_written():
    values = {
        "memory": None,
        "evaluate": (),
        "output": Path("out"),
        "resume": True,
        "force": True,
        "max_quality_loss": 5,
    }
    assert toml_of(values) == "max-quality-loss = 5\n"


def test_paths_are_whole_and_what_is_no_path_stays(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine").mkdir()
    values = {"model": "mine", "calibration": "self", "codec": Path("vq.pt"), "evaluate": (Path("a.txt"),)}
    text = toml_of(values)
    for line in (
        f'model = "{tmp_path}/mine"',
        'calibration = "self"',
        f'codec = "{tmp_path}/vq.pt"',
        f'evaluate = ["{tmp_path}/a.txt"]',
    ):
        assert line in text.splitlines()
    assert toml_of({"model": "org/name-of-the-hub"}) == 'model = "org/name-of-the-hub"\n'


def test_the_file_of_a_run_asks_for_the_same_run(tmp_path_factory, tmp_path, file):
    """With what the profile decided written out."""
    small = home(tmp_path_factory)
    setup = setup_of(small, tmp_path / "out", prompt=None, batch=None, memory=None, evaluate=[small / "notes.txt"])
    file.write_text(run_file(setup), encoding="utf-8")
    read = read_run_file(file)
    assert (read["prompt"], read["batch"], read["precision"]) == (16, 1, "fp16")
    assert {name: read[name] for name in setup.budget.limits} == {
        name: limit.asked for name, limit in setup.budget.limits.items()
    }
    request = request_of(**read, output=tmp_path / "out")
    changes = {name: read[name] for name in ("prompt", "batch", "precision", *setup.budget.limits)}
    asked = options(small, tmp_path / "out", evaluate=[small / "notes.txt"], **changes)
    assert request == request_of(**asked)


@pytest.mark.parametrize(
    ("content", "message", "remedy"),
    [
        (None, "cannot read .*run.toml: No such file", "Give a TOML file"),
        (b"memory = 90%", "run.toml is not TOML", "one option a line"),
        (b"\xff\xfe", "run.toml is not UTF-8", "one option a line"),
        (b"a = 1\n[budget]\nmemory = '90%'", r"holds the table \[budget\]", "at the top"),
    ],
)
def test_a_file_that_holds_no_options_is_refused(tmp_path, content, message, remedy):
    if content is not None:
        (tmp_path / "run.toml").write_bytes(content)
    with pytest.raises(InputError, match=message) as caught:
        read_run_file(tmp_path / "run.toml")
    assert remedy in caught.value.remedy
