"""Scores of an impression against the radiologist's by common words and by vectors: ROUGE and BERTScore.

Works alone: lists of texts in, one number for each case out.
"""

from __future__ import annotations

import re
from collections import Counter
from functools import lru_cache
from importlib import metadata
from itertools import chain, pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from nltk.stem.porter import PorterStemmer  # type: ignore[import-untyped]  # what rouge_score stems with
from rouge_score.scoring import fmeasure
from rouge_score.tokenize import tokenize
from tqdm import tqdm

ROUGE = ("rouge1", "rouge2", "rougeL", "rougeLsum")

# A sentence ends at a line break, at a semicolon, or after . ! ? and a space, though not after a bare number,
# which opens a list item ("1. Clear lungs."). An item written "2)" or "(2)" starts a sentence too.
_BREAK = re.compile(r"\s*\n\s*|(?<=;)\s+|(?<=[.!?])(?<!\b\d\.)(?<!\b\d\d\.)\s+|\s+(?=\(?\d{1,2}\)\s)")
_NORMAL = re.compile(
    r"[\W\d]*(?:no|normal|negative|unremarkable|clear|without)\b"
    r"|.*\b(?:normal|negative|unremarkable|clear|within normal limits)\W*$",
    re.I | re.S,
)
_NOT_NORMAL = re.compile(
    r"\b(?:but|however|although|except|other than|aside|apart|with(?! no\b)|likely|possibl[ey]|probabl[ey]"
    r"|recommend\w*|(?:un)?chang\w+|stable|interval|persist\w*|residual|chronic|again|increas\w*|decreas\w*"
    r"|improv\w*|worse\w*|mild\w*|moderate\w*|severe\w*|small|large|status post|post\w*op\w*)\b",
    re.I,
)
NORMAL_RULE = (
    "each sentence of the reference opens with no, normal, negative, unremarkable, clear or without, or "
    "ends on such a word, and none names a change, degree, doubt or exception (rule 1)"
)
_STEMMER = SimpleNamespace(stem=lru_cache(maxsize=None)(PorterStemmer().stem))  # slow, and words recur


def sentences(text: str) -> list[str]:
    """The sentences and list items of an impression, as ROUGE-Lsum and `is_normal` see them."""
    return [part for part in _BREAK.split(text) if re.search(r"\w", part)]


def is_normal(reference: str) -> bool:
    """Whether an impression reports nothing abnormal, by NORMAL_RULE: words only, good for a rough stratum."""
    return all(_NORMAL.match(part) and not _NOT_NORMAL.search(part) for part in sentences(reference))


def rouge_signature() -> str:
    """Everything the ROUGE numbers depend on, in one line to stand beside them."""
    return (
        f"rouge-score={metadata.version('rouge-score')}|F1|stemmer=porter,nltk={metadata.version('nltk')}"
        "|tokenizer=default(lower,a-z0-9)|Lsum-split=newline,semicolon,sentence,list-item(rule 1)"
    )


def _common(places: dict[str, int], reference: list[str], other: list[str]) -> set[int]:
    """Indices into `reference` of a longest common subsequence: the very one that rouge_score backtracks to. `places`
    has for each token of `reference` a bit mask of its indices. The table t of common lengths is kept bit-parallel
    (Hyyro 2004), an integer a column: bit i of column j is 0 where t[i+1][j+1] = t[i][j+1] + 1."""
    full = column = (1 << len(reference)) - 1
    columns = []
    for token in other:
        hit = column & places.get(token, 0)
        column = ((column + hit) | (column - hit)) & full
        columns.append(column)
    chosen, i, j = set(), len(reference), len(other)
    while i and j:
        if reference[i - 1] == other[j - 1]:
            i, j = i - 1, j - 1
            chosen.add(i)
        elif columns[j - 1] >> (i - 1) & 1:
            i -= 1
        else:  # t[i][j] > t[i-1][j]: without a match, rouge_score's condition t[i][j-1] > t[i-1][j]
            j -= 1
    return chosen


def _lcs_hits(reference: list[list[str]], prediction: list[list[str]]) -> int:
    """Hits of ROUGE-Lsum: the union over predicted sentences of the common subsequences, no token counted twice.
    With one sentence on either side these are the hits of ROUGE-L."""
    found: Counter[str] = Counter()
    for sentence in reference:
        places: dict[str, int] = {}
        for i, token in enumerate(sentence):
            places[token] = places.get(token, 0) | 1 << i
        union = set().union(*(_common(places, sentence, part) for part in prediction))
        found.update(sentence[i] for i in union)
    there = Counter(chain(*prediction))
    return sum(min(count, there[token]) for token, count in found.items())


def _rouge_case(ref_parts: list[list[str]], pred_parts: list[list[str]]) -> tuple[float, ...]:
    ref, pred = list(chain(*ref_parts)), list(chain(*pred_parts))
    m, n = len(ref), len(pred)

    def f1(hits: int, less: int = 0) -> float:
        return float(fmeasure(hits / max(n - less, 1), hits / max(m - less, 1)))

    unigrams = Counter(ref) & Counter(pred)
    bigrams = Counter(pairwise(ref)) & Counter(pairwise(pred))
    longest = _lcs_hits([ref], [pred])
    several = len(ref_parts) > 1 or len(pred_parts) > 1
    return (
        f1(unigrams.total()),
        f1(bigrams.total(), 1),
        f1(longest),
        f1(_lcs_hits(ref_parts, pred_parts) if several else longest),
    )


def rouge(references: list[str], predictions: list[str]) -> dict[str, list[float]]:
    """F1 of ROUGE-1, -2, -L, -Lsum for each case: what google's rouge_score with stemmer gives, to the last bit. Tokens
    and F1 are its own code; its O(mn) tables in Python became bit-parallel. An empty text scores 0."""

    @lru_cache(maxsize=50_000)
    def parts(text: str) -> list[list[str]]:
        return [tokenize(sentence, _STEMMER) for sentence in sentences(text)]

    pairs = list(zip(references, predictions, strict=True))
    distinct = tqdm(dict.fromkeys(pairs), "ROUGE", disable=None, leave=False)
    known = {(ref, pred): _rouge_case(parts(ref), parts(pred)) for ref, pred in distinct}
    return {name: [known[pair][k] for pair in pairs] for k, name in enumerate(ROUGE)}


def bertscore(
    references: list[str],
    predictions: list[str],
    *,
    model: str = "roberta-large",
    num_layers: int | None = None,
    batch_size: int = 64,
    device: str | None = None,
    rescale: bool = False,
) -> dict[str, Any]:
    """BERTScore F1 of each case by the bert-score package (English, no idf); an empty text scores 0 without it.

    `model` is a name or a local folder; a folder named like a model that bert-score knows (".../roberta-large") takes
    that model's layer and baseline. Returns `f1` and bert-score's `hash`, and `f1_rescaled` and `hash_rescaled`: None
    without `rescale` or where bert-score has no baseline. A missing model raises what transformers raises (OSError).
    Where cosines are negative (small models) bert-score's figures depend a little on the batch: padding counts as 0.
    """
    import bert_score  # here, for it brings torch and takes seconds
    from bert_score.utils import get_hash, model2layers

    known = Path(model).name if Path(model).is_dir() else model
    layers = model2layers.get(known) if num_layers is None else num_layers
    if layers is None:
        raise ValueError("bert-score knows no best layer for this model; choose one (num_layers)")
    scorer = bert_score.BERTScorer(model_type=model, num_layers=layers, device=device, lang="en")
    if scorer._tokenizer.model_max_length > 1_000_000:  # "no limit" overflows it (bert_score issue 205)
        scorer._tokenizer.model_max_length = scorer._model.config.max_position_embeddings - 2

    pairs = list(zip(references, predictions, strict=True))
    # Long ones first for little padding; equal references side by side, to be encoded once for all systems.
    todo = sorted({pair for pair in pairs if all(map(str.strip, pair))}, key=lambda pair: (-len(pair[0]), pair))
    scores: dict[tuple[str, str], float] = {}
    chunk = 32 * batch_size  # bert-score holds the token vectors of a whole call in memory
    for start in tqdm(range(0, len(todo), chunk), "BERTScore", disable=None, leave=False):
        part = todo[start : start + chunk]
        f1 = scorer.score([pred for _, pred in part], [ref for ref, _ in part], batch_size=batch_size)[2]
        scores.update(zip(part, np.nan_to_num(f1.numpy()).tolist(), strict=True))
    result: dict[str, Any] = {
        "f1": [scores.get(pair, 0.0) for pair in pairs],
        "hash": scorer.hash,
        "f1_rescaled": None,
        "hash_rescaled": None,
    }
    table = Path(bert_score.__file__).parent / "rescale_baseline" / "en" / f"{known}.tsv"
    if rescale and table.is_file():
        base = float(table.read_text().splitlines()[1 + layers].split(",")[3])  # LAYER,P,R,F
        result["f1_rescaled"] = [(scores.get(pair, base) - base) / (1 - base) for pair in pairs]
        result["hash_rescaled"] = get_hash(model, layers, False, True, False, scorer.use_fast_tokenizer)
    return result
