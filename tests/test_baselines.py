"""baselines.py: constant, neighbour, and which cases are near the training data."""

from __future__ import annotations

from pathlib import Path

import pytest
from predictions import REFERENCES, REPORTS, rows_of, two_systems, write

from radllama.baselines import BASELINES, baselines, constant_impression, near_training
from radllama.cases import load
from radllama.metrics import rouge
from radllama.similar import nearest


def test_the_constant_is_the_best_of_the_frequent_impressions() -> None:
    impressions = (
        ["Pneumonia of the lower lobe."] * 5
        + ["No acute disease."] * 4
        + ["no acute disease"] * 3
        + ["No acute cardiopulmonary disease."] * 3
        + ["No acute bony disease is seen."] * 3
    )
    chosen = constant_impression(impressions)
    means = {text: sum(rouge(impressions, [text] * len(impressions))["rougeL"]) for text in set(impressions)}
    assert means[chosen] == max(means.values())
    assert chosen == "No acute disease."  # its most frequent spelling
    assert constant_impression(impressions, candidates=1) == "No acute disease."  # 7 of 18, spellings together


def test_the_three_answers(tmp_path: Path) -> None:
    train = write(
        tmp_path / "train.jsonl",
        [
            {"id": "a", "findings": "Lungs are clear and the heart is normal.", "impression": "No acute disease."},
            {"id": "case-4", "findings": "Pleural effusion, large, on the right.", "impression": "Right effusion."},
            {"id": "c", "findings": "Heart and lungs are clear today.", "impression": "No acute disease."},
        ],
    )
    cases, _ = load(two_systems(tmp_path))
    (constant, copied, near), close = baselines(cases, train)
    assert [system.name for system in (constant, copied, near)] == list(BASELINES)
    assert constant.predictions == ["No acute disease."] * 6
    assert copied.predictions == [findings for findings, _ in REPORTS]
    assert near.predictions[:2] == ["No acute disease.", "Right effusion."]
    assert near.source == f"baseline from {train}"
    assert near.stop_reasons == [None] * 6
    assert close.tolist() == [False] * 6


def trigrams(text: str) -> set[tuple[str, ...]]:
    words = text.lower().replace(".", "").split()
    return set(zip(words, words[1:], words[2:], strict=False))


def test_contamination_is_a_jaccard_of_trigrams(tmp_path: Path) -> None:
    cases, _ = load([write(tmp_path / "m.jsonl", rows_of("m", REFERENCES))])
    findings = [findings for findings, _ in REPORTS]
    every = list(range(6))
    assert near_training(cases, every, findings, REFERENCES).all()
    changed = [text.upper() + "!!" for text in findings]
    assert near_training(cases, every, changed, [text.lower() for text in REFERENCES]).all()
    assert not near_training(cases, every, findings, ["Something else altogether was seen here."] * 6).any()
    # On both sides of the threshold: the last words of a long text changed, one after another.
    text = "one two three four five six seven eight nine ten eleven twelve"
    row = rows_of("m", ["x"] * 6)[0] | {"findings": text, "reference": "and so on"}
    cases, _ = load([write(tmp_path / "n.jsonl", [row])])
    whole, results = trigrams(f"{text} and so on"), []
    for kept in range(15):
        words = f"{text} and so on".split()
        words[kept:] = ["x"] * (15 - kept)
        other = trigrams(" ".join(words))
        close = near_training(cases, [0], [" ".join(words[:12])], [" ".join(words[12:])])
        results.append(close.tolist() == [len(whole & other) >= 0.8 * len(whole | other)])
        assert close[0] == (kept >= 14)
    assert all(results)


def test_another_training_report_with_the_same_findings_counts_too(tmp_path: Path) -> None:
    """Reports of normal findings are often the same, and have several impressions: the first is not all there is."""
    cases, _ = load([write(tmp_path / "m.jsonl", rows_of("m", REFERENCES))])
    other = "Unrelated words fill this impression from its beginning to its end."
    findings = [REPORTS[0][0], REPORTS[0][0].upper(), REPORTS[1][0]]
    train = [other, REFERENCES[0], REFERENCES[1]]
    near = nearest(findings, cases.findings[:2])
    assert near == [0, 2]
    assert near_training(cases, [*near, 0, 0, 0, 0], findings, train).tolist() == [True, True, *[False] * 4]


def test_texts_without_a_word_that_it_knows_are_not_contaminated(tmp_path: Path) -> None:
    row = rows_of("m", ["x"] * 6)[0] | {"findings": "肺野清晰。", "reference": "正常。"}
    cases, _ = load([write(tmp_path / "m.jsonl", [row])])
    assert near_training(cases, [0], ["心影增大。"], ["异常。"]).tolist() == [False]
    short = row | {"findings": "Clear.", "reference": "Normal."}
    cases, _ = load([write(tmp_path / "m.jsonl", [short])])
    assert near_training(cases, [0], ["clear"], ["normal"]).tolist() == [True]


def test_training_data_must_not_hold_the_scored_cases(tmp_path: Path) -> None:
    cases, _ = load(two_systems(tmp_path))
    pairs = [
        {"id": "case-1", "findings": REPORTS[1][0].upper(), "impression": "x"},
        {"id": "case-2", "findings": "Another report that happens to have this id.", "impression": "x"},
    ]
    with pytest.raises(ValueError, match=r"train.jsonl: holds 1 scored cases \(case-1\)"):
        baselines(cases, write(tmp_path / "train.jsonl", pairs))
    with pytest.raises(ValueError, match=r"train.jsonl line 1: impression must be given"):
        baselines(cases, write(tmp_path / "train.jsonl", [{"findings": "x"}]))
    row = rows_of("m", ["x"] * 6)[0] | {"findings": "肺野清晰。"}  # no word that it knows: nothing to go by
    cases, _ = load([write(tmp_path / "m.jsonl", [row])])
    other = {"id": "case-0", "findings": "心影增大。", "impression": "x"}
    assert len(baselines(cases, write(tmp_path / "train.jsonl", [other]))[0]) == 3
