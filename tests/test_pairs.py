"""pairs.py: one report, its pair or the reason why there is none."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from report_tables import FINDINGS, LONG, Row, rows

from radllama import intake, pairs, reports
from radllama.reports import Dropped, Options, Pair, parse_report, process, pseudonym
from radllama.sections import leaks


def pair(record: Row, **options: Any) -> Pair:
    result = process(record, Options(**options))
    assert isinstance(result, Pair), result
    return result


def dropped(record: Row, **options: Any) -> str:
    result = process(record, Options(**options))
    assert isinstance(result, Dropped), result
    return result.reason


def test_a_whole_report_gives_a_pair() -> None:
    text = (
        f"HISTORY: Cough.\nCOMPARISON: None.\n\nFINDINGS: {LONG}\n\nIMPRESSION:\n1) No acute disease.\n2) Normal heart."
    )
    found = pair({"id": "a", "text": text, "modality": "CR"})
    assert found == Pair("a", LONG, "1. No acute disease.\n2. Normal heart.", modality="CR", indication="Cough.",
                         comparison="None.")  # fmt: skip
    assert reports.parse_report is parse_report
    assert parse_report(text).findings == LONG


def test_split_columns_are_cleaned() -> None:
    found = pair(
        {"id": 7, "findings": f"  Findings: {LONG}\n", "impression": "IMPRESSION: No acute disease.", "extra": 1}
    )
    assert (found.id, found.findings, found.impression) == ("7", LONG, "No acute disease.")


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ({"text": f"FINDINGS: {LONG}"}, "no_impression"),
        ({"text": f"IMPRESSION: {LONG}"}, "no_findings"),
        ({"text": f"FINDINGS AND IMPRESSION: {LONG}"}, "merged_findings_impression"),
        ({"findings": LONG, "impression": None}, "no_impression"),
        ({"findings": float("nan"), "impression": "No disease."}, "no_findings"),
        ({"findings": "", "impression": " "}, "empty_report"),
        ({}, "empty_report"),
        ({"findings": "The lungs are clear.", "impression": "Normal chest."}, "short_findings"),
        ({"findings": LONG, "impression": "Normal."}, "short_impression"),
        ({"findings": LONG, "impression": "XXXX ____ effusion."}, "placeholders"),
        ({"findings": "XXXX " * 6 + LONG, "impression": "Normal chest."}, "pair"),
        ({"findings": f"{LONG} {LONG}", "impression": "Normal chest."}, "repeated"),
        ({"findings": LONG, "impression": LONG.upper()}, "repeated"),
        ({"findings": f"{LONG} There is a large mass in the right lower lobe.",
          "impression": "There is a large mass in the right lower lobe."}, "impression_in_prompt"),
        ({"findings": f"{LONG}\nIMPRESSION: Normal.", "impression": "Normal chest."}, "impression_in_prompt"),
        ({"findings": LONG, "impression": "Normal chest.", "indication": "IMPRESSION: Normal chest."},
         "impression_in_prompt"),
        ({"findings": f"{LONG} Discussed with Dr. John Smith.", "impression": "Normal chest."}, "identifier"),
        ({"findings": f"{LONG} \ud800", "impression": "Normal chest."}, "undecodable"),
    ],
)  # fmt: skip
def test_reasons(record: Row, reason: str) -> None:
    result = process(record)
    assert ("pair" if isinstance(result, Pair) else result.reason) == reason


POLICED = {
    "placeholder": {"findings": f"{LONG} XXXX seen.", "impression": "Normal chest."},
    "repeated": {"findings": f"{LONG} {LONG}", "impression": "Normal chest."},
    "language": {
        "findings": "Die Lunge ist frei und es zeigt sich kein Erguss. Das Herz ist nicht vergrößert. Keine Stauung.",
        "impression": "Kein akuter Befund.",
    },
    "prior": {"findings": LONG, "impression": "Unchanged from the prior study."},
    "number": {"findings": f"{LONG} A 4 mm nodule lies in the right upper lobe.", "impression": "Nodule of 14 mm."},
    "side": {"findings": f"{LONG} There is a right pleural effusion.", "impression": "Left pleural effusion."},
    "negation": {
        "findings": f"{FINDINGS[0]} {FINDINGS[1]} There is a pleural effusion.",
        "impression": "No pleural effusion.",
    },
    "entity": {"findings": LONG, "impression": "Acute appendicitis."},
}


@pytest.mark.parametrize("policy", pairs.POLICIES)
def test_policies(policy: str) -> None:
    record = POLICED[policy]
    others = {name: "off" for name in pairs.POLICIES if name != policy}
    assert pair(record, **others, **{policy: "flag"}).flags == (policy,)
    assert pair(record, **others, **{policy: "off"}).flags == ()
    assert dropped(record, **others, **{policy: "drop"}) == policy


def test_good_reports_have_no_flags() -> None:
    for sentence in FINDINGS:
        assert pair({"findings": f"{LONG} {sentence}", "impression": "No acute disease."}, negation="off").flags == ()
    supported = {"findings": LONG, "impression": "Unchanged chest.", "comparison": "Chest radiograph of last year."}
    assert "prior" not in pair(supported).flags


def test_a_withheld_context_does_not_cost_the_pair() -> None:
    record = {"findings": LONG, "impression": "Normal chest.", "indication": "Cough.", "comparison": "CT of 3/4/2016."}
    found = pair(record)
    assert (found.indication, found.comparison) == ("Cough.", "")
    assert found.flags == ("comparison_withheld",)
    assert found.identifiers == "date:1"
    assert pair(record, deid="off").comparison == "CT of 3/4/2016."
    assert pair(record, deid="redact").comparison == "CT of [DATE]."


@pytest.mark.parametrize("name", ["modality", "body_part"])
def test_labels_are_screened_by_themselves(name: str) -> None:
    record = {"findings": LONG, "impression": "Normal chest.", "modality": "MR", "body_part": "Brain"}
    assert pair(record).flags == ()  # MR is no title
    record[name] = "Chest, Mr. John Smith MRN: 1234567"
    found = pair(record)
    assert (getattr(found, name), found.flags) == ("", (f"{name}_withheld",))
    assert found.identifiers == "mrn:1 name:1"
    assert getattr(pair(record, deid="redact"), name) == "Chest, Mr. [NAME] MRN: [MRN]"
    assert "Smith" not in getattr(pair(record, deid="redact", surrogates=True, key=b"k" * 32), name)
    assert getattr(pair(record, deid="off"), name) == record[name]


class Missing:
    """As pandas' NA: no truth value, not even of a comparison."""

    def __ne__(self, other: object) -> Any:
        return self

    def __bool__(self) -> bool:
        raise TypeError("boolean value of NA is ambiguous")

    def __repr__(self) -> str:
        return "<NA>"

    __hash__ = None  # type: ignore[assignment]


def test_values_of_table_engines() -> None:
    record = {"findings": LONG, "impression": "Normal chest.", "modality": Missing(), "body_part": np.array(["a", "b"])}
    assert (pair(record).modality, pair(record).body_part) == ("", "['a' 'b']")


def test_redaction_and_surrogates() -> None:
    record = {"id": "a", "patient_id": "p1", "impression": "Normal chest.",
              "findings": f"{LONG} Compared with 3/4/2016. Read by Dr. John Smith."}  # fmt: skip
    assert dropped(record) == "identifier"
    redacted = pair(record, deid="redact").findings
    assert "[DATE]" in redacted
    assert "Smith" not in redacted
    surrogate = pair(record, deid="redact", surrogates=True, key=b"k" * 32)
    assert "Smith" not in surrogate.findings
    assert "3/4/2016" not in surrogate.findings
    assert "[" not in surrogate.findings
    again = pair(record | {"id": "b"}, deid="redact", surrogates=True, key=b"k" * 32)
    assert again.findings == surrogate.findings  # the same patient
    other = pair(record | {"patient_id": "p2"}, deid="redact", surrogates=True, key=b"k" * 32)
    assert other.findings != surrogate.findings


def test_options_refuse_what_makes_no_sense() -> None:
    with pytest.raises(ValueError, match="--key-file"):
        Options(deid="redact", surrogates=True)
    with pytest.raises(ValueError, match="--deid redact"):
        Options(surrogates=True, key=b"k" * 32)
    with pytest.raises(ValueError, match="prior: expected flag, drop or off"):
        Options(prior="maybe")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="needs a key"):
        pseudonym("1", b"")


@settings(max_examples=200, deadline=None)
@given(st.dictionaries(st.sampled_from(intake.FIELDS), st.none() | st.text() | st.integers() | st.floats()))
def test_process_never_raises(record: Row) -> None:
    result = process(record)
    json.dumps(result.row(), ensure_ascii=False).encode()
    if isinstance(result, Pair):
        assert not leaks(result.impression, result.findings)


class Table(list[Row]):
    """As `datasets.Dataset.map` and `.filter` do: a row in, the row updated by what the function returns."""

    def map(self, function: Callable[[Row], Row]) -> Table:
        return Table({**row, **function(dict(row))} for row in self)

    def filter(self, keep: Callable[[Row], bool]) -> Table:
        return Table(row for row in self if keep(row))


def test_process_as_a_plain_function_of_rows() -> None:
    """The example of docs/reports.md; `datasets` itself is no dependency, `Table` stands in for it."""
    table = Table(rows(20))
    judged = table.map(lambda row: process(row | {"id": row["uid"]}).row())
    assert len({tuple(row) for row in judged}) == 1  # the same keys in all rows, as a table needs
    assert [row["reason"] for row in judged] == [""] * 20
    bad = Table([{"findings": "short", "impression": "Normal chest."}]).map(lambda row: process(row).row())
    assert len(bad.filter(lambda row: not row["reason"])) == 0
    assert set(bad[0]) == set(judged[0]) - {"uid", "mrn"}


def test_empty_sentences_go_and_ellipses_stay() -> None:
    found = pair({"findings": f"{LONG}. . More..", "impression": "Normal chest.. No change... seen. ."})
    assert found.findings == f"{LONG} . More."
    assert found.impression == "Normal chest. No change... seen."
