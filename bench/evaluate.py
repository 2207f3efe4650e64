"""How long an evaluation takes: ROUGE and clinical checks over many cases, and the statistics over 2,114.

    python bench/evaluate.py [--cases 100000] [--seed 0]

A case is made from two synthetic reports (assets/reports): half the sentences of each, in a new order, every decimal
number drawn anew, and most sentences of the findings with an image's number, which no other has. The answer is the
impression with a sentence dropped, a side swapped or a number changed. Reports repeat themselves, and the code
remembers what it has read: the shares of distinct texts stand beside the times. The more is distinct, the harder.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import time
from collections.abc import Hashable, Sequence
from pathlib import Path
from random import Random

import numpy as np
from numpy.typing import NDArray

from radllama.cases import Cases, System
from radllama.eval import ASPECTS, DERIVED, JUDGED, clinical_checks, tables
from radllama.metrics import ROUGE, rouge, sentences

Times = NDArray[np.float64]
ROOT = Path(__file__).resolve().parents[1]
CASES, RESAMPLES, SYSTEMS, STRATA = 2_114, 10_000, 5, 8  # of the statistics; the paper's test set has 2,114 reports
OTHER = {"left": "right", "right": "left"}


def _renumber(text: str, draw: Random) -> str:
    return re.sub(r"\d+\.\d+", lambda _: f"{draw.uniform(0.2, 9.9):.1f}", text)


def _mix(one: str, other: str, draw: Random) -> list[str]:
    """Half the sentences of each text, at least one, in a new order and without the numbers of a list."""
    parts = [part for text in (one, other) for part in draw.sample(sentences(text), -(-len(sentences(text)) // 2))]
    draw.shuffle(parts)
    return [_renumber(re.sub(r"^\(?\d{1,2}[.)]\s*", "", part), draw) for part in parts]


def _with_image(part: str, draw: Random) -> str:
    return f"{part.rstrip('.')} (series {draw.randint(1, 40)}, image {draw.randint(1, 999)})."


def _answer(parts: list[str], draw: Random) -> str:
    if len(parts) > 1 and draw.random() < 0.5:
        parts = draw.sample(parts, len(parts) - 1)
    text = " ".join(parts)
    if draw.random() < 0.3:
        text = re.sub(r"\b(left|right)\b", lambda side: OTHER[side[0]], text)
    return _renumber(text, draw) if draw.random() < 0.5 else text


def make(count: int, seed: int) -> tuple[Cases, System]:
    """`count` cases and one system that answers them."""
    with (ROOT / "assets/reports/train.jsonl").open(encoding="utf-8") as file:
        reports = [json.loads(line) for line in file]
    draw = Random(seed)
    findings, references, answers = [], [], []
    for _ in range(count):
        one, other = draw.sample(reports, 2)
        seen = _mix(one["findings"], other["findings"], draw)
        findings.append(" ".join(_with_image(part, draw) if draw.random() < 0.7 else part for part in seen))
        impression = _mix(one["impression"], other["impression"], draw)
        references.append(" ".join(impression))
        answers.append(_answer(impression, draw))
    ids = [f"case-{i}" for i in range(count)]
    cases = Cases(ids, findings, references, [""] * count, np.arange(count), False, {})
    return cases, System("system", "made here", answers, ["stop"] * count)


def clock() -> Times:
    """Seconds on the wall, and of this process and its children on the processors (which others' work leaves alone)."""
    return np.array([time.perf_counter(), sum(os.times()[:4])])


def statistics(seed: int) -> Times:
    """Time for means, intervals, strata and all pairs: every column there is, for five systems."""
    draw = np.random.default_rng(seed)
    strata = {f"stratum {k}": draw.random(CASES) < 0.5 for k in range(STRATA)}
    texts = [""] * CASES
    cases = Cases([str(i) for i in range(CASES)], texts, texts, texts, np.arange(CASES), False, strata)
    systems = [System(f"system {s}", "made here", texts, ["stop"] * CASES) for s in range(SYSTEMS)]
    metrics = [*ROUGE, "bertscore", "bert_rescaled", "clinical_f1", "faithfulness", *ASPECTS, *JUDGED]
    columns = {metric: draw.random((SYSTEMS, CASES)) for metric in metrics}
    for metric in ASPECTS:
        columns[metric][draw.random((SYSTEMS, CASES)) < 0.5] = np.nan
    start = clock()
    tables({"resamples": RESAMPLES, "seed": seed}, cases, systems, columns)
    taken = clock() - start
    print(
        f"{RESAMPLES:,} resamples over {CASES:,} cases: {SYSTEMS} systems, {len(metrics)} metrics, {STRATA} strata, "
        f"{SYSTEMS * (SYSTEMS - 1) // 2} pairs by {len(set(metrics) - DERIVED)} tested metrics"
    )
    return taken


def _share(name: str, texts: Sequence[Hashable]) -> None:
    print(f"{name:24} {len(texts):>10,}  {len(set(texts)) / len(texts):6.1%} distinct")


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description="Times of an evaluation.")
    parser.add_argument("--cases", type=int, default=100_000, metavar="N")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    cases, system = make(args.cases, args.seed)
    _share("cases with answers", list(zip(cases.findings, cases.references, system.predictions, strict=True)))
    _share("references", cases.references)
    _share("predictions", system.predictions)
    _share("sentences of findings", [part for text in cases.findings for part in sentences(text)])
    _share("sentences of predictions", [part for text in system.predictions for part in sentences(text)])
    start = clock()
    rouge(cases.references, system.predictions)
    middle = clock()
    clinical_checks(cases, [system])
    end = clock()
    print(f"\n{args.cases:,} cases on {os.cpu_count()} cores (promise: 180 s for 100,000 on two)")
    times = {"ROUGE": middle - start, "clinical checks": end - middle, "both": end - start}
    for name, (wall, processor) in times.items():
        print(f"{name:24} {wall:10.1f} s   processor {processor:.1f} s")
    wall, processor = statistics(args.seed)
    print(f"{'statistics':24} {wall:10.1f} s   processor {processor:.1f} s   (promise: 10 s on two)")


if __name__ == "__main__":
    main()
