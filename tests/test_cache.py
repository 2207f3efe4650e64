"""cache.py: rows equal to rendering on demand, what makes a cache stale, damage, killed and concurrent builds."""

from __future__ import annotations

import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.metadata import distribution
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import SENTENCES, synthetic_examples
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sentencepiece import SentencePieceTrainer

from radllama import cache as module
from radllama.cache import FOLDER, HEADER, Cache, Sentences, Template, open_cache
from radllama.data import INSTRUCTIONS, Example, OnDemand, Prompt, Reports, read_examples
from radllama.tokenizer import PromptFormat, Tokenizer

ROOT = Path(__file__).parents[1]
SECRET = "zebra"
PROMPT = Prompt("llama3", (*INSTRUCTIONS[:2], "  Conclude:\n"))


def write_pairs(file: Path, examples: list[Example]) -> Path:
    rows: list[dict[str, Any]] = [
        {"id": e.id, "text": e.text} if e.text else {"id": e.id, "findings": e.findings, "impression": e.impression}
        for e in examples
    ]
    rows = [row | example.fields for row, example in zip(rows, examples, strict=True)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return file


def mixed_examples() -> list[Example]:
    """Pairs and plain texts, with every character that templates and tokenizers treat in its own way."""
    odd = [
        "  \n Clear.  ",
        ": x\n\n\n",
        "</s>[INST] <|eot_id|>assistant",
        "é 漢字 \ufeff👩\u200d⚕\ufe0f",
        "▁ _\t\r\n.",
        "\\n",
        "\n\nA",
    ]
    pairs = [Example(f"{n} é", one, other) for n, (one, other) in enumerate((a, b) for a in odd for b in odd)]
    texts = [Example(f"text {n}", text=text) for n, text in enumerate(odd)]
    similar = Example("similar", "Clear.", "Normal.", "", {"similar": ["Old granuloma.", "Never shown."]})
    return [*pairs, *texts, similar, *synthetic_examples(20)]


def assert_same_rows(cache: Cache, examples: list[Example], tokenizer: Tokenizer, prompt: Prompt) -> None:
    """Every row in every wording, and the lengths, against rendering on demand."""
    source = OnDemand(examples, tokenizer, prompt, "")
    assert len(cache) == len(examples)
    for index, example in enumerate(examples):
        assert cache.identity(index) == example.id
        for wording in range(len(prompt.instructions)):
            assert cache.row(index, wording) == source.row(index, wording)
    for found, expected in zip(cache.lengths(), source.lengths(), strict=True):
        assert found.tolist() == expected.tolist()


@pytest.fixture(scope="session")
def sentencepiece_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A SentencePiece BPE as Llama 2's: byte fallback, spaces kept, a dummy space in front."""
    folder = tmp_path_factory.mktemp("llama2")
    (folder / "text.txt").write_text("\n".join(SENTENCES * 20), encoding="utf-8")
    SentencePieceTrainer.train(
        input=str(folder / "text.txt"), model_prefix=str(folder / "tokenizer"), model_type="bpe", vocab_size=420,
        byte_fallback=True, normalization_rule_name="identity", remove_extra_whitespaces=False, minloglevel=2,
        hard_vocab_limit=False)  # fmt: skip
    return folder


@pytest.fixture(scope="session")
def spaced_folder(tokenizer_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Llama 3's format with a tokenizer that puts a space before every text that begins a line."""
    folder = tmp_path_factory.mktemp("spaced") / "model"
    shutil.copytree(tokenizer_folder, folder)
    config = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))

    def add_space(node: Any) -> Any:
        if isinstance(node, dict):
            made = {key: add_space(value) for key, value in node.items()}
            return made | {"add_prefix_space": True} if node.get("type") == "ByteLevel" else made
        return [add_space(value) for value in node] if isinstance(node, list) else node

    config["pre_tokenizer"] = add_space(config["pre_tokenizer"])
    (folder / "tokenizer.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


FORMATS: list[tuple[str, PromptFormat]] = [
    ("tokenizer_folder", "llama3"),
    ("tokenizer_folder", "llama2"),
    ("tokenizer_folder", "alpaca"),
    ("spaced_folder", "llama3"),
    ("sentencepiece_folder", "llama2"),
    ("sentencepiece_folder", "alpaca"),
]


@pytest.fixture(scope="session", params=FORMATS, ids=lambda value: "-".join(value))
def both(request: pytest.FixtureRequest) -> tuple[Tokenizer, Prompt]:
    name, prompt_format = request.param
    folder = request.getfixturevalue(name)
    return Tokenizer.from_dir(folder, prompt_format=prompt_format), Prompt(prompt_format, PROMPT.instructions, 1)


# Rows


def test_rows_are_those_of_rendering_on_demand(both: tuple[Tokenizer, Prompt], tmp_path: Path) -> None:
    file = write_pairs(tmp_path / "pairs.jsonl", mixed_examples())
    cache = open_cache(file, *both)
    assert cache is not None
    assert_same_rows(cache, read_examples(file), *both)
    again = open_cache(file, *both)
    assert again is not None
    assert again.row(3, 1) == cache.row(3, 1)
    assert len([path for path in (tmp_path / FOLDER).iterdir() if path.is_dir()]) == 1


def test_only_the_chat_format_of_llama_3_is_stored_in_pieces(both: tuple[Tokenizer, Prompt]) -> None:
    tokenizer, prompt = both
    plain = (
        tokenizer.encode("A")
        == tokenizer.render([{"role": "user", "content": ""}, {"role": "assistant", "content": "A"}])[0][-2:-1]
    )
    expected = prompt.format == "llama3" and plain
    assert (Template.find(tokenizer, prompt) is not None) == expected


def test_the_formats_cover_both_ways(request: pytest.FixtureRequest) -> None:
    found = {}
    for name, prompt_format in FORMATS:
        tokenizer = Tokenizer.from_dir(request.getfixturevalue(name), prompt_format=prompt_format)
        found[name, prompt_format] = Template.find(tokenizer, Prompt(prompt_format, ("Go.",))) is not None
    assert found == {key: key == ("tokenizer_folder", "llama3") for key in FORMATS}


TEXT = st.text(st.characters(codec="utf-8"), min_size=1, max_size=30).filter(str.strip)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(TEXT, TEXT), min_size=1, max_size=4), st.lists(TEXT, min_size=1, max_size=3))
def test_random_texts_and_wordings(
    both: tuple[Tokenizer, Prompt],
    tmp_path_factory: pytest.TempPathFactory,
    pairs: list[tuple[str, str]],
    wordings: list[str],
) -> None:
    tokenizer, prompt = both[0], Prompt(both[1].format, tuple(wordings))
    examples = [Example(f"r{n}", findings, impression) for n, (findings, impression) in enumerate(pairs)]
    file = write_pairs(tmp_path_factory.mktemp("random") / "pairs.jsonl", examples)
    cache = open_cache(file, tokenizer, prompt)
    assert cache is not None
    assert_same_rows(cache, examples, tokenizer, prompt)
    shutil.rmtree(file.parent)


def test_reports_draw_the_same_steps(tokenizer: Tokenizer, tmp_path: Path) -> None:
    examples = synthetic_examples(60)
    cache = open_cache(write_pairs(tmp_path / "train.jsonl", examples), tokenizer, PROMPT)
    assert cache is not None
    prompts, rows = cache.lengths()
    for max_length in (rows.max(), rows.max() - 30, sorted(prompts)[40]):
        found, expected = (
            Reports(source, tokenizer, PROMPT, max_length=int(max_length), seed=3, name="train.jsonl")
            for source in (cache, examples)
        )
        assert (found.lost, found.truncated, len(found)) == (expected.lost, expected.truncated, len(expected))
        assert [found.step(n, 7) for n in range(20)] == [expected.step(n, 7) for n in range(20)]
    assert found.lost > 0
    assert found.truncated > found.lost


def test_more_reports_than_a_batch_and_wide_ids(
    tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "BATCH", 7)
    examples = synthetic_examples(50)
    file = write_pairs(tmp_path / "train.jsonl", examples)
    cache = open_cache(file, tokenizer, PROMPT)
    assert cache is not None
    assert cache._parts.dtype == np.uint16
    assert_same_rows(cache, examples, tokenizer, PROMPT)
    shutil.rmtree(tmp_path / FOLDER)
    monkeypatch.setattr(tokenizer, "vocab_size", 128_256)
    wide = open_cache(file, tokenizer, PROMPT)
    assert wide is not None
    assert wide._parts.dtype == np.uint32
    assert_same_rows(wide, examples, tokenizer, PROMPT)


def test_fields_to_draw_by(tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given_fields: list[dict[str, Any]] = [
        {"modality": "CT"},
        {"modality": None},
        {},
        {"modality": "CR", "body_part": 7},
    ]
    examples = [
        Example(e.id, e.findings, e.impression, fields=given_fields[n % 4])
        for n, e in enumerate(synthetic_examples(12))
    ]
    file = write_pairs(tmp_path / "train.jsonl", examples)
    cache = open_cache(file, tokenizer, PROMPT)
    assert cache is not None
    for field, wanted in (("modality", ["CT", "", "", "CR"]), ("body_part", ["", "", "", "7"])):
        for source in (cache, OnDemand(read_examples(file), tokenizer, PROMPT, "")):
            names, codes = source.values(field)
            assert [names[code] for code in codes] == wanted * 3
    with pytest.raises(ValueError, match="modality, body_part"):
        cache.values("indication")
    shutil.rmtree(tmp_path / FOLDER)
    monkeypatch.setattr(module, "MOST_VALUES", 2)
    cache = open_cache(file, tokenizer, PROMPT)
    assert cache is not None
    with pytest.raises(ValueError, match="modality: the reports have more than 2 different values"):
        cache.values("modality")
    assert cache.values("body_part")[0] == ["", "7"]


# When a cache is built


@pytest.fixture
def builds(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The folders that are built while a test runs."""
    built: list[Path] = []
    original = module.fill

    def count(folder: Path, *rest: Any) -> dict[str, Any]:
        built.append(folder)
        return original(folder, *rest)

    monkeypatch.setattr(module, "fill", count)
    return built


def opened(file: Path, tokenizer: Tokenizer, prompt: Prompt = PROMPT) -> Cache:
    cache = open_cache(file, tokenizer, prompt)
    assert cache is not None
    return cache


def test_whatever_a_row_depends_on_makes_another_cache(
    tokenizer: Tokenizer, tokenizer_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    examples = synthetic_examples(5)
    file = write_pairs(tmp_path / "train.jsonl", examples)
    first = opened(file, tokenizer).folder
    folders = [first]
    file.write_bytes(file.read_bytes().replace(b'"r0"', b'"r9"'))  # one byte
    folders.append(opened(file, tokenizer).folder)
    assert opened(file, tokenizer).identity(0) == "r9"
    write_pairs(file, examples)
    assert opened(file, tokenizer).folder == first  # the old content: the old cache
    wordings = (*PROMPT.instructions[:2], "  Conclude: \n")
    folders.append(opened(file, tokenizer, Prompt("llama3", wordings)).folder)
    folders.append(opened(file, tokenizer, Prompt("llama3", PROMPT.instructions[:2])).folder)
    folders.append(opened(file, tokenizer, Prompt("llama3", PROMPT.instructions[::-1])).folder)
    alpaca = Tokenizer.from_dir(tokenizer_folder, prompt_format="alpaca")
    folders.append(opened(file, alpaca, Prompt("alpaca", PROMPT.instructions)).folder)

    config = json.loads((tokenizer_folder / "tokenizer.json").read_text(encoding="utf-8"))
    config["model"]["merges"].pop()
    shutil.copytree(tokenizer_folder, tmp_path / "other")
    (tmp_path / "other" / "tokenizer.json").write_text(json.dumps(config), encoding="utf-8")
    folders.append(opened(file, Tokenizer.from_dir(tmp_path / "other")).folder)

    original = Tokenizer.render
    changes: list[Callable[[list[int]], list[int]]] = [
        lambda ids: [ids[0], *ids],
        lambda ids: [*ids, 7],
        lambda ids: ids[:2],
    ]
    for change in changes:  # another template in the code, which does or does not fall into pieces

        def render(self: Tokenizer, messages: Any, *, change: Any = change, **options: Any) -> Any:
            ids, mask = original(self, messages, **options)
            return change(ids), [False, *mask][: len(change(ids))] if len(change(ids)) > 2 else [False, True]

        monkeypatch.setattr(Tokenizer, "render", render)
        cache = opened(file, tokenizer)
        folders.append(cache.folder)
        assert_same_rows(cache, examples, tokenizer, PROMPT)
    assert len(set(folders)) == len(folders)


def test_what_no_row_depends_on_does_not(tokenizer: Tokenizer, tmp_path: Path, builds: list[Path]) -> None:
    examples = synthetic_examples(8)
    cache = opened(write_pairs(tmp_path / "train.jsonl", examples), tokenizer)
    for max_length, seed in ((512, 0), (200, 1)):
        Reports(cache, tokenizer, PROMPT, max_length=max_length, seed=seed, name="train.jsonl")
    shutil.copy(tmp_path / "train.jsonl", tmp_path / "renamed.jsonl")
    assert opened(tmp_path / "renamed.jsonl", tokenizer).folder == cache.folder
    assert len(builds) == 1


@pytest.mark.parametrize("damage", ["cut", "bit", "longer", "missing", "header", "no header", "empty"])
@pytest.mark.parametrize("prompt_format", ["llama3", "alpaca"])
def test_a_damaged_cache_is_built_again(
    tokenizer_folder: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    builds: list[Path],
    damage: str,
    prompt_format: PromptFormat,
) -> None:
    tokenizer = Tokenizer.from_dir(tokenizer_folder, prompt_format=prompt_format)
    prompt = Prompt(prompt_format, PROMPT.instructions)
    examples = synthetic_examples(5)
    file = write_pairs(tmp_path / "train.jsonl", examples)
    folder = opened(file, tokenizer, prompt).folder
    names = {path.name for path in folder.iterdir()}
    assert len(names) == 8
    for count, name in enumerate(sorted(names - {HEADER}) if damage in ("cut", "bit") else ["parts.bin"], 2):
        content = bytearray((folder / name).read_bytes())
        header = (folder / HEADER).read_text(encoding="utf-8")
        match damage:
            case "cut":
                (folder / name).write_bytes(content[:-1])
            case "bit":
                content[len(content) // 2] ^= 1
                (folder / name).write_bytes(content)
            case "longer":
                (folder / name).write_bytes(content + b"\0")
            case "missing":
                (folder / name).unlink()
            case "header":
                (folder / HEADER).write_text(header.replace('"reports": 5', '"reports": 4'), encoding="utf-8")
            case "no header":
                (folder / HEADER).unlink()
            case "empty":
                (folder / HEADER).write_text("")
        with caplog.at_level(logging.WARNING):
            assert_same_rows(opened(file, tokenizer, prompt), examples, tokenizer, prompt)
        assert len(builds) == count
        assert "is damaged" in caplog.text
    assert {path.name for path in folder.iterdir()} == names
    assert not list((tmp_path / FOLDER).glob("*.partial"))


SCRIPT = """
import sys
from pathlib import Path
from radllama import cache
from radllama.data import Prompt
from radllama.tokenizer import Tokenizer

fill = cache.fill
def noted(folder, *rest):
    print("builds", flush=True)
    return fill(folder, *rest)
cache.fill = noted
if len(sys.argv) > 3:  # slowly
    encode = cache.encode_pieces
    def slow(*rest):
        import time
        time.sleep(0.05)
        return encode(*rest)
    cache.encode_pieces, cache.BATCH = slow, 4
found = cache.open_cache(sys.argv[1], Tokenizer.from_dir(sys.argv[2]), Prompt("llama3", ("Conclude.", "Sum up.")))
print(len(found), found.folder.name, sum(sum(found.row(n, n % 2).ids) for n in range(len(found))), flush=True)
"""


def start(file: Path, tokenizer_folder: Path, *slowly: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", SCRIPT, str(file), str(tokenizer_folder), *slowly]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)


def test_a_killed_build_leaves_nothing_in_use(tokenizer: Tokenizer, tokenizer_folder: Path, tmp_path: Path) -> None:
    examples = synthetic_examples(400)
    file = write_pairs(tmp_path / "train.jsonl", examples)
    prompt = Prompt("llama3", ("Conclude.", "Sum up."))
    process = start(file, tokenizer_folder, "slowly")
    deadline = time.monotonic() + 60
    while not list((tmp_path / FOLDER).glob("*.partial/parts.bin")) and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.3)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    left = list((tmp_path / FOLDER).glob("*.partial"))
    assert len(left) == 1, "killed in the middle"
    assert not left[0].with_suffix("").exists()
    assert_same_rows(opened(file, tokenizer, prompt), examples, tokenizer, prompt)
    assert not left[0].exists()


def test_of_two_processes_one_builds(tokenizer: Tokenizer, tokenizer_folder: Path, tmp_path: Path) -> None:
    examples = synthetic_examples(200)
    file = write_pairs(tmp_path / "train.jsonl", examples)
    processes = [start(file, tokenizer_folder, "slowly") for _ in range(3)]
    outputs = [process.communicate(timeout=120)[0].splitlines() for process in processes]
    assert [process.returncode for process in processes] == [0, 0, 0]
    assert sorted(len(lines) for lines in outputs) == [1, 1, 2]  # one said that it builds
    assert len({lines[-1] for lines in outputs}) == 1
    source = OnDemand(examples, tokenizer, Prompt("llama3", ("Conclude.", "Sum up.")), "")
    assert int(outputs[0][-1].split()[-1]) == sum(sum(source.row(n, n % 2).ids) for n in range(200))


def test_who_waits_builds_if_the_builder_is_killed(tokenizer_folder: Path, tmp_path: Path) -> None:
    file = write_pairs(tmp_path / "train.jsonl", synthetic_examples(200))
    first = start(file, tokenizer_folder, "slowly")
    assert first.stdout is not None
    assert first.stdout.readline() == "builds\n"
    second = start(file, tokenizer_folder)
    time.sleep(1)
    first.send_signal(signal.SIGKILL)
    first.communicate()
    lines = second.communicate(timeout=60)[0].splitlines()
    assert lines[0] == "builds"
    assert lines[1].startswith("200 ")


# Where it cannot be built


def test_a_folder_that_cannot_be_written_means_no_cache_and_a_note(
    tokenizer: Tokenizer, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = write_pairs(tmp_path / "train.jsonl", synthetic_examples(5))
    (tmp_path / FOLDER).write_text("")  # permissions do not hold root back, a file in the way does
    with caplog.at_level(logging.INFO):
        assert open_cache(file, tokenizer, PROMPT) is None
    assert "no tokenised cache can be written beside it" in caplog.text


def test_a_finished_cache_serves_in_a_folder_that_cannot_be_written(
    tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = write_pairs(tmp_path / "train.jsonl", synthetic_examples(5))
    opened(file, tokenizer)

    def refuse(folder: Path) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(module, "open_lock", refuse)
    assert len(opened(file, tokenizer)) == 5


def test_without_locks_reports_are_kept_in_memory(
    tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(file: Any, kind: int) -> None:
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(module.fcntl, "flock", refuse)
    with caplog.at_level(logging.INFO):
        assert open_cache(write_pairs(tmp_path / "train.jsonl", synthetic_examples(5)), tokenizer, PROMPT) is None
    assert "no locks there: Function not implemented" in caplog.text


def test_a_full_disk_is_said_and_leaves_nothing(
    tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = write_pairs(tmp_path / "train.jsonl", synthetic_examples(5))

    def full(self: module.Writer, data: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module.Writer, "write", full)
    with pytest.raises(OSError, match="the tokenised cache cannot be written"):
        open_cache(file, tokenizer, PROMPT)
    assert not [path for path in (tmp_path / FOLDER).iterdir() if path.is_dir()]


def test_git_ignores_caches(tokenizer: Tokenizer, tmp_path: Path) -> None:
    opened(write_pairs(tmp_path / "train.jsonl", synthetic_examples(5)), tokenizer)
    assert (tmp_path / FOLDER / ".gitignore").read_text() == "*\n"


@pytest.mark.parametrize(
    "lines",
    [
        [],
        [b"\n", b" \n"],
        [b'{"id": "a", "findings": "zebra", "impression": ""}\n'],
        [b'{"id": "a", "findings": "zebra", "impression": "x"}\n', b"\xff\n", b'{"id": "b", "text": "zebra"', b"\n"],
        [b'{"id": "a", "text": "x"}\n', b'{"id": "b", "text": "zebra"}\n', b"\n", b'{"id": "a", "text": "zebra"}\n'],
        [b'{"id": "%d", "text": ""}\n' % n for n in range(30)],
    ],
    ids=["empty", "blank", "no impression", "broken", "id twice", "many"],
)
def test_bad_files_give_the_errors_of_read_examples(tokenizer: Tokenizer, tmp_path: Path, lines: list[bytes]) -> None:
    file = tmp_path / "train.jsonl"
    file.write_bytes(b"".join(lines))
    with pytest.raises(ValueError, match=r"train\.jsonl") as expected:
        read_examples(file)
    with pytest.raises(ValueError, match=r"train\.jsonl") as found:
        open_cache(file, tokenizer, PROMPT)
    assert str(found.value) == str(expected.value)
    assert SECRET not in str(found.value)
    assert not [path for path in (tmp_path / FOLDER).iterdir() if path.is_dir()]


def test_a_missing_file_is_named(tokenizer: Tokenizer, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"nowhere\.jsonl: no such file"):
        open_cache(tmp_path / "nowhere.jsonl", tokenizer, PROMPT)
    assert not list(tmp_path.iterdir())


def test_a_file_that_grows_meanwhile_is_refused(
    tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = write_pairs(tmp_path / "train.jsonl", synthetic_examples(5))
    original = module.build

    def grow(*arguments: Any) -> dict[str, Any]:
        with file.open("a") as lines:
            lines.write(json.dumps({"id": "late", "text": "More."}) + "\n")
        return original(*arguments)

    monkeypatch.setattr(module, "build", grow)
    with pytest.raises(ValueError, match="changed while it was read"):
        open_cache(file, tokenizer, PROMPT)


# Sentences


@pytest.fixture(scope="module", params=["small", "Llama 3's"])
def parting(request: pytest.FixtureRequest, tokenizer: Tokenizer) -> Tokenizer:
    if request.param == "small":
        return tokenizer
    return Tokenizer.from_dir(str(distribution("llama-models").locate_file("llama_models/llama3")))


@settings(max_examples=500, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.text(alphabet=st.sampled_from("A b.3 \n\r\t'(s\u00a0é漢\ud800"), max_size=30), max_size=4))
def test_sentences_give_the_ids_of_whole_texts(parting: Tokenizer, texts: list[str]) -> None:
    assert parting.parts_sentences
    sentences = Sentences(parting)
    sentences.MOST = 3  # forgotten all the time
    for _ in range(2):
        assert [np.frombuffer(ids, np.uint32).tolist() for ids in sentences.encode(texts)] == [
            parting.encode(text) for text in texts
        ]


def test_what_is_known_is_not_tokenised_again(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    sentences = Sentences(tokenizer)
    first = sentences.encode(["The lungs are clear. No effusion.", "No effusion."])

    def refuse(texts: list[str]) -> list[list[int]]:
        assert not texts
        return []

    monkeypatch.setattr(tokenizer, "encode_batch", refuse)
    assert sentences.encode(["The lungs are clear. No effusion.", "No effusion."]) == first


def test_only_llama_3s_own_pattern_parts_sentences(spaced_folder: Path, sentencepiece_folder: Path) -> None:
    assert not Tokenizer.from_dir(spaced_folder).parts_sentences
    assert not Tokenizer.from_dir(sentencepiece_folder).parts_sentences
