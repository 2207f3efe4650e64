"""Three systems that any model must beat: a constant impression, the findings copied, the nearest neighbour's."""

from __future__ import annotations

import re
from array import array
from collections import Counter
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from radllama.cases import Cases, System
from radllama.files import raise_if, read_jsonl, some
from radllama.metrics import rouge

BASELINES = ("constant", "findings copied", "nearest neighbour")
NEAR = 0.8  # of common word trigrams (Jaccard): a case this close to a training report is contaminated


def _words(text: str) -> list[str]:
    return re.findall(r"[a-z0-9]+", text.lower())


def constant_impression(impressions: list[str], seed: int = 0, candidates: int = 50, sample: int = 1000) -> str:
    """The best single answer to everything: of the most frequent training impressions (case and punctuation
    aside, ties drawn by the seed) the one with the highest mean ROUGE-L against a seeded sample of them all."""
    shuffled = [impressions[i] for i in np.random.default_rng([seed, 2]).permutation(len(impressions))]
    keys, targets = [" ".join(_words(text)) for text in shuffled], shuffled[:sample]
    frequent = [key for key, _ in Counter(keys).most_common(candidates)]
    scores = rouge(targets * len(frequent), [key for key in frequent for _ in targets])["rougeL"]
    best = frequent[np.reshape(scores, (len(frequent), -1)).mean(1).argmax()]
    return Counter(text for key, text in zip(keys, shuffled, strict=True) if key == best).most_common(1)[0][0]


def nearest(train: list[str], queries: list[str]) -> list[int]:
    """For each query the index of the training text with the highest TF-IDF cosine; the earliest wins a tie.
    Weight: (1 + ln tf) (1 + ln((1 + N) / (1 + df))) over words [a-z0-9]+ in lower case, N distinct training texts."""
    first: dict[str, int] = {}
    for i, text in enumerate(train):
        first.setdefault(" ".join(_words(text)), i)
    vocabulary: dict[str, int] = {}
    terms, docs, counts = array("i"), array("i"), array("i")
    for doc, text in enumerate(tqdm(first, "neighbour index", disable=None, leave=False)):
        for word, count in Counter(text.split()).items():
            terms.append(vocabulary.setdefault(word, len(vocabulary)))
            docs.append(doc)
            counts.append(count)
    term, owner = np.array(terms), np.array(docs)
    df = np.bincount(term, minlength=len(vocabulary))
    idf = 1 + np.log((1 + len(first)) / (1 + df))
    weight = (1 + np.log(np.array(counts))) * idf[term]
    weight /= np.sqrt(np.bincount(owner, weight**2, minlength=len(first)))[owner]
    order = np.argsort(term, kind="stable")  # postings: each term's documents, one after another
    owner, weight, ends = owner[order], weight[order].astype(np.float32), np.cumsum(df)
    index, found = list(first.values()), []
    for query in tqdm(queries, "nearest neighbour", disable=None, leave=False):
        score = np.zeros(len(first), np.float32)
        for word, count in Counter(word for word in _words(query) if word in vocabulary).items():
            t = vocabulary[word]
            span = slice(ends[t] - df[t], ends[t])
            score[owner[span]] += np.float32((1 + np.log(count)) * idf[t]) * weight[span]
        found.append(index[int(score.argmax())])
    return found


def _trigrams(words: list[str]) -> set[tuple[str, ...]]:
    return set(zip(words, words[1:], words[2:], strict=False)) or ({tuple(words)} if words else set())


def near_training(cases: Cases, near: list[int], findings: list[str], impressions: list[str]) -> NDArray[np.bool_]:
    """Which cases (n,) are contaminated: findings and impression together have at least NEAR of their word trigrams in
    common (Jaccard) with those of their nearest training report, or of another one with the same findings."""
    keys = [" ".join(_words(text)) for text in findings]
    alike: dict[str, set[str]] = {keys[i]: set() for i in near}
    for key, impression in zip(keys, impressions, strict=True):
        if key in alike:
            alike[key].add(" ".join(_words(impression)))
    close = []
    for i, found, reference in zip(near, cases.findings, cases.references, strict=True):
        ours, theirs = _trigrams(_words(f"{found} {reference}")), keys[i]
        pairs = (_trigrams(f"{theirs} {impression}".split()) for impression in alike[theirs])
        close.append(any(ours and len(ours & pair) >= NEAR * len(ours | pair) for pair in pairs))
    return np.array(close, bool)


def baselines(cases: Cases, train: Path, seed: int = 0) -> tuple[list[System], NDArray[np.bool_]]:
    """The three from training pairs (rows with `findings` and `impression`), and which cases (n,) are contaminated."""
    problems: list[str] = []
    rows = [row for _, row in read_jsonl(train, ("findings", "impression"), problems)]
    known = {case: words for case, words in zip(cases.ids, map(_words, cases.findings), strict=True) if words}
    if leaked := [row["id"] for row in rows if known.get(str(row.get("id"))) == _words(row["findings"])]:
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
