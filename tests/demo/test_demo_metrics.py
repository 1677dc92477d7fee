"""The scores of a search and their intervals, against values worked out by hand and by brute force."""

import itertools

import numpy as np
import pytest

from petune.demo.metrics import bootstrap_mean, score_queries


def test_scores_of_a_search_worked_out_by_hand():
    similarity = np.array(
        [
            [9, 1, 1, 1, 1, 1, 1],  # first
            [5, 4, 1, 1, 1, 1, 1],  # second
            [6, 5, 0, 4, 3, 2, 1],  # seventh
            *np.eye(7)[3:],
        ]
    )
    scores = score_queries(similarity)
    assert scores.hit_at_1[:3].tolist() == [1, 0, 0]
    assert scores.hit_at_5[:3].tolist() == [1, 1, 0]
    assert scores.reciprocal_rank[:3] == pytest.approx([1, 1 / 2, 1 / 7])


def test_a_tie_scores_the_mean_over_all_orders_of_the_tied():
    similarity = np.zeros((7, 7))
    similarity[0] = [3, 5, 3, 3, 1, 0, 0]  # the answer is behind one and ties with two
    orders = itertools.permutations(["answer", "other", "another"])
    ranks = [2 + order.index("answer") for order in orders]
    scores = score_queries(similarity)
    assert scores.reciprocal_rank[0] == pytest.approx(np.mean([1 / rank for rank in ranks]))
    assert scores.hit_at_1[0] == 0
    assert scores.hit_at_1[1] == pytest.approx(1 / 7)  # all equal: no better than chance
    assert scores.hit_at_5[1] == pytest.approx(5 / 7)


def test_a_similarity_that_cannot_be_scored_is_refused():
    with pytest.raises(ValueError, match=r"shape \(2, 3\); it must be \[n, n\]"):
        score_queries(np.zeros((2, 3)))
    with pytest.raises(ValueError, match="NaN, so the encoder diverged; use a lower learning rate"):
        score_queries(np.full((2, 2), np.nan))


def test_the_interval_has_the_width_of_the_standard_error():
    values = np.random.default_rng(0).normal(size=400)
    interval = bootstrap_mean(values, [str(i) for i in range(400)], seed=0)
    assert interval.mean == pytest.approx(values.mean())
    assert interval.high - interval.low == pytest.approx(2 * 1.96 / 20, rel=0.15)


def test_values_that_agree_within_their_file_widen_the_interval():
    values = np.repeat(np.random.default_rng(0).normal(size=40), 10)
    single = bootstrap_mean(values, [str(i) for i in range(400)], seed=0)
    grouped = bootstrap_mean(values, [str(i // 10) for i in range(400)], seed=0)
    assert grouped.high - grouped.low > 2.5 * (single.high - single.low)


def test_a_paired_difference_is_tighter_than_its_parts():
    generator = np.random.default_rng(0)
    hard = generator.normal(size=300)
    groups = [str(i) for i in range(300)]
    before, after = hard, hard + 0.2 + 0.05 * generator.normal(size=300)
    gain = bootstrap_mean(after - before, groups, seed=0)
    assert gain.excludes_zero
    assert gain.low == pytest.approx(0.2, abs=0.02)
    assert not bootstrap_mean(before, groups, seed=0).excludes_zero
