"""The balance: languages as they are, shares by the square root, turns that keep to the shares."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgeprune.pipeline.balance import balanced, languages_of, shares_of

TEXTS = {
    "en": "The government of the people shall not perish from the earth.",
    "de": "Der schnelle braune Fuchs springt über den faulen Hund und läuft davon.",
    "fr": "Le gouvernement a décidé de reporter la réunion à la semaine prochaine.",
    "ja": "これは日本語で書かれた文書で、設定の方法を説明しています。",
}


def test_languages_are_told() -> None:
    assert languages_of(list(TEXTS.values()), ["a"] * 4) == list(TEXTS)


def test_what_a_source_has_little_of_counts_as_what_it_has_most_of() -> None:
    texts = [TEXTS["en"]] * 200 + ["condemnations", TEXTS["ja"], TEXTS["ja"]]
    sources = ["a"] * 202 + ["b"]
    assert languages_of(texts, sources) == ["en"] * 202 + ["ja"]


def test_shares_are_square_roots() -> None:
    groups = [("a", "en"), ("a", "en"), ("a", "de"), ("b", "en")]
    assert shares_of(groups, np.array([500, 400, 100, 400])) == pytest.approx(
        {("a", "de"): 1 / 6, ("a", "en"): 3 / 6, ("b", "en"): 2 / 6}
    )


@given(st.lists(st.tuples(st.sampled_from("abc"), st.integers(1, 60)), min_size=1, max_size=60), st.integers(1, 800))
def test_turns_keep_to_the_shares_as_long_as_there_is_enough(documents, needed) -> None:
    groups, tokens = [(source, "en") for source, _ in documents], np.array([count for _, count in documents])
    shares = shares_of(groups, tokens)
    chosen = balanced(groups, tokens, shares, needed, lambda candidates: int(candidates[0]))
    assert len(set(chosen)) == len(chosen)
    total = tokens[chosen].sum()
    if max(tokens) <= needed / 2:  # larger ones may be passed over
        assert total >= min(needed, tokens.sum())
    assert total - tokens[chosen[-1]] < needed  # and not a document more
    for group, share in shares.items():
        own = [n for n in range(len(groups)) if groups[n] == group]
        taken = sum(tokens[n] for n in chosen if n in own)
        if max(tokens) <= needed / 2 and taken < tokens[own].sum():  # it still had some: it lags by a document or two
            assert taken >= share * total - 60 * (1 + share * len(shares))


def test_only_what_is_allowed_and_fits_is_taken() -> None:
    groups, tokens = [("a", "en")] * 5, np.array([10, 1000, 10, 10, 10])
    shares = shares_of(groups, tokens)
    assert balanced(groups, tokens, shares, 30, min) == [0, 2, 3]
    assert balanced(groups, tokens, shares, 1000, min) == [0, 1]
    assert balanced(groups, tokens, shares, 4, min) == [0]  # one at least
    assert balanced(groups, tokens, shares, 4, min, []) == []
    assert balanced(groups, tokens, shares, 30, max, [0, 2, 4]) == [4, 2, 0]
    assert balanced(groups, tokens, shares, 99, min, [0, 2]) == [0, 2]
