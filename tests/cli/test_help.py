"""The help of every command: panels, examples that the parser takes, defaults, nothing cut off."""

from __future__ import annotations

import re
import shlex

import pytest
from typer.main import get_command
from typer.testing import CliRunner

from edgeprune.cli.app import COMMANDS, app
from edgeprune.pruning.methods import METHODS

NAMES = [command.__name__ for _, command, _ in COMMANDS]
EXAMPLES = [example for _, _, examples in COMMANDS for example in examples]


def helped(*words: str, columns: int) -> str:
    result = CliRunner().invoke(app, [*words, "--help"], env={"COLUMNS": str(columns)})
    assert result.exit_code == 0
    return result.stdout


@pytest.mark.parametrize("columns", [80, 120])
@pytest.mark.parametrize("name", NAMES)
def test_the_help_of_a_command_ends_with_its_examples_and_cuts_nothing(name, columns):
    text = helped(name, columns=columns)
    examples = next(examples for _, command, examples in COMMANDS if command.__name__ == name)
    shown = [line.strip() for line in text.split("For example:")[1].splitlines() if line.strip()]
    assert shown == list(examples)  # a line each, to be copied
    assert max(map(len, text.splitlines())) <= columns
    assert "..." not in re.sub(r"(\[ARGS\]|PATH\S?)\.\.\.", "", text)  # of what may be given again
    assert "\N{HORIZONTAL ELLIPSIS}" not in text


@pytest.mark.parametrize("example", EXAMPLES)
def test_the_parser_takes_every_example(example):
    program, name, *words = shlex.split(example)
    assert program == "edgeprune"
    command = get_command(app).commands[name]
    context = command.make_context(name, [*words], resilient_parsing=True)
    assert not context.args, "a word that no option takes"


@pytest.mark.parametrize("columns", [80, 120])
def test_the_commands_stand_in_panels(columns):
    text = helped(columns=columns)
    for panel, command, _ in COMMANDS:
        assert text.index(f" {panel} ") < text.index(f"\u2502 {command.__name__} ")
    assert "edgeprune fit demo --device jetson-orin" in text


def test_what_is_required_is_marked_and_defaults_are_shown():
    assert "[required]" in helped("run", columns=120)
    for words in ("[default: default]", "[default: auto]", "[default: 32]", "Default: the profile's."):
        assert words in helped("fit", columns=120)
    assert "A device, to see all its figures." in helped("devices", columns=120)


def test_every_method_has_a_line_of_its_own():
    result = CliRunner().invoke(app, ["compare", "--list-methods"], env={"COLUMNS": "80"})
    assert result.exit_code == 0
    lines = result.stdout.splitlines()[1 : 1 + len(METHODS)]
    assert [line.split()[0] for line in lines] == list(METHODS)
    assert all(method.words in line for line, method in zip(lines, METHODS.values(), strict=True))
    assert "int4-64" in result.stdout
