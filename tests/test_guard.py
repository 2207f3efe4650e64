"""guard.py: which losses are bad, what a held step leaves alone, what is written down."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from radllama.config import Training
from radllama.guard import BAD_STEPS_FILE, MOST_SKIPPED, Guard
from radllama.run import TrainingError


def make(**training: Any) -> tuple[Guard, nn.Linear, torch.optim.AdamW]:
    layer = nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(layer.parameters())
    settings = Training(output="o", steps=1, **training)
    return Guard(settings, optimizer, gradients_of=list(layer.parameters())), layer, optimizer


def step(layer: nn.Linear, optimizer: torch.optim.AdamW, factor: float = 1.0) -> None:
    (layer(torch.ones(3)).sum() * factor).backward()
    optimizer.step()
    optimizer.zero_grad()


def test_a_held_step_leaves_weights_and_moments_bit_for_bit() -> None:
    guard, layer, optimizer = make()
    assert guard.judge(1.0) is None
    step(layer, optimizer)
    before = [t.clone() for p in layer.parameters() for t in (p, *optimizer.state[p].values())]
    assert guard.judge(math.nan) == "the loss is nan"
    step(layer, optimizer)
    assert guard.judge(1.0) is None
    step(layer, optimizer, math.inf)  # a good loss, but a bad gradient
    assert guard.judge_gradient(None, scaled=False) == "the gradient is not finite"
    after = [t for p in layer.parameters() for t in (p, *optimizer.state[p].values())]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert guard.judge(1.0) is None
    step(layer, optimizer)
    assert guard.judge_gradient(None, scaled=False) is None
    assert not torch.equal(before[0], layer.weight)


def test_spikes_are_measured_by_the_usual_loss_and_do_not_become_usual() -> None:
    guard, _, _ = make(loss_spike=3.0)
    assert guard.judge(100.0) is None  # nothing is usual yet
    assert all(guard.judge(2.0) is None for _ in range(20))
    for _ in range(40):
        assert guard.judge(6.1) == "the loss is 6.1000, 3.0 times the usual"
    assert guard.judge(5.9) is None
    other, _, _ = make(loss_spike=3.0)
    other.load(json.loads(json.dumps(guard.state())))
    assert other.judge(6.1)
    assert other.state() == guard.state()


def test_offenders_go_to_a_file_and_the_policy_decides(tmp_path: Path) -> None:
    guard, _, _ = make(on_bad_loss="skip")
    told = guard.report(tmp_path, 7, "the loss is nan", math.nan, [("a", 1.0), ("b", math.nan), ("c", 2.0)])
    assert told.endswith("reports: b (bad_steps.jsonl); skipped")
    for number in range(MOST_SKIPPED - 2):
        guard.report(tmp_path, 8 + number, "the loss is nan", math.nan, [("a", math.inf)])
    with pytest.raises(TrainingError, match="the 10th bad step in a row"):
        guard.report(tmp_path, 20, "the loss is nan", math.nan, [("a", math.inf)])
    lines = [json.loads(line) for line in (tmp_path / BAD_STEPS_FILE).read_text().splitlines()]
    assert lines[0] == {"step": 7, "fault": "the loss is nan", "loss": None, "action": "skipped", "ids": ["b"]}
    assert lines[-1]["action"] == "stopped"
    guard, _, _ = make()
    with pytest.raises(TrainingError, match="step 3: the loss is nan; reports: a "):
        guard.report(None, 3, "the loss is nan", math.nan, [("a", math.nan)])
