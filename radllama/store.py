"""What has been found out about each report, in flat files, with a journal that lets a run go on where it stood."""

from __future__ import annotations

import fcntl
import json
import logging
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from radllama import duplicates
from radllama.pairs import LABELS

logger = logging.getLogger("radllama")

KEPT = np.dtype(
    [("id", "u8"), ("pair", "u8"), ("findings", "u8"), ("impression", "u8"), ("patient", "u8"), ("date", "i4"),
     ("findings_words", "u2"), ("impression_words", "u2"), ("flags", "u4"), ("modality", "u2"), ("body_part", "u2"),
     ("grams", "u4")]
)  # fmt: skip
FILES = ("kept.bin", "bands.bin", "grams.bin", "pairs.txt", "dropped.jsonl")


@dataclass
class Scanned:
    """What a chunk gives: bytes to append to FILES, and counts."""

    files: tuple[bytes, ...]
    rows: int
    bad: int
    reasons: dict[str, int]
    details: dict[str, Counter[str]]  # identifiers by what became of them and by kind
    labels: dict[str, list[str]]


class Store:
    """The flat files in DIR/.work, and a journal that says after each chunk how long they were."""

    def __init__(self, folder: Path, fingerprint: str) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self._header = folder, json.dumps({"fingerprint": fingerprint}) + "\n"
        self._lock = (folder / "lock").open("w")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(
                f"{folder.parent}: another run writes there; wait for it, or choose another --out"
            ) from None
        except OSError as error:
            logger.warning("%s: this file system has no locks (%s); start no second run there", folder, error.strerror)
        self._journal = folder / "journal.jsonl"
        self._open: list[Any] = []
        self.entries = self._found()
        self.keep(len(self.entries))

    def _found(self) -> list[dict[str, Any]]:
        """The chunks that an interrupted run of the same settings and rules has completed."""
        if not self._journal.exists():
            return []
        header, *lines = self._journal.read_text(encoding="utf-8").split("\n")[:-1] or [""]
        if header + "\n" != self._header:
            return []
        try:
            entries = [json.loads(line) for line in lines]
        except json.JSONDecodeError:
            return []
        sizes = [file.stat().st_size if (file := self.folder / name).exists() else 0 for name in FILES]
        while entries and any(size < due for size, due in zip(sizes, entries[-1]["sizes"], strict=True)):
            entries.pop()
        return entries

    def keep(self, count: int) -> None:
        """Forget all but the first `count` chunks."""
        self.close()
        self.entries = self.entries[:count]
        for name, size in zip(FILES, self.sizes(), strict=True):
            with (self.folder / name).open("ab") as file:
                file.truncate(size)
        temporary = self._journal.with_suffix(".tmp")
        temporary.write_text(
            self._header + "".join(json.dumps(entry) + "\n" for entry in self.entries), encoding="utf-8"
        )
        temporary.replace(self._journal)
        self._open = [(self.folder / name).open("ab") for name in (*FILES, self._journal.name)]

    def sizes(self) -> list[int]:
        return self.entries[-1]["sizes"] if self.entries else [0] * len(FILES)

    def append(self, digest: str, scanned: Scanned) -> None:
        *files, journal = self._open
        for file, content in zip(files, scanned.files, strict=True):
            file.write(content)
            file.flush()
        sizes = [size + len(content) for size, content in zip(self.sizes(), scanned.files, strict=True)]
        counts = {name: getattr(scanned, name) for name in ("rows", "bad", "reasons", "details", "labels")}
        self.entries.append({"digest": digest, "sizes": sizes, **counts})
        journal.write(json.dumps(self.entries[-1]).encode() + b"\n")
        journal.flush()

    def close(self) -> None:
        for file in self._open:
            file.close()

    def column(self, name: str) -> NDArray[Any]:
        """One column of all kept reports; labels as numbers into `labels(name)`."""
        count = self.sizes()[0] // KEPT.itemsize
        column = np.empty(count, KEPT[name])
        place = 0
        with (self.folder / FILES[0]).open("rb") as file:
            while len(block := np.frombuffer(file.read(KEPT.itemsize << 15), dtype=KEPT)):
                column[place : place + len(block)] = block[name]
                place += len(block)
        if name in LABELS:
            numbers = {label: number for number, label in enumerate(self.labels(name))}
            start = 0
            for entry in self.entries:
                end = entry["sizes"][0] // KEPT.itemsize
                column[start:end] = np.array([numbers[label] for label in entry["labels"][name]])[column[start:end]]
                start = end
        return column

    def labels(self, name: str) -> list[str]:
        return list(dict.fromkeys(label for entry in self.entries for label in entry["labels"][name]))[:65535]

    def bands(self) -> Iterator[duplicates.U32]:
        """Column by column: 4 bytes a report at a time."""
        count = self.sizes()[1] // 4 // duplicates.BANDS
        for band in range(duplicates.BANDS):
            column, place = np.empty(count, np.uint32), 0
            with (self.folder / FILES[1]).open("rb") as file:
                while block := file.read(4 * duplicates.BANDS << 15):
                    keys = np.frombuffer(block, dtype=np.uint32)[band :: duplicates.BANDS]
                    column[place : place + len(keys)] = keys
                    place += len(keys)
            yield column
