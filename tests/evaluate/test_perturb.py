"""Perturbed texts: what each change keeps of a text, for any text and seed."""

from __future__ import annotations

import ast
import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgeprune.evaluate import perturb

TEXTS = st.text(st.characters(exclude_categories=("Cs",)), max_size=200)
SEEDS = st.integers(0, 2**32)
PROSE = "We hold these truths to be self-evident, that all men are created equal, and that they are endowed. " * 20


def made(function: perturb.Perturb, text: str, seed: int = 0) -> str:
    return function(text, np.random.default_rng(seed))


@given(TEXTS, SEEDS)
@settings(max_examples=50, deadline=None)
def test_every_change_is_a_function_of_text_and_seed(text: str, seed: int) -> None:
    for change in perturb.PERTURBATIONS:
        assert made(change.function, text, seed) == made(change.function, text, seed), change.name


@pytest.mark.parametrize("change", perturb.PERTURBATIONS, ids=lambda change: change.name)
def test_every_change_alters_prose(change: perturb.Perturbation) -> None:
    assert made(change.function, PROSE) != PROSE


@given(TEXTS, SEEDS)
@settings(max_examples=50, deadline=None)
def test_typos_touch_letters_alone(text: str, seed: int) -> None:
    def others(of: str) -> list[str]:
        return [character for character in of if not character.isalpha()]

    assert others(made(perturb.typos, text, seed)) == others(text)


def test_typos_are_as_many_as_is_said() -> None:
    # A slip adds or removes a letter in half of the cases: the lengths of the words give their share.
    text = "a " * 20_000
    words = made(perturb.typos, text).split(" ")
    gone, doubled = words.count("") - 1, words.count("aa")
    for count in (gone, doubled):
        assert count / 20_000 == pytest.approx(perturb.MISTYPED / 4, rel=0.2)


def test_a_neighbouring_key_keeps_the_case() -> None:
    generator = np.random.default_rng(0)
    assert {perturb._neighbour("S", generator) for _ in range(40)} == {"A", "D"}
    assert {perturb._neighbour("q", generator) for _ in range(40)} == {"w"}
    assert perturb._neighbour("é", generator) == "é"


@given(TEXTS, SEEDS)
@settings(max_examples=50, deadline=None)
def test_white_space_keeps_the_words(text: str, seed: int) -> None:
    assert made(perturb.white_space, text, seed).split() == text.split()


@given(TEXTS)
@settings(max_examples=50, deadline=None)
def test_capital_letters_stay_the_same_letters(text: str) -> None:
    assert made(perturb.upper_case, text).upper() == text.upper()


@given(st.lists(st.from_regex(r"[a-z]{1,16}", fullmatch=True), max_size=30), SEEDS)
@settings(max_examples=50, deadline=None)
def test_numbers_stand_after_every_few_words(words: list[str], seed: int) -> None:
    written = made(perturb.numbers, " ".join(words), seed).split()
    assert [word for word in written if not word[0].isdigit()] == words
    assert sum(word[0].isdigit() for word in written) == -(-len(words) // perturb.WORDS)


@given(TEXTS, SEEDS)
@settings(max_examples=50, deadline=None)
def test_lines_of_code_hold_the_words_as_strings(text: str, seed: int) -> None:
    program = made(perturb.code, text, seed)
    literals = re.findall(r"""'(?:[^'\\\n]|\\.)*'|"(?:[^"\\\n]|\\.)*\"""", re.sub(r'row\["\w+"\]', "", program))
    held = "".join(ast.literal_eval(literal) for literal in literals)
    assert "".join(held.split()) == "".join(text.split())


@given(TEXTS)
@settings(max_examples=50, deadline=None)
def test_a_repetition_is_one_passage_and_as_long_as_the_text(text: str) -> None:
    repeated, passage = made(perturb.repetition, text), text[: perturb.PASSAGE].strip()
    if passage:
        assert len(repeated) >= len(text)
        assert repeated.replace(passage, "").strip(" ") == ""


@given(TEXTS, SEEDS)
@settings(max_examples=50, deadline=None)
def test_a_scrap_is_a_part_of_the_text(text: str, seed: int) -> None:
    scrap = made(perturb.truncated, text, seed)
    assert scrap in text
    assert len(scrap) == min(len(text), perturb.SCRAP)
