"""datacard.py: the counts of the funnel and of the contamination, against what was put in."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from radllama import datacard
from radllama.duplicates import REASONS
from radllama.held_out import HeldOut

NOTHING = np.zeros(0, np.int64)


def test_the_funnel_adds_up() -> None:
    entries: list[dict[str, Any]] = [
        {"rows": 10, "reasons": {"ragged_row": 1, "no_findings": 2, "identifier": 1}},
        {"rows": 5, "reasons": {"no_findings": 1, "prior": 1, "empty_report": 2}},
    ]
    reason = np.array([0, 0, REASONS.index("copies_over_cap"), 0, 0, 0, REASONS.index("repeated_id")], dtype=np.int8)
    stages = datacard.funnel(entries, reason)
    assert [stage["reports"] for stage in stages] == [15, 14, 9, 8, 7, 5]
    assert stages[2]["dropped"] == {"no_findings": 3, "empty_report": 2}
    assert list(stages[2]["dropped"]) == ["no_findings", "empty_report"]  # the most frequent first
    assert stages[5]["dropped"] == {"copies_over_cap": 1, "repeated_id": 1}


def test_contamination_counts_held_out_reports_that_train_holds() -> None:
    columns = {
        "pair": np.array([1, 2, 3, 4, 1, 6], dtype=np.uint64),
        "findings": np.array([1, 2, 3, 4, 1, 3], dtype=np.uint64),
        "impression": np.array([9, 9, 9, 8, 9, 9], dtype=np.uint64),
        "id": np.array([0, 2**63, 2**63, 2**63, 0, 2**63], dtype=np.uint64),  # drawn: test, train ...
    }
    split = np.array([0, 0, 2, 2, 2, 2], dtype=np.int8)
    reason = np.array([0, 0, 0, 0, 0, REASONS.index("copies_over_cap")], dtype=np.int8)
    leader = np.array([0, 1, 1, 3, 4, 5], dtype=np.int32)
    found = datacard.contamination(
        columns.__getitem__, leader, split, reason, (0.8, 0.0, 0.2), HeldOut(NOTHING, NOTHING, 3, 3)
    )
    third = round(1 / 3, 6)
    assert found["now"]["test"] == {
        "same pair": third, "same findings": third, "same impression": round(2 / 3, 6), "near": third,
    }  # fmt: skip
    assert found["at random"]["test"] == {"same pair": 0, "same findings": 0, "same impression": 1, "near": 0}
    assert found["search"]["held-out reports"] == 3
    bare = datacard.contamination(columns.__getitem__, leader, split, reason, (0.8, 0.0, 0.2), None)
    assert "search" not in bare
    assert "near" not in bare["now"]["test"]


def test_a_table_survives_odd_labels() -> None:
    assert datacard._table(["a"], [["x|y\nz"]]) == "| a |\n| --- |\n| x\\|y z |"


def test_the_card_of_nothing(tmp_path: Path) -> None:
    """All reports dropped: no division by zero, no missing key."""
    nobody = np.zeros(0, np.bool_)
    empty = {name: np.zeros(0, np.int64) for name in
             ("patient", "findings_words", "impression_words", "modality", "body_part", "flags", "date")}  # fmt: skip
    none = {"same pair": 0.0}
    summary = {
        "sources": ["a.csv"],
        "stages": datacard.funnel([], np.zeros(0, np.int8)),
        "splits": {name: datacard.describe(empty.__getitem__, lambda _: [], nobody) for name in ("train", "test")},
        "identifiers": {},
        "contamination": {side: {"test": none, "validation": none} for side in ("now", "at random")},
        "settings": {"deid": "off", "key": False, "near": 0.0, "cap": 0, "test_from": 0, "surrogates": False},
        "versions": {},
    }
    datacard.write_card(summary, tmp_path)
    assert json.loads((tmp_path / "funnel.json").read_text(encoding="utf-8")) == summary
    assert "The screen was off" in (tmp_path / "DATASET.md").read_text(encoding="utf-8")
