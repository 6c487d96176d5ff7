"""A double of Ollama's reader of Modelfiles, and of the part of Go's text/template that ours use.

As parser/parser.go of Ollama reads them: instructions of one line, whose argument may be in quotes, or over lines in
three. As Go renders them: every text between actions as it is.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

INSTRUCTION = re.compile(
    r'(?P<name>[A-Za-z]+)[ \t]+(?P<argument>"""(?P<long>.*?)"""|"(?P<short>[^"\n]*)"|[^\n]*)\n', re.S
)
KNOWN = {"FROM", "PARAMETER", "TEMPLATE", "SYSTEM"}
PARAMETERS = {"num_ctx": int, "stop": str}
ACTION = re.compile(r"\{\{ (.*?) \}\}", re.S)


def read_modelfile(text: str) -> list[tuple[str, str]]:
    """The instructions with their arguments, those of parameters by `PARAMETER NAME`."""
    read, place = [], 0
    while place < len(text):
        found = INSTRUCTION.match(text, place)
        assert found, text[place:]
        assert found["name"] in KNOWN
        name, argument = found["name"], found["argument"]
        if name == "PARAMETER":
            parameter, _, argument = argument.partition(" ")
            PARAMETERS[parameter](argument)
            name = f"{name} {parameter}"
        for quotes in ('"""', '"'):
            if argument.startswith(quotes):
                argument = argument.removeprefix(quotes).removesuffix(quotes)
                break
        read.append((name, argument))
        place = found.end()
    return read


def rendered(template: str, messages: Sequence[Mapping[str, str]]) -> str:
    """What Go makes of a template of one `range .Messages` whose messages are between `if eq .Role` and `end`."""
    assert template.startswith("{{ range .Messages }}")
    body = template.removeprefix("{{ range .Messages }}").removesuffix("{{ end }}")
    text = ""
    for message in messages:
        shown = True
        for index, piece in enumerate(ACTION.split(body)):
            if index % 2 == 0:
                text += piece * shown
            elif piece == ".Content":
                text += message["content"] * shown
            elif piece == "end":
                shown = True
            else:
                assert (role := re.fullmatch(r'if eq \.Role "(\w+)"', piece)), piece
                shown = message["role"] == role[1]
    return text
