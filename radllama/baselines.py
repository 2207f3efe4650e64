"""Three systems that any model must beat: a constant impression, the findings copied, the nearest neighbour's."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from radllama.cases import Cases, System
from radllama.files import raise_if, read_jsonl, some
from radllama.metrics import rouge
from radllama.similar import are_near, nearest, trigrams, words

BASELINES = ("constant", "findings copied", "nearest neighbour")


def constant_impression(impressions: list[str], seed: int = 0, candidates: int = 50, sample: int = 1000) -> str:
    """The best single answer to everything: of the most frequent training impressions (case and punctuation
    aside, ties drawn by the seed) the one with the highest mean ROUGE-L against a seeded sample of them all."""
    shuffled = [impressions[i] for i in np.random.default_rng([seed, 2]).permutation(len(impressions))]
    keys, targets = [" ".join(words(text)) for text in shuffled], shuffled[:sample]
    frequent = [key for key, _ in Counter(keys).most_common(candidates)]
    scores = rouge(targets * len(frequent), [key for key in frequent for _ in targets])["rougeL"]
    best = frequent[np.reshape(scores, (len(frequent), -1)).mean(1).argmax()]
    return Counter(text for key, text in zip(keys, shuffled, strict=True) if key == best).most_common(1)[0][0]


def near_training(cases: Cases, near: list[int], findings: list[str], impressions: list[str]) -> NDArray[np.bool_]:
    """Which cases (n,) are contaminated: findings and impression together have at least NEAR of their word trigrams in
    common (Jaccard) with those of their nearest training report, or of another one with the same findings."""
    keys = [" ".join(words(text)) for text in findings]
    alike: dict[str, set[str]] = {keys[i]: set() for i in near}
    for key, impression in zip(keys, impressions, strict=True):
        if key in alike:
            alike[key].add(" ".join(words(impression)))
    close = []
    for i, found, reference in zip(near, cases.findings, cases.references, strict=True):
        ours, theirs = trigrams(words(f"{found} {reference}")), keys[i]
        pairs = (trigrams(f"{theirs} {impression}".split()) for impression in alike[theirs])
        close.append(any(are_near(ours, pair) for pair in pairs))
    return np.array(close, bool)


def baselines(cases: Cases, train: Path, seed: int = 0) -> tuple[list[System], NDArray[np.bool_]]:
    """The three from training pairs (rows with `findings` and `impression`), and which cases (n,) are contaminated."""
    problems: list[str] = []
    rows = [row for _, row in read_jsonl(train, ("findings", "impression"), problems)]
    known = {case: text for case, text in zip(cases.ids, map(words, cases.findings), strict=True) if text}
    if leaked := [row["id"] for row in rows if known.get(str(row.get("id"))) == words(row["findings"])]:
        problems.append(f"{train}: holds {len(leaked)} scored cases ({some(leaked)}); give training data only")
    raise_if(problems)
    near = nearest([row["findings"] for row in rows], cases.findings)
    constant = constant_impression([row["impression"] for row in rows], seed)
    answers = ([constant] * len(near), cases.findings, [rows[i]["impression"] for i in near])
    close = near_training(cases, near, [row["findings"] for row in rows], [row["impression"] for row in rows])
    return [
        System(name, f"baseline from {train}", answer, [None] * len(answer))
        for name, answer in zip(BASELINES, answers, strict=True)
    ], close
