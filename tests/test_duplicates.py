"""duplicates.py against brute force over Python sets, and the rules of the splits as properties."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from radllama import duplicates as dup

PHRASES = (
    "the lungs are clear without focal consolidation",
    "heart size is within normal limits",
    "there is no pleural effusion or pneumothorax",
    "a 12 mm nodule lies in the right upper lobe",
    "small left pleural effusion is unchanged",
    "degenerative changes of the thoracic spine",
    "the gallbladder holds several stones up to 8 mm",
    "mild prominence of the central pulmonary vessels",
    "no free air below the diaphragm",
    "median sternotomy wires are intact",
    "the aorta is tortuous and calcified",
    "the osseous structures are unremarkable",
)
Texts = list[list[str]]


def made(count: int, seed: int = 0) -> Texts:
    """Texts of 20 to 90 words; half of them are earlier ones with a few words changed."""
    draw = random.Random(seed)
    texts: Texts = []
    for _ in range(count):
        if texts and draw.random() < 0.5:
            text = list(draw.choice(texts))
            for _ in range(draw.randint(0, len(text) // 16)):
                text[draw.randrange(len(text))] = f"w{draw.randrange(1000)}"
        else:
            text = " ".join(draw.sample(PHRASES, draw.randint(4, len(PHRASES)))).split()
            for _ in range(draw.randint(0, 12)):
                text.insert(draw.randrange(len(text)), f"v{draw.randrange(300)}")
        texts.append(text)
    return texts


def gram_set(text: Sequence[str]) -> set[tuple[str, ...]]:
    return set(zip(text, text[1:], text[2:], strict=False)) or ({tuple(text)} if text else set())


def jaccard(a: Sequence[str], b: Sequence[str]) -> float:
    one, two = gram_set(a), gram_set(b)
    return len(one & two) / len(one | two)


def on_disk(texts: Texts, folder: Path) -> tuple[dup.Shingles, dup.U32]:
    flat, sizes = dup.shingles(texts)
    (folder / "grams.bin").write_bytes(flat.tobytes())
    return dup.Shingles(folder / "grams.bin", sizes.astype(np.uint32)), dup.band_keys(flat, sizes)


def hashes(texts: Texts) -> dup.U64:
    return np.array([dup.digest(" ".join(text)) for text in texts], dtype=np.uint64)


def clustered(texts: Texts, folder: Path) -> tuple[dup.Clusters, dup.Shingles]:
    sets, keys = on_disk(texts, folder)
    pair = hashes(texts)
    exact = dup.exact_clusters(pair, pair)
    return dup.near_clusters(exact, list(keys.T), sets, 0.8), sets


def components(texts: Texts, threshold: float = 0.8) -> list[int]:
    """By brute force: the lowest member of the chain of near duplicates that each text belongs to."""
    root = list(range(len(texts)))
    for b in range(len(texts)):
        for a in range(b):
            if root[a] != root[b] and jaccard(texts[a], texts[b]) >= threshold:
                low, high = sorted((root[a], root[b]))
                root = [low if r == high else r for r in root]
    return root


# ---- texts, sets


def test_normalise_keeps_words_and_digits() -> None:
    assert dup.normalise("  A 2.5 cm\nNODULE -- right-sided (RUL).") == "a 2 5 cm nodule right sided rul"
    assert dup.normalise("No.\tChange!") == dup.normalise("no change")
    assert dup.normalise("4 mm") != dup.normalise("5 mm")


@given(st.lists(st.lists(st.sampled_from("abcd"), max_size=9), min_size=1, max_size=8))
def test_shingles_are_the_sets_of_3_grams(texts: Texts) -> None:
    flat, sizes = dup.shingles(texts)
    assert sizes.tolist() == [len(gram_set(text)) for text in texts]
    parts = np.split(flat, np.cumsum(sizes)[:-1])
    for a, one in zip(texts, parts, strict=True):
        assert (np.diff(one.astype(np.int64)) > 0).all()
        for b, two in zip(texts, parts, strict=True):
            assert len(np.intersect1d(one, two)) == len(gram_set(a) & gram_set(b))


def test_similar_is_the_jaccard_index(tmp_path: Path) -> None:
    texts = made(60)
    sets, _ = on_disk(texts, tmp_path)
    a, b = (side.ravel() for side in np.meshgrid(np.arange(60), np.arange(60)))
    for threshold in (0.5, 0.8):
        expected = [jaccard(texts[i], texts[j]) >= threshold for i, j in zip(a, b, strict=True)]
        assert sets.similar(a, b, threshold).tolist() == expected
    sets.close()


def test_similar_counts_the_threshold_itself(tmp_path: Path) -> None:
    words = [f"w{k}" for k in range(11)]  # 9 grams
    sets, _ = on_disk([words, [*words, "x"], [*words[:-1], "y"]], tmp_path)
    assert jaccard(words, [*words[:-1], "y"]) == 0.8
    assert sets.similar(np.array([0, 0]), np.array([1, 2]), 0.8).tolist() == [True, True]
    assert sets.similar(np.array([0, 0]), np.array([1, 2]), 0.81).tolist() == [True, False]
    sets.close()


# ---- clusters


def test_near_clusters_are_those_of_brute_force(tmp_path: Path) -> None:
    texts = made(400, seed=1)
    clusters, sets = clustered(texts, tmp_path)
    expected = components(texts)
    assert len(set(expected)) < 300  # there is something to find
    near = [(a, b) for b in range(400) for a in range(b) if jaccard(texts[a], texts[b]) >= 0.8]
    assert sum(clusters.component[a] == clusters.component[b] for a, b in near) >= 0.99 * len(near)
    assert all(expected[index] == expected[root] for index, root in enumerate(clusters.component.tolist()))
    for index, leader in enumerate(clusters.leader):
        assert leader == index or jaccard(texts[index], texts[leader]) >= 0.8
        assert clusters.leader[leader] == leader
        assert clusters.component[leader] == clusters.component[index]
    assert (clusters.leader != np.arange(400)).sum() > 100
    sets.close()


def test_equal_findings_are_one_component_but_no_copies() -> None:
    pair = np.array([11, 12, 13, 11, 14], dtype=np.uint64)
    findings = np.array([1, 2, 1, 1, 2], dtype=np.uint64)
    clusters = dup.exact_clusters(pair, findings)
    assert clusters.component.tolist() == [0, 1, 0, 0, 1]
    assert clusters.leader.tolist() == [0, 1, 2, 0, 4]


def test_without_rensa_the_error_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "rensa", None)
    with pytest.raises(ValueError, match=r"radllama\[reports\].*--near off"):
        dup.band_keys(np.ones(1, np.uint32), np.ones(1, np.int64))


def test_signatures_do_not_depend_on_the_neighbours() -> None:
    texts = made(30)
    together = dup.band_keys(*dup.shingles(texts))
    alone = np.concatenate([dup.band_keys(*dup.shingles([text])) for text in texts])
    assert np.array_equal(together, alone)


# ---- splits

SHARES = (0.8, 0.1, 0.1)


def unlinked(count: int) -> tuple[dup.Clusters, dup.U64]:
    each = np.arange(count, dtype=np.int32)
    return dup.Clusters(each, each), np.array([dup.digest(f"pair {k}") for k in range(count)], dtype=np.uint64)


def patients(numbers: Sequence[int]) -> dup.U64:
    return np.array([dup.digest(f"patient {k}") if k else 0 for k in numbers], dtype=np.uint64)


def test_draw_meets_the_shares_and_stays_as_data_grows() -> None:
    clusters, pair = unlinked(20_000)
    split, reason = dup.assign(clusters, pair, patients([0] * 20_000), shares=SHARES, cap=10)
    assert not reason.any()
    assert np.allclose(np.bincount(split) / 20_000, SHARES, atol=0.01)
    half = dup.Clusters(*(column[:10_000] for column in clusters))
    before, _ = dup.assign(half, pair[:10_000], patients([0] * 10_000), shares=SHARES, cap=10)
    assert np.array_equal(before, split[:10_000])


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(0, 4), st.booleans(), st.booleans())
def test_nobody_is_on_both_sides(seed: int, cap: int, known: bool, temporal: bool) -> None:
    draw = np.random.default_rng(seed)
    count = 300
    pair = np.array([dup.digest(f"{k}") for k in draw.integers(0, 150, count)], dtype=np.uint64)
    findings = pair % np.uint64(97)
    near = dup.exact_clusters(pair, findings)
    patient = patients((draw.integers(0, 80, count) * (known | (draw.random(count) < 0.3))).tolist())
    date = draw.integers(20100101, 20201231, count).astype(np.int32)
    split, reason = dup.assign(
        near, pair, patient, shares=SHARES, cap=cap, date=date, test_from=20180101 if temporal else 0
    )
    kept = reason == 0
    for values in (near.component, np.where(patient == 0, np.arange(count, dtype=np.uint64), patient)):
        sides: dict[int, set[int]] = {}
        for value, side in zip(values[kept].tolist(), split[kept].tolist(), strict=True):
            sides.setdefault(value, set()).add(side)
        assert all(len(found) == 1 for found in sides.values())
    for side in range(3):
        copies = np.unique(pair[kept & (split == side)], return_counts=True)[1]
        assert not len(copies) or copies.max() <= ((cap or count) if side == 0 else 1)
    if temporal:
        assert (date[kept & (split == 2)] >= 20180101).all()
        assert (date[kept & (split != 2)] < 20180101).all()
    if not known and not temporal and not patient.any():
        assert set(reason.tolist()) <= {0, dup.REASONS.index("copies_over_cap")}


def test_small_groups_stay_held_out_and_boilerplate_stays_in_train() -> None:
    """200 patients share one normal pair, two share another; 2,000 reports are unique."""
    patient = patients([*range(1, 201), *range(201, 2201), 0, 0])
    sides = dup.draw(patient, SHARES)
    test, train = (int(np.flatnonzero((sides == side) & (np.arange(2202) >= 200))[0]) for side in (2, 0))
    clusters, pair = unlinked(2202)
    for rows, name in ((np.arange(200), "boilerplate 1"), (np.array([test, train]), "shared")):
        pair[rows] = dup.digest(name)
    clusters = dup.exact_clusters(pair, pair)
    split, reason = dup.assign(clusters, pair, patient, shares=SHARES, cap=10)
    lost = dup.REASONS.index("duplicate_across_splits")
    assert (split[test], reason[test]) == (2, 0)
    assert reason[train] == lost
    boilerplate = np.flatnonzero(reason[:200] == 0)
    assert split[boilerplate].tolist() == [0] * 10  # 9 % of all: a giant, whatever its hash draws
    assert (reason[:200] == lost).sum() == (sides[:200] != 0).sum() > 10


def test_most_boilerplate_groups_remain_in_train() -> None:
    """100 groups of 20 patients each: were test to win, train would lose 1 - 0.8^20 = 99 % of them."""
    patient = patients(range(1, 20_001))
    pair = np.array([dup.digest(f"group {k // 20}" if k < 2000 else f"{k}") for k in range(20_000)], dtype=np.uint64)
    clusters = dup.exact_clusters(pair, pair)
    split, reason = dup.assign(clusters, pair, patient, shares=SHARES, cap=10)
    kept = (reason == 0) & (np.arange(20_000) < 2000)
    sides = [len(set(clusters.component[kept & (split == side)].tolist())) for side in range(3)]
    assert sum(sides) == 100
    assert 65 <= sides[0] <= 93
    assert sides[1] > 2 < sides[2]


def test_a_hold_out_by_date_keeps_earlier_patients_out() -> None:
    clusters, pair = unlinked(4)
    date = np.array([20170101, 20180601, 20180601, 0], dtype=np.int32)
    split, reason = dup.assign(
        clusters, pair, patients([1, 1, 2, 3]), shares=SHARES, cap=10, date=date, test_from=20180101
    )
    assert [dup.REASONS[code] for code in reason] == ["", "patient_seen_before", "", "no_date"]
    assert split[0] < 2 == split[2]


def test_earlier_reasons_stay_and_count_for_nothing() -> None:
    pair = np.array([5, 5, 5], dtype=np.uint64)
    clusters = dup.exact_clusters(pair, pair)
    dropped = np.array([0, 1, 0], dtype=np.int8)
    _, reason = dup.assign(clusters, pair, patients([0, 0, 0]), shares=(1, 0, 0), cap=2, dropped=dropped)
    assert reason.tolist() == [0, 1, 0]
