"""Duplicates among millions of pairs on one machine: exact, near (MinHash), and what they mean for the splits.

A pair is compared by the set of its word 3-grams, case and punctuation aside, findings and impression together; two
pairs are near duplicates if the Jaccard index of their sets is `threshold` (0.8) or more. MinHash proposes, the sets
decide: 120 minima make 20 bands of 6, so that a pair at 0.8 shares a band with probability 0.998, and each proposal is
checked against the sets themselves, which lie on disk. One band at a time is in memory, 4 bytes a report.

    clusters = near_clusters(...)       # who is a near duplicate of whom
    splits, why = assign(...)           # one split for each cluster and each patient, or a reason to drop
"""

from __future__ import annotations

import os
import re
import zlib
from collections.abc import Iterable, Iterator, Sequence
from hashlib import blake2b
from importlib import import_module
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

VERSION = "1"  # of the normalisation, the 3-grams and the bands
BANDS, ROWS = 20, 6
SEED = 20408
LOWEST = 0.75  # thresholds below would need other bands: at 0.75 they find 98 %
ROUNDS = 8  # leaders a band's bucket may have
BATCH = 8192  # comparisons at a time

U32 = NDArray[np.uint32]
U64 = NDArray[np.uint64]
I64 = NDArray[np.int64]
I32 = NDArray[np.int32]
I8 = NDArray[np.int8]
Bools = NDArray[np.bool_]

_WORDS = re.compile(r"[^\W_]+")
# The same for ASCII, five times as fast: capitals to small letters, what is no letter or digit to a space.
_FOLD = bytes(c + 32 if 65 <= c <= 90 else c if 97 <= c <= 122 or 48 <= c <= 57 else 32 for c in range(256))


# ---- of one pair


def words(text: str) -> list[str]:
    """The words and numbers of a text in lower case; "2.5" is two of them."""
    if not text.isascii():
        return _WORDS.findall(text.lower())
    return text.encode().translate(_FOLD).decode().split()


def normalise(text: str) -> str:
    """What counts when texts are compared: words and digits, without case and punctuation."""
    return " ".join(words(text))


def digest(text: str, key: bytes = b"") -> int:
    """64 bits of BLAKE2b, keyed where there is a key; among 10 million texts two collide with probability 3e-6."""
    raw = blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8, key=key[:64]).digest()
    return int.from_bytes(raw, "little")


class _Numbers(dict[str, int]):
    """Word -> its CRC-32, worked out once."""

    def __missing__(self, word: str) -> int:
        if len(self) > 500_000:
            self.clear()
        number = self[word] = zlib.crc32(word.encode("utf-8", "surrogatepass"))
        return number


_number = _Numbers().__getitem__


def mix(values: U64) -> U64:
    """The finisher of SplitMix64: every bit of the input moves every bit of the output."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def shingles(texts: Sequence[Sequence[str]]) -> tuple[U32, I64]:
    """The set of word 3-grams of each text, as sorted 32-bit hashes one text after the other, and the sets' sizes.

    A text of one or two words has itself as its only gram, an empty text has none.
    """
    numbers = np.array([number for text in texts for number in map(_number, text)], dtype=np.uint64)
    lengths = np.array([len(text) for text in texts], dtype=np.int64)
    starts = np.cumsum(lengths) - lengths
    rows = np.repeat(np.arange(len(lengths)), lengths)
    left = starts[rows] + lengths[rows] - np.arange(len(numbers))  # words from here to the text's end
    padded = np.concatenate([numbers, np.zeros(2, np.uint64)])
    second = np.where(left > 1, padded[1:-1], np.uint64(0))
    third = np.where(left > 2, padded[2:], np.uint64(0))
    grams = mix(mix(mix(numbers + np.uint64(1)) + second) + third) >> np.uint64(32)
    kept = (left > 2) | ((lengths[rows] < 3) & (left == lengths[rows]))
    # Row and gram in one number: sorted and made unique in one go (np.unique hashes, which is slower here).
    both = np.sort((rows[kept].astype(np.uint64) << np.uint64(32)) | grams[kept])
    unique = both[np.concatenate([[True], both[1:] != both[:-1]])] if len(both) else both
    sizes = np.bincount((unique >> np.uint64(32)).astype(np.int64), minlength=len(lengths))
    return (unique & np.uint64(0xFFFFFFFF)).astype(np.uint32), sizes


def band_keys(flat: U32, sizes: I64) -> U32:
    """(reports, BANDS): pairs that share a key in some column may be near duplicates. Needs the extra "reports"."""
    try:
        rensa = import_module("rensa")
    except ImportError:
        raise ValueError(
            "near duplicates need rensa: pip install 'radllama[reports]', or give --near off for exact ones alone"
        ) from None
    offsets = np.concatenate([[0], np.cumsum(sizes)]).astype(np.uint64)
    matrix = rensa.RMinHash.digest_matrix_from_flat_token_hashes(
        mix(flat.astype(np.uint64)), offsets, BANDS * ROWS, SEED
    )
    minima = np.array(matrix.to_rows(), dtype=np.uint64).reshape(len(sizes), BANDS, ROWS)
    keys = np.zeros((len(sizes), BANDS), np.uint64)
    for row in range(ROWS):
        keys = mix(keys + minima[:, :, row] + np.uint64(1))
    return (keys >> np.uint64(32)).astype(np.uint32)


# ---- sets on disk


class Shingles:
    """The sets of all reports, read from disk where needed: `flat` holds them as uint32, one after the other."""

    def __init__(self, flat: Path, sizes: NDArray[np.unsignedinteger]) -> None:
        self.sizes = sizes
        self.offsets = np.zeros(len(sizes) + 1, np.int64)
        np.cumsum(sizes, out=self.offsets[1:])
        self.folder = flat.parent
        self._file: BinaryIO = flat.open("rb")

    def close(self) -> None:
        self._file.close()

    def gather(self, indices: I64) -> tuple[U32, I64]:
        """The sets of some reports, one after the other, and their sizes."""
        handle, parts = self._file.fileno(), []
        for start, end in zip(
            (self.offsets[indices] * 4).tolist(), (self.offsets[indices + 1] * 4).tolist(), strict=True
        ):
            parts.append(os.pread(handle, end - start, start))
        return np.frombuffer(b"".join(parts), dtype=np.uint32), self.sizes[indices].astype(np.int64)

    def blocks(self, rows: int = 16_384) -> Iterator[tuple[int, U32, I64]]:
        """(first report, sets, sizes), block by block."""
        for start in range(0, len(self.sizes), rows):
            end = min(start + rows, len(self.sizes))
            begin, stop = int(self.offsets[start]) * 4, int(self.offsets[end]) * 4
            flat = np.frombuffer(os.pread(self._file.fileno(), stop - begin, begin), dtype=np.uint32)
            yield start, flat, self.sizes[start:end].astype(np.int64)

    def similar(self, a: I64, b: I64, threshold: float) -> Bools:
        """Which of the pairs (a[i], b[i]) have a Jaccard index of `threshold` or more."""
        result = np.zeros(len(a), np.bool_)
        small, large = np.minimum(self.sizes[a], self.sizes[b]), np.maximum(self.sizes[a], self.sizes[b])
        possible = np.flatnonzero(small >= threshold * large - 1e-9)  # the index is at most small / large
        for start in range(0, len(possible), BATCH):
            some = possible[start : start + BATCH]
            unique, place = np.unique(np.concatenate([a[some], b[some]]), return_inverse=True)
            flat, sizes = self.gather(unique)
            starts = np.cumsum(sizes) - sizes
            n = len(some)
            total = sizes[place]
            rows = np.repeat(np.tile(np.arange(n), 2), total)
            at = np.repeat(starts[place] - (np.cumsum(total) - total), total) + np.arange(total.sum())
            both = (rows.astype(np.uint64) << np.uint64(32)) | flat[at]
            both.sort(kind="stable")  # merges: each half is sorted already
            shared = np.bincount((both[1:][both[1:] == both[:-1]] >> np.uint64(32)).astype(np.int64), minlength=n)
            union = total[:n] + total[n:] - shared
            result[some] = shared >= threshold * union - 1e-9
        return result


# ---- clusters


class Clusters(NamedTuple):
    """For each report the first (lowest) report of what it belongs to."""

    component: I32  # linked by any chain of near duplicates, equal pairs or equal findings: kept on one side of a split
    leader: I32  # equal to, or a near duplicate of, this very report: what `cap` counts


def first_of(values: U64) -> I32:
    """For each value the index where it occurs first."""
    _, first, inverse = np.unique(values, return_index=True, return_inverse=True)
    return first.astype(np.int32)[inverse]


def _compress(parent: I32) -> None:
    while True:
        above = parent[parent]
        if np.array_equal(above, parent):
            return
        parent[:] = above


def _union(parent: I32, a: Iterable[int], b: Iterable[int]) -> None:
    """The root of a tree is its lowest index."""
    for x, y in zip(a, b, strict=True):
        while parent[x] != x:
            parent[x] = parent[parent[x]]
            x = parent[x]
        while parent[y] != y:
            parent[y] = parent[parent[y]]
            y = parent[y]
        if x != y:
            parent[max(x, y)] = min(x, y)


def exact_clusters(pair: U64, findings: U64) -> Clusters:
    """Equal pairs have one leader; equal findings are one component, whatever their impressions."""
    leader = first_of(pair)
    component = leader.copy()
    same = first_of(findings)
    linked = np.flatnonzero(same != np.arange(len(same)))
    _union(component, same[linked].tolist(), linked.tolist())
    _compress(component)
    return Clusters(component, leader)


def _shared(rows: I64, key: U32) -> tuple[I64, U32]:
    """The rows whose key (sorted) occurs more than once."""
    if not len(key):
        return rows, key
    change = np.concatenate([[True], key[1:] != key[:-1], [True]])
    several = ~(change[:-1] & change[1:])
    return rows[several], key[several]


def near_clusters(clusters: Clusters, bands: Iterable[U32], sets: Shingles, threshold: float) -> Clusters:
    """Join near duplicates to `clusters` (exact ones), band by band.

    bands: the BANDS columns of `band_keys`, (reports,) each. Within a bucket (equal keys) every report is compared with
    the bucket's first; those unlike it are compared with the first of the rest, and so on for ROUNDS rounds.
    """
    component, leader = clusters.component.copy(), clusters.leader.copy()
    chosen = np.flatnonzero(leader == np.arange(len(leader)))  # one of each pair: the others are clustered already
    leads = np.zeros(len(leader), np.bool_)  # has others: stays a leader
    for keys in tqdm(bands, desc="near duplicates", unit="band", total=BANDS, leave=False):
        key = keys[chosen]
        order = np.argsort(key, kind="stable")
        rest, key = _shared(chosen[order], key[order])
        for _ in range(ROUNDS):
            if not len(rest):
                break
            begins = np.concatenate([[True], key[1:] != key[:-1]])
            first = rest[begins][np.cumsum(begins) - 1]
            member = ~begins
            a, b = first[member], rest[member]
            _compress(component)
            lone = (leader[b] == b) & ~leads[b]
            ask = (component[a] != component[b]) | (lone & (leader[a] == a))
            near = ~ask  # already known to belong together
            asked = np.flatnonzero(ask)
            found = sets.similar(a[asked], b[asked], threshold)
            near[asked] = found
            _union(component, a[asked[found]].tolist(), b[asked[found]].tolist())
            joins = asked[found & lone[asked] & (leader[a[asked]] == a[asked])]
            leader[b[joins]] = a[joins]
            leads[a[joins]] = True
            unlike = np.flatnonzero(member)[~near]
            rest, key = _shared(rest[unlike], key[unlike])
    _compress(component)
    leader = leader[clusters.leader]  # copies follow the one that was compared
    return Clusters(component, leader)


# ---- splits

SPLITS = ("train", "validation", "test")  # a higher number is held out more strictly
REASONS = ("", "repeated_id", "no_date", "patient_seen_before", "duplicate_across_splits", "copies_over_cap",
           "near_held_out")  # fmt: skip
GIANT = 0.01  # a component with more than this share of all reports belongs to train


def draw(values: U64, shares: Sequence[float]) -> I8:
    """A split for each 64-bit hash; shares: of train, validation, test."""
    total = sum(shares)
    uniform = values.astype(np.float64) / 2.0**64
    test, held_out = shares[2] / total, (shares[1] + shares[2]) / total
    return np.where(uniform < test, 2, np.where(uniform < held_out, 1, 0)).astype(np.int8)


def assign(
    clusters: Clusters,
    pair: U64,
    patient: U64,
    *,
    shares: Sequence[float],
    cap: int,
    date: I32 | None = None,
    test_from: int = 0,
    dropped: I8 | None = None,
) -> tuple[I8, I8]:
    """A split for each report, and why it is dropped (an index of REASONS, 0: it is kept).

    A patient (0: unknown) has one split, drawn by the patient's hash; a report of no known patient has that of its
    component, drawn by the hash of the component's first pair. With `test_from` (YYYYMMDD) test holds the reports from
    that date on, of patients not seen before, and nothing else.

    A component ends up on one side. If patients of several splits share it, a small one (up to `cap` reports) stays in
    the most held-out of them and train loses its part. That rule would take nearly all boilerplate out of train, since
    among a hundred patients one is in test; so a larger component keeps the split that its own hash draws, and the
    others lose theirs. One of more than 1 % of all reports belongs to train.

    In train at most `cap` reports of a leader are kept (0: all), the first ones; elsewhere one of each pair.
    """
    count, boilerplate = len(pair), cap or 10
    reason = np.zeros(count, np.int8) if dropped is None else dropped.copy()
    root = clusters.component
    known = patient != 0
    own_shares = (shares[0], shares[1], 0.0) if test_from else shares
    of_component = draw(pair, shares)
    split = np.where(known, draw(patient, own_shares), draw(pair, own_shares)[root]).astype(np.int8)
    if test_from and date is not None:
        _hold_out(split, reason, patient, date, test_from)

    alive = np.flatnonzero(reason == 0)
    has = np.zeros((3, count), np.bool_)
    for number in range(3):
        has[number, root[alive[split[alive] == number]]] = True
    size = np.bincount(root[alive], minlength=count)
    winner = np.where(has[2], 2, np.where(has[1], 1, 0)).astype(np.int8)
    torn = has.sum(axis=0) > 1
    drawn = np.where(has[of_component, np.arange(count)], of_component, 0)
    large = torn & (size > boilerplate)
    winner[large] = np.where(has[drawn, np.arange(count)], drawn, winner)[large]
    if not test_from:
        winner[size > max(boilerplate, GIANT * len(alive))] = 0
        split = np.where(known, split, winner[root]).astype(np.int8)
    lost = alive[split[alive] != winner[root[alive]]]
    reason[lost] = REASONS.index("duplicate_across_splits")

    same = first_of(pair)
    for number in range(3):
        rows = np.flatnonzero((reason == 0) & (split == number))
        if number or cap:
            groups, most = (same[rows], 1) if number else (clusters.leader[rows], cap)
            reason[rows[_place(groups) >= most]] = REASONS.index("copies_over_cap")
    return split, reason


def _hold_out(split: I8, reason: I8, patient: U64, date: I32, test_from: int) -> None:
    late = date >= test_from
    reason[(date == 0) & (reason == 0)] = REASONS.index("no_date")
    split[late] = 2
    before = np.unique(patient[(date > 0) & ~late & (patient != 0)])
    seen = late & np.isin(patient, before)
    reason[seen & (reason == 0)] = REASONS.index("patient_seen_before")


def _place(groups: I32) -> I64:
    """For each element how many of its group come before it."""
    order = np.argsort(groups, kind="stable")
    ordered = groups[order]
    begins = np.concatenate([[True], ordered[1:] != ordered[:-1]]) if len(groups) else np.zeros(0, np.bool_)
    start = np.flatnonzero(begins)[np.cumsum(begins) - 1] if len(groups) else np.zeros(0, np.int64)
    place = np.empty(len(groups), np.int64)
    place[order] = np.arange(len(groups)) - start
    return place
