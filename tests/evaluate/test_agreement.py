import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binomtest

from edgeprune.evaluate.agreement import agreement, common_tokens, identical_answers, wilson
from edgeprune.evaluate.perplexity import Losses


def losses(likeliest):
    """Only the likeliest tokens count here."""
    documents = [[np.array(window, dtype=np.int64) for window in windows] for windows in likeliest]
    return Losses(np.zeros(len(documents)), np.ones(len(documents), dtype=np.int64), documents)


def test_the_share_is_counted_over_places():
    dense, fitted = losses([[[1, 2, 3], [4]], [[5, 6]]]), losses([[[1, 2, 9], [4]], [[9, 6]]])
    found = agreement(dense, fitted, seed=0)
    assert (found.share, found.places, found.documents, found.of) == (4 / 6, 6, 2, 2)
    assert agreement(dense, dense, seed=0).share == agreement(dense, dense, seed=0).low == 1


def test_the_interval_is_over_documents():
    """Places of a document stand and fall together: 200 documents that agree wholly or not at all are 200 samples."""
    generator = np.random.default_rng(1)
    agrees = generator.random(200) < 0.7
    dense = losses([[np.zeros(100)]] * 200)
    fitted = losses([[np.full(100, 0 if agree else 1)] for agree in agrees])
    found = agreement(dense, fitted, seed=0)
    share = agrees.mean()
    assert found.share == pytest.approx(share)
    reach = 1.96 * np.sqrt(share * (1 - share) / 200)
    assert (found.low, found.high) == pytest.approx((share - reach, share + reach), abs=0.015)
    assert agreement(losses([[[1, 2]]]), losses([[[1, 3]]]), seed=0).low == 0.5  # of one document: no interval


KEPT = np.array([3, 5, 8, 9])


def test_ids_of_a_vocabulary_of_its_own_are_compared_as_old_ones():
    dense, fitted = losses([[[3, 8, 4]]]), losses([[[0, 2, 1]]])
    found = agreement(dense, fitted, seed=0, kept=KEPT)
    assert (found.share, found.places) == (2 / 3, 3)


def test_places_behind_other_tokens_are_left_out():
    old = [[np.array([3, 5, 8]), np.array([9, 4, 3])], [np.array([7, 3])]]
    new = [[np.array([0, 1, 2]), np.array([3, 1, 1, 0])], [np.array([1, 1, 0])]]  # 4 and 7 are spelled by two tokens
    common = common_tokens(old, new, KEPT)
    assert common == [[3, 1], [0]]
    dense = losses([[[5, 8], [4, 3]], [[3]]])
    fitted = losses([[[1, 3], [0, 0, 0]], [[0, 0]]])
    found = agreement(dense, fitted, seed=0, common=common, kept=KEPT)
    assert (found.places, found.documents, found.of) == (3, 1, 2)
    assert found.share == 1 / 3


def test_nothing_in_common_is_no_agreement():
    assert agreement(losses([[[3]]]), losses([[[0]]]), seed=0, common=[[0]], kept=KEPT) is None


def test_answers_count_up_to_their_first_difference():
    dense = np.zeros((3, 8), dtype=np.int64)
    fitted = dense.copy()
    fitted[0, 2] = 1  # and the same again from there on
    fitted[1, 7] = 1
    found = identical_answers(dense, fitted)
    assert [(of.tokens, of.same, of.answers) for of in found] == [(1, 3, 3), (2, 3, 3), (4, 2, 3), (8, 1, 3)]
    assert found[-1].share == 1 / 3


@given(st.integers(0, 60), st.integers(1, 60))
def test_wilson_is_the_score_interval(successes, trials):
    successes = min(successes, trials)
    expected = binomtest(successes, trials).proportion_ci(method="wilson")
    assert wilson(successes, trials) == pytest.approx((expected.low, expected.high), abs=1e-6)
