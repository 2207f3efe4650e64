"""Similar reports: the training reports whose findings share most words with a report's, and what was concluded there.

    python -m radllama.similar --train data/train.jsonl --input data/test.jsonl --output data/test-similar.jsonl

writes the input's rows with one more field, `similar`: the impressions of the most similar training reports, best
first. With `data.similar` in the training config they stand behind the findings in every prompt. A small model that saw
few reports gains from it; it looks things up instead of having to know them. Run it for the training file too: a
training report never finds itself, its copies or near copies, as a new report would not.

Every report is compared with all training reports that share a word: fine for some 100,000 of them, not for millions.
"""

from __future__ import annotations

import argparse
import re
import sys
from array import array
from collections import Counter
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from radllama.files import read_rows, write_rows

NEAR = 0.8  # of common word trigrams (Jaccard) make two reports near duplicates


def words(text: str) -> list[str]:
    return re.findall(r"[a-z0-9]+", text.lower())


def trigrams(text: list[str]) -> set[tuple[str, ...]]:
    """The different three words in a row; of a shorter text all of it."""
    return set(zip(text, text[1:], text[2:], strict=False)) or ({tuple(text)} if text else set())


def are_near(a: set[tuple[str, ...]], b: set[tuple[str, ...]]) -> bool:
    return bool(a) and len(a & b) >= NEAR * len(a | b)


class TfIdf:
    """An index of texts for cosine similarity: (1 + ln tf) (1 + ln((1 + N) / (1 + df))) over words [a-z0-9]+ in lower
    case; N and df count the different texts."""

    def __init__(self, texts: list[str]) -> None:
        distinct: dict[str, list[int]] = {}
        for i, text in enumerate(texts):
            distinct.setdefault(" ".join(words(text)), []).append(i)
        self.places = list(distinct.values())  # of each different text in `texts`
        self.vocabulary: dict[str, int] = {}
        terms, docs, counts = array("i"), array("i"), array("i")
        for doc, text in enumerate(tqdm(distinct, "index", disable=None, leave=False)):
            for word, count in Counter(text.split()).items():
                terms.append(self.vocabulary.setdefault(word, len(self.vocabulary)))
                docs.append(doc)
                counts.append(count)
        term, owner = np.array(terms, int), np.array(docs, int)
        self._df = np.bincount(term, minlength=len(self.vocabulary))
        self._idf = 1 + np.log((1 + len(distinct)) / (1 + self._df))
        weight = (1 + np.log(np.array(counts))) * self._idf[term]
        weight /= np.sqrt(np.bincount(owner, weight**2, minlength=len(distinct)))[owner]
        order = np.argsort(term, kind="stable")  # postings: each term's texts, one after another
        self._owner, self._weight, self._ends = owner[order], weight[order].astype(np.float32), np.cumsum(self._df)

    def scores(self, query: str) -> NDArray[np.float32]:
        """Of each different text (N,); the query's own length, common to all, is left out."""
        score = np.zeros(len(self.places), np.float32)
        for word, count in Counter(word for word in words(query) if word in self.vocabulary).items():
            t = self.vocabulary[word]
            span = slice(self._ends[t] - self._df[t], self._ends[t])
            score[self._owner[span]] += np.float32((1 + np.log(count)) * self._idf[t]) * self._weight[span]
        return score


def nearest(train: list[str], queries: list[str]) -> list[int]:
    """For each query the index of the most similar training text; the earliest wins a tie."""
    index = TfIdf(train)
    return [
        index.places[int(index.scores(query).argmax())][0]
        for query in tqdm(queries, "nearest neighbour", disable=None, leave=False)
    ]


def most_similar(train: list[dict[str, Any]], rows: list[dict[str, Any]], count: int) -> Iterator[list[str]]:
    """For each row the impressions of up to `count` training rows, the most similar findings first.

    A row that stands in `train` (by its id) gets none from a report with the same findings or a near copy of itself.
    """
    index = TfIdf([row["findings"] for row in train])
    known = {str(row.get("id")): i for i, row in enumerate(train)}
    whole = [trigrams(words(f"{row['findings']} {row.get('impression', '')}")) for row in train]
    group = {i: number for number, places in enumerate(index.places) for i in places}
    for row in tqdm(rows, "similar reports", disable=None, leave=False, unit="report"):
        own = known.get(str(row.get("id")))
        order = np.argsort(-index.scores(row["findings"]), kind="stable")
        others = (i for number in order if own is None or number != group[own] for i in index.places[number])
        allowed = (i for i in others if own is None or not are_near(whole[own], whole[i]))
        yield [train[i]["impression"].strip() for i in islice(allowed, count)]


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m radllama.similar", description="Add the impressions of similar training reports to each report."
    )
    parser.add_argument("--train", type=Path, required=True, help="training pairs (JSON lines)")
    parser.add_argument("--input", type=Path, required=True, help="reports to look up; may be the training file")
    parser.add_argument("--output", type=Path, required=True, help="the input's rows with the field similar")
    parser.add_argument("--count", type=int, default=3, help="impressions a report (default: 3)")
    options = parser.parse_args(arguments)
    try:
        if options.count < 1:
            raise ValueError("--count: expected at least 1")
        train = read_rows(options.train, ("id", "findings", "impression"))
        rows = read_rows(options.input, ("id", "findings"))
        found = most_similar(train, rows, options.count)
        write_rows(options.output, [row | {"similar": texts} for row, texts in zip(rows, found, strict=True)])
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    print(f"wrote {options.output}: {len(rows):,} reports")


if __name__ == "__main__":
    main()
