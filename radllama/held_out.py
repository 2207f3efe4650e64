"""Which reports are near duplicates of a held-out one: an exact search, which shares nothing with MinHash.

Two sets A and B with a Jaccard index of t or more differ in at most h = (1-t)/(1+t) (|A| + |B|) grams. Cut the range
of the grams' hashes into more than h pieces: each gram in which they differ spoils one piece, and at least one piece
holds the same grams in A and in B (PartEnum: Arasu, Ganti, Kaushik, "Efficient exact set-similarity joins", VLDB 2006).
So each report writes the hash of each of its pieces to disk, the held-out ones look for equal ones, and whoever shares
one is compared. With s pieces to spare, s + 1 are equal, and a held-out report need not ask for its s commonest.

Both sides must be cut alike, but h depends on both sizes: the number of pieces is that of the size class of the report
that is looked for, and a held-out report is cut anew for each class in reach. Before the sets themselves are read,
a parity of 256 bits decides: bits in which two reports differ are no more than the grams in which they differ.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from radllama.duplicates import I8, I64, U32, U64, Bools, Shingles, mix

COMMON = 10_000  # pieces that more reports hold than that are not asked for
CLASS = 1.1  # a size class ends where the next begins: at 1.1 times its beginning
SPARE = 4  # pieces more than are needed, at the least
ROWS = 8192  # sets in memory at a time
HITS = 1 << 20  # pairs in memory at a time
PARTITION = 1 << 22  # entries of the index to be sorted at a time, about
_COUNTS = 1 << 24
_WORDS = 4  # of 64 bits: the parity
_EPSILON = 1e-6


class HeldOut(NamedTuple):
    """Near duplicates between a held-out report and one of a less strict split: query[i] and other[i]."""

    query: I64
    other: I64
    queries: int  # held-out reports
    complete: int  # those whose search could miss nothing


class _Class(NamedTuple):
    """Sets of `first` to `last` grams are cut into `pieces`."""

    number: int
    first: int
    last: int
    pieces: int


def _differ(sizes: I64, threshold: float) -> I64:
    """In how many grams two sets, of so many together, may differ."""
    return (sizes * (1 - threshold) / (1 + threshold) + _EPSILON).astype(np.int64)


def _classes(largest: int, threshold: float) -> list[_Class]:
    found: list[_Class] = []
    first = 1
    while first <= largest:
        last = max(first, int(first * CLASS) - 1)
        both = np.array([last + int(last / threshold + _EPSILON)])
        found.append(_Class(len(found), first, last, int(_differ(both, threshold)[0]) + 1 + SPARE))
        first = last + 1
    return found


def _pieces(flat: U32, sizes: I64, pieces: I64, salt: I64) -> U64:
    """Of each set the hashes of what its pieces hold, one set after the other; `salt`: of its class."""
    first = np.cumsum(pieces) - pieces
    place = (flat * np.repeat(pieces.astype(np.uint64), sizes)) >> np.uint64(32)
    place += np.repeat(first.astype(np.uint64), sizes)
    held = np.bincount(place.astype(np.int64), minlength=int(pieces.sum()))
    end = np.cumsum(held)
    # Unsigned sums wrap around, so that a difference of two is the sum between them; sets are sorted.
    total = np.concatenate([np.zeros(1, np.uint64), np.cumsum(mix(flat.astype(np.uint64) + np.uint64(1)))])
    number = np.arange(len(held)) - np.repeat(first, pieces) + (np.repeat(salt, pieces) << 32)
    hashes: U64 = mix(total[end] - total[end - held] + mix(number.astype(np.uint64))) >> np.uint64(32)
    return hashes


def _parities(flat: U32, sizes: I64) -> U64:
    """(sets, _WORDS): bit g of a set tells whether an odd number of its grams end on g."""
    bits = 64 * _WORDS
    rows = np.repeat(np.arange(len(sizes)) * bits, sizes)
    odd = np.bincount(rows + (flat & np.uint32(bits - 1)), minlength=bits * len(sizes)).astype(np.uint8) & 1
    return np.packbits(odd.reshape(-1, bits), axis=1, bitorder="little").view("<u8")


class _Spill:
    """Pairs of a 32-bit key and a 32-bit number on disk, in files by the key's first bits."""

    def __init__(self, folder: Path, name: str, bits: int, stack: ExitStack) -> None:
        self.paths = [folder / f"{name}-{number}.bin" for number in range(1 << bits)]
        self.files = [stack.enter_context(path.open("wb")) for path in self.paths]
        self.borders = np.arange(1, 1 << bits, dtype=np.uint64) << np.uint64(64 - bits)

    def write(self, keys: U64, numbers: I64) -> None:
        entries = np.sort((keys << np.uint64(32)) | numbers.astype(np.uint64))
        for file, part in zip(self.files, np.split(entries, np.searchsorted(entries, self.borders)), strict=True):
            file.write(part.tobytes())

    def read(self, number: int) -> tuple[U32, I64]:
        """(keys, numbers) of one file, sorted by the key. The file is removed."""
        self.files[number].close()
        entries = np.sort(np.fromfile(self.paths[number], np.uint64))
        self.paths[number].unlink()
        return (entries >> np.uint64(32)).astype(np.uint32), (entries & np.uint64(0xFFFFFFFF)).astype(np.int64)


def near_held_out(sets: Shingles, split: I8, kept: Bools, threshold: float) -> HeldOut:
    """Compare every kept held-out report (of split 1 or 2) with every kept report of a lower split.

    A report whose search could miss something, since more of its pieces than can be spared are held by more than COMMON
    reports, is not counted in `complete`. Writes about 0.5 kB a report beside the sets, and removes it.
    """
    folder = sets.folder / "held-out"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    chosen = np.flatnonzero(kept & (split > 0))
    searched = kept & (split < 2)
    classes = _classes(int(sets.sizes.max(initial=0)), threshold)
    number_of = np.repeat([c.number for c in classes], [c.last - c.first + 1 for c in classes])  # by size - 1
    pieces_of = np.array([c.pieces for c in classes])
    there = np.zeros(len(classes), np.bool_)
    bits = min(max(int(sets.offsets[-1]) // 3 // PARTITION, 1).bit_length(), 8)
    counts = np.zeros(_COUNTS, np.uint32)
    parities = np.zeros((len(split), _WORDS), np.uint64)
    try:
        with ExitStack() as stack:
            index, asked = (_Spill(folder, name, bits, stack) for name in ("index", "asked"))
            total = -(-len(split) // ROWS)
            for start, flat, sizes in tqdm(sets.blocks(ROWS), "index", total, unit="block", leave=False):
                parities[start : start + len(sizes)] = _parities(flat, sizes)
                used = searched[start : start + len(sizes)] & (sizes > 0)
                flat, rows = flat[np.repeat(used, sizes)], np.flatnonzero(used)
                number = number_of[sizes[rows] - 1]
                there[number] = True
                keys = _pieces(flat, sizes[rows], pieces_of[number], number)
                np.add.at(counts, keys & np.uint64(_COUNTS - 1), np.uint32(1))
                index.write(keys, np.repeat(rows + start, pieces_of[number]))
            complete = np.ones(len(chosen), np.bool_)
            for size_class in tqdm([c for c in classes if there[c.number]], "ask", unit="class", leave=False):
                _ask(sets, chosen, size_class, threshold, counts, asked, complete)
            del counts
            found = [np.zeros(0, np.uint64)]
            for part in tqdm(range(1 << bits), "held-out search", unit="part", leave=False):
                for query, other in _meet(index.read(part), asked.read(part)):
                    query = chosen[query]
                    likely = split[other] < split[query]
                    query, other = query[likely], other[likely]
                    may = _differ(sets.sizes[query].astype(np.int64) + sets.sizes[other], threshold)
                    apart = np.bitwise_count(parities[query] ^ parities[other]).sum(axis=1, dtype=np.int64)
                    likely = apart <= may
                    query, other = query[likely].astype(np.uint64), other[likely].astype(np.uint64)
                    pairs = np.unique((query << np.uint64(32)) | other)
                    query, other = _halves(pairs)
                    found.append(pairs[sets.similar(query, other, threshold)])
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    query, other = _halves(np.unique(np.concatenate(found)))
    return HeldOut(query, other, len(chosen), int(complete.sum()))


def _ask(
    sets: Shingles, chosen: I64, size_class: _Class, threshold: float, counts: U32, asked: _Spill, complete: Bools
) -> None:
    """Write what the held-out reports look for among the reports of a size class."""
    largest = (sets.sizes[chosen] / threshold + _EPSILON).astype(np.int64)  # near duplicates are no larger
    sizes = sets.sizes[chosen].astype(np.int64)
    reach = np.flatnonzero((largest >= size_class.first) & (threshold * sizes <= size_class.last + _EPSILON))
    for start in range(0, len(reach), ROWS):
        some = reach[start : start + ROWS]
        flat, own = sets.gather(chosen[some])
        pieces = np.full(len(some), size_class.pieces)
        keys = _pieces(flat, own, pieces, np.full(len(some), size_class.number)).reshape(len(some), -1)
        often = counts[keys & np.uint64(_COUNTS - 1)]
        spare = size_class.pieces - 1 - _differ(own + np.minimum(largest[some], size_class.last), threshold)
        order = np.argsort(often, axis=1, kind="stable")[:, ::-1]  # the commonest first
        rank = np.empty_like(order)
        np.put_along_axis(rank, order, np.arange(size_class.pieces)[None, :], axis=1)
        needed = rank >= spare[:, None]
        complete[some] &= ~(needed & (often > COMMON)).any(axis=1)
        row, column = np.nonzero(needed & (often > 0) & (often <= COMMON))
        asked.write(keys[row, column], some[row])


def _meet(index: tuple[U32, I64], asked: tuple[U32, I64]) -> Iterator[tuple[I64, I64]]:
    """All pairs (number in `asked`, number in `index`) whose keys are equal, about HITS at a time."""
    low = np.searchsorted(index[0], asked[0], "left")
    times = np.searchsorted(index[0], asked[0], "right") - low
    reach = np.cumsum(times)
    last = 0
    while last < len(reach):
        done = int(reach[last - 1]) if last else 0
        end = max(int(np.searchsorted(reach, done + HITS, "right")), last + 1)
        some = times[last:end]
        at = np.repeat(low[last:end] - (np.cumsum(some) - some), some) + np.arange(int(some.sum()))
        yield np.repeat(asked[1][last:end], some), index[1][at]
        last = end


def _halves(both: U64) -> tuple[I64, I64]:
    return (both >> np.uint64(32)).astype(np.int64), (both & np.uint64(0xFFFFFFFF)).astype(np.int64)
