"""--config: a file's options are the defaults of a call; the command line wins, and slips are refused by name."""

from __future__ import annotations

import pytest
from typer.testing import CliRunner

from edgeprune.cli.app import app
from edgeprune.cli.options import OPTIONS
from edgeprune.errors import InputError
from edgeprune.pipeline.request import DEFAULTS, Request, request_of

PANELS = ("Model and data", "Budget", "Search", "Image generators", "Device", "Output")


class Asked(Exception):
    """Ends a command where its work would begin."""


@pytest.fixture
def asked(monkeypatch):
    """Calls the command line; returns the request that it would fit."""

    def run(*words: str) -> Request:
        requests = []

        def fit(progress, **options):
            requests.append(request_of(**options))
            raise Asked

        monkeypatch.setattr("edgeprune.commands.fit.fit", fit)
        monkeypatch.setattr("edgeprune.commands.frontier.frontier", fit)
        result = CliRunner().invoke(app, words)
        if not isinstance(result.exception, Asked):
            raise result.exception
        return requests[0]

    return run


def test_every_option_of_a_request_has_its_help():
    assert list(OPTIONS) == list(DEFAULTS)


def test_the_options_stand_in_panels():
    text = CliRunner().invoke(app, ["fit", "--help"], env={"COLUMNS": "100"}).stdout
    assert [line.strip("╭╮─ ") for line in text.splitlines() if line.startswith("╭─ ")][2:] == list(PANELS)


def test_a_file_gives_the_options_and_the_command_line_wins(tmp_path, asked):
    file = tmp_path / "run.toml"
    file.write_text(
        'model = "my-model"\ndevice = "jetson-orin"\nmemory = "90%"\nsamples = 16\nmax-quality-loss = 5\n'
        'evaluate = ["a.txt", "b.txt"]\ncheckpoint = false\nkeep_remote = true\nseed = 3\n'
    )
    from_file = asked("fit", "--config", str(file))
    assert from_file == request_of(
        model="my-model",
        device="jetson-orin",
        memory="90%",
        samples=16,
        max_quality_loss="5",
        evaluate=["a.txt", "b.txt"],
        checkpoint=False,
        keep_remote=True,
        seed=3,
    )
    changed = asked("fit", "--memory", "80%", "--config", str(file), "--evaluate", "c.txt", "--checkpoint", "other")
    assert (changed.memory, changed.model, changed.checkpoint) == ("80%", "other", True)
    assert [path.name for path in changed.evaluate] == ["c.txt"]
    assert (changed.samples, changed.seed) == (16, 3)


def test_a_frontier_takes_a_file_too(tmp_path, asked):
    file = tmp_path / "run.toml"
    file.write_text('device = "cpu"\nno-checkpoint = true\n')
    with pytest.raises(InputError, match="no option 'no-checkpoint'"):
        asked("frontier", "--config", str(file))
    assert not asked("fit", "--config", str(file)).checkpoint
    file.write_text('device = "cpu"\nrungs = 3\n')
    assert asked("frontier", "--config", str(file)).rungs == 3
    assert asked("frontier", "--device", "cpu").rungs == 6


@pytest.mark.parametrize(
    ("text", "message", "remedy"),
    [
        ("memroy = '90%'", "there is no option 'memroy'", "Did you mean memory?"),
        ("config = 'other.toml'", "there is no option 'config'", ""),
        ("memory = 90%", "is not TOML", "one option a line"),
        ("[budget]\nmemory = '90%'", "holds the table [budget]", "Options stand at the top"),
        ("samples = true", "samples = True is not a number or a text", "--help"),
        ("force = 'yes'", "force = 'yes' is not true or false", "--help"),
        ("samples = [1, 2]", "samples can be given once", "Write one value"),
    ],
)
def test_a_slip_in_the_file_is_refused_by_name(tmp_path, asked, text, message, remedy):
    file = tmp_path / "run.toml"
    file.write_text(text)
    with pytest.raises(InputError) as caught:
        asked("fit", "--config", str(file))
    assert message in caught.value.message
    assert remedy in caught.value.remedy


def test_a_file_that_is_missing_or_binary_is_refused(tmp_path, asked):
    with pytest.raises(InputError, match="cannot read"):
        asked("fit", "--config", str(tmp_path / "none.toml"))
    (tmp_path / "binary.toml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InputError, match="is not UTF-8"):
        asked("fit", "--config", str(tmp_path / "binary.toml"))


def test_options_of_a_file_do_not_slip_past_from(tmp_path, asked):
    file = tmp_path / "run.toml"
    file.write_text('memory = "90%"\n')
    with pytest.raises(InputError, match="--memory with --from"):
        asked("fit", "--config", str(file), "--from", str(tmp_path), "--pick", "0")
