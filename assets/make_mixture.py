"""Make much out of few reports: the file that a small model is trained on from scratch before it is fine-tuned.

    python assets/make_mixture.py --pairs data/indiana/train.jsonl --others assets/reports/train.jsonl \
      runs/synthetic-text.jsonl --output runs/indiana-mixture.jsonl

Each pair is written several times, in turn as a pair and as plain text, once as it stands and then with the sentences
of its findings shuffled: an impression does not depend on their order. Of the similar reports that
`radllama.similar` found, each copy gets another choice. Other files (pairs or plain texts) follow as
they are; synthetic reports teach how an impression carries words over from the findings.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any


def variants(pair: dict[str, Any], copies: int, count: int, rng: Random) -> Iterator[dict[str, Any]]:
    """`copies` rows of one pair, ids numbered, each with `count` of its similar reports' impressions."""
    similar = list(pair.get("similar", []))
    sentences = [part for part in re.split(r"(?<=[.!?])\s+", pair["findings"].strip()) if part]
    for number in range(copies):
        if number:
            rng.shuffle(sentences)
            rng.shuffle(similar)
        findings, identity = " ".join(sentences), f"{pair['id']}-{number}"
        hints = similar[:count]
        if number % 2:
            lines = [f"FINDINGS: {findings}", *(f"Similar report: {text}" for text in hints)]
            yield {"id": identity, "text": "\n".join([*lines, f"IMPRESSION: {pair['impression'].strip()}"])}
        else:
            yield {"id": identity, "findings": findings, "similar": hints, "impression": pair["impression"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--pairs", type=Path, required=True, help="training pairs: id, findings, impression a line")
    parser.add_argument("--others", type=Path, nargs="*", default=[], help="pairs or plain texts to add as they are")
    parser.add_argument("--copies", type=int, default=6, help="of each pair (default: 6)")
    parser.add_argument("--similar", type=int, default=3, help="of its similar reports' impressions (default: 3)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, required=True)
    options = parser.parse_args()
    missing = [str(file) for file in [options.pairs, *options.others] if not file.is_file()]
    if missing:
        sys.exit(f"error: no such file: {', '.join(missing)}")
    rng, rows = Random(options.seed), []
    for line in options.pairs.read_text(encoding="utf-8").splitlines():
        rows += variants(json.loads(line), options.copies, options.similar, rng)
    lines = [json.dumps(row, ensure_ascii=False) for row in rows]
    for file in options.others:
        lines += file.read_text(encoding="utf-8").splitlines()
    partial = options.output.with_name(options.output.name + ".partial")
    partial.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    partial.replace(options.output)
    print(f"wrote {options.output}: {len(lines):,} rows, {len(rows):,} of them from {options.pairs}")


if __name__ == "__main__":
    main()
