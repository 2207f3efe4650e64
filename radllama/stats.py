"""Intervals and paired tests over scores that are already there, one number for each case and metric.

Resampling draws whole clusters (patients), and works on sums by cluster: 10,000 resamples of thousands of cases take
seconds. NaN stands where a metric does not apply to a case; such cases are left out of that metric's mean, and out of
a comparison where either system has none.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import combinations, product
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


def _by_cluster(values: Floats, clusters: Ints) -> tuple[Floats, Floats]:
    """Sums and numbers of the values that are not NaN, (C, K) each, in the C clusters that occur."""
    present, inverse = np.unique(clusters, return_inverse=True)
    sums, sizes = np.zeros((2, len(present), values.shape[1]))
    known = ~np.isnan(values)
    np.add.at(sums, inverse, np.where(known, values, 0.0))
    np.add.at(sizes, inverse, known)
    return sums, sizes


def _chunks(total: int, width: int, name: str) -> Iterable[int]:
    size = max(1, 8_000_000 // width)  # 64 MB of float64 at a time
    yield from tqdm([min(size, total - done) for done in range(0, total, size)], name, disable=None, leave=False)


def bootstrap_means(values: Floats, clusters: Ints, resamples: int = 10_000, seed: int = 0) -> Floats:
    """Means (resamples, K) of the columns of `values` (n, K) when whole clusters are drawn with replacement. All
    columns see the same draws, so the difference of two is a paired one."""
    sums, sizes = _by_cluster(values, clusters)
    total, rng, means = len(sizes), np.random.default_rng([seed, 0]), []
    for size in _chunks(resamples, total, "bootstrap"):
        drawn = rng.integers(total, size=(size, total)) + np.arange(size)[:, None] * total
        counts = np.bincount(drawn.ravel(), minlength=size * total).reshape(size, total).astype(np.float64)
        with np.errstate(invalid="ignore"):  # a draw without any value: NaN
            means.append((counts @ sums) / (counts @ sizes))
    return np.concatenate(means)


def randomisation_p(differences: Floats, clusters: Ints, resamples: int = 10_000, seed: int = 0) -> Floats:
    """Two-sided p (K,) that paired `differences` (n, K) have mean 0, by approximate randomisation (Noreen 1989): each
    resample swaps the two systems' answers in a random half of the clusters. p = (count + 1) / (resamples + 1), where
    the count is of resamples at least as far from 0 as the data; so p is never 0."""
    sums, _ = _by_cluster(differences, clusters)
    total, rng, count = sums.sum(0), np.random.default_rng([seed, 1]), np.zeros(sums.shape[1])
    reach = np.abs(total) - 1e-9 * np.abs(sums).sum(0)  # a tie stays a tie whatever the rounding
    for size in _chunks(resamples, len(sums), "randomisation"):
        bits = np.frombuffer(rng.bytes(size * (len(sums) // 8 + 1)), np.uint8).reshape(size, -1)
        swapped = np.unpackbits(bits, axis=1)[:, : len(sums)].astype(np.float64)
        count += (np.abs(total - 2 * (swapped @ sums)) >= reach).sum(0)
    return np.asarray((count + 1) / (resamples + 1))


def holm(p: Sequence[float]) -> list[float]:
    """Holm's adjusted p: each may be compared with the level itself, the family-wise error is kept."""
    adjusted, highest = [0.0] * len(p), 0.0
    for rank, k in enumerate(sorted(range(len(p)), key=lambda k: p[k])):
        adjusted[k] = highest = max(highest, min(1.0, (len(p) - rank) * p[k]))
    return adjusted


def _interval(draws: Floats, clusters: Ints) -> dict[str, float | None]:
    """The 95 % percentile interval of one column of draws; one cluster alone says nothing about spread."""
    alone = (clusters == clusters[0]).all() or np.isnan(draws).all()
    low, high = (None, None) if alone else np.nanpercentile(draws, (2.5, 97.5)).tolist()
    return {"low": low, "high": high}


def _mean(values: Floats) -> dict[str, float | int | None]:
    """Mean over the cases that have a value, and their number where some have none."""
    known = values[~np.isnan(values)]
    partial = {} if len(known) == len(values) else {"cases": len(known)}
    return {"mean": float(known.mean()) if len(known) else None, **partial}


def summarise(scores: Floats, metrics: list[str], clusters: Ints, resamples: int, seed: int) -> list[dict[str, Any]]:
    """For each of S systems mean and interval of each metric. `scores` (n, S, M)."""
    draws = bootstrap_means(scores.reshape(len(scores), -1), clusters, resamples, seed)
    draws = draws.reshape(resamples, *scores.shape[1:])
    return [
        {metric: _mean(scores[:, s, m]) | _interval(draws[:, s, m], clusters) for m, metric in enumerate(metrics)}
        for s in range(scores.shape[1])
    ]


def compare_systems(
    scores: Floats, names: list[str], metrics: list[str], clusters: Ints, resamples: int, seed: int
) -> list[dict[str, Any]]:
    """A row for each pair and metric: a - b, its paired interval, p, and p after Holm over the pair's metrics. Where no
    case has a value in both, difference and p are None, and Holm's family is the smaller."""
    keys = [(a, b, m) for (a, b), m in product(combinations(range(len(names)), 2), range(len(metrics)))]
    differences = np.stack([scores[:, a, m] - scores[:, b, m] for a, b, m in keys], axis=1)
    draws = bootstrap_means(differences, clusters, resamples, seed)
    p = randomisation_p(differences, clusters, resamples, seed).tolist()
    adjusted: list[float | None] = [None] * len(p)
    for start in range(0, len(p), len(metrics)):
        family = [k for k in range(start, start + len(metrics)) if not np.isnan(differences[:, k]).all()]
        for k, q in zip(family, holm([p[k] for k in family]), strict=True):
            adjusted[k] = q
    rows = []
    for k, (a, b, m) in enumerate(keys):
        mean = _mean(differences[:, k])
        row = {"a": names[a], "b": names[b], "metric": metrics[m], "difference": mean.pop("mean"), **mean}
        tested = {"p": None if adjusted[k] is None else p[k], "p_holm": adjusted[k]}
        rows.append(row | _interval(draws[:, k], clusters) | tested)
    return rows
