"""stats.py against slow or exact oracles."""

from __future__ import annotations

import time
from itertools import product

import numpy as np
import pytest

from radllama import stats


def test_bootstrap_equals_a_plain_loop() -> None:
    rng = np.random.default_rng(1)
    values, clusters = rng.random((23, 3)), rng.integers(7, size=23) * 10
    means = stats.bootstrap_means(values, clusters, resamples=40, seed=5)
    members = [values[clusters == c] for c in np.unique(clusters)]
    draws = np.random.default_rng([5, 0])
    for got in means:
        chosen = np.concatenate([members[k] for k in draws.integers(len(members), size=len(members))])
        assert np.allclose(got, chosen.mean(0))


def test_cases_without_a_value_are_left_out() -> None:
    rng = np.random.default_rng(7)
    scores, clusters = rng.random((40, 2, 2)), np.repeat(np.arange(20), 2)
    scores[rng.random((40, 2)) < 0.4, 1] = np.nan
    means = stats.bootstrap_means(scores[:, :, 1], clusters, resamples=30, seed=5)
    draws = np.random.default_rng([5, 0])
    for got in means:
        chosen = np.concatenate([scores[clusters == c, :, 1] for c in draws.integers(20, size=20)])
        assert np.allclose(got, np.nanmean(chosen, 0))
    a, b = stats.summarise(scores, ["full", "part"], clusters, 50, 0)
    assert a["full"]["mean"] == pytest.approx(scores[:, 0, 0].mean())
    assert "cases" not in a["full"]
    assert b["part"]["cases"] == (~np.isnan(scores[:, 1, 1])).sum()
    row = stats.compare_systems(scores, ["a", "b"], ["full", "part"], clusters, 50, 0)[1]
    both = ~np.isnan(scores[:, :, 1]).any(1)
    assert row["cases"] == both.sum() < b["part"]["cases"]
    assert row["difference"] == pytest.approx((scores[both, 0, 1] - scores[both, 1, 1]).mean())
    kept = stats.randomisation_p((scores[both, 0, 1] - scores[both, 1, 1])[:, None], clusters[both], 5000)
    assert stats.randomisation_p((scores[:, 0, 1] - scores[:, 1, 1])[:, None], clusters, 5000) == pytest.approx(
        kept, abs=0.03
    )
    scores[:, 1] = np.nan
    nothing = stats.summarise(scores, ["full", "part"], clusters, 50, 0)[1]["part"]
    assert nothing == {"mean": None, "cases": 0, "low": None, "high": None}


def test_a_metric_that_no_case_has_in_both_systems_is_no_test() -> None:
    scores = np.random.default_rng(8).normal(0.5, 1, (40, 2, 3))
    alone = stats.compare_systems(scores[:, :, :2], ["a", "b"], ["x", "y"], np.arange(40), 100, 0)
    scores[:, 1, 2] = np.nan
    rows = stats.compare_systems(scores, ["a", "b"], ["x", "y", "z"], np.arange(40), 100, 0)
    assert {key: rows[2][key] for key in ("difference", "low", "high", "p", "p_holm")} == dict.fromkeys(
        ("difference", "low", "high", "p", "p_holm")
    )
    assert [row["p_holm"] for row in rows[:2]] == [row["p_holm"] for row in alone]


def test_chunks_bound_memory_and_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    values = np.random.default_rng(2).normal(0.02, 1, (50, 2))
    whole = stats.bootstrap_means(values, np.arange(50), 30)
    sizes = list(stats._chunks(10_000, 2114, ""))
    assert sum(sizes) == 10_000
    assert max(sizes) * 2114 <= 8_000_000
    monkeypatch.setattr(stats, "_chunks", lambda total, width, name: [7] * 4 + [2])
    assert np.allclose(stats.bootstrap_means(values, np.arange(50), 30), whole)


def test_the_interval_covers_the_mean_as_often_as_it_says() -> None:
    rng, hits = np.random.default_rng(3), 0
    for _ in range(300):
        values, clusters = rng.normal(0.5, 1, (60, 1)), np.arange(60)
        interval = stats._interval(stats.bootstrap_means(values, clusters, 400)[:, 0], clusters)
        hits += (interval["low"] or 0) <= 0.5 <= (interval["high"] or 0)
    assert 0.91 <= hits / 300 <= 0.98


def test_copies_of_a_patients_case_add_no_certainty() -> None:
    values = np.random.default_rng(4).random((30, 1))
    once, thrice = np.arange(30), np.repeat(np.arange(30), 3)
    assert np.allclose(
        stats.bootstrap_means(values, once, 200), stats.bootstrap_means(values.repeat(3, 0), thrice, 200)
    )
    shifted = values - 0.45
    assert stats.randomisation_p(shifted.repeat(3, 0), thrice, 500) == stats.randomisation_p(shifted, once, 500)
    assert stats.randomisation_p(shifted.repeat(3, 0), np.arange(90), 500) < stats.randomisation_p(shifted, once, 500)


def test_randomisation_approaches_the_exact_test() -> None:
    differences = np.random.default_rng(6).normal(0.35, 1, (12, 3))
    clusters = np.array([0, 0, 1, 2, 3, 3, 4, 5, 6, 7, 8, 9])
    sums = np.stack([differences[clusters == c].sum(0) for c in range(10)])
    signs = np.array(list(product((-1, 1), repeat=10)))
    exact = (np.abs(signs @ sums) >= np.abs(sums.sum(0)) - 1e-12).mean(0)
    assert np.ptp(exact) > 0.1
    assert stats.randomisation_p(differences, clusters, 40_000) == pytest.approx(exact, abs=0.012)


def test_p_is_never_zero_and_one_without_a_difference() -> None:
    columns = np.stack([np.full(40, 0.3), np.zeros(40), np.tile([0.1, -0.1], 20)], axis=1)
    p = stats.randomisation_p(columns, np.arange(40), 999)
    assert p.tolist() == [1 / 1000, 1, 1]


def test_holm() -> None:
    assert stats.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert stats.holm([0.6, 0.9]) == [1, 1]


def test_ten_thousand_resamples_take_less_than_ten_seconds() -> None:
    scores = np.random.default_rng(0).random((2114, 5, 6))  # five systems, six metrics
    names = ["rouge1", "rouge2", "rougeL", "rougeLsum", "bertscore", "clinical"]
    start = time.perf_counter()
    stats.summarise(scores, names, np.arange(2114), 10_000, 0)
    rows = stats.compare_systems(scores, list("abcde"), names, np.arange(2114), 10_000, 0)
    assert len(rows) == 60
    assert time.perf_counter() - start < 10
