"""Canaries: planted in train alone, found again in a model that learnt them by heart, in no other."""

from __future__ import annotations

import json
import math
from collections import Counter
from itertools import islice
from pathlib import Path

import pytest
import torch
from conftest import random_llama, synthetic_examples, tiny_config
from torch.nn import functional as F

from radllama import canaries as module
from radllama.canaries import exposure, impression_losses, main, measure
from radllama.card import set_section, write_card
from radllama.checkpoint import save_model
from radllama.config import parse_config
from radllama.data import Example, Prompt, read_examples
from radllama.planted import CANARIES_FILE, canaries, candidates
from radllama.reports import main as reports
from radllama.tokenizer import Tokenizer
from radllama.train import train

PROMPT = Prompt("llama3", ("Derive the impression.",))


def test_canaries_are_different_uniform_and_repeatable() -> None:
    planted = canaries(300, "x")
    assert planted == canaries(300, "x")
    assert planted != canaries(300, "y")
    for key in ("id", "findings", "impression"):
        assert len({row[key] for row in planted}) == 300
    drawn = list(islice(candidates("x"), 3200))
    shapes = Counter(text.split()[0] for text in drawn)
    assert len(shapes) == 16
    assert max(abs(count - 200) for count in shapes.values()) < 80  # 5.8 standard deviations
    assert all("{" not in text and text.endswith(" weeks.") for text in drawn)


def raw(folder: Path, count: int = 200) -> Path:
    file = folder / "raw.jsonl"
    lines = [
        {
            "id": f"r{n}",
            "findings": f"The heart is of size {n}. No effusion number {n} is seen.",
            "impression": f"Normal {n}.",
        }
        for n in range(count)
    ]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return file


def test_canaries_go_into_train_alone(tmp_path: Path) -> None:
    arguments = [str(raw(tmp_path)), "--out", str(tmp_path / "data"), "--shares", "60/20/20", "--near", "off"]
    assert reports(arguments) == 0
    without = {name: (tmp_path / f"data/{name}.jsonl").read_bytes() for name in ("train", "validation", "test")}
    assert reports([*arguments, "--plant-canaries", "7"]) == 0
    planted = read_examples(tmp_path / "data" / CANARIES_FILE)
    assert len(planted) == 7
    for name in ("validation", "test"):
        assert (tmp_path / f"data/{name}.jsonl").read_bytes() == without[name]
    content = (tmp_path / "data/train.jsonl").read_bytes()
    assert content.startswith(without["train"])
    assert read_examples(tmp_path / "data/train.jsonl")[-7:] == planted
    assert "7 canaries" in (tmp_path / "data/DATASET.md").read_text()
    assert reports([*arguments, "--plant-canaries", "7"]) == 0
    assert (tmp_path / "data/train.jsonl").read_bytes() == content
    assert reports(arguments) == 0  # the list of canaries that are not there goes as well
    assert not (tmp_path / "data" / CANARIES_FILE).exists()


def test_losses_are_those_of_rows_alone(tokenizer: Tokenizer) -> None:
    """Against one plain forward pass a row, without packing and shared prompt."""
    model = random_llama(tiny_config(vocab_size=tokenizer.vocab_size))
    findings, texts = "No effusion.", list(islice(candidates("a"), 5))
    found = impression_losses(model, tokenizer, PROMPT, findings, texts, batch_size=3)
    for text, loss in zip(texts, found, strict=True):
        ids, mask = tokenizer.render(PROMPT.messages(findings, text))
        with torch.no_grad():
            logits = model(torch.tensor([ids]))[0, :-1]
        each = F.cross_entropy(logits, torch.tensor(ids[1:]), reduction="none")
        assert loss == pytest.approx(float(each[torch.tensor(mask[1:])].sum()), rel=1e-5)


def test_exposure_is_by_rank() -> None:
    assert exposure(1.0, [2.0] * 1023) == 10.0
    assert exposure(3.0, [2.0] * 1023) == 0.0
    assert exposure(2.0, [1.0, 2.0, 3.0]) == math.log2(4 / 3)


def test_an_untouched_model_has_the_exposure_of_chance(tokenizer: Tokenizer) -> None:
    model = random_llama(tiny_config(vocab_size=tokenizer.vocab_size))
    planted = [Example(**row) for row in canaries(60, "chance")]
    found = measure(model, tokenizer, PROMPT, planted, others=63)
    assert found["verbatim"] == 0
    assert found["exposure_of_an_untrained_model"] == pytest.approx(1.38, abs=0.01)  # 1.44 for ever more candidates
    # One canary's exposure has a standard deviation of 1.4 bits, the mean of 60 of 0.18.
    assert found["exposure_bits"]["mean"] == pytest.approx(1.38, abs=0.75)


def test_a_model_that_learnt_canaries_by_heart_gives_them_back(
    tmp_path: Path, tokenizer_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tokenizer = Tokenizer.from_dir(tokenizer_folder)
    shape = tiny_config(vocab_size=tokenizer.vocab_size, hidden_size=64, intermediate_size=128, head_dim=16)
    save_model(random_llama(shape), tmp_path / "base")
    tokenizer.save(tmp_path / "base")
    planted = canaries(4, "by heart")
    pairs = [{"id": e.id, "findings": e.findings, "impression": e.impression} for e in synthetic_examples(4)]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in [*pairs, *planted]))
    (tmp_path / CANARIES_FILE).write_text("".join(json.dumps(row) + "\n" for row in planted))
    config = {
        "model": {"path": str(tmp_path / "base")},
        "method": "full",
        "data": {"train": str(tmp_path / "train.jsonl"), "instructions": list(PROMPT.instructions)},
        "training": {"output": str(tmp_path / "run"), "steps": 150, "learning_rate": 3e-3, "dtype": "float32"},
    }
    run = train(parse_config(config))
    card = (run / "last/README.md").read_text()
    assert "## Memorisation\n\nNot measured" in card
    assert "SHA-256" in card
    assert "| loss |" in card
    measured = ["--canaries", str(tmp_path / CANARIES_FILE), "--candidates", "127"]
    main(["--model", str(run / "last"), "--out", str(tmp_path / "after"), *measured])
    main(["--model", str(tmp_path / "base"), "--out", str(tmp_path / "before"), *measured])
    after, before = (json.loads((tmp_path / name / module.RESULT_FILE).read_text()) for name in ("after", "before"))
    assert after["verbatim"] == 4
    assert after["exposure_bits"]["mean"] == 7.0  # each before all 127 others
    assert before["verbatim"] == 0
    assert before["exposure_bits"]["mean"] < 4.5
    assert "4 of 4 planted canaries" in (run / "last/README.md").read_text()
    assert "Not measured" not in (run / "last/README.md").read_text()
    assert all(row["impression"] not in capsys.readouterr().out for row in planted)


def test_a_model_trained_with_similar_reports_is_measured_with_them(
    tmp_path: Path, tokenizer: Tokenizer, tokenizer_folder: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    model = random_llama(tiny_config(vocab_size=tokenizer.vocab_size))
    prompt = Prompt("llama3", PROMPT.instructions, similar=1)
    planted = [Example(**row, fields={"similar": ["No acute disease."]}) for row in canaries(1, "similar")]
    asked: list[str] = []
    questions = prompt.question(planted[0])
    monkeypatch.setattr(
        module, "impression_losses", lambda m, t, p, question, texts: asked.append(question) or [1.0] * len(texts)
    )
    monkeypatch.setattr(
        module, "generate", lambda m, prompts, **_: [asked.append(tokenizer.decode(ids)) or [] for ids in prompts]
    )
    measure(model, tokenizer, prompt, planted, others=1)
    assert questions in asked[0]
    assert asked[1] == questions
    assert "No acute disease." in questions
    save_model(model, tmp_path / "model")
    tokenizer.save(tmp_path / "model")
    prompt.save(tmp_path / "model")
    (tmp_path / "c.jsonl").write_text("".join(json.dumps(row) + "\n" for row in canaries(1, "similar")))
    with pytest.raises(SystemExit):
        main(["--model", str(tmp_path / "model"), "--canaries", str(tmp_path / "c.jsonl"), "--out", str(tmp_path)])
    assert "python -m radllama.similar" in capsys.readouterr().err


def test_a_card_holds_no_path_and_takes_sections(tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_text("x")
    raw = {"model": {"path": str(tmp_path)}, "method": "lora", "data": {"train": str(tmp_path / "train.jsonl")}}
    config = parse_config(raw | {"training": {"output": str(tmp_path / "run"), "steps": 1}})
    (tmp_path / "run").mkdir()
    lines = '{"step": 2, "loss": 0.5}\n{"step": 3, "loss": null}\n{"step": 3, "validation_loss": 0.25}\n{"st'
    (tmp_path / "run/metrics.jsonl").write_text(lines)
    write_card(tmp_path, config, tmp_path / "run")
    card = (tmp_path / "README.md").read_text()
    assert str(tmp_path) not in card
    assert "| step | 3 |\n| loss | 0.5 |\n| validation loss | 0.25 |" in card
    set_section(tmp_path, "Memorisation", r"None \1.")
    set_section(tmp_path, "More", "text")
    set_section(tmp_path, "Memorisation", "Again.")
    after = (tmp_path / "README.md").read_text()
    assert after.startswith(card.split("## Memorisation")[0])
    assert after.endswith("## Memorisation\n\nAgain.\n\n## More\n\ntext\n") or "Again.\n## More\n\ntext\n" in after
    set_section(tmp_path / "run", "Memorisation", "Alone.")
    assert (tmp_path / "run/README.md").read_text() == "## Memorisation\n\nAlone.\n"


def test_bad_input_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "c.jsonl").write_text('{"id": "a"}\n')
    with pytest.raises(SystemExit):
        main(["--model", "./nowhere", "--canaries", str(tmp_path / "c.jsonl"), "--out", str(tmp_path)])
    assert "c.jsonl" in capsys.readouterr().err
    assert reports([str(raw(tmp_path)), "--out", str(tmp_path / "data"), "--plant-canaries", "-1"]) == 2
