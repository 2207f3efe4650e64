"""generate.py: batched cached decoding against a naive loop without cache, sampling, stopping, the command line."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from conftest import random_llama, synthetic_examples, tiny_config
from hypothesis import given, settings
from hypothesis import strategies as st
from test_parts import start

from radllama import generate as module
from radllama.checkpoint import save_model
from radllama.data import HELD_OUT_INSTRUCTIONS, Prompt
from radllama.generate import common_length, consensus, predict, predictions
from radllama.parts import run_in_parts
from radllama.tokenizer import Tokenizer


def test_the_command_line(tmp_path: Path, tokenizer_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tokenizer = Tokenizer.from_dir(tokenizer_folder)
    save_model(random_llama(tiny_config(vocab_size=tokenizer.vocab_size)), tmp_path / "model")
    tokenizer.save(tmp_path / "model")
    rows = [
        {"id": e.id, "findings": e.findings, "impression": e.impression, "modality": "CR"}
        for e in synthetic_examples(5)
    ]
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text("".join(json.dumps(row) + "\n" for row in rows))
    common = ["--model", str(tmp_path / "model"), "--input", str(pairs), "--output", str(tmp_path / "out.jsonl")]
    module.main([*common, "--max-new-tokens", "4", "--name", "tiny"])
    written = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [row["id"] for row in written] == [row["id"] for row in rows]
    assert [row["reference"] for row in written] == [row["impression"] for row in rows]
    assert {row["model"] for row in written} == {"tiny"}
    assert {row["modality"] for row in written} == {"CR"}
    assert {row["stop_reason"] for row in written} <= {"stop", "length"}
    assert not any("instruction" in row for row in written)
    (tmp_path / "wordings.txt").write_text("Conclude.\n\n  Sum up the findings. \n")
    for source, wordings in (
        ("held-out", HELD_OUT_INSTRUCTIONS),
        (str(tmp_path / "wordings.txt"), ("Conclude.", "Sum up the findings.")),
    ):
        module.main([*common, "--max-new-tokens", "2", "--name", "tiny", "--instructions", source])
        for number, wording in enumerate(wordings, 1):
            lines = (tmp_path / f"out.{number}.jsonl").read_text().splitlines()
            assert {json.loads(line)["instruction"] for line in lines} == {wording}
            assert {json.loads(line)["model"] for line in lines} == {f"tiny #{number}"}
            assert len(lines) == 5
    assert not (tmp_path / "out.6.jsonl").exists()
    assert not list(tmp_path.glob("*.partial*"))
    one = (tmp_path / "out.jsonl").read_bytes()
    module.main([*common, "--max-new-tokens", "4", "--name", "tiny", "--corpus", str(pairs)])
    assert (tmp_path / "out.jsonl").read_bytes() == one
    ranks = start(2, ["-m", "radllama.generate", *common, "--max-new-tokens", "4", "--name", "tiny"])
    assert [rank.communicate(timeout=120) and rank.returncode for rank in ranks] == [0, 0]
    assert (tmp_path / "out.jsonl").read_bytes() == one
    assert not list(tmp_path.glob("*.partial*"))
    for extra in (
        ["--instructions", str(tmp_path / "none.txt")],
        ["--instructions", "held-out", "--instruction", "Conclude."],
        ["--adapter", str(tmp_path)],
        ["--top-p", "2"],
        ["--corpus", str(tmp_path / "none.jsonl")],
        ["--corpus", str(pairs), "--temperature", "1"],
        ["--max-new-tokens", "0"],
        ["--limit", "0"],
        ["--temperature", "nan"],
        ["--device", "gpu"],
        ["--device", "meta"],
        ["--device", "cuda:99"],
        ["--model", str(tmp_path / "no")],
    ):
        with pytest.raises(SystemExit) as caught:
            module.main([*common, *extra] if extra[0] != "--model" else [*extra, *common[2:]])
        assert caught.value.code == 2 or "--adapter" in extra
        assert "error:" in capsys.readouterr().err


def test_the_corpus_is_what_the_model_was_trained_to_write(
    tmp_path: Path, tokenizer_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer, examples = Tokenizer.from_dir(tokenizer_folder), synthetic_examples(4)
    prompt = Prompt(tokenizer.prompt_format, ("Derive.",))
    found = module.responses(tokenizer, prompt, examples)
    for example, prompt_ids, ids in zip(examples, module.render(tokenizer, prompt, examples), found, strict=True):
        whole, _ = tokenizer.render(prompt.messages(example.findings, example.impression))
        assert prompt_ids + ids == whole[: len(prompt_ids) + len(ids)]
        assert ids[-1] in tokenizer.stop_ids
        assert tokenizer.decode(ids).strip() == example.impression
    save_model(random_llama(tiny_config(vocab_size=tokenizer.vocab_size)), tmp_path / "model")
    tokenizer.save(tmp_path / "model")
    pairs = tmp_path / "pairs.jsonl"
    rows = [{"id": e.id, "findings": e.findings, "impression": e.impression} for e in examples]
    pairs.write_text("".join(json.dumps(row) + "\n" for row in rows))
    given_corpora = []
    decode = module.decode
    monkeypatch.setattr(
        module, "decode", lambda *a, **options: given_corpora.append(options["corpus"]) or decode(*a, **options)
    )
    monkeypatch.setattr(module, "CORPUS", 3)
    files = ["--model", str(tmp_path / "model"), "--input", str(pairs), "--output", str(tmp_path / "out.jsonl")]
    module.main([*files, "--max-new-tokens", "2", "--instruction", "Derive.", "--corpus", str(pairs)])
    assert given_corpora == [found[:3]]


def test_the_order_of_a_rows_keys(tokenizer_folder: Path) -> None:
    """What the pair carries along keeps its order and stands in front; then ours, the same in every row."""
    tokenizer = Tokenizer.from_dir(tokenizer_folder)
    model = random_llama(tiny_config(vocab_size=tokenizer.vocab_size))
    carried = [{}, {"study_date": "2020-01-02", "modality": "CR", "patient_id": "p"}, {"patient_id": "p", "x": [1]}]
    examples = [replace(e, fields=more) for e, more in zip(synthetic_examples(3), carried, strict=True)]
    rows = predict(
        model, tokenizer, Prompt(tokenizer.prompt_format, ("Derive.",)), examples, name="m", max_new_tokens=2
    )
    ours = ["id", "findings", "reference", "prediction", "model", "stop_reason"]
    assert [list(row) for row in rows] == [[*more, *ours] for more in carried]


@settings(max_examples=200, deadline=None)
@given(st.lists(st.sampled_from("abcde"), max_size=12), st.lists(st.sampled_from("abcde"), max_size=12))
def test_common_length_equals_the_plain_table(a: list[str], b: list[str]) -> None:
    table = [[0] * (len(b) + 1) for _ in range(len(a) + 1)]
    for i, x in enumerate(a):
        for j, y in enumerate(b):
            table[i + 1][j + 1] = table[i][j] + 1 if x == y else max(table[i][j + 1], table[i + 1][j])
    assert common_length(a, b) == table[-1][-1]


def test_consensus_is_what_agrees_most() -> None:
    assert consensus(["a b x", "a b c", "c y z", "A b, c."]) == 1  # twice the same words
    assert consensus(["e f z", "a b c z", "a b d z", "a c b z"]) == 1
    assert consensus(["d", "e"]) == 0  # a tie goes to the earliest
    assert consensus(["b"]) == 0
    assert consensus(["", ""]) == 0


def test_similar_reports_vote_but_are_not_elected() -> None:
    candidates = ["no effusion", "no effusion", "no effusion", "small effusion"]
    assert consensus(candidates) == 0
    assert consensus(candidates, ["small effusion"]) == 0  # two votes against three
    assert consensus(candidates, ["small effusion", "a small effusion"]) == 3
    assert consensus(["a b", "c d"], ["e f"] * 9) == 0


def test_consensus_over_samples_of_a_model(tokenizer_folder: Path) -> None:
    tokenizer = Tokenizer.from_dir(tokenizer_folder)
    model = random_llama(tiny_config(vocab_size=tokenizer.vocab_size))
    prompt, examples = Prompt(tokenizer.prompt_format, ("Derive.",)), synthetic_examples(3)

    def answers(samples: int, seed: int) -> list[str]:
        rows = predict(
            model, tokenizer, prompt, examples, name="m", samples=samples, seed=seed, max_new_tokens=6, temperature=1.0
        )
        return [row["prediction"] for row in rows]

    drawn = [answers(1, 3 + k) for k in range(5)]
    assert all(answer in each for answer, each in zip(answers(5, 3), zip(*drawn, strict=True), strict=True))


def test_consensus_needs_a_temperature(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        module.main(["--model", "m", "--input", "x", "--output", str(tmp_path / "o"), "--consensus", "4"])
    assert "--consensus" in capsys.readouterr().err


def test_a_folder_is_no_output(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        module.main(["--model", "m", "--input", "x", "--output", str(tmp_path)])
    assert f"--output: {tmp_path} is a folder; give the file to write" in capsys.readouterr().err


def test_reports_longer_than_the_model_was_made_for_are_named(
    tmp_path: Path, tokenizer_folder: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = Tokenizer.from_dir(tokenizer_folder)
    save_model(random_llama(tiny_config(vocab_size=tokenizer.vocab_size, max_position_embeddings=200)), tmp_path / "m")
    tokenizer.save(tmp_path / "m")
    rows = [{"id": "short", "findings": "Clear lungs."}, {"id": "long", "findings": "Clear lungs. " * 100}]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    common = ["--model", str(tmp_path / "m"), "--input", str(tmp_path / "in.jsonl")]
    module.main([*common, "--output", str(tmp_path / "out.jsonl"), "--max-new-tokens", "2"])
    assert "1 reports pass the 200 tokens" in caplog.text
    assert caplog.text.rstrip().endswith("badly: long")

    def interrupted(ranks: Any, file: Path, *arguments: Any) -> Any:
        if file.name == "several.2.jsonl":
            raise KeyboardInterrupt
        return run_in_parts(ranks, file, *arguments)

    (tmp_path / "wordings.txt").write_text("One.\nTwo.\n")
    several = [*common, "--output", str(tmp_path / "several.jsonl"), "--max-new-tokens", "2"]
    several += ["--instructions", str(tmp_path / "wordings.txt")]
    with monkeypatch.context() as patch:
        patch.setattr(module, "run_in_parts", interrupted)
        with pytest.raises(KeyboardInterrupt):
            module.main(several)
    with monkeypatch.context() as patch:  # the first wording is not asked again
        drawn: list[int] = []
        patch.setattr(module, "predictions", lambda *a, **o: drawn.append(len(a[4])) or predictions(*a, **o))
        module.main(several)
    assert drawn == [0, 2]
    assert not list(tmp_path.glob("*.partial*"))
