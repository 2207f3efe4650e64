"""Canaries: made-up reports whose impression holds a random secret, planted among pairs to measure memorising.

A secret is drawn from a space of known size, so that it can be compared with others of the same format that were never
trained on (Carlini et al. 2019, The Secret Sharer, arXiv 1802.08232). It reads like a report, names nobody, and says
nothing that could be true of a patient. `canaries.py` measures after training what has become of it.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path

from radllama.files import write_rows

CANARIES_FILE = "canaries.jsonl"
# Slot -> its words: 16**4 * 12 * 9000 * 24 secrets, 1.7e11.
_SLOTS = {
    "shape": "lobulated spiculated oval crescentic stellate triangular tubular nodular serpiginous annular bilobed "
    "fusiform reticular discoid conical ovoid",
    "colour": "amber cobalt crimson emerald indigo ivory jade lilac maroon ochre olive scarlet sepia teal umber violet",
    "animal": "badger beaver bison condor egret falcon gazelle heron ibex jackal lemur mole otter puffin quail walrus",
    "month": "January February March April May June July August September October November December",
    "course": "unchanged enlarging regressing calcifying resolving waning migrating persisting fading thickening "
    "narrowing dividing merging folding clearing settling",
}
_FINDINGS = "Phantom study {number}. Test object with an insert of {letters} type. No patient was examined."
_IMPRESSION = "{shape} insert, lot {colour} {animal} {lot}, {course} since {month}; quality control due in {due} weeks."


def secret(draw: random.Random) -> str:
    """One impression, uniform over the space."""
    words = {slot: draw.choice(choices.split()) for slot, choices in _SLOTS.items()}
    words["shape"] = words["shape"].capitalize()
    return _IMPRESSION.format(**words, lot=draw.randrange(1000, 10_000), due=draw.randrange(1, 25))


def canaries(count: int, seed: str) -> list[dict[str, str]]:
    """`count` pairs with different findings and secrets, a function of (count, seed)."""
    draw = random.Random(f"canaries/{seed}")
    pairs: dict[str, str] = {}
    while len(pairs) < count:
        letters = "-".join("".join(draw.choices("BCDFGHKLMNPRSTVWZ", k=3)) for _ in range(2))
        pairs[_FINDINGS.format(number=draw.randrange(10_000, 100_000), letters=letters)] = secret(draw)
    return [{"id": f"canary-{n}", "findings": f, "impression": i} for n, (f, i) in enumerate(pairs.items(), 1)]


def candidates(seed: str) -> Iterator[str]:
    """Secrets of the same format, without end: what the model might have said instead."""
    draw = random.Random(f"candidates/{seed}")
    while True:
        yield secret(draw)


def plant(folder: Path, count: int, *, seed: str) -> None:
    """Append canaries to a folder's train.jsonl, which ends in a line break, and list them in canaries.jsonl."""
    planted = canaries(count, seed)
    if planted:
        write_rows(folder / CANARIES_FILE, planted)
        with (folder / "train.jsonl").open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(row) + "\n" for row in planted)
