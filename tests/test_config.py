"""config.py: every problem at once, each with its path; overrides; what DeepSpeed's section may not say."""

from __future__ import annotations

import json
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest

from radllama.config import parse_config, read_config

GOOD: dict[str, Any] = {
    "model": {"path": "m"},
    "method": "qlora",
    "data": {"train": "t.jsonl"},
    "training": {"output": "o", "steps": 3},
}


def changed(**sections: Any) -> dict[str, Any]:
    raw = deepcopy(GOOD)
    for key, value in sections.items():
        raw[key] = raw.get(key, {}) | value if isinstance(value, dict) else value
    return raw


def test_all_problems_are_named_at_once() -> None:
    raw = changed(method="qlor", modle=1, training={"batch_size": "8", "learning_rate": -1}, data={"trian": "x"})
    with pytest.raises(ValueError, match="5 problem") as caught:
        parse_config(raw, source="my.json")
    text = str(caught.value)
    for part in (
        "my.json",
        "method:",
        "'qlora'",
        "modle: unknown key",
        "training.batch_size",
        "'8'",
        "training.learning_rate",
    ):
        assert part in text
    assert "data.trian: unknown key; expected one of train, validation" in text


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"training": {"epochs": 1}}, "either epochs or steps"),
        ({"training": {"learning_rate": 1e-4, "min_learning_rate": 1e-3}}, "min_learning_rate"),
        ({"method": "full", "lora": {"rank": 4}}, "lora: is not used by method full"),
        ({"method": "lora", "quantization": {}}, "quantization: is not used by method lora"),
        ({"model": {"from_scratch": True}}, "needs method full"),
        ({"lora": {"targets": ["w1"]}}, "lora.targets.0"),
        ({"data": {"weights": {"modality": {"CT": 0}}}}, "data.weights.modality.CT: .*greater than 0"),
        ({"data": {"weights": {"organ": {"lung": 2.0}}}}, "data.weights.organ.*'modality' or 'body_part'"),
        ({"deepspeed": {"optimizer": {}}}, "deepspeed.optimizer"),
        ({"deepspeed": {"gradient_clipping": 3}}, "training.gradient_clipping"),
        ({"deepspeed": {"gradient_accumulation_steps": 2}}, "training.accumulation"),
        ({"deepspeed": {"bf16": {"enabled": True}}}, "training.dtype"),
        (
            {"quantization": {"keep_dequantized": True}, "deepspeed": {"zero_optimization": {"stage": 3}}},
            "quantization.keep_dequantized",
        ),
    ],
)
def test_contradictions(sections: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_config(changed(**sections))


@pytest.mark.parametrize("method", ["qlora", "lora", "full"])
def test_the_resolved_copy_is_a_config_again(method: str) -> None:
    config = parse_config(changed(method=method))
    assert parse_config(config.resolved()) == config


def test_weights() -> None:
    assert parse_config(GOOD).data.weights is None
    config = parse_config(changed(data={"weights": {"modality": {"CT": 2, "CR": 0.5}, "body_part": {"chest": 1.5}}}))
    assert config.data.weights == {"modality": {"CT": 2.0, "CR": 0.5}, "body_part": {"chest": 1.5}}
    assert parse_config(config.resolved()) == config


def test_agreeing_deepspeed_keys_pass() -> None:
    section = {"gradient_accumulation_steps": 1, "bf16": {"enabled": True}, "zero_optimization": {"stage": 3}}
    parse_config(changed(training={"dtype": "bfloat16"}, deepspeed=section))


def test_overrides(tmp_path: Path) -> None:
    file = tmp_path / "c.json"
    file.write_text(json.dumps(GOOD))
    config = read_config(file, ["training.learning_rate=1e-5", "model.path=a/b", "deepspeed.zero_optimization.stage=2"])
    assert config.training.learning_rate == 1e-5
    assert config.model.path == "a/b"
    assert config.deepspeed == {"zero_optimization": {"stage": 2}}
    for bad in ("training.learning_rate", "=1", "method.x=1"):
        with pytest.raises(ValueError, match="--set"):
            read_config(file, [bad])


@pytest.mark.parametrize("text", ["{", "[1]", "\xff"])
def test_broken_files_are_named(tmp_path: Path, text: str) -> None:
    file = tmp_path / "c.json"
    file.write_text(text, encoding="latin-1")
    with pytest.raises(ValueError, match=r"c\.json"):
        read_config(file)
    with pytest.raises(ValueError, match="no such config"):
        read_config(tmp_path / "none.json")
