"""The GPU benchmark's stages with tiny shapes on a CPU, where equal work must give equal numbers."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from radllama import model as model_module
from radllama.model import MLP, RMSNorm

BENCH = Path(__file__).parent.parent / "bench"


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(BENCH))
    return importlib.import_module("gpu")


def test_the_stages_without_peers(gpu: Any, tmp_path: Path) -> None:
    checks = gpu.run_stage("correct", tmp_path, smoke=True)
    assert {row["check"] for row in checks} == {"attention", "codes", "training", "decoding"}
    assert all(row["right"] for row in checks)
    assert [row["form"] for row in gpu.run_stage("attention", tmp_path, smoke=True)] == [
        *("varlen", "a call a segment", "one mask")
    ]
    for row in gpu.run_stage("train-8b", tmp_path, smoke=True):
        assert row["tokens_per_second"] == pytest.approx(row["computed_tokens"] / row["seconds"])
        assert 0.8 * row["tokens"] < row["computed_tokens"] < row["tokens"]
    assert "aten::mm" in (tmp_path / "train-8b" / "profile-plain.txt").read_text(encoding="utf-8")
    text = gpu.table(tmp_path)
    assert "train-70b: nothing measured" in text
    assert "computed_tokens" in text
    best = max(row["reports_per_second"] for row in json.loads((tmp_path / "train-8b" / "results.json").read_text()))
    assert f"train-8b: an epoch over 4,350,000 reports {4_350_000 / 8 / best / 3600:.1f} h" in text


def test_a_failure_is_recorded_and_ends_nothing(gpu: Any, tmp_path: Path) -> None:
    bench = gpu.Bench(torch.device("cpu"), torch.float32, False, tmp_path, float("inf"), [])
    for message in ("out of memory", "and again"):
        with bench.attempt(case=message):
            raise RuntimeError(message)
    assert [row["error"] for row in bench.results] == ["RuntimeError: out of memory", "RuntimeError: and again"]
    assert (tmp_path / "results.json").exists()
    late = gpu.Bench(torch.device("cpu"), torch.float32, False, tmp_path, 0.0, [])
    with late.attempt(case="late"):
        late.time(lambda: pytest.fail("no time was left"))
    assert late.results[0]["error"].startswith("TimeoutError")


def test_ratios_take_each_sides_best(gpu: Any) -> None:
    rows = [
        {"side": "ours", "reports_per_second": 6.0},
        {"side": "ours", "error": "out of memory"},
        {"side": "common", "reports_per_second": 1.5},
        {"side": "common", "reports_per_second": 2.0},
    ]
    assert gpu.ratios(rows) == ["  common: 3.00"]


def test_carried_packages_are_small_and_import(gpu: Any, tmp_path: Path) -> None:
    gpu.carry(tmp_path, "130")
    libraries = [file.name for file in tmp_path.rglob("*.so")]
    assert libraries == ["libbitsandbytes_cuda130.so"]
    assert sum(file.stat().st_size for file in tmp_path.rglob("*") if file.is_file()) < 32 * 2**20
    for package in ("bitsandbytes", "peft"):
        assert (tmp_path / package / "__init__.py").exists()
        assert list(tmp_path.glob(f"{package}-*.dist-info/METADATA"))


@pytest.mark.slow
def test_every_stage_from_the_command_line(gpu: Any, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(BENCH / "gpu.py"), "--smoke", "--out", str(tmp_path)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "nothing measured" not in done.stdout
    peers = gpu.json.loads((tmp_path / "peers-8b" / "results.json").read_text(encoding="utf-8"))
    compared = [row for row in peers if "loss" in row]
    assert [row["side"] for row in compared] == ["common", "tuned"]
    for row in compared:
        assert row["loss"] == pytest.approx(row["loss_of_ours"], rel=1e-5)
        assert row["gradient_cosine"] > 0.99999
    written = gpu.json.loads((tmp_path / "generate" / "results.json").read_text(encoding="utf-8"))[-1]
    assert written["equal_reports"] == written["reports"]


@pytest.mark.slow
def test_compiled_pieces_give_the_same_numbers(gpu: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    work = importlib.import_module("gpu_work")
    for owner, name in ((RMSNorm, "forward"), (MLP, "forward"), (model_module, "rotate")):
        monkeypatch.setattr(owner, name, getattr(owner, name))  # put back at the end
    bench = gpu.Bench(torch.device("cpu"), torch.float32, True, tmp_path, float("inf"), [])
    model = work.ours(bench, work.TINY, 4)
    rows = work.reports(bench, 300, work.TINY.vocab_size)
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}

    def run() -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        model.zero_grad()
        loss = gpu.step_of(model, rows, work.Still(list(trained.values())), bench.device)()
        return loss, {name: parameter.grad for name, parameter in trained.items()}

    expected, found = run(), (work.compile_elementwise(), run())[1]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)
