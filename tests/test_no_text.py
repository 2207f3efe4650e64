"""No report text in logs, metrics, messages or any file whose purpose is not text, whatever is run on the reports.

Every findings and impression here carries a marker, also in rows that are malformed. All that the commands print, log
and write is searched for it, but for the files in PURPOSE, which docs/security.md lists.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import random_llama, tiny_config

from radllama import eval as evaluation
from radllama import generate, reports, train
from radllama.checkpoint import save_model
from radllama.tokenizer import Tokenizer

MARKER = "zqxw"
# Files whose purpose is the reports' text.
PURPOSE = {"train.jsonl", "validation.jsonl", "test.jsonl", "quarantine.jsonl", "predictions.jsonl", "raw.jsonl"}
PURPOSE |= {"bad.jsonl", "bad-predictions.jsonl", "scorecard.html", "raw.csv"}
PURPOSE_FOLDERS = {".radllama-cache", ".work"}
Check = Callable[[], str]


def leaks(folder: Path) -> list[str]:
    """The files under a folder, and the names of files, that hold the marker and should not."""
    found = []
    for file in folder.rglob("*"):
        if MARKER in file.name.lower():
            found.append(f"the name of {file}")
        if file.is_file() and file.name not in PURPOSE and not PURPOSE_FOLDERS & set(file.parts):
            content = file.read_bytes().lower()
            if MARKER.encode() in content or MARKER.encode("utf-16-le") in content:
                found.append(str(file))
    return found


@pytest.fixture
def quiet(tmp_path: Path, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture) -> Iterator[Check]:
    """Call it after a command: nothing printed, logged or written so far has the marker. Returns what was printed."""
    caplog.set_level("INFO")

    def check() -> str:
        printed = capfd.readouterr()
        for name, text in (("stdout", printed.out), ("stderr", printed.err), ("log", caplog.text)):
            place = text.lower().find(MARKER)
            assert place < 0, f"{name}: ...{text[max(0, place - 300) : place + 100]}"
        assert not leaks(tmp_path)
        return printed.out + printed.err + caplog.text

    yield check
    check()


def rows(count: int, **more: Any) -> list[dict[str, Any]]:
    return [
        {"id": f"r{n}", "patient_id": f"p{n}", "modality": "CT"}
        | {"findings": f"{MARKER.upper()}A{n} the heart is normal in size {n}. There is no {MARKER} effusion.",
           "impression": f"No {MARKER}B{n} acute abnormality."} | more
        for n in range(count)
    ]  # fmt: skip


def write(path: Path, lines: list[dict[str, Any] | str]) -> None:
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))


# Every way in which a line of pairs or predictions is refused, with text near the fault.
TEXT = f"{MARKER} in the text"
MALFORMED: list[dict[str, Any] | str] = [
    f'{{"id": "a", "findings": "{TEXT}',
    f'{{"id": "b", "findings": "{TEXT}"}} {TEXT}',
    f"{TEXT}",
    f'["{TEXT}"]',
    json.dumps(TEXT),
    {"id": "c", "findings": [TEXT], "impression": {"a": TEXT}},
    {"id": "d", "findings": TEXT, "impression": ""},
    {"id": "d", "findings": TEXT},
    {"findings": TEXT, "impression": TEXT},
    {"id": {"x": TEXT}, "findings": TEXT, "impression": TEXT},
    {"id": "e", "findings": TEXT + "\ud800", "impression": TEXT},
    f'{{"id": "f", "findings": "{TEXT}", "impression": "{TEXT}", "more": NaN}}',
    f'{{"id": "g", "findings": "{TEXT}", "impression": "{TEXT}", "more": {"[" * 9999}}}',
    f'{{"id": "h", "findings": "{TEXT}", "impression": "{TEXT}", "more": {"9" * 5000}}}',
    f'{{"id": "i", "findings": "{TEXT}\t"}}',
    f'{{"id": "j", "findings": "{TEXT}\\x"}}',
    f'{{{MARKER}: "{TEXT}"}}',
]


@pytest.fixture
def job(tmp_path: Path, tokenizer_folder: Path) -> Path:
    """A tiny model, pairs and a config."""
    tokenizer = Tokenizer.from_dir(tokenizer_folder)
    save_model(random_llama(tiny_config(vocab_size=tokenizer.vocab_size)), tmp_path / "base")
    tokenizer.save(tmp_path / "base")
    pairs = rows(24)
    write(tmp_path / "train.jsonl", [*pairs[:16]])
    write(tmp_path / "validation.jsonl", [*pairs[16:]])
    write(tmp_path / "bad.jsonl", [*pairs[:2], *MALFORMED])
    config = {
        "model": {"path": str(tmp_path / "base")},
        "method": "qlora",
        "lora": {"rank": 4, "alpha": 8},
        "data": {"train": str(tmp_path / "train.jsonl"), "validation": str(tmp_path / "validation.jsonl"),
                 "max_length": 120, "instructions": ["Conclude."]},
        "training": {"output": str(tmp_path / "run"), "steps": 3, "save_every": 2, "dtype": "float32"},
    }  # fmt: skip
    (tmp_path / "job.json").write_text(json.dumps(config))
    return tmp_path / "job.json"


def test_training(job: Path, quiet: Check, tmp_path: Path) -> None:
    run = ["--config", str(job)]
    train.main(run)
    quiet()
    assert (tmp_path / "run/last/adapter_model.safetensors").exists()
    assert (tmp_path / "run/loss.png").exists()
    train.main([*run, "--resume", "--set", "training.steps=3"])
    quiet()


def test_a_nan_stop_names_ids_alone(job: Path, quiet: Check, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    forward = train.Run.forward
    monkeypatch.setattr(train.Run, "forward", lambda run, batch: forward(run, batch) * float("nan"))
    with pytest.raises(SystemExit) as caught:
        train.main(["--config", str(job), "--set", f"training.output={tmp_path}/nan"])
    assert MARKER not in str(caught.value)
    assert "reports" in str(caught.value)
    assert re.search(r": r\d, ", str(caught.value))
    quiet()


@pytest.mark.parametrize("split", ["train", "validation"])
def test_bad_lines_in_training(job: Path, quiet: Check, tmp_path: Path, split: str) -> None:
    with pytest.raises(SystemExit):
        train.main(["--config", str(job), "--set", f"data.{split}={tmp_path}/bad.jsonl"])
    told = quiet()
    for number in range(3, 3 + len(MALFORMED)):
        assert f"line {number}:" in told


def test_a_pairs_file_taken_for_a_config(job: Path, quiet: Check, tmp_path: Path) -> None:
    write(tmp_path / "bad.jsonl", [rows(1)[0]])
    for file in ("bad.jsonl", "train.jsonl"):
        with pytest.raises(SystemExit):
            train.main(["--config", str(tmp_path / file)])
        assert file in quiet()


def test_generation(job: Path, quiet: Check, tmp_path: Path) -> None:
    run = ["--model", str(tmp_path / "base"), "--output", str(tmp_path / "predictions.jsonl"), "--max-new-tokens", "3"]
    generate.main([*run, "--input", str(tmp_path / "validation.jsonl")])
    assert MARKER in (tmp_path / "predictions.jsonl").read_text().lower()
    quiet()
    with pytest.raises(SystemExit):
        generate.main([*run, "--input", str(tmp_path / "bad.jsonl")])
    assert "line 3:" in quiet()


def test_evaluation(quiet: Check, tmp_path: Path) -> None:
    good: list[dict[str, Any]] = [
        {"id": row["id"], "findings": row["findings"], "reference": row["impression"], "model": "tuned",
         "prediction": f"{MARKER}C effusion", "stop_reason": "stop"}
        for row in rows(6)
    ]  # fmt: skip
    write(tmp_path / "predictions.jsonl", [*good])
    write(tmp_path / "train.jsonl", [row | {"id": f"t{row['id']}", "patient_id": "q"} for row in rows(6)])
    run = [str(tmp_path / "predictions.jsonl"), "--out", str(tmp_path / "scores")]
    assert evaluation.main([*run, "--train", str(tmp_path / "train.jsonl")]) in (0, None), quiet()
    quiet()
    assert MARKER in (tmp_path / "scores/scorecard.html").read_text().lower()
    assert (tmp_path / "scores/per_case.jsonl").exists()
    bad = [line if isinstance(line, str) else {"reference": line.get("impression", ""), **line} for line in MALFORMED]
    write(tmp_path / "bad-predictions.jsonl", [*good, *bad])
    assert MARKER in (tmp_path / "bad-predictions.jsonl").read_text()
    ended: Any = None
    try:
        ended = evaluation.main([str(tmp_path / "bad-predictions.jsonl"), "--out", str(tmp_path / "none")])
    except SystemExit as caught:
        ended = caught.code
    assert ended not in (0, None)
    assert "line 7:" in quiet()


def test_raw_reports(quiet: Check, tmp_path: Path) -> None:
    good = rows(60)
    write(tmp_path / "raw.jsonl", [*good, *MALFORMED, *good[:3]])
    run = [str(tmp_path / "raw.jsonl"), "--deid", "off", "--near", "off"]
    assert reports.main([*run, "--out", str(tmp_path / "data"), "--max-bad", "1"]) == 0
    assert MARKER in (tmp_path / "data/train.jsonl").read_text().lower()
    assert (tmp_path / "data/DATASET.md").exists()
    quiet()
    assert reports.main([str(tmp_path / "raw.jsonl"), "--out", str(tmp_path / "stopped"), "--max-bad", "0.01"]) == 2
    assert "cannot be read" in quiet()
    (tmp_path / "raw.csv").write_text(f'id,text\n1,"{TEXT}\n2,{TEXT},{TEXT}\n')
    assert reports.main([str(tmp_path / "raw.csv"), "--out", str(tmp_path / "csv"), "--findings", "nowhere"]) == 2
    quiet()


def test_the_search_finds_what_it_should(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text(f'{{"text": "{MARKER.upper()}"}}')
    (tmp_path / "train.jsonl").write_text(MARKER)
    assert leaks(tmp_path) == [str(tmp_path / "metrics.jsonl")]
