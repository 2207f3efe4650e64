"""cases.py: predictions files joined by id, strata, contexts, and messages about bad input."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from predictions import POOR, REFERENCES, REPORTS, rows_of, two_systems, write

from radllama import eval as ev
from radllama.cases import load


@pytest.fixture
def two(tmp_path: Path) -> list[Path]:
    return two_systems(tmp_path)


def test_files_are_joined_by_id(two: list[Path]) -> None:
    cases, (good, poor) = load(two)
    assert cases.ids == [f"case-{i}" for i in range(6)]
    assert (cases.findings, cases.references) == ([findings for findings, _ in REPORTS], REFERENCES)
    assert (good.name, good.source, good.predictions) == ("good", str(two[0]), REFERENCES)
    assert poor.predictions == POOR  # its file has another order
    assert poor.stop_reasons == ["stop"] * 5 + ["length"]


def test_patients_are_the_unit_where_all_are_known(tmp_path: Path) -> None:
    rows = rows_of("m", ["No acute disease."] * 6)
    for i, row in enumerate(rows):
        row["patient_id"] = f"p{i // 2}"
    path = write(tmp_path / "m.jsonl", rows)
    cases, _ = load([path])
    assert cases.by_patient
    assert cases.clusters.tolist() == [0, 0, 1, 1, 2, 2]
    del rows[3]["patient_id"]
    cases, _ = load([write(path, rows)])
    assert not cases.by_patient
    assert len(set(cases.clusters.tolist())) == 6
    full = write(tmp_path / "n.jsonl", [{**row, "model": "n", "patient_id": "p"} for row in rows])
    assert load([path, full])[0].by_patient  # either file may know the patient


def test_strata(two: list[Path], tmp_path: Path) -> None:
    cases, _ = load(two)
    assert {name: mask.tolist() for name, mask in cases.strata.items()} == {
        "normal": [True, False, False, False, True, True],
        "abnormal": [False, True, True, True, False, False],
        "1-4 words": [True, False, False, False, True, True],  # 4, 8, 11, 5, 2 and 3 words: the median is 4
        "5+ words": [False, True, True, True, False, False],
    }
    rows = rows_of("m", ["x"] * 6, modality="CT")
    rows[0]["modality"] = "MR"
    del rows[1]["modality"]
    strata = load([write(tmp_path / "m.jsonl", rows)])[0].strata
    assert list(strata)[4:] == ["modality CT", "modality MR", "modality not given"]  # most frequent first
    assert [int(strata[name].sum()) for name in list(strata)[4:]] == [4, 1, 1]


def test_a_stratum_of_all_or_none_is_no_stratum(tmp_path: Path) -> None:
    rows = rows_of("m", ["x"] * 6, modality="CT")
    for row in rows:
        row["reference"] = "No acute disease."
    assert load([write(tmp_path / "m.jsonl", rows)])[0].strata == {}


def test_contexts_hold_indication_and_comparison_of_either_file(tmp_path: Path) -> None:
    rows = rows_of("m", ["x"] * 6)
    rows[0] |= {"indication": "Cough.", "comparison": "CT of last year."}
    rows[1] |= {"indication": " ", "comparison": "None."}
    rows[2] |= {"indication": None}
    rows[3] |= {"indication": ""}
    other = rows_of("n", ["x"] * 6)
    other[2] |= {"indication": "Pain."}
    other[3] |= {"indication": "Fever."}
    cases, _ = load([write(tmp_path / "m.jsonl", rows), write(tmp_path / "n.jsonl", other)])
    first = "Indication: Cough.\nComparison: CT of last year."
    assert cases.contexts == [first, "Comparison: None.", "Indication: Pain.", "Indication: Fever.", "", ""]


def test_odd_but_good_files(tmp_path: Path) -> None:
    rows = rows_of("m \n one", ["x"] * 6, patient_id=7)
    path = tmp_path / "m.jsonl"
    write(path, [*rows[:3], "", "  ", *rows[3:]])
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes().replace(b"\n", b"\r\n"))
    cases, (system,) = load([path])
    assert len(cases.ids) == 6
    assert system.name == "m one"
    assert cases.by_patient
    assert np.ptp(cases.clusters) == 0


# ---- bad input


ROW = rows_of("m", REFERENCES)[0]
BAD: list[tuple[list[Any], list[str]]] = [
    ([ROW, '{"id": "x", '], ["a.jsonl line 2", "invalid JSON", "one object a line"]),
    ([ROW, "[1, 2]"], ["a.jsonl line 2", "not an object"]),
    ([ROW, '{"id": "\\ud800"}'], ["a.jsonl line 2", "surrogates"]),
    ([ROW, "[" * 100_000], ["a.jsonl line 2"]),
    ([{**ROW, "id": 7}, {**ROW, "id": " "}], ["line 1: id", "line 2: id"]),
    ([{key: value for key, value in ROW.items() if key not in ("findings", "prediction")}], ["findings, prediction"]),
    ([{**ROW, "prediction": None}], ["line 1: prediction"]),
    ([{**ROW, "reference": "\n"}], ["line 1: reference", "delete it"]),
    ([{key: value for key, value in ROW.items() if key != "stop_reason"}], ["stop_reason", "null"]),
    ([{**ROW, "stop_reason": "eos"}], ["line 1: stop_reason", '"length"']),
    ([ROW, {**ROW, "id": "other"}, ROW], ["duplicate ids (case-0 on lines 1, 3)", "keep one"]),
    ([ROW, {**ROW, "id": "other", "model": "n"}], ["more than one model (m, n)", "--names"]),
    ([], ["a.jsonl: holds no rows"]),
]


@pytest.mark.parametrize(("rows", "parts"), BAD)
def test_bad_files_are_named_with_line_and_cure(rows: list[Any], parts: list[str], tmp_path: Path, capsys: Any) -> None:
    path = write(tmp_path / "a.jsonl", rows)
    with pytest.raises(ValueError, match="cannot be used"):
        load([path])
    assert ev.main([str(path), "--out", str(tmp_path / "out")]) == 2
    message = capsys.readouterr().err
    assert message.startswith("error: the input cannot be used:")
    assert all(part in message for part in [str(path), *parts])
    assert not any(text in message for pair in REPORTS for text in pair)
    assert not (tmp_path / "out").exists()


def test_all_problems_of_all_files_come_at_once(tmp_path: Path) -> None:
    a = write(tmp_path / "a.jsonl", [{**ROW, "prediction": 1}, "nonsense"])
    b = tmp_path / "b.jsonl"
    b.write_bytes(b'{"id": "caf\xe9"}\n')
    with pytest.raises(ValueError, match="cannot be used") as caught:
        load([a, b, tmp_path / "c.jsonl"])
    lines = str(caught.value).splitlines()
    assert len(lines) == 5
    assert "b.jsonl line 1" in lines[3]
    assert "c.jsonl: cannot be read (No such file" in lines[4]
    with pytest.raises(ValueError, match="and 30 more"):
        load([write(a, ["nonsense"] * 50)])


def test_systems_must_answer_the_same_cases(two: list[Path], tmp_path: Path) -> None:
    rows = rows_of("third", ["x"] * 6)
    rows[0]["id"], rows[1]["reference"], rows[2]["findings"] = "new", "Another.", "Others."
    rows[3]["findings"] = rows[3]["findings"].replace(" ", "  ")  # spacing is no difference
    with pytest.raises(ValueError, match="cannot be used") as caught:
        load([*two, write(tmp_path / "third.jsonl", rows)])
    message = str(caught.value)
    assert "third.jsonl: against" in message
    assert "1 ids are missing (case-0) and 1 added (new)" in message
    assert "for 2 ids (case-1, case-2)" in message


def test_names(two: list[Path], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"several systems are named 'good' .*--names"):
        load([two[0], two[0]])
    assert [system.name for system in load([two[0], two[0]], ["a", "b"])[1]] == ["a", "b"]
    with pytest.raises(ValueError, match="2 predictions files and 1 names"):
        load(two, ["a"])
    with pytest.raises(ValueError, match="0 predictions files"):
        load([])
    mixed = write(tmp_path / "mixed.jsonl", [ROW, {**ROW, "id": "other", "model": "n"}])
    assert load([mixed], ["both"])[1][0].name == "both"
