"""Make much out of few reports: the file that a small model is trained on from scratch before it is fine-tuned.

    python assets/make_mixture.py --pairs data/indiana/train.jsonl --others assets/reports/train.jsonl \
      runs/synthetic-text.jsonl --output runs/indiana-mixture.jsonl

Each pair is written several times, in turn as a pair and as plain text, once as it stands, then with the sentences of
its findings shuffled (an impression does not depend on their order) and with half of the rarer words that findings and
impression share replaced, in both alike, by other such words. The replaced text is medical nonsense on purpose: what
cannot be remembered has to be carried over from the findings. Other files (pairs or plain texts) follow as they are.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

WORD = re.compile(r"[A-Za-z]{4,}")
COMMON = 0.1  # a word in more than this share of the reports belongs to the language, not to the report


def words(text: str) -> set[str]:
    return {word.lower() for word in WORD.findall(text)}


def shared_words(pairs: list[dict[str, Any]]) -> list[list[str]]:
    """For each pair the words of at least four letters in findings and impression that are in few reports."""
    both = [(words(pair["findings"]), words(pair["impression"])) for pair in pairs]
    spread = Counter(word for findings, impression in both for word in findings | impression)
    return [
        sorted(w for w in findings & impression if spread[w] <= COMMON * len(pairs)) for findings, impression in both
    ]


def replaced(text: str, table: dict[str, str]) -> str:
    def other(match: re.Match[str]) -> str:
        word = match[0]
        new = table.get(word.lower(), word)
        return new.capitalize() if word[0].isupper() else new

    return WORD.sub(other, text)


def variants(
    pair: dict[str, Any], shared: list[str], pool: list[str], copies: int, rng: Random
) -> Iterator[dict[str, str]]:
    """`copies` rows of one pair, ids numbered."""
    sentences = [part for part in re.split(r"(?<=[.!?])\s+", pair["findings"].strip()) if part]
    for number in range(copies):
        table: dict[str, str] = {}
        if number:
            rng.shuffle(sentences)
            table = {word: rng.choice(pool) for word in shared if rng.random() < 0.5}
        findings, identity = replaced(" ".join(sentences), table), f"{pair['id']}-{number}"
        impression = replaced(pair["impression"].strip(), table)
        if number % 2:
            yield {"id": identity, "text": f"FINDINGS: {findings}\nIMPRESSION: {impression}"}
        else:
            yield {"id": identity, "findings": findings, "impression": impression}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--pairs", type=Path, required=True, help="training pairs: id, findings, impression a line")
    parser.add_argument("--others", type=Path, nargs="*", default=[], help="pairs or plain texts to add as they are")
    parser.add_argument("--copies", type=int, default=8, help="of each pair (default: 8)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, required=True)
    options = parser.parse_args()
    missing = [str(file) for file in [options.pairs, *options.others] if not file.is_file()]
    if missing:
        sys.exit(f"error: no such file: {', '.join(missing)}")
    rng, rows = Random(options.seed), []
    pairs = [json.loads(line) for line in options.pairs.read_text(encoding="utf-8").splitlines()]
    shared = shared_words(pairs)
    pool = [word for found in shared for word in found]
    for pair, found in zip(pairs, shared, strict=True):
        rows += variants(pair, found, pool, options.copies, rng)
    lines = [json.dumps(row, ensure_ascii=False) for row in rows]
    for file in options.others:
        lines += file.read_text(encoding="utf-8").splitlines()
    partial = options.output.with_name(options.output.name + ".partial")
    partial.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    partial.replace(options.output)
    print(f"wrote {options.output}: {len(lines):,} rows, {len(rows):,} of them from {options.pairs}")


if __name__ == "__main__":
    main()
