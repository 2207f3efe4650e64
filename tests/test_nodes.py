"""Two nodes, each with its own launcher, train as two ranks of one node do (docs/cluster.md)."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT

from radllama.train import free_port

TRAIN = str(ROOT / "radllama/train.py")


def losses(run: Path) -> list[dict[str, Any]]:
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [
        {key: line[key] for key in ("step", "loss", "validation_loss", "gradient_norm") if key in line}
        for line in lines
    ]


@pytest.mark.system  # for its minute, not for a package
def test_two_nodes_train_as_one(tmp_path: Path) -> None:
    lines = (ROOT / "assets/reports/validation.jsonl").read_text().splitlines()
    (tmp_path / "train.jsonl").write_text("\n".join(lines[:40]) + "\n")
    (tmp_path / "validation.jsonl").write_text("\n".join(lines[40:48]) + "\n")
    config = {
        "model": {"path": str(ROOT / "assets/tiny-llama3")},
        "method": "qlora",
        "lora": {"rank": 4, "alpha": 8},
        "data": {"train": str(tmp_path / "train.jsonl"), "validation": str(tmp_path / "validation.jsonl")},
        "training": {"output": "", "steps": 3, "dtype": "float32"},
    }
    (tmp_path / "job.json").write_text(json.dumps(config))
    (tmp_path / "hosts").write_text("node-a slots=1\nnode-b slots=1\n")
    launcher, port = str(Path(sys.executable).with_name("deepspeed")), str(free_port())
    ranks = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")  # left by runs in this process
    environment = {key: value for key, value in os.environ.items() if key not in ranks} | {"DS_ACCELERATOR": "cpu"}

    def job(output: str) -> list[str]:
        return [TRAIN, "--config", str(tmp_path / "job.json"), "--set", f"training.output={tmp_path / output}"]

    nodes = []
    for node in ("0", "1"):
        command = [launcher, "--hostfile", str(tmp_path / "hosts"), "--no_ssh", "--node_rank", node]
        command += ["--master_addr", "127.0.0.1", "--master_port", port, *job("nodes")]
        with (tmp_path / f"node-{node}.log").open("w") as log:
            nodes.append(subprocess.Popen(command, env=environment, stdout=log, stderr=log, cwd=tmp_path))
    try:
        ended = [node.wait(timeout=300) for node in nodes]
    finally:
        for node in nodes:
            node.kill()
    assert ended == [0, 0], "".join((tmp_path / f"node-{node}.log").read_text()[-2000:] for node in (0, 1))
    one = [launcher, "--num_gpus", "2", "--master_port", str(free_port()), *job("one")]
    done = subprocess.run(one, env=environment, capture_output=True, text=True, timeout=300, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    assert losses(tmp_path / "nodes") == losses(tmp_path / "one")
    assert len(losses(tmp_path / "one")) == 4
    weights = [(tmp_path / run / "last/adapter_model.safetensors").read_bytes() for run in ("nodes", "one")]
    assert weights[0] == weights[1]
