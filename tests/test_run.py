"""run.py: whose a folder is, what --resume may change, and what metrics.jsonl keeps."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from radllama.config import Config, parse_config
from radllama.run import CONFIG_FILE, DATA_FILE, MetricsLog, TrainingError, claim_run_folder, write_config


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "run"


def config(folder: Path, **training: Any) -> Config:
    training = {"output": str(folder), "steps": 4} | training
    return parse_config({"model": {"path": "m"}, "method": "full", "data": {"train": "t"}, "training": training})


def begin(folder: Path, **training: Any) -> None:
    write_config(config(folder, **training), folder)
    MetricsLog(folder, keep_below=0).write({"step": 1})


def test_a_start_that_failed_before_its_first_step_may_be_corrected(folder: Path) -> None:
    write_config(config(folder, learning_rate=1.0), folder)
    (folder / DATA_FILE).write_text("{}")
    (folder / ".lock").write_text("process 1")
    MetricsLog(folder, keep_below=0)
    for resume in (False, True):
        claim_run_folder(config(folder, learning_rate=2.0), resume)
    write_config(config(folder, learning_rate=2.0), folder)
    assert json.loads((folder / CONFIG_FILE).read_text())["training"]["learning_rate"] == 2.0
    assert not (folder / DATA_FILE).exists()  # of other data, perhaps


def test_what_a_write_that_was_cut_off_has_left_is_no_run(folder: Path) -> None:
    folder.mkdir()
    (folder / f".{CONFIG_FILE}.17.tmp").write_text('{"trai')
    claim_run_folder(config(folder), resume=False)
    with pytest.raises(ValueError, match=r"--resume: .* holds no run; start without"):
        claim_run_folder(config(folder), resume=True)


@pytest.mark.parametrize("left", ["step", "checkpoint"])
def test_a_run_that_has_begun_keeps_its_folder_and_fingerprints(folder: Path, left: str) -> None:
    write_config(config(folder), folder)
    (folder / DATA_FILE).write_text("{}")
    if left == "step":
        MetricsLog(folder, keep_below=0).write({"step": 1})
    else:
        (folder / "checkpoints").mkdir()
    with pytest.raises(ValueError, match=r"another config \(training\.learning_rate\); choose another"):
        claim_run_folder(config(folder, learning_rate=1.0), resume=False)
    with pytest.raises(ValueError, match=r"\(training\.learning_rate\); set back what differs, or choose another"):
        claim_run_folder(config(folder, learning_rate=1.0), resume=True)
    with pytest.raises(ValueError, match="continue it with --resume"):
        claim_run_folder(config(folder), resume=False)
    claim_run_folder(config(folder), resume=True)
    write_config(config(folder), folder)
    assert (folder / DATA_FILE).exists()


@pytest.mark.parametrize("text", ['{"model_type": "llama"}', "{}"])
def test_a_models_folder_is_no_run_folder(folder: Path, text: str) -> None:
    folder.mkdir()
    (folder / CONFIG_FILE).write_text(text)
    for resume in (False, True):
        with pytest.raises(ValueError, match="is not a run folder"):
            claim_run_folder(config(folder), resume)


def test_a_broken_config_is_named(folder: Path) -> None:
    begin(folder)
    (folder / CONFIG_FILE).write_text('{"model"')
    with pytest.raises(ValueError, match=rf"{folder / CONFIG_FILE}: not valid JSON"):
        claim_run_folder(config(folder), resume=True)


def test_what_resume_may_change(folder: Path) -> None:
    begin(folder)
    moved = folder.rename(folder.with_name("moved"))
    changed = {"on_bad_loss": "skip", "loss_spike": 3.0, "save_every": 7, "validate_every": 5, "keep_checkpoints": 1}
    claim_run_folder(config(moved, gradient_checkpointing="on", **changed), resume=True)
    for key, value in {"steps": 5, "seed": 1, "batch_size": 2, "dtype": "float32", "optimizer": "adamw_8bit"}.items():
        with pytest.raises(ValueError, match=rf"another config \(training\.{key}\)"):
            claim_run_folder(config(moved, **{key: value}), resume=True)


@pytest.mark.parametrize("validated", [True, False])
def test_metrics_keep_the_steps_that_were_done(folder: Path, validated: bool) -> None:
    folder.mkdir()
    records = [{"step": step, key: 1.0} for step in (1, 2, 3) for key in ("loss", "validation_loss")]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records) + '{"step": 4, "lo')
    MetricsLog(folder, keep_below=2, validated=validated).write({"step": 2, "validation_loss": 2.0})
    found = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert found == [*records[: 4 if validated else 3], {"step": 2, "validation_loss": 2.0}]


def test_a_full_disk_is_named(folder: Path) -> None:
    folder.mkdir()
    log = MetricsLog(folder, keep_below=0)
    log._file = Path("/dev/full").open("w")  # noqa: SIM115
    with pytest.raises(TrainingError, match=rf"{log.path} cannot be written \(.*No space left.*--resume"):
        log.write({"step": 1})
