"""sections.py: the conformance corpus, reports built from known parts, hostile text, list numbers, leaks."""

from __future__ import annotations

import json
import re
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from radllama import sections
from radllama.sections import LEAK_WORDS, ParsedReport, leaks, parse_report, renumber

CASES: list[dict[str, Any]] = [
    json.loads(line) for line in (Path(__file__).parent / "sections_cases.jsonl").read_text("utf-8").splitlines()
]
FUZZ = settings(max_examples=300, deadline=None, derandomize=True)


def assert_spans(text: str, parsed: ParsedReport) -> None:
    at = 0
    for section in parsed.sections:
        assert section.start == at < section.end <= len(text)
        at = section.end
    assert at == len(text)
    assert "".join(text[section.start : section.end] for section in parsed.sections) == text


def test_corpus_is_large_and_names_are_unique() -> None:
    assert len(CASES) >= 150
    assert len({case["id"] for case in CASES}) == len(CASES)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["id"])
def test_conformance(case: dict[str, Any]) -> None:
    parsed = parse_report(case["text"], addendum=case.get("addendum", "drop"))
    assert_spans(case["text"], parsed)
    got = {
        "findings": parsed.findings,
        "impression": parsed.impression,
        "reason": parsed.reason,
        "indication": parsed.indication,
        "comparison": parsed.comparison,
        "has_addendum": parsed.has_addendum,
        "names": [section.name for section in parsed.sections],
        "renumbered": renumber(parsed.impression),
    }
    expected = {key: case[key] for key in got if key in case}
    assert {key: got[key] for key in expected} == expected


@pytest.mark.parametrize("case", [case for case in CASES if case["reason"] is None], ids=lambda case: case["id"])
@pytest.mark.parametrize("end", ["\r\n", "\r"])
def test_line_ends_change_nothing(case: dict[str, Any], end: str) -> None:
    policy = case.get("addendum", "drop")
    parsed = parse_report(case["text"].replace("\r\n", "\n").replace("\n", end), addendum=policy)
    assert (parsed.findings, parsed.impression, parsed.reason) == (case["findings"], case["impression"], None)


def test_section_texts_and_headings() -> None:
    text = "Mercy clinic\n**INDICATION:** Cough.\nCT CHEST FINDINGS (limited): Clear.\nIMPRESSION -  Normal.\n"
    sections = parse_report(text).sections
    assert [(s.name, s.heading, s.text) for s in sections] == [
        ("preamble", "", "Mercy clinic"),
        ("indication", "INDICATION", "Cough."),
        ("findings", "CT CHEST FINDINGS (limited)", "Clear."),
        ("impression", "IMPRESSION", "Normal."),
    ]
    assert text[sections[1].start : sections[1].end] == "**INDICATION:** Cough.\n"


# Bodies that hold words of the heading table in sentences; none may open a section.
SENTENCES = st.sampled_from(
    [
        "The lungs are clear.", "Heart size is normal.", "These findings are unchanged.", "No comparison is available.",
        "Findings are consistent with edema.", "There is mass effect and impression on the cord.", "T12 is wedged.",
        "The technique is limited by motion.", "A 2.5 cm mass lies in segment 6.", "BI-RADS 2 is assigned.",
        "History of fall is noted.", "The study was reviewed with the team.", "No acute osseous findings.",
        "Examination of the abdomen is limited.", "The report of the outside CT was read.", "Ratio is 1:2 at 10:45.",
        "Results may follow.", "Lungs: Clear.", "LIVER: Normal.", "Follow-up is advised.", "In summary this is normal.",
        "The above impression stands.", "Contrast was given.", "Opacity (see comparison) persists.", "XXXX is seen.",
    ]
)  # fmt: skip
BODIES = st.lists(SENTENCES, min_size=1, max_size=6, unique=True)
STYLES: dict[str, tuple[str, str, Any]] = {  # before a heading, after it, its case
    "upper": ("\n", ": ", str.upper),
    "title": ("\n", ": ", str.capitalize),
    "lower": ("\n\n", ": ", str.lower),
    "one line": (" ", ": ", str.upper),
    "one line, title": (" ", ": ", str.capitalize),
    "alone": ("\n\n", "\n", str.upper),
    "alone, title": ("\n\n", "\n", str.capitalize),
    "no colon": ("\n", " ", str.upper),
    "dash": ("\n", " - ", str.upper),
    "Markdown": ("\n\n## ", "\n", str.capitalize),
    "bold": ("\n\n**", "**\n", str.upper),
    "HTML": ("<br><b>", ":</b> ", str.upper),
    "indented": ("\n   ", ":\n   ", str.upper),
    "Windows": ("\r\n", ":\r\n", str.upper),
    "no space": ("\n", ":", str.upper),
}
FRONTS = st.lists(st.sampled_from(["exam", "indication", "technique", "comparison"]), unique=True)


def squeeze(text: str) -> str:
    return " ".join(text.split())


@FUZZ
@given(
    style=st.sampled_from(sorted(STYLES)),
    fronts=FRONTS,
    findings=BODIES,
    impression=BODIES,
    heading=st.sampled_from(["impression", "conclusion", "impresion", "final impression", "impression and plan"]),
    extra=st.sampled_from(["", "addendum", "signature", "recommendation"]),
    swapped=st.booleans(),
)
def test_what_is_put_in_comes_out(
    style: str, fronts: list[str], findings: list[str], impression: list[str], heading: str, extra: str, swapped: bool
) -> None:
    before, after, case = STYLES[style]
    body = [("findings", " ".join(findings)), (heading, " ".join(impression))]
    parts = [(front, "Nothing to add.") for front in fronts] + body[:: -1 if swapped else 1]
    text = "".join(f"{before}{case(name)}{after}{words}" for name, words in parts)
    if extra:
        text += {
            "addendum": "\n\nADDENDUM: Seen again.\nIMPRESSION: Another one.",
            "signature": "\n\nElectronically signed by: A. Reader",
            "recommendation": "\n\nRECOMMENDATION: Follow-up in a year.",
        }[extra]
    parsed = parse_report(text)
    assert_spans(text, parsed)
    assert (squeeze(parsed.findings), squeeze(parsed.impression)) == (body[0][1], body[1][1]), text
    assert parsed.has_addendum == (extra == "addendum")
    copied = len(re.findall(r"[A-Za-z]+|[0-9]+", body[1][1])) >= LEAK_WORDS and body[1][1] in body[0][1]
    assert parsed.reason == ("impression_in_findings" if copied else None)


SCRAPS = st.sampled_from(
    [
        "FINDINGS", "Findings", "findings", "IMPRESSION", "Impression:", "impression", "ADDENDUM", "END OF ADDENDUM",
        "CHEST:", "Lungs:", "AND", "and", "COMPARISON:", "TECHNIQUE", "ORIGINAL REPORT", "Electronically signed by",
        "WET READ:", "BEFUND:", "印象", "1.", "2)", "(s)", ":", "-", "—", ";", ".", "/", "&", "***", "##", "<br>",
        "</p>", "<b>", "&nbsp;", "\\n", "\n", "\r", "\r\n", "\t", " ", "the", "is", "No", "acute", "İ", "ß",
        "ﬁ", "XXXX", "___", "segment", "BI-RADS", "\x00", "\u2028", "\ud800",
    ]
)  # fmt: skip


@FUZZ
@given(st.one_of(st.text(max_size=200), st.lists(SCRAPS, max_size=40).map(" ".join), st.lists(SCRAPS).map("".join)))
def test_no_text_fails(text: str) -> None:
    for policy in ("drop", "append", "quarantine"):
        parsed = parse_report(text, addendum=policy)  # type: ignore[arg-type]
        assert_spans(text, parsed)
        if parsed.reason is None:
            assert parsed.findings.strip()
            assert parsed.impression.strip()
            assert not parsed.has_addendum or policy != "quarantine"
    leaks(text, text)
    once = renumber(text)
    assert renumber(once) == once
    letters = re.compile(r"[^\W\d_]+")
    assert letters.findall(once) == letters.findall(text)


HOSTILE = [
    unit * (80_000 // len(unit))
    for unit in (
        "FINDINGS",
        "FINDINGS: ",
        "FINDINGS AND ",
        "IMPRESSION (",
        "<p ",
        "\n ",
        "-",
        "1. ",
        "A",
        "- ",
        "L: \n",
    )
] + ["exam" + " " * 80_000, "FINDINGS " + " " * 80_000 + "x"]


@pytest.mark.parametrize("text", HOSTILE, ids=lambda text: text[:14])
def test_long_hostile_text_takes_linear_time(text: str) -> None:
    begin = time.process_time()
    parse_report(text)
    renumber(text)
    assert time.process_time() - begin < 4


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("1. Clear. 2. Normal.", "1. Clear.\n2. Normal."),
        ("1) Clear.\n2) Normal.", "1. Clear.\n2. Normal."),
        ("(1) Clear. (2) Normal.", "1. Clear.\n2. Normal."),
        ("1.Clear.\r\n2.Normal.", "1. Clear.\n2. Normal."),
        ("#1. Clear. #2. Normal.", "1. Clear.\n2. Normal."),
        ("1- Clear.\n2- Normal.", "1. Clear.\n2. Normal."),
        ("- Clear.\n- Normal.", "1. Clear.\n2. Normal."),
        ("• Clear\n• Normal", "1. Clear\n2. Normal"),
        ("1. Clear lungs 2. Normal heart", "1. Clear lungs\n2. Normal heart"),
        ("1. Clear\nand aerated.\n\n2. Normal.", "1. Clear and aerated.\n2. Normal."),
        ("1. Clear.\n3. Normal.", "1. Clear.\n2. Normal."),
        ("1. Clear.\n1. Normal.", "1. Clear.\n2. Normal."),
        ("Normal chest. 1. Clear. 2. Normal.", "Normal chest.\n1. Clear.\n2. Normal."),
        ("1. Normal chest.", "Normal chest."),
        ("- Normal chest.", "Normal chest."),
        ("1. Clear. 2.", "Clear."),
        ("Normal chest.", "Normal chest."),
        ("", ""),
        ("BI-RADS 2. Benign.", "BI-RADS 2. Benign."),
        ("BI-RADS: 1. Negative. 2. Cyst.", "BI-RADS: 1. Negative. 2. Cyst."),
        ("1. No malignancy. BI-RADS 2. Benign finding.", "No malignancy. BI-RADS 2. Benign finding."),
        ("1. Benign, BI-RADS 2. 2. Cyst.", "1. Benign, BI-RADS 2.\n2. Cyst."),
        ("1. Benign, BI-RADS category 2.\n2. Cyst.", "1. Benign, BI-RADS category 2.\n2. Cyst."),
        ("1. Benign, BI-RADS\n2. Cyst.", "Benign, BI-RADS 2. Cyst."),
        ("1. 1. Clear.", "Clear."),
        ("Lung-RADS category 4. Biopsy.", "Lung-RADS category 4. Biopsy."),
        ("PI-RADS 1. Normal. LI-RADS 2. Cyst.", "PI-RADS 1. Normal. LI-RADS 2. Cyst."),
        ("Lesion in segment 6. 2. Stable.", "Lesion in segment 6. 2. Stable."),
        ("1. Lesion in segment 6. 2. Stable.", "1. Lesion in segment 6.\n2. Stable."),
        ("1. Lesion in segment 2. 2. Stable.", "1. Lesion in segment 2.\n2. Stable."),
        ("1. Lesion in seg. 2. Stable.", "Lesion in seg. 2. Stable."),
        ("1. Mass of 2.5 cm. 2. Cyst of 1. 5 cm.", "1. Mass of 2.5 cm.\n2. Cyst of 1. 5 cm."),
        ("2.5 cm mass.", "2.5 cm mass."),
        ("1. Fracture of T12. 2. Bulge at L4-5. 3. Rest.", "1. Fracture of T12.\n2. Bulge at L4-5.\n3. Rest."),
        ("1. Nodule, series 3, image 2. 2. Cyst.", "1. Nodule, series 3, image 2.\n2. Cyst."),
        ("1. Nodule on series 2. 3. Rest.", "Nodule on series 2. 3. Rest."),
        ("1. Bosniak 2. Cyst.", "Bosniak 2. Cyst."),
        ("Stenosis, grade 1. Cord is normal. 2. Rest.", "Stenosis, grade 1. Cord is normal. 2. Rest."),
        ("In 2019. 1 nodule.", "In 2019. 1 nodule."),
        ("2. Stable.\n3. Cyst.", "2. Stable.\n3. Cyst."),
    ],
)
def test_renumber(text: str, expected: str) -> None:
    assert renumber(text) == expected
    assert renumber(expected) == expected


LONG = "There is a large right pleural effusion with adjacent atelectasis."


@pytest.mark.parametrize(
    ("impression", "prompt", "expected"),
    [
        (LONG, f"Lungs: hazy. {LONG} Heart: normal.", True),
        (LONG, "Lungs: hazy.\nthere is a LARGE right pleural\neffusion, with adjacent atelectasis", True),
        (f"1. {LONG} 2. No pneumothorax.", f"{LONG} No pneumothorax.", True),
        (f"{LONG} No pneumothorax.", f"1. {LONG}\n2. No pneumothorax.", True),
        ("Anything else.", "Lungs are clear. IMPRESSION: Normal chest.", True),
        ("Anything else.", "FINDINGS AND IMPRESSION: Normal chest.", True),
        ("Anything else.", "Lungs are clear.\n\nConclusion\nNormal chest.", True),
        ("No acute disease.", "Lungs are clear. No acute disease.", False),
        ("No pneumothorax.", "No pneumothorax.", False),
        (f"{LONG} New since yesterday.", LONG, False),
        (LONG, "Lungs are clear.", False),
        ("Normal.", "Write the impression of this report.\n\nFindings: Lungs are clear.\n\nImpression:", False),
        ("Normal.", "Derive the impression from the findings of this radiology report. Lungs are clear.", False),
        ("Normal.", "Mass effect and impression on the cord.", False),
        (LONG, "There is a large right pleural effusion with adjacent atelectasisX.", False),
        ("", "", False),
    ],
)
def test_leaks(impression: str, prompt: str, expected: bool) -> None:
    assert leaks(impression, prompt) is expected


@pytest.mark.parametrize("case", [case for case in CASES if case["reason"] is None], ids=lambda case: case["id"])
def test_no_kept_pair_leaks(case: dict[str, Any]) -> None:
    parsed = parse_report(case["text"], addendum=case.get("addendum", "drop"))
    assert not leaks(parsed.impression, parsed.findings)


def test_no_impression_heading_gets_past_the_quick_look() -> None:
    for phrase, (name, _) in sections._NAMES.items():
        if name == "impression":
            for heading in (phrase.upper(), phrase.title()):
                text = f"The lungs are clear.\n\n{heading}: Mild oedema."
                assert sections.leaks("Nothing.", text) == any(
                    part.name in ("impression", "merged") for part in sections.parse_report(text).sections
                )
    assert sections.leaks("Nothing.", "The lungs are clear.\n\nIMPRESSION: Mild oedema.")


def test_underscores_that_stand_for_removed_words_stay() -> None:
    parsed = parse_report("FINDINGS: A ___ opacity in the ____ lobe, __bold__.\n\nIMPRESSION: ___ opacity.")
    assert parsed.findings == "A ___ opacity in the ____ lobe, bold."
    assert parsed.impression == "___ opacity."
