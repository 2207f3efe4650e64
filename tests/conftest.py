"""Tiny models and a tiny tokenizer that several test files share."""

from __future__ import annotations

import importlib.util
import json
import os
import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from radllama.data import Example
from radllama.model import Llama, LlamaConfig
from radllama.tokenizer import Tokenizer

ROOT = Path(__file__).parents[1]
SENTENCES = (
    "The heart is normal in size.",
    "No pleural effusion or pneumothorax.",
    "A 12 mm nodule lies in the right upper lobe.",
    "Small left pleural effusion, unchanged.",
    "Degenerative changes of the thoracic spine.",
    "The gallbladder holds several stones up to 8 mm.",
    "No intracranial haemorrhage or mass effect.",
    "Patchy opacity at the left base suggests pneumonia.",
)


def load_asset(name: str) -> ModuleType:
    """The script assets/NAME.py as a module, loaded once."""
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, ROOT / "assets" / f"{name}.py")
        assert spec
        assert spec.loader
        sys.modules[name] = importlib.util.module_from_spec(spec)  # scripts and dataclasses look modules up by name
        spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]


def tiny_config(**changes: Any) -> LlamaConfig:
    """A Llama of a few thousand parameters, two query heads to a key head."""
    shape: dict[str, Any] = {
        "vocab_size": 97,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
    }
    return LlamaConfig(**(shape | changes))


def random_llama(config: LlamaConfig, seed: int = 0) -> Llama:
    """Random weights in fp32, large enough that the logits' standard deviation is above 1."""
    model = Llama(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            noise = torch.randn(weight.shape, generator=generator)
            if "norm" in name:
                weight.copy_(1 + 0.3 * noise)
            else:
                weight.copy_(noise if "embed" in name else 1.5 * noise * weight.shape[1] ** -0.5)
    return model


def synthetic_examples(count: int, seed: int = 0) -> list[Example]:
    """Findings of one to five sentences and an impression of one to three; ids r0, r1, ..."""
    draw = random.Random(seed)

    def text(most: int) -> str:
        return " ".join(draw.choice(SENTENCES) for _ in range(draw.randint(1, most)))

    return [Example(id=f"r{number}", findings=text(5), impression=text(3)) for number in range(count)]


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What assets/make_base.py writes: a byte-level BPE of about 450 ids with Llama 3's special tokens."""
    folder = tmp_path_factory.mktemp("base")
    lines = [json.dumps({"findings": e.findings, "impression": e.impression}) for e in synthetic_examples(100)]
    (folder / "texts.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    script = [sys.executable, str(ROOT / "assets" / "make_base.py"), "--vocab-size", "450"]
    subprocess.run(
        [*script, "--texts", str(folder / "texts.jsonl"), "--output", str(folder / "model")], check=True, timeout=120
    )
    return folder / "model"


@pytest.fixture(scope="session")
def tokenizer(tokenizer_folder: Path) -> Tokenizer:
    return Tokenizer.from_dir(tokenizer_folder)


@pytest.fixture(scope="session")
def server() -> Iterator[subprocess.Popen[str]]:
    """run_server.py, which starts runs of several ranks; see jobs.py."""
    environment = os.environ | {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(ROOT / "tests/run_server.py")]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)
    yield process
    assert process.stdin
    process.stdin.close()
    process.wait(30)


@pytest.fixture
def runs(tmp_path: Path, tokenizer_folder: Path, server: subprocess.Popen[str]) -> Any:
    from jobs import Runs

    return Runs(tmp_path, tokenizer_folder, server)
