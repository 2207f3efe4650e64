"""The maker of raw exports: what it says it planted stands in the texts, and nothing else does."""

from __future__ import annotations

import csv
import gzip
import itertools
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from conftest import load_asset

from radllama.sections import parse_report

ROOT = Path(__file__).resolve().parents[1]
COUNT = 4000


load_asset("make_reports")
make_raw = load_asset("make_raw")
Row = dict[str, str]
Export = list[tuple[Row, dict[str, Any]]]


def shingles(text: str) -> set[tuple[str, ...]]:
    words = text.lower().split()
    return {tuple(words[k : k + 5]) for k in range(len(words) - 4)}


def similarity(one: str, other: str) -> float:
    a, b = shingles(one), shingles(other)
    return len(a & b) / len(a | b)


@pytest.fixture(scope="module")
def export() -> Export:
    return [(dict(zip(make_raw.COLUMNS, row, strict=True)), truth) for row, truth in make_raw.rows(COUNT, 3)]


@pytest.fixture(scope="module")
def by_id(export: Export) -> dict[str, tuple[Row, dict[str, Any]]]:
    return {row["report_id"]: (row, truth) for row, truth in export}


def test_every_row_has_its_truth_and_faults_have_their_shares(export: Export) -> None:
    assert [row["report_id"] for row, _ in export] == [truth["id"] for _, truth in export]
    assert len({row["report_id"] for row, _ in export}) == COUNT
    counts = Counter(truth["fault"] for _, truth in export)
    assert set(counts) <= {"", *make_raw.FAULTS}
    for fault, share in make_raw.FAULTS.items():
        assert abs(counts[fault] - share * COUNT) < 4.5 * (share * COUNT) ** 0.5, fault
    assert not set(export[0][0].values()) & {"", *make_raw.FAULTS}, "the rows themselves tell nothing"


def test_patients_come_back_and_dates_are_dates(export: Export) -> None:
    studies = Counter(row["patient_id"] for row, _ in export)
    assert 2 < COUNT / len(studies) < 3.5
    assert max(studies.values()) >= 6
    assert all("2008-01-01" <= row["study_date"] < "2019-01-01" for row, _ in export)
    assert len({(row["modality"], row["body_part"]) for row, _ in export}) == len(make_raw.EXAM_PAIRS)


def test_a_report_without_fault_parses_into_what_it_was_made_of(export: Export) -> None:
    """Whatever the style. It is also a test of sections.py on texts that it was not written for."""
    maker = make_raw.Maker(COUNT, 3)
    for number, (row, truth) in enumerate(export):
        parsed = parse_report(row["report_text"])
        if truth["fault"]:
            continue
        assert parsed.reason is None, truth
        for body in maker.content(number):
            assert body.findings in " ".join(parsed.findings.split()), truth
            assert all(words in " ".join(parsed.impression.split()) for words in body.statements), truth
        assert parsed.has_addendum == truth["addendum"]


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        ("merged_sections", "merged_findings_impression"),
        ("no_findings", "no_findings"),
        ("no_impression", "no_impression"),
        ("empty_impression", "empty_impression"),
        ("leak", "impression_in_findings"),
    ],
)
def test_broken_sections_are_broken(export: Export, fault: str, reason: str) -> None:
    texts = [row["report_text"] for row, truth in export if truth["fault"] == fault]
    assert texts
    assert {parse_report(text).reason for text in texts} == {reason}


def test_other_faults_are_in_the_texts(export: Export) -> None:
    for row, truth in export:
        parsed = parse_report(row["report_text"])
        match truth["fault"]:
            case "placeholders":
                assert any(mark in row["report_text"] for mark in make_raw.MARKS)
            case "short_findings":
                assert len(parsed.findings.split()) < 10
            case "short_impression":
                assert len(parsed.impression.split()) == 1
            case "prior":
                assert "prior" in parsed.impression
                assert "prior" not in parsed.findings
            case "number":
                size = parsed.impression.split("lesion of ")[-1].removesuffix(".")
                assert size not in parsed.findings
            case "identifiers":
                assert 1 <= len(truth["identifiers"]) <= 3
                assert all(text in row["report_text"] for _, _, text in truth["identifiers"])


def test_duplicates_repeat_an_earlier_report_without_fault(
    export: Export, by_id: dict[str, tuple[Row, dict[str, Any]]]
) -> None:
    for row, truth in export:
        if not truth["fault"].endswith("duplicate"):
            assert "duplicate_of" not in truth
            continue
        original, known = by_id[truth["duplicate_of"]]
        assert original["report_id"] < row["report_id"]
        assert known["fault"] == ""
        mine, theirs = parse_report(row["report_text"]), parse_report(original["report_text"])
        assert mine.reason is None
        one, other = (" ".join(parsed.findings.split()) for parsed in (mine, theirs))
        if truth["fault"] == "exact_duplicate":
            assert {key: row[key] for key in make_raw.COLUMNS[1:]} == {
                key: original[key] for key in make_raw.COLUMNS[1:]
            }
        elif truth["fault"] == "restyled_duplicate":
            assert row["report_text"] != original["report_text"]
            assert one == other
        else:
            assert 0.85 < similarity(one, other) < 1


def test_other_reports_are_not_alike(export: Export) -> None:
    """The truth is complete: among reports that share one body, no pair comes near a duplicate's similarity."""
    maker = make_raw.Maker(COUNT, 3)
    groups: dict[str, list[int]] = {}
    for number, (_, truth) in enumerate(export):
        if not truth["fault"]:
            for body in maker.content(number):
                groups.setdefault(body.findings, []).append(number)
    largest = 0.0
    for members in groups.values():
        for one, other in itertools.pairwise(members):
            texts = [" ".join(body.findings for body in maker.content(number)) for number in (one, other)]
            largest = max(largest, similarity(*texts))
    assert 0.3 < largest < 0.72


@pytest.mark.parametrize("ending", ["csv", "jsonl", "csv.gz", "jsonl.gz"])
def test_files_hold_the_rows_and_are_the_same_for_a_seed(tmp_path: Path, ending: str) -> None:
    files = [tmp_path / f"{name}.{ending}" for name in ("one", "two")]
    for file in files:
        assert make_raw.main(["--count", "60", "--seed", "5", "--output", str(file)]) == 0
    assert files[0].read_bytes() == files[1].read_bytes()
    content = gzip.decompress(files[0].read_bytes()) if ending.endswith("gz") else files[0].read_bytes()
    lines = content.decode()
    if "csv" in ending:
        found = list(csv.DictReader(lines.splitlines(keepends=True)))
    else:
        found = [json.loads(line) for line in lines.splitlines()]
    expected = list(make_raw.rows(60, 5))
    assert [tuple(row.values()) for row in found] == [row for row, _ in expected]
    assert list(found[0]) == list(make_raw.COLUMNS)
    truth = (tmp_path / f"one.{ending}.truth.jsonl").read_text(encoding="utf-8").splitlines()
    known = json.loads(json.dumps([truth for _, truth in expected]))  # tuples become lists
    assert [json.loads(line) for line in truth] == known
    assert len(list(tmp_path.iterdir())) == 4
    other = list(make_raw.rows(60, 6))
    assert [row[-1] for row, _ in other] != [row[-1] for row, _ in expected]


def test_bad_arguments_end_cleanly(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    for arguments, message in (
        (["--count", "5", "--output", str(tmp_path / "raw.txt")], "ends in .csv"),
        (["--count", "-5", "--output", str(tmp_path / "raw.csv")], "whole number"),
        (["--count", "5", "--output", str(tmp_path / "file" / "raw.csv")], "cannot write"),
    ):
        with pytest.raises(SystemExit) as caught:
            make_raw.main(arguments)
        assert caught.value.code == 2
        assert message in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
