"""Statements and comparison by rules, and the perturbation suite they must pass."""

from __future__ import annotations

import re
import sys
import time
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from radllama.clinical import ASPECTS, Statement, compare, statements
from radllama.lexicon import LEXICON, lower, sentence_texts, sentences

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "bench"))
import perturb  # noqa: E402

WORDS = [
    "no",
    "without",
    "right",
    "left",
    "bilateral",
    "small",
    "large",
    "8",
    "mm",
    "2.5",
    "cm",
    "x",
    "nodule",
    "mass",
    "effusion",
    "pneumothorax",
    "lung",
    "liver",
    "kidney",
    "normal",
    "clear",
    "is",
    "are",
    "with",
    ",",
    ".",
    ";",
    ":",
    "and",
    "or",
    "not",
    "seen",
    "stable",
    "new",
    "but",
    "1.",
    "BI-RADS",
    "4",
    "recommend",
    "CT",
    "months",
    "6",
    "possible",
    "İ",
    "cyst",
    "stone",
]
TEXTS = st.one_of(st.text(max_size=200), st.lists(st.sampled_from(WORDS), max_size=40).map(" ".join))


def brief(text: str) -> list[tuple[str, bool, str | None]]:
    return [(s.entity, s.negated, s.side) for s in statements(text)]


def one(text: str) -> Statement:
    (found,) = statements(text)
    return found


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Mild cardiomegaly.", [("cardiomegaly", False, None)]),
        ("The cardiac silhouette is mildly enlarged.", [("cardiomegaly", False, None)]),
        (
            "No pneumothorax or left pleural effusion.",
            [("pneumothorax", True, "left"), ("pleural effusion", True, "left")],
        ),
        ("Abscess is not seen.", [("abscess", True, None)]),
        ("The bile ducts are not dilated.", [("biliary dilatation", True, None)]),
        ("Bibasilar atelectasis.", [("atelectasis", False, "bilateral")]),
        ("Small right and left effusions.", [("pleural effusion", False, "bilateral")]),
        ("RUL nodule.", [("lung nodule", False, "right")]),
        ("Cyst of the left kidney.", [("renal cyst", False, "left")]),
        ("Gallstones.", [("cholelithiasis", False, None)]),
        ("Stones in the gallbladder.", [("cholelithiasis", False, None)]),
        ("No mass suspicious for malignancy.", [("mass", True, None)]),
        ("No effusion. Moderate edema.", [("pleural effusion", True, None), ("edema", False, None)]),
        ("No effusion, stable cardiomegaly.", [("pleural effusion", True, None), ("cardiomegaly", False, None)]),
        ("No effusion with edema.", [("pleural effusion", True, None), ("edema", False, None)]),
        ("Enlarged right hilar lymph nodes.", [("lymphadenopathy", False, "right")]),
        ("No effusion but edema.", [("pleural effusion", True, None), ("edema", False, None)]),
        ("Lungs are clear without effusion.", [("lung abnormality", True, None), ("pleural effusion", True, None)]),
        ("The heart is normal in size.", [("cardiomegaly", True, None)]),
        ("The anterior cruciate ligament is intact.", [("ligament tear", True, None)]),
        ("Nonobstructive bowel gas pattern.", [("bowel obstruction", True, None)]),
        ("Unremarkable brain MRI.", [("brain abnormality", True, None)]),
        ("BI-RADS 2: Benign.", [("category", False, None)]),
        ("Chest CT is recommended.", [("recommendation: ct", False, None)]),
        (
            "Haemorrhage and oedema of the left hemisphere.",
            [("intracranial hemorrhage", False, None), ("cerebral edema", False, "left")],
        ),
        ("The patient was seen.", []),
        ("", []),
    ],
    ids=lambda value: value[:40] if isinstance(value, str) else "",
)
def test_what_a_sentence_states(text: str, expected: list[tuple[str, bool, str | None]]) -> None:
    assert brief(text) == expected


def test_numbers_are_normalised_and_stay_with_their_finding() -> None:
    cyst, stone = statements("2.4 x 1.8 cm left renal cyst and 3 mm stone in the right kidney.")
    assert cyst.numbers == ((24.0, "mm"), (18.0, "mm"))
    assert (stone.entity, stone.numbers, stone.side) == ("kidney stone", ((3.0, "mm"),), "right")
    assert one("A nodule is seen in the lung. It measures 8 mm.").numbers == ((8.0, "mm"),)
    assert one("Recommend CT in 6 to 12 months.").numbers == ((180.0, "day"), (360.0, "day"))
    assert one("TI-RADS category 4.").numbers == ((4.0, "rads"),)
    assert one("Cyst of .5 cm").numbers == ((5.0, "mm"),)


def test_severity_change_doubt_urgency_and_advice() -> None:
    assert one("Mild to moderate ascites").severity == "mild-moderate"
    assert one("A small amount of ascites").severity == one("Trace ascites").severity == "mild"
    for text, change in [
        ("Unchanged ascites.", "same"), ("New ascites.", "new"), ("Ascites has increased in the interval.", "more"),
        ("Improved ascites.", "less"), ("Ascites, no change.", "same"),
    ]:  # fmt: skip
        found = one(text)
        assert (found.change, found.prior, found.negated) == (change, True, False)
    assert not one("Ascites.").prior
    assert one("Possible pneumonia.").uncertain
    assert not one("Pneumonia.").uncertain
    assert one("Large left pneumothorax.").urgent
    assert not one("No pneumothorax.").urgent
    advice = one("Urgent surgical consultation is recommended.")
    assert advice.recommendation
    assert advice.urgent
    assert not one("Hepatic steatosis.").recommendation


@settings(max_examples=300, deadline=None)
@given(TEXTS)
def test_any_text_gives_spans_inside_it(text: str) -> None:
    for found in statements(text):
        assert 0 <= found.start <= found.entity_start < found.entity_end <= found.end <= len(text)
    assert len(lower(text)) == len(text)
    spans = sentences(text)
    assert all(a < b for a, b in spans)
    assert all(b <= c for (_, b), (c, _) in pairwise(spans))
    assert sentence_texts(text) == [text[a:b] for a, b in spans]


@settings(max_examples=300, deadline=None)
@given(TEXTS, TEXTS)
def test_scores_are_shares_symmetric_and_full_for_the_same_text(a: str, b: str) -> None:
    same, there, back = compare(a, a), compare(a, b), compare(b, a)
    assert set(same) == {*ASPECTS, "clinical_f1"}
    assert set(same.values()) <= {1.0, None}
    assert there == pytest.approx(back)
    assert all(value is None or 0 <= value <= 1 for value in there.values())


def test_spans_point_at_the_words() -> None:
    text = "1. Stable.\n2. İn the left kidney, a 2 cm cyst."
    cyst = statements(text)[-1]
    assert text[cyst.entity_start : cyst.entity_end] == "cyst"
    assert text[cyst.start : cyst.end] == "İn the left kidney, a 2 cm cyst"


def test_a_long_text_without_a_stop_stays_quick() -> None:
    start = time.perf_counter()
    statements("no left small mass of the kidney, " * 5000)
    assert time.perf_counter() - start < 20


@pytest.mark.parametrize(
    ("reference", "prediction", "aspect", "score"),
    [
        ("Left effusion.", "Right effusion.", "side", 0.0),
        ("Bilateral effusions.", "Right effusion.", "side", 2 / 3),
        ("8 mm lung nodule.", "0.8 cm pulmonary nodule.", "number", 1.0),
        ("8 mm lung nodule.", "8 cm lung nodule.", "number", 0.0),
        ("Mild edema.", "Severe edema.", "severity", 0.0),
        ("Stable edema.", "Edema.", "prior", 0.0),
        ("Edema. Recommend CT.", "Edema.", "recommendation", 0.0),
        ("No pneumothorax.", "Pneumothorax.", "urgent", 0.0),
        ("No pneumothorax.", "Pneumothorax.", "negation", 0.0),
        ("No pneumothorax.", "Pneumothorax.", "entity", 0.0),
        ("Edema.", "Edema.", "side", None),
        ("Edema.", "", "clinical_f1", 0.0),
        ("", "", "clinical_f1", None),
        # a summary implies the particulars, not the other way round
        (
            "No acute cardiopulmonary abnormality.",
            "No acute cardiopulmonary abnormality. No pneumothorax.",
            "entity",
            1.0,
        ),
        ("No pneumothorax.", "No bowel obstruction.", "entity", 0.0),
        ("5 mm renal cyst. 9 mm lung nodule.", "9 mm renal cyst. 5 mm lung nodule.", "number", 0.0),
    ],
)
def test_compare_by_aspect(reference: str, prediction: str, aspect: str, score: float | None) -> None:
    assert compare(reference, prediction)[aspect] == (None if score is None else pytest.approx(score))


def test_the_lexicon_refers_only_to_what_it_defines() -> None:
    known = set(LEXICON.organ_of) | set(LEXICON.parents)
    assert len(LEXICON.organ_of) > 400
    for name, words in [*LEXICON.supports.items(), *LEXICON.general.items(), ("", LEXICON.critical)]:
        assert not {word for word in words if word not in known}, name
        assert name in known | {""}


# --- the perturbation suite


def test_the_suite_is_large_and_its_paraphrases_change_words() -> None:
    cases = perturb.hand_written()
    assert sum(len(case.paraphrases) for case in cases) >= 60
    for case in cases:
        for text in case.paraphrases:
            assert re.findall(r"\w+", text.lower()) != re.findall(r"\w+", case.impression.lower())
    made = perturb.changes(cases)
    assert sum(kind != "paraphrase" for _, kind, _ in made) >= 300
    assert made == perturb.changes(cases)


@pytest.mark.parametrize("half", perturb.HALVES)
@pytest.mark.parametrize("source", ["by hand", "synthetic"])
def test_errors_are_noticed_and_paraphrases_are_not_punished(source: str, half: str) -> None:
    cases = perturb.hand_written() if source == "by hand" else perturb.from_pairs(ROOT / "assets/reports/test.jsonl")
    made = perturb.changes([case for case in cases if case.half == half])
    table = perturb.summary(made, perturb.scores(made, with_rouge=False))
    for kind in ("negation flip", "side swap", "number change"):
        assert table[kind]["clinical_f1"]["count"] >= 10
        assert table[kind]["clinical_f1"]["noticed"] >= 0.95, kind
    assert table["paraphrase"]["clinical_f1"]["noticed"] <= 0.10
    for kind in ("invented finding", "invented prior", "number change"):
        assert table[kind]["faithfulness"]["noticed"] >= 0.85, kind
