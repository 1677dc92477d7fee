"""Retrieval scores per query, and how sure one can be of their mean."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.floating[Any]]

RESAMPLES = 2000  # the 2.5% quantile then rests on 50 resamples


@dataclass(frozen=True)
class Interval:
    """A mean and the 95% interval of its bootstrap distribution."""

    mean: float
    low: float
    high: float

    @property
    def excludes_zero(self) -> bool:
        return self.low > 0 or self.high < 0


@dataclass(frozen=True)
class QueryScores:
    """Scores of every query, each [queries]."""

    hit_at_1: Floats
    hit_at_5: Floats
    reciprocal_rank: Floats

    def means(self) -> dict[str, float]:
        return {
            "R@1": float(self.hit_at_1.mean()),
            "R@5": float(self.hit_at_5.mean()),
            "MRR": float(self.reciprocal_rank.mean()),
        }


def score_queries(similarity: Floats) -> QueryScores:
    """Scores of a search in which candidate i is the right answer to query i.

    A right answer that ties with t others after b better ones has each of the ranks b+1 … b+t+1 equally often:
    counting ties as hits would give a query that shares no word with anything full marks under TF-IDF.

        hit@k = clip((k − b) / (t + 1), 0, 1),    1/rank = (H(b+t+1) − H(b)) / (t + 1),    H(n) = Σ_{i≤n} 1/i

    Args:
        similarity: [queries, candidates], square; higher is nearer.

    Raises:
        ValueError: not square, or NaN in it.
    """
    if similarity.ndim != 2 or similarity.shape[0] != similarity.shape[1]:
        raise ValueError(f"score_queries: similarity has shape {similarity.shape}; it must be [n, n].")
    if np.isnan(similarity).any():
        raise ValueError("score_queries: similarity has NaN, so the encoder diverged; use a lower learning rate.")
    right = similarity.diagonal()[:, None]
    better = (similarity > right).sum(axis=1)
    tied = (similarity == right).sum(axis=1) - 1
    harmonic = np.concatenate([[0.0], np.cumsum(1.0 / np.arange(1, len(similarity) + 1))])

    def hit_at(k: int) -> Floats:
        return np.clip((k - better) / (tied + 1), 0.0, 1.0)

    reciprocal_rank = (harmonic[better + tied + 1] - harmonic[better]) / (tied + 1)
    return QueryScores(hit_at(1), hit_at(5), reciprocal_rank)


def bootstrap_mean(values: Floats, groups: list[str], *, seed: int) -> Interval:
    """Mean of `values` with its 95% percentile interval, whole groups drawn with replacement.

    Queries from one file succeed and fail together, so files are drawn, not queries. Every call with the same groups
    and seed draws the same files: the interval of `a − b` is that of the paired difference.

    Args:
        values: one number a query, [queries].
        groups: the file of each query.
        seed: of the draws.
    """
    _, member = np.unique(groups, return_inverse=True)
    sums = np.bincount(member, weights=values)
    sizes = np.bincount(member)
    draws = np.random.default_rng(seed).multinomial(len(sizes), np.full(len(sizes), 1 / len(sizes)), size=RESAMPLES)
    low, high = np.quantile((draws @ sums) / (draws @ sizes), [0.025, 0.975])
    return Interval(float(values.mean()), float(low), float(high))
