"""build.py: what `partition` is given is the whole model, parameter by parameter, and what it keeps is what stays."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import random_llama, tiny_config
from torch import Tensor, nn

from radllama.build import partition_of, random_model, stored_in_4bit
from radllama.checkpoint import load_model, save_model

CONFIG = tiny_config(hidden_size=64, intermediate_size=96, head_dim=16)


class Halves:
    """Keeps the first half of each parameter, and the whole for comparison."""

    def __init__(self) -> None:
        self.whole: list[Tensor] = []

    def __call__(self, parameter: nn.Parameter) -> None:
        self.whole.append(parameter.detach().clone())
        parameter.data = parameter.detach().flatten()[: parameter.numel() // 2].clone()


def check(halves: Halves, model: nn.Module, expected: nn.Module) -> None:
    assert len(halves.whole) == len(list(expected.parameters()))
    for (name, kept), whole in zip(model.named_parameters(), expected.parameters(), strict=True):
        assert any(torch.equal(whole, seen) for seen in halves.whole if seen.shape == whole.shape), name
        assert kept.dtype == whole.dtype, name
        assert torch.equal(kept, whole.flatten()[: whole.numel() // 2]), name


@pytest.mark.parametrize("how", ["plain", "cast", "quantise", "checkpoint"])
@pytest.mark.parametrize("tied", [False, True])
def test_loading_in_parts(how: str, tied: bool, tmp_path: Path) -> None:
    config = tiny_config(hidden_size=64, intermediate_size=96, head_dim=16, tie_word_embeddings=tied)
    save_model(random_llama(config), tmp_path / "model")
    if how == "checkpoint":
        save_model(load_model(tmp_path / "model", quantize="nf4", dtype=torch.float32), tmp_path / "model")
    options: dict[str, Any] = {"dtype": torch.bfloat16 if how == "cast" else torch.float32}
    options["quantize"] = "nf4" if how == "quantise" else None
    halves = Halves()
    check(
        halves, load_model(tmp_path / "model", partition=halves, **options), load_model(tmp_path / "model", **options)
    )


def test_random_weights_in_parts() -> None:
    place: dict[str, Any] = {"device": torch.device("cpu"), "dtype": torch.bfloat16}
    halves = Halves()
    check(halves, random_model(CONFIG, 3, partition=halves, **place), random_model(CONFIG, 3, **place))


@pytest.mark.parametrize("settings", [{}, {"zero_optimization": {}}, {"zero_optimization": {"stage": 2}}])
def test_below_stage_3_nothing_is_partitioned(settings: dict[str, Any]) -> None:
    assert partition_of(settings, torch.device("cpu"), torch.float32) is None


@pytest.mark.parametrize("said", [None, {"quant_method": "bitsandbytes", "load_in_4bit": True}])
def test_weights_are_in_4_bits_where_the_tensors_are(tmp_path: Path, said: Any) -> None:
    save_model(random_llama(CONFIG), tmp_path / "model")
    config = json.loads((tmp_path / "model/config.json").read_text())
    (tmp_path / "model/config.json").write_text(json.dumps(config | {"quantization_config": said}))
    assert not stored_in_4bit(tmp_path / "model")
    save_model(load_model(tmp_path / "model", quantize="nf4"), tmp_path / "small")
    assert stored_in_4bit(tmp_path / "small")
