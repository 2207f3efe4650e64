"""Kappa and tau against naive loops over pairs; rating sheets there and back, as spreadsheets mangle them."""

from __future__ import annotations

import csv
import io
import json
import math
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from radllama import agreement as ag

FIVE = range(1, 6)


def table(one: list[int], other: list[int], values: Any = FIVE) -> Any:
    counts = np.zeros((len(values), len(values)))
    for a, b in zip(one, other, strict=True):
        counts[values.index(a), values.index(b)] += 1
    return counts


def naive_kappa(one: list[int], other: list[int]) -> float:
    """1 - observed / expected squared difference; the expectation over all n x n pairings."""
    observed = sum((a - b) ** 2 for a, b in zip(one, other, strict=True)) / len(one)
    expected = sum((a - b) ** 2 for a in one for b in other) / len(one) ** 2
    return 1 - observed / expected if expected else math.nan


def naive_tau(one: list[int], other: list[int]) -> float:
    """Kendall's definition, pair by pair."""
    surplus = untied_one = untied_other = 0
    for (a, b), (c, d) in combinations(zip(one, other, strict=True), 2):
        surplus += (np.sign(a - c) * np.sign(b - d)).item()
        untied_one += a != c
        untied_other += b != d
    return surplus / math.sqrt(untied_one * untied_other) if untied_one and untied_other else math.nan


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(FIVE), st.sampled_from(FIVE)), min_size=2, max_size=25))
def test_kappa_and_tau_equal_their_definitions(pairs: list[tuple[int, int]]) -> None:
    one, other = ([pair[k] for pair in pairs] for k in (0, 1))
    counts = table(one, other)
    np.testing.assert_allclose(ag.quadratic_kappa(counts, FIVE), naive_kappa(one, other), atol=1e-12)
    np.testing.assert_allclose(ag.kendall_tau_b(counts), naive_tau(one, other), atol=1e-12)


def test_kappa_and_tau_by_hand_and_by_libraries() -> None:
    one, other = [1, 2, 3, 4, 5, 3, 2, 4, 4, 1], [1, 3, 3, 5, 4, 2, 2, 4, 3, 2]
    # scikit-learn 1.9.1 cohen_kappa_score(weights="quadratic") and scipy 1.17.1 kendalltau gave these:
    assert ag.quadratic_kappa(table(one, other), FIVE) == pytest.approx(GOLDEN_KAPPA, abs=1e-12)
    assert ag.kendall_tau_b(table(one, other)) == pytest.approx(GOLDEN_TAU, abs=1e-12)
    assert ag.quadratic_kappa(table([1, 5], [5, 1]), FIVE) == pytest.approx(-1)
    assert ag.kendall_tau_b(table([1, 2, 5], [1, 3, 4])) == 1
    stacked = np.stack([table(one, other), table(one, one)])  # a bootstrap's draws are done at once
    assert ag.quadratic_kappa(stacked, FIVE).tolist() == pytest.approx([GOLDEN_KAPPA, 1])
    assert ag.kendall_tau_b(stacked).tolist() == pytest.approx([GOLDEN_TAU, 1])


GOLDEN_KAPPA, GOLDEN_TAU = 0.7986577181208054, 0.7273340668525836


def test_the_bootstrap_draws_whole_cases() -> None:
    rng = np.random.default_rng(0)
    one = rng.integers(1, 6, 60).tolist()
    other = np.clip(np.array(one) + rng.integers(-1, 2, 60), 1, 5).tolist()
    cases = [f"c{i // 3}" for i in range(60)]  # three systems a case
    found = ag.compare(one, other, cases, FIVE, resamples=4000, seed=1)
    draw = np.random.default_rng(5)
    kappas, taus = [], []
    for _ in range(1500):
        drawn = [3 * c + k for c in draw.integers(20, size=20) for k in range(3)]
        sample = table([one[i] for i in drawn], [other[i] for i in drawn])
        kappas.append(ag.quadratic_kappa(sample, FIVE))
        taus.append(ag.kendall_tau_b(sample))
    for name, spread in (("kappa", kappas), ("tau", taus)):
        low, high = np.percentile(spread, [2.5, 97.5])
        assert found[name]["low"] == pytest.approx(low, abs=0.015)
        assert found[name]["high"] == pytest.approx(high, abs=0.015)
    assert (found["n"], found["cases"]) == (60, 20)
    assert found["exact"] == np.mean(np.array(one) == np.array(other))
    alone = ag.compare(one, other, [str(i) for i in range(60)], FIVE, resamples=500, seed=1)
    assert alone["kappa"]["value"] == found["kappa"]["value"]
    assert alone["kappa"]["low"] != found["kappa"]["low"]


def test_what_is_undefined_is_none() -> None:
    constant = ag.compare([3, 3, 3], [3, 3, 3], ["a", "b", "c"], FIVE, resamples=50)
    assert constant["kappa"] == constant["tau"] == {"value": None, "low": None, "high": None}
    assert constant["exact"] == 1
    one_case = ag.compare([1, 5], [2, 5], ["a", "a"], FIVE, resamples=50)
    assert one_case["kappa"]["value"] > 0.9
    assert one_case["kappa"]["low"] is None
    assert "undefined" in ag.format_agreement([{"a": "x", "b": "y", "column": "coherence", **constant}])


def test_agreement_uses_what_both_have_rated() -> None:
    items = [(f"c{i}", "s") for i in range(6)]
    anna = {item: {"coherence": 1 + i % 5, "relevance": 3} for i, item in enumerate(items)}
    ben = {item: {"coherence": 1 + i % 5} for i, item in enumerate(items[:4])}
    rows = ag.agreement({"anna": anna, "ben": ben}, resamples=20)
    assert [(row["a"], row["b"], row["column"], row["n"]) for row in rows] == [("anna", "ben", "coherence", 4)]
    assert rows[0]["kappa"]["value"] == rows[0]["tau"]["value"] == 1
    text = ag.format_agreement(rows)
    assert max(map(len, text.splitlines())) <= 80
    assert "anna and ben" in text
    with pytest.raises(ValueError, match="no two raters"):
        ag.agreement({"anna": anna})


# ---- sheets

CASES = [
    {"id": "p7-1", "findings": "=HYPERLINK(1)", "reference": "-1 cm nodule"},
    {"id": "p7-2", "findings": 'Clear, "quiet" lungs.\nNo effusion.', "reference": "  @sum"},
    {"id": "p7-3", "findings": "+ effusion", "reference": "\tNormal"},
]
SYSTEMS = {"tuned-x": ["Nodule.", "Normal.", ""], "base-y": ["=cmd|' /C calc'!A0", "Normal.", "Effusion; ＝1"]}


@pytest.fixture
def sheet(tmp_path: Path) -> Path:
    assert ag.write_sheet(CASES, SYSTEMS, tmp_path / "sheet.csv", tmp_path / "key.json", seed=3) == 4
    return tmp_path / "sheet.csv"


def rows_of(path: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(path.read_text(encoding="utf-8-sig"), newline="")))


def fill(path: Path, changes: dict[tuple[int, str], str], delimiter: str = ",", encoding: str = "utf-8") -> Path:
    """Write a rating of 4 (and 1 error) into each cell, and `changes` {(row, column): text} over it."""
    rows = rows_of(path)
    for number, row in enumerate(rows):
        row |= dict.fromkeys(ag.COLUMNS, "4") | {"serious_errors": "1"}
        row |= {column: text for (where, column), text in changes.items() if where == number}
    filled = path.with_name("anna.csv")
    with filled.open("w", newline="", encoding=encoding, errors="replace") as file:
        writer = csv.DictWriter(file, list(rows[0]), delimiter=delimiter)
        writer.writeheader()
        writer.writerows(rows)
    return filled


def test_a_sheet_is_blind_and_shuffled_and_holds_no_formula(sheet: Path) -> None:
    rows = rows_of(sheet)
    text = sheet.read_text(encoding="utf-8")
    assert not [name for name in ("tuned-x", "base-y", "p7-") if name in text]
    assert list(rows[0]) == ["item", "findings", "reference", "impression", *ag.COLUMNS, "comment"]
    assert [row["item"] for row in rows] == [f"item-{i:04}" for i in range(1, 5)]
    for row in rows:
        assert not [cell for cell in row.values() if cell.strip()[:1] and cell.strip()[0] in "=+-@＝＋－＠"]
        assert not [cell for cell in row.values() if cell.startswith("\t")]
    assert {row["findings"] for row in rows} == {"'=HYPERLINK(1)", CASES[1]["findings"], "'+ effusion"}
    key = ag.read_key(sheet.with_name("key.json"))
    owners = [key[row["item"]] for row in rows]
    assert sorted(owner for each in owners for owner in each) == [
        ("p7-1", "base-y"), ("p7-1", "tuned-x"), ("p7-2", "base-y"), ("p7-2", "tuned-x"), ("p7-3", "base-y"),
    ]  # fmt: skip
    assert [("p7-2", "tuned-x"), ("p7-2", "base-y")] in owners  # the same words are rated once
    orders = set()
    for seed in range(6):
        ag.write_sheet(CASES, SYSTEMS, sheet, sheet.with_name("k.json"), seed=seed)
        orders.add(tuple(row["impression"] for row in rows_of(sheet)))
    assert len(orders) > 2


def test_count_draws_whole_cases(sheet: Path) -> None:
    ag.write_sheet(CASES[:2], {"a": ["x", "y"], "b": ["z", "w"]}, sheet, sheet.with_name("key.json"), count=1)
    key = ag.read_key(sheet.with_name("key.json"))
    assert len({case for owners in key.values() for case, _ in owners}) == 1
    assert len(key) == 2
    with pytest.raises(ValueError, match="count"):
        ag.write_sheet(CASES, SYSTEMS, sheet, sheet, count=4)


@pytest.mark.parametrize(
    ("delimiter", "encoding"), [(",", "utf-8"), (";", "utf-8-sig"), ("\t", "utf-8"), (";", "cp1252")]
)
def test_a_sheet_is_read_as_a_spreadsheet_saved_it(sheet: Path, delimiter: str, encoding: str) -> None:
    changes = {
        (0, "coherence"): "5,0",
        (1, "coherence"): " 2.0 ",
        (2, "relevance"): "",
        (0, "comment"): "naïve; odd, so",
    }
    key = ag.read_key(sheet.with_name("key.json"))
    rater = ag.read_sheet(fill(sheet, changes, delimiter, encoding), key)
    assert len(rater.ratings) == 5
    assert rater.ratings[key["item-0001"][0]]["coherence"] == 5
    assert rater.ratings[key["item-0002"][0]]["coherence"] == 2
    assert "relevance" not in rater.ratings[key["item-0003"][0]]
    assert rater.ratings[key["item-0004"][0]] == dict.fromkeys(ag.CRITERIA, 4) | {"serious_errors": 1}
    assert len(rater.problems) == 1
    assert "1 cells are empty" in rater.problems[0]


def test_wrong_cells_are_all_listed(sheet: Path) -> None:
    changes = {
        (0, "coherence"): "6",
        (1, "relevance"): "good",
        (1, "conciseness"): "2.5",
        (2, "serious_errors"): "-1",
        (3, "item"): "item-0001",
    }
    with pytest.raises(ValueError, match=r"anna\.csv") as caught:
        ag.read_sheet(fill(sheet, changes), ag.read_key(sheet.with_name("key.json")))
    for part in ("item-0001, coherence", "item-0002, relevance", "item-0002, conc", "item-0003, serious", "twice"):
        assert part in str(caught.value)
    assert "good" not in str(caught.value)


def test_other_files_than_sheets_and_keys(sheet: Path) -> None:
    key = ag.read_key(sheet.with_name("key.json"))
    with pytest.raises(ValueError, match="not in the key"):
        ag.read_sheet(fill(sheet, {(0, "item"): "item-9999"}), key)
    for text in ("", "a,b\n1,2\n", "\x00"):
        sheet.write_text(text)
        with pytest.raises(ValueError, match=r"sheet\.csv"):
            ag.read_sheet(sheet, key)
        with pytest.raises(ValueError, match="not the key"):
            ag.read_key(sheet)


def test_a_sheet_cut_short_is_read_and_said(sheet: Path) -> None:
    filled = fill(sheet, {})
    rows = rows_of(filled)[:2]
    with filled.open("w", newline="") as file:
        csv.DictWriter(file, list(rows[0])).writeheader()
        csv.DictWriter(file, list(rows[0])).writerows(rows)
    rater = ag.read_sheet(filled, ag.read_key(sheet.with_name("key.json")))
    assert ["2 items of the key are not in it" in problem for problem in rater.problems] == [True]


def test_the_judge_is_a_rater() -> None:
    errors = [{"statement": "s", "type": "false finding", "severity": s} for s in ("urgent", "minor", "significant")]
    scores = dict.fromkeys(ag.CRITERIA, 4)
    rows = [
        {"id": "a", "system": "s", "scores": scores, "errors": errors},
        {"id": "b", "system": "s", "scores": dict.fromkeys(ag.CRITERIA), "errors": None, "failure": "refused"},
        {"id": "c", "system": "s", "scores": scores, "errors": errors * 4},
    ]
    ratings = ag.judge_ratings(rows)
    assert ratings["a", "s"] == scores | {"serious_errors": 2}
    assert ratings["b", "s"] == {}
    assert ratings["c", "s"]["serious_errors"] == ag.MOST_ERRORS


def test_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cases = [{"id": f"c{i}", "findings": f"Finding {i}.", "reference": "Normal."} for i in range(12)]
    for name in ("tuned", "base"):
        rows = [case | {"prediction": f"{name} says {case['id']}", "model": name} for case in cases]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    files = [str(tmp_path / "tuned.jsonl"), str(tmp_path / "base.jsonl")]
    sheet, key, out = tmp_path / "sheet.csv", str(tmp_path / "key.json"), tmp_path / "agreement.json"
    assert ag.main(["sheet", *files, "--out", str(sheet), "--key", key, "--count", "10"]) == 0
    varied = {(i, "coherence"): str(1 + i % 5) for i in range(20)}
    anna = fill(sheet, varied)
    ben = anna.rename(tmp_path / "ben.csv")
    anna = fill(sheet, varied | {(0, "coherence"): "3"})
    judge = tmp_path / "judge.jsonl"
    owners = [owner for each in ag.read_key(key).values() for owner in each]
    rows = [
        {"id": i, "system": s, "scores": dict.fromkeys(ag.CRITERIA, 1 + n % 5), "errors": []}
        for n, (i, s) in enumerate(owners)
    ]
    judge.write_text("".join(json.dumps(row) + "\n" for row in rows))
    command = ["compare", "--key", key, "--sheets", str(anna), str(ben), "--judge", str(judge), "--resamples", "50"]
    assert ag.main([*command, "--out", str(out)]) == 0
    text = capsys.readouterr().out
    for pair in ("anna and ben", "anna and judge", "ben and judge"):
        assert pair in text
    found = {(row["a"], row["b"], row["column"]): row for row in json.loads(out.read_text())}
    assert found["ben", "judge", "coherence"]["kappa"]["value"] == 1
    assert found["anna", "ben", "coherence"]["exact"] == 0.95
    for wrong in (
        ["sheet", files[0], files[0], "--out", str(sheet), "--key", key],
        ["sheet", files[0], "--names", "a", "b", "--out", str(sheet), "--key", key],
        ["compare", "--key", key, "--sheets", str(anna), str(anna)],
        ["compare", "--key", key, "--sheets", str(anna), "--judge", files[0]],
        ["compare", "--key", key, "--sheets", str(tmp_path / "gone.csv")],
    ):
        assert ag.main(wrong) == 2
        assert "error: " in capsys.readouterr().err
