"""Texts as users really write them: pure functions from a text and a generator of random numbers to a text.

They know no tokens and no model. All that is drawn comes from the generator, so that a seed gives the same text.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

MISTYPED = 0.05  # of the letters
WORDS = 4  # between numbers, and in a line of code
PASSAGE = 120  # characters that are repeated
SCRAP = 100  # characters of a text that is cut off
ROWS = ("qwertyuiop", "asdfghjkl", "zxcvbnm")  # of a keyboard
_WORD = re.compile(r"\S{1,16}\s*")  # at most so long: some languages put no spaces

Perturb = Callable[[str, np.random.Generator], str]


@dataclass(frozen=True)
class Perturbation:
    """A change of a text, with its name and what it does in words."""

    name: str
    words: str
    function: Perturb


def typos(text: str, generator: np.random.Generator) -> str:
    """Returns the text with some letters mistyped: left out, doubled, swapped with the next, or of a neighbouring
    key."""
    letters, position, written = generator.random(len(text)) < MISTYPED, 0, []
    kinds = generator.integers(4, size=len(text))
    while position < len(text):
        letter, after = text[position], text[position + 1 : position + 2]
        slip = kinds[position] if letters[position] and letter.isalpha() else None
        position += 1
        if slip == 1:
            letter *= 2
        elif slip == 2 and after.isalpha():
            letter, position = after + letter, position + 1
        elif slip == 3:
            letter = _neighbour(letter, generator)
        written.append("" if slip == 0 else letter)
    return "".join(written)


def _neighbour(letter: str, generator: np.random.Generator) -> str:
    """Returns the letter of a key beside a letter's, in its case; a letter that is on none of these keys as it is."""
    row = next((row for row in ROWS if letter.lower() in row), "")
    places = [i for i in (row.find(letter.lower()) - 1, row.find(letter.lower()) + 1) if 0 <= i < len(row)]
    if not places:
        return letter
    near = row[places[int(generator.integers(len(places)))]]
    return near.upper() if letter.isupper() else near


def upper_case(text: str, _: np.random.Generator) -> str:
    """Returns the text in capital letters."""
    return text.upper()


def white_space(text: str, generator: np.random.Generator) -> str:
    """Returns the text with other white space between the same words."""
    gaps = (" ", "  ", "   ", "\t", "\n", " \n")

    def gap(_: re.Match[str]) -> str:
        return gaps[int(generator.integers(len(gaps)))]

    return re.sub(r"\s+", gap, text)


def numbers(text: str, generator: np.random.Generator) -> str:
    """Returns the text with a number after every few words: counts, decimals, percentages, dates and times."""

    def number() -> str:
        a, b, c = (int(value) for value in generator.integers(1, (10_000, 13, 29)))
        forms = (f"{a}", f"{a / 100:.2f}", f"{a / 100:.1f}%", f"{2000 + b}-{b:02d}-{c:02d}", f"{b + 10}:{c:02d}")
        return forms[int(generator.integers(len(forms)))]

    return "".join(f"{line.rstrip()} {number()} " for line in _lines(text))


def code(text: str, generator: np.random.Generator) -> str:
    """Returns the text as lines of a program that hold a few words each."""
    forms = (
        "{name} = {value}",
        "print({value})",
        'if row["{name}"] == {value}:\n    return None',
        "self.{name}.append({value})  # {number}",
    )

    def line(words: str) -> str:
        names = re.findall(r"[^\W\d]\w*", words) or ["x"]
        form = forms[int(generator.integers(len(forms)))]
        name = "_".join(names[:2]).lower()
        return form.format(name=name, value=repr(words.strip()), number=int(generator.integers(100)))

    return "\n".join(map(line, _lines(text)))


def repetition(text: str, _: np.random.Generator) -> str:
    """Returns a text of at least this length that repeats its first passage, with a space between."""
    passage = text[:PASSAGE].strip()
    return " ".join([passage] * (1 + len(text) // max(1, len(passage))))


def truncated(text: str, generator: np.random.Generator) -> str:
    """Returns a scrap of the text that begins and ends anywhere, in the middle of words too."""
    start = int(generator.integers(max(1, len(text) - SCRAP + 1)))
    return text[start : start + SCRAP]


def _lines(text: str) -> list[str]:
    """Returns the text in parts of a few words each, with the white space behind them."""
    words = _WORD.findall(text.lstrip())
    return ["".join(words[start : start + WORDS]) for start in range(0, len(words), WORDS)]


PERTURBATIONS = (
    Perturbation("typos", f"{100 * MISTYPED:g} % of the letters mistyped", typos),
    Perturbation("upper case", "in capital letters", upper_case),
    Perturbation("white space", "tabs, line ends and several spaces between words", white_space),
    Perturbation("numbers", f"a number after every {WORDS} words", numbers),
    Perturbation("code", f"{WORDS} words in each line of a program", code),
    Perturbation("repetition", f"its first {PASSAGE} characters over and over", repetition),
    Perturbation("truncated", f"{SCRAP} characters cut out of it anywhere", truncated),
)
