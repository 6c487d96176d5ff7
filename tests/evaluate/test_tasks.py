import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgeprune.errors import InputError
from edgeprune.evaluate.tasks import difference, is_file, names_of, read_questions, score

ROW = {"question": "Which is a fruit?", "choices": ["an apple", "a stone"], "answer": 0}


def test_the_interval_of_a_difference_is_bonett_and_prices():
    """Their formula in counts: p12 = (n12 + 1) / (n + 2), p21 = (n21 + 1) / (n + 2)."""
    dense = np.array([1] * 5 + [0] * 12 + [1] * 23 + [0] * 10)
    fitted = np.array([0] * 5 + [1] * 12 + [1] * 23 + [0] * 10)
    gained, lost, count = 12, 5, 50
    p12, p21 = (gained + 1) / (count + 2), (lost + 1) / (count + 2)
    reach = 1.959964 * math.sqrt((p12 + p21 - (p12 - p21) ** 2) / (count + 2))
    found = difference(dense, fitted)
    assert found.value == pytest.approx((gained - lost) / count)
    assert (found.low, found.high) == pytest.approx((p12 - p21 - reach, p12 - p21 + reach))


def test_few_equal_answers_do_not_prove_that_two_models_are_equal():
    found = difference(np.ones(5), np.ones(5))
    assert found.value == 0
    assert found.low < -0.3 and found.high > 0.3
    assert difference(np.ones(5000), np.ones(5000)).high < 0.002


# Of `hard + noise < 0.5` the share is one half, since both are symmetric.
TRUE_DIFFERENCE = 0.5 - 0.6


def test_the_interval_holds_the_true_difference_in_nineteen_of_twenty_cases():
    generator, hits, trials = np.random.default_rng(0), 0, 2000
    for _ in range(trials):
        hard = generator.random(60)  # of each question; both models answer the easy ones
        dense, fitted = (hard < 0.6).astype(float), (hard + generator.normal(0, 0.2, 60) < 0.5).astype(float)
        found = difference(dense, fitted)
        hits += found.low <= TRUE_DIFFERENCE <= found.high
    assert 0.93 <= hits / trials <= 0.99


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.floats(0, 1), st.floats(0, 1)), min_size=1, max_size=40))
def test_scores_and_differences_stay_in_their_range_and_turn_around(pairs):
    dense, fitted = np.array(pairs).T
    there, back = difference(dense, fitted), difference(fitted, dense)
    assert -1 <= there.low <= there.high <= 1
    assert (there.value, there.low, there.high) == pytest.approx((-back.value, -back.high, -back.low))
    one = score(fitted)
    assert 0 <= one.low <= one.share + 1e-12 and one.share <= one.high + 1e-12 <= 1 + 2e-12


def test_names_and_files_are_told_apart():
    assert names_of(" arc_easy, own.jsonl,arc_easy ") == ["arc_easy", "own.jsonl"]
    assert [is_file(name) for name in ("arc_easy", "a/own.jsonl", "b.YAML", "c.yml")] == [False, True, True, True]
    with pytest.raises(InputError, match="empty"):
        names_of(" , ")


def test_an_answer_is_a_number_or_the_text_of_a_choice(tmp_path):
    path = tmp_path / "own.jsonl"
    path.write_text(f"{json.dumps(ROW)}\n\n{json.dumps(ROW | {'answer': 'a stone', 'more': 1})}\n")
    assert read_questions(path) == [ROW, ROW | {"answer": 1}]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("no json", "line 1, is not JSON"),
        ([1], "line 1,"),
        (ROW | {"question": " "}, "question is no text"),
        (ROW | {"choices": ["one"]}, "choices are no list of two texts"),
        (ROW | {"choices": ["one", 2]}, "choices are no list of two texts"),
        (ROW | {"choices": ["one", "one"]}, "two of the choices are the same"),
        (ROW | {"answer": 2}, "answer 2 is none of the 2 choices"),
        (ROW | {"answer": True}, "answer True is none"),
        (ROW | {"answer": "a pear"}, "answer 'a pear' is none"),
    ],
)
def test_a_bad_line_is_named(tmp_path, row, message):
    path = tmp_path / "own.jsonl"
    path.write_text(row if isinstance(row, str) else json.dumps(row))
    with pytest.raises(InputError, match=message) as caught:
        read_questions(path)
    assert str(path) in caught.value.message and "choices" in caught.value.remedy


def test_a_file_without_questions_is_told(tmp_path):
    (tmp_path / "own.jsonl").write_text("\n")
    with pytest.raises(InputError, match="holds no question"):
        read_questions(tmp_path / "own.jsonl")
