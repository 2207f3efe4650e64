"""The house rules: which module imports which, the frozen signatures, and configs that really parse."""

from __future__ import annotations

import ast
import inspect
import json
from pathlib import Path

import pytest

from radllama import checkpoint, eval, generate, lora, model, reports, tokenizer, train
from radllama.config import read_config

ROOT = Path(__file__).parent.parent
# Which modules of ours each module may import.
MAY_IMPORT: dict[str, set[str]] = {
    "__init__": set(),
    "tokenizer": set(),
    "data": {"files", "tokenizer"},
    "loss": {"fused"},
    "fused": set(),
    "model": {"fused", "loss"},
    "attention": {"model"},
    "meta": {"checkpoint", "files", "model"},
    "quant": {"fused"},
    "lora": {"files", "fused", "quant"},
    "checkpoint": {"files", "model", "quant", "lora"},
    "config": {"files"},
    "run": {"config", "files"},
    "card": {"config", "files", "run"},
    "planted": {"files"},
    "canaries": {"card", "checkpoint", "data", "files", "generate", "lora", "model", "planted", "tokenizer"},
    "cache": {"data", "files", "tokenizer"},
    "build": {"checkpoint", "config", "lora", "model"},
    "watch": {"run"},
    "reshard": {"config"},
    "resume": {"config", "files", "reshard", "run"},
    "heap": set(),
    "guard": {"config", "data", "files", "run"},
    "train": {
        *{"attention", "build", "cache", "card", "checkpoint", "config", "data", "files", "fused", "guard", "heap"},
        *{"lora", "model", "quant", "resume", "run", "tokenizer", "watch"},
    },
    # A dry run of the real modules and the job's own packs: no second account of either that could go stale.
    "dry_run": {"config", "lora", "model", "quant"},
    "zero": {"config", "dry_run"},
    "plan": {"cache", "config", "data", "dry_run", "fused", "model", "tokenizer", "zero"},
    "draft": set(),
    "screen": {"fused"},
    "decode": {"draft", "fused", "model", "quant", "screen"},
    "parts": {"files"},
    "generate": {"decode", "files", "parts", "similar", "tokenizer", "data", "model", "quant", "lora", "checkpoint"},
    "files": set(),
    "sections": set(),
    "deid_words": set(),
    "deid_rules": {"deid_words"},
    "deid": {"deid_rules", "deid_words"},
    "lexicon": set(),
    "clinical": {"lexicon"},
    "faithful": {"clinical", "lexicon"},
    "intake": set(),
    "duplicates": set(),
    "held_out": {"duplicates"},
    "pairs": {"deid", "faithful", "intake", "sections"},
    "datacard": {"duplicates", "held_out", "pairs"},
    "store": {"duplicates", "pairs"},
    "reports": {
        *{"store", "clinical", "datacard", "deid", "duplicates", "held_out", "intake", "pairs", "planted", "sections"}
    },
    "client": {"files"},
    "rubric": {"client"},
    "judge": {"deid", "client", "files", "rubric"},
    "agreement": {"files", "rubric"},
    "scorecard": set(),
    "metrics": set(),
    "stats": set(),
    "cases": {"files", "metrics", "stats"},
    "similar": {"files"},
    "baselines": {"cases", "files", "metrics", "similar"},
    "eval": {
        "baselines",
        "cases",
        "client",
        "clinical",
        "faithful",
        "files",
        "judge",
        "metrics",
        "rubric",
        "scorecard",
        "similar",
        "stats",
    },
}
FORBIDDEN = {"transformers", "peft", "trl", "tiktoken"}


def imports(file: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {f"{node.module}.{alias.name}" for alias in node.names} | {node.module or ""}
    return found


@pytest.mark.parametrize("file", sorted((ROOT / "radllama").glob("*.py")), ids=lambda file: file.stem)
def test_imports_stay_within_the_table(file: Path) -> None:
    names = imports(file)
    ours = {name.split(".")[1] for name in names if name.startswith("radllama.")}
    assert ours <= MAY_IMPORT[file.stem] | {file.stem}
    assert not {name.split(".")[0] for name in names} & FORBIDDEN


def test_every_module_stands_in_the_table() -> None:
    assert {file.stem for file in (ROOT / "radllama").glob("*.py")} == set(MAY_IMPORT)


def test_model_stays_short() -> None:
    assert len((ROOT / "radllama/model.py").read_text(encoding="utf-8").splitlines()) <= 350


SIGNATURES = [
    (checkpoint.load_model, ["path"], {"quantize": None, "device": "cpu"}),
    (checkpoint.save_model, ["model", "path"], {"max_shard_bytes": 5 * 2**30}),
    (lora.add_lora, ["model"], {"dropout": 0.0, "targets": lora.ALL_LINEAR, "rslora": False}),
    (lora.merge_lora, ["model"], {}),
    (lora.save_adapter, ["model", "path"], {}),
    (lora.load_adapter, ["model", "path"], {}),
    (tokenizer.Tokenizer.from_dir, ["path"], {}),
    (tokenizer.Tokenizer.render, ["self", "messages"], {"add_generation_prompt": False}),
    (generate.generate, ["model", "prompts"], {"temperature": 0.0, "top_k": None, "top_p": None, "seed": 0}),
    (eval.rouge, ["references", "predictions"], {}),
    (eval.evaluate, ["paths"], {}),
    (train.train, ["config"], {}),
    (reports.parse_report, ["text"], {}),
    (model.LlamaConfig.from_json, ["path"], {}),
]


@pytest.mark.parametrize(
    ("function", "positional", "defaults"), SIGNATURES, ids=lambda value: getattr(value, "__name__", "")
)
def test_signatures_only_grow(function: object, positional: list[str], defaults: dict[str, object]) -> None:
    parameters = inspect.signature(function).parameters  # type: ignore[arg-type]
    assert [p.name for p in parameters.values() if p.kind is p.POSITIONAL_OR_KEYWORD] == positional
    for name, value in defaults.items():
        assert parameters[name].kind is inspect.Parameter.KEYWORD_ONLY
        assert parameters[name].default == value


@pytest.mark.parametrize(
    "file", [*sorted((ROOT / "configs").glob("*.json")), ROOT / "qlora.json"], ids=lambda file: file.stem
)
def test_every_config_parses_and_says_what_it_needs(file: Path) -> None:
    assert read_config(file).comment
    assert json.loads(file.read_text(encoding="utf-8"))["comment"]
