"""Near duplicates: found as the similarity of their shingles says, whatever the language, first ones kept."""

from __future__ import annotations

import numpy as np
import pytest

from edgeprune.pipeline.near_duplicates import ALIKE, SHINGLE, near_duplicates


def words(seed: int, count: int = 150) -> list[str]:
    return ["".join(chr(97 + c) for c in row) for row in np.random.default_rng(seed).integers(26, size=(count, 6))]


def similarity(one: str, other: str) -> float:
    """The Jaccard similarity by its definition."""
    first, second = ({text[i : i + SHINGLE] for i in range(len(text) - SHINGLE + 1)} for text in (one, other))
    return len(first & second) / len(first | second)


@pytest.mark.parametrize("changed", [0, 1, 2, 30, 60, 150])
def test_texts_are_duplicates_where_their_shingles_are_alike(changed: int) -> None:
    base, others = words(0), words(1)
    places = np.random.default_rng(2).permutation(150)[:changed]
    other = " ".join(others[i] if i in places else word for i, word in enumerate(base))
    exact = similarity(" ".join(base), other)
    assert abs(exact - ALIKE) > 0.08  # where the estimate cannot err
    assert near_duplicates([" ".join(base), other]) == ([0, 0] if exact > ALIKE else [0, 1])


def test_case_and_spaces_make_no_difference_and_the_first_is_kept() -> None:
    one, other = " ".join(words(0)), " ".join(words(1))
    assert near_duplicates([other, one, one.upper(), one.replace(" ", "\n\n"), other]) == [0, 1, 1, 1, 0]


def test_a_language_without_spaces_is_compared_too() -> None:
    text = "吾輩は猫である。名前はまだ無い。どこで生れたかとんと見当がつかぬ。" * 3
    assert near_duplicates([text, text[:-3], text[::-1], "短い", "短い", "長い"]) == [0, 0, 2, 3, 3, 5]


def test_half_a_character_is_no_error() -> None:
    assert near_duplicates(["\ud800 a text of some words", "another one"]) == [0, 1]
