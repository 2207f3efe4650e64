"""held_out.py against brute force over Python sets."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_duplicates import Texts, gram_set, made, on_disk

from radllama import duplicates as dup
from radllama import held_out

Pairs = set[tuple[int, int]]


def search(sets: dup.Shingles, split: dup.I8, kept: dup.Bools, threshold: float) -> tuple[Pairs, held_out.HeldOut]:
    found = held_out.near_held_out(sets, split, kept, threshold)
    pairs = set(zip(found.query.tolist(), found.other.tolist(), strict=True))
    assert len(pairs) == len(found.query)
    return pairs, found


def expected(texts: Texts, split: dup.I8, kept: dup.Bools, threshold: float) -> Pairs:
    held = np.flatnonzero(kept & (split > 0)).tolist()
    others = np.flatnonzero(kept & (split < 2)).tolist()
    grams = [gram_set(text) for text in texts]
    found: Pairs = set()
    for a in held:
        for b in others:
            shared = len(grams[a] & grams[b])
            if split[a] > split[b] and shared >= threshold * (len(grams[a]) + len(grams[b]) - shared) - 1e-9 > 0:
                found.add((a, b))
    return found


def drawn(count: int, seed: int) -> tuple[dup.I8, dup.Bools]:
    draw = np.random.default_rng(seed)
    return draw.choice(3, count, p=[0.6, 0.2, 0.2]).astype(np.int8), draw.random(count) < 0.9


@pytest.mark.parametrize("threshold", [0.75, 0.8, 0.9, 1.0])
def test_the_search_finds_what_brute_force_finds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, threshold: float
) -> None:
    texts = made(400, seed=2)
    for name, value in (("ROWS", 64), ("PARTITION", 512), ("HITS", 300)):  # several blocks, files and parts
        monkeypatch.setattr(held_out, name, value)
    sets, _ = on_disk(texts, tmp_path)
    split, kept = drawn(400, 0)
    pairs, found = search(sets, split, kept, threshold)
    assert pairs == expected(texts, split, kept, threshold)
    assert len(pairs) > 20
    assert found.queries == found.complete == int((kept & (split > 0)).sum())
    assert [file.name for file in tmp_path.iterdir()] == ["grams.bin"]
    sets.close()


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, 400), st.floats(0.75, 1))
def test_pairs_at_the_threshold_are_found_whatever_their_sizes(seed: int, longest: int, threshold: float) -> None:
    """Sets of numbers: those of one side and, at the very border of what is near, some taken away or others added."""
    draw = np.random.default_rng(seed)
    made: list[np.ndarray] = []
    for _ in range(40):
        a = draw.choice(2**32, draw.integers(1, longest + 1), replace=False).astype(np.uint32)
        less = draw.integers(0, int(len(a) * (1 - threshold)) + 1)
        shared = len(a) - less
        more = max(0, int(shared / threshold - len(a) + draw.integers(0, 2)))  # shared / (len(a) + more) >= threshold
        b = np.concatenate([a[:shared], draw.choice(2**32, more, replace=False).astype(np.uint32)])
        made += [np.unique(a), np.unique(b)] if draw.random() < 0.5 else [np.unique(b), np.unique(a)]
    truth = {
        (k, k + 1)
        for k in range(0, len(made), 2)
        if (both := len(np.intersect1d(made[k], made[k + 1])))
        >= threshold * (len(made[k]) + len(made[k + 1]) - both) - 1e-9
    }
    split = np.tile(np.array([2, 0], np.int8), 40)
    with pytest.MonkeyPatch.context() as patch, TemporaryDirectory() as folder:
        patch.setattr(held_out, "_COUNTS", 1 << 12)
        file = Path(folder) / "grams.bin"
        file.write_bytes(np.concatenate(made).tobytes())
        sets = dup.Shingles(file, np.array([len(one) for one in made], np.uint32))
        pairs, found = search(sets, split, np.ones(80, np.bool_), threshold)
        sets.close()
    assert pairs == truth
    assert found.complete == 40


def test_what_is_too_common_is_left_out_and_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = made(300, seed=5)
    sets, _ = on_disk(texts, tmp_path)
    split, kept = drawn(300, 1)
    truth = expected(texts, split, kept, 0.8)
    last = -1
    for common in (0, 1, 3, 300):
        monkeypatch.setattr(held_out, "COMMON", common)
        pairs, found = search(sets, split, kept, 0.8)
        assert pairs <= truth
        assert len({a for a, _ in truth - pairs}) <= found.queries - found.complete
        assert found.complete >= last
        last = found.complete
    assert pairs == truth
    assert found.complete == found.queries
    sets.close()


def test_empty_texts_are_nobodys_duplicates(tmp_path: Path) -> None:
    texts = [[], ["a"], [], ["a"]]
    sets, _ = on_disk(texts, tmp_path)
    split = np.array([2, 2, 0, 0], np.int8)
    pairs, found = search(sets, split, np.ones(4, np.bool_), 0.8)
    assert pairs == {(1, 3)}
    assert (found.queries, found.complete) == (2, 2)
    sets.close()


def test_nothing_held_out_and_nothing_at_all(tmp_path: Path) -> None:
    for count in (0, 5):
        texts = made(count, seed=1)
        sets, _ = on_disk(texts, tmp_path)
        pairs, found = search(sets, np.zeros(count, np.int8), np.ones(count, np.bool_), 0.8)
        assert (pairs, found.queries, found.complete) == (set(), 0, 0)
        sets.close()
