"""similar.py: TF-IDF against a dense computation, what a training report may not find, and the command line."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from radllama import similar
from radllama.data import Prompt, read_examples
from radllama.similar import most_similar, nearest


def report(identity: str, findings: str, impression: str) -> dict[str, Any]:
    return {"id": identity, "findings": findings, "impression": impression}


TRAIN = [
    report("a", "Heart size normal, lungs clear.", "No acute disease."),
    report("b", "Large left effusion with atelectasis.", "Left effusion."),
    report("c", "HEART SIZE NORMAL. Lungs clear!", "Normal chest."),
    report("d", "Heart enlarged, lungs clear.", "Cardiomegaly."),
    report("e", "Small right effusion.", "Right effusion."),
]


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
    found = nearest(train, queries)
    assert found == [int((matrix @ dense(query)).argmax()) for query in queries]
    assert len(set(found)) > 10
    rows = [report(str(i), text, f"answer {i}") for i, text in enumerate(train)]
    asked = [{"id": f"q{i}", "findings": text} for i, text in enumerate(queries)]
    for query, texts in zip(queries, most_similar(rows, asked, 5), strict=True):
        scores = matrix @ dense(query)
        order = [int(text.split()[1]) for text in texts]
        assert len(set(order)) == 5
        assert np.allclose(scores[order], np.sort(scores)[::-1][:5], atol=1e-6)


def test_nearest_breaks_ties_by_order() -> None:
    train = ["Lungs clear", "effusion left", "LUNGS, clear!", "Effusion left."]
    assert nearest(train, ["effusion left", "lungs clear", "something else"]) == [1, 0, 0]
    assert nearest(["...", "肺野清晰"], ["肺野清晰"]) == [0]  # no word that it knows: the first, and no crash


def test_a_new_report_finds_every_copy() -> None:
    asked = {"id": "new", "findings": "Heart size normal and lungs clear."}
    assert next(most_similar(TRAIN, [asked], 3)) == ["No acute disease.", "Normal chest.", "Cardiomegaly."]
    assert len(next(most_similar(TRAIN, [asked], 99))) == 5


def test_a_training_report_finds_neither_itself_nor_its_copies() -> None:
    found = dict(zip("abcde", most_similar(TRAIN, TRAIN, 2), strict=True))
    assert found["a"][0] == found["c"][0] == "Cardiomegaly."
    assert "No acute disease." not in found["a"] + found["c"]
    assert "Normal chest." not in found["a"] + found["c"]
    long = "The cardiac silhouette and the mediastinal contours are within normal limits and the lungs are clear"
    near = [report("x", f"{long} today.", "One."), report("y", f"{long}.", "One."), *TRAIN]
    assert "One." not in next(most_similar(near, near[:1], 6))
    assert next(most_similar(near, [near[0] | {"id": "new"}], 1)) == ["One."]


def test_the_command_writes_rows_that_a_prompt_uses(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train, asked = tmp_path / "train.jsonl", tmp_path / "asked.jsonl"
    train.write_text("".join(json.dumps(row) + "\n" for row in TRAIN))
    asked.write_text(json.dumps({"id": "q", "findings": "Heart enlarged.", "modality": "XR"}) + "\n")
    similar.main([f"--train={train}", f"--input={asked}", f"--output={tmp_path / 'out.jsonl'}", "--count=2"])
    assert "1 reports" in capsys.readouterr().out
    (example,) = read_examples(tmp_path / "out.jsonl", need_impression=False)
    assert example.fields["modality"] == "XR"
    assert example.fields["similar"][0] == "Cardiomegaly."
    assert Prompt("llama3", ("Say.",), 1).question(example) == "Heart enlarged.\nSimilar report: Cardiomegaly."
    assert Prompt("llama3", ("Say.",), 9).question(example).count("Similar report: ") == 2
    assert Prompt("llama3", ("Say.",)).question(example) == "Heart enlarged."


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"count": 0}, "--count: expected at least 1"), ({"train": "none.jsonl"}, "none.jsonl: cannot be read")],
)
def test_errors_name_what_is_wrong(
    changes: dict[str, Any], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "train.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in TRAIN))
    options = {"train": file, "input": file, "output": tmp_path / "out.jsonl"} | changes
    with pytest.raises(SystemExit) as end:
        similar.main([f"--{key}={value}" for key, value in options.items()])
    assert end.value.code == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out.jsonl").exists()
