"""What an impression claims and its findings do not carry."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from test_clinical import TEXTS

from radllama.clinical import items_of
from radllama.faithful import _Sorted, _sorted_text, faithfulness, unsupported

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "bench"))
import perturb  # noqa: E402

NORMAL = "The lungs are clear. Heart size is normal. No pleural effusion or pneumothorax. The bones are intact."
NODULE = "There is a 12 mm nodule in the right upper lobe. The heart is normal."


@pytest.mark.parametrize(
    ("findings", "impression", "context", "kinds"),
    [
        (NORMAL, "No acute cardiopulmonary disease.", "", []),
        (NORMAL, "Normal chest.", "", []),
        (NORMAL, "No evidence of pneumonia.", "", []),
        (NORMAL, "Left pleural effusion.", "", ["negation", "side"]),
        (NORMAL, "2 cm adrenal mass.", "", ["entity", "number"]),
        (NORMAL, "Acute cardiopulmonary abnormality.", "", ["negation"]),
        ("Large left pneumothorax.", "No acute cardiopulmonary abnormality.", "", ["negation"]),
        ("Large left pneumothorax.", "No pneumothorax.", "", ["negation"]),
        ("Airspace consolidation in the right lower lobe.", "Right lower lobe pneumonia.", "", []),
        ("The appendix is dilated to 12 mm with fat stranding.", "Acute appendicitis.", "", []),
        (NODULE, "1.2 cm right upper lobe nodule.", "", []),
        (NODULE, "21 mm right upper lobe nodule.", "", ["number"]),
        (NODULE, "12 mm left upper lobe nodule.", "", ["side"]),
        (NODULE, "Right upper lobe nodule, unchanged.", "", ["prior"]),
        (NODULE, "Right upper lobe nodule, unchanged.", "Comparison: None.", ["prior"]),
        (NODULE, "Right upper lobe nodule, unchanged.", "Comparison: CT of 2019.", []),
        (NODULE + " It is unchanged.", "Stable right upper lobe nodule.", "", []),
        (NODULE, "Right upper lobe nodule. Recommend CT in 6 months.", "", []),
        ("Nodules in the left and right breast.", "Bilateral breast nodules.", "", []),
        ("The liver is enlarged.", "Splenomegaly.", "", ["entity"]),
        ("Patchy opacity at the left base.", "Continued concern for pneumonia.", "", []),
        (NODULE, "Without comparisons, the right upper lobe nodule is indeterminate.", "", []),
        (NODULE, "Right upper lobe nodule. No prior studies are available.", "", []),
        ("Metallic fragments in the left chest wall.", "Metallic fragments from a prior gunshot wound.", "", []),
        ("Streaky opacities at the lung bases.", "Bibasilar atelectasis.", "", []),
        ("Streaky opacity at the right lung base.", "Bibasilar atelectasis.", "", ["side"]),
        (NODULE, "Right upper lobe nodule, unchanged from the prior study.", "", ["prior"]),
        ("", "", "", []),
    ],
)
def test_what_the_findings_do_not_support(findings: str, impression: str, context: str, kinds: list[str]) -> None:
    assert [found.kind for found in unsupported(findings, impression, context)] == kinds


def test_unsupported_claims_are_found_where_they_stand() -> None:
    impression = "No acute disease. 2 cm adrenal mass."
    spans = {(impression[u.start : u.end], u.kind) for u in unsupported(NORMAL, impression)}
    assert spans == {("adrenal mass", "entity"), ("adrenal mass", "number")}


def test_synthetic_impressions_are_faithful_to_their_findings() -> None:
    cases = perturb.from_pairs(ROOT / "assets/reports/test.jsonl")
    flagged = [case for case in cases if unsupported(case.findings, case.impression, case.context)]
    assert len(flagged) <= 0.05 * len(cases)


@settings(max_examples=300, deadline=None)
@given(TEXTS, TEXTS, TEXTS)
def test_claims_stand_in_any_impression_and_their_share_is_one_where_none_fails(a: str, b: str, c: str) -> None:
    found = unsupported(a, b, c)
    assert all(0 <= u.start < u.end <= len(b) for u in found)
    assert 0 <= faithfulness(a, b, c) <= 1
    assert (faithfulness(a, b, c) == 1) == (not found)


@pytest.mark.parametrize("text", ["Nodule in the left lung. 12 mm, unchanged.", "1. Clear lungs.\n2. Stable. 3 cm."])
def test_a_size_said_of_nothing_goes_to_the_finding_before_it(text: str) -> None:
    assert _sorted_text(text) == _Sorted.of(item for _, _, item in items_of(text))


@settings(max_examples=300, deadline=None)
@given(TEXTS)
def test_sorting_sentence_by_sentence_gives_what_sorting_the_text_does(text: str) -> None:
    assert _sorted_text(text) == _Sorted.of(item for _, _, item in items_of(text))
