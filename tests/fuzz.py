"""A structure-aware fuzz of everything that is read from outside: weights, configs, adapters, tokenizers, reports.

    python tests/fuzz.py [--cases 10400] [--seed 0]       # a table; exit status 1 and a list if there are findings
    python tests/fuzz.py --seed 0 --case 4711             # that case alone, with its traceback

Each case spoils one thing in a good folder and loads it. It must load, or end in a ValueError that names the file and
quotes no report. Anything else is a finding: another exception, a crash, more than TIMEOUT seconds, more than MEMORY
bytes. The cases run in a process of their own, which is started again where one of them ends it.

KINDS says what is spoilt, spoil.py how. The kinds marked `parsed` write well-formed JSON (or protobuf, or lines of the
right form) with wrong content, so that they reach what lies behind the parser.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from spoil import (
    MARKER,
    Change,
    as_json,
    at,
    coherent,
    doubled,
    dump,
    field_of,
    header_length,
    header_names,
    metadata,
    numbers,
    only,
    pieces,
    ranks,
    rows_of,
    shard_names,
    spoil,
    spoil_bytes,
    state_record,
    texts,
    unpickled,
)

TIMEOUT, MEMORY = 20, 2**30


# ---------------------------------------------------------------- loading


def use_model(folder: Path) -> None:
    import torch

    from radllama.checkpoint import find_model, load_model

    model = load_model(find_model(str(folder)), dtype=torch.float32)
    with torch.no_grad():
        model(torch.zeros(1, 3, dtype=torch.int64))


def use_merge(folder: Path) -> None:
    """The adapter over its base: loaded, and described."""
    import torch

    from radllama.checkpoint import describe, load_model
    from radllama.lora import load_adapter

    model = load_model(folder, dtype=torch.float32)
    load_adapter(model, folder / "adapter")
    describe(folder / "adapter")
    with torch.no_grad():
        model(torch.zeros(1, 3, dtype=torch.int64))


def use_pairs(folder: Path) -> None:
    from radllama.cache import open_cache
    from radllama.data import INSTRUCTIONS, Prompt, Reports, pack, read_examples
    from radllama.tokenizer import Tokenizer

    tokenizer = TOKENIZERS.get("") or TOKENIZERS.setdefault("", Tokenizer.from_dir(folder))
    prompt = Prompt(tokenizer.prompt_format, INSTRUCTIONS[:2])
    read = read_examples(folder / "pairs.jsonl")
    cache = open_cache(folder / "pairs.jsonl", tokenizer, prompt)
    for source in (read, cache):
        assert source
        reports = Reports(source, tokenizer, prompt, max_length=512, seed=0, name=str(folder / "pairs.jsonl"))
        reports.source.values("modality")
        pack(reports.step(0, 4))


TOKENIZERS: dict[str, Any] = {}


def use_predictions(folder: Path) -> None:
    from radllama.cases import load

    load([folder / "predictions.jsonl"])
    load([folder / "predictions.jsonl", folder / "others.jsonl"])


def use_tokenizer(folder: Path) -> None:
    from radllama.data import check_vocabulary
    from radllama.tokenizer import Tokenizer

    tokenizer = Tokenizer.from_dir(folder)
    check_vocabulary(tokenizer, 10_000, source=str(folder))
    ids, _ = tokenizer.render(
        [{"role": "user", "content": "No effusion."}, {"role": "assistant", "content": "Normal."}]
    )
    assert all(0 <= number < tokenizer.vocab_size for number in ids)
    assert isinstance(tokenizer.decode(ids), str)
    tokenizer.save(folder / "copy")


def use_nf4(folder: Path) -> None:
    use_model(folder / "nf4")


def use_shards(folder: Path) -> None:
    use_model(folder / "shards")


def use_piece(folder: Path) -> None:
    use_tokenizer(folder / "piece")


def use_tiktoken(folder: Path) -> None:
    use_tokenizer(folder / "tiktoken")


def use_import(folder: Path) -> None:
    from radllama.meta import import_meta

    import_meta(folder / "meta", folder / "imported")


def use_prompt(folder: Path) -> None:
    from radllama.data import Prompt

    prompt = Prompt.load(folder)
    assert prompt
    prompt.messages("No effusion.")


def use_job(folder: Path) -> None:
    from radllama.config import parse_config, read_config

    parse_config(read_config(folder / "job.json").resolved())


@dataclass(frozen=True)
class Kind:
    name: str
    file: str
    change: Change
    use: Callable[[Path], None]
    parsed: bool = True


WEIGHTS, ADAPTER = "model.safetensors", "adapter/adapter_model.safetensors"
INDEX, PARTS = f"shards/{WEIGHTS}.index.json", ("nf4", "shards", "piece", "tiktoken", "meta")
PIPELINE = ("pre_tokenizer", "normalizer", "decoder", "post_processor")
KINDS = [
    *(Kind(f"header: {name}", WEIGHTS, field_of(name), use_model) for name in ("data_offsets", "shape", "dtype")),
    Kind("header: names", WEIGHTS, header_names, use_model),
    Kind("header: length", WEIGHTS, header_length, use_model, parsed=False),
    Kind("header: metadata", WEIGHTS, metadata, use_model),
    Kind("header: bytes", WEIGHTS, spoil_bytes, use_model, parsed=False),
    Kind("weights: coherent, of another model", WEIGHTS, coherent, use_model),
    Kind("4-bit: record", "nf4/model.safetensors", state_record, use_nf4),
    Kind("4-bit: tensors", "nf4/model.safetensors", coherent, use_nf4),
    Kind("index: shards", INDEX, shard_names, use_shards),
    Kind("index: names", INDEX, at("weight_map"), use_shards),
    Kind("index: structure", INDEX, as_json(lambda path: len(path) == 1), use_shards),
    Kind("index: bytes", INDEX, spoil_bytes, use_shards, parsed=False),
    Kind("config: sizes", "config.json", as_json(lambda path: "_" in path[0] and "rope" not in path[0]), use_model),
    Kind("config: rope", "config.json", at("rope_scaling", "rope_theta", "rms_norm_eps"), use_model),
    Kind("config: any", "config.json", as_json(), use_model),
    Kind("config: bytes", "config.json", spoil_bytes, use_model, parsed=False),
    Kind("adapter: numbers", "adapter/adapter_config.json", at("r", "lora_alpha", "lora_dropout"), use_merge),
    Kind("adapter: targets", "adapter/adapter_config.json", at("target_modules"), use_merge),
    Kind("adapter: any key", "adapter/adapter_config.json", as_json(), use_merge),
    Kind("adapter: config bytes", "adapter/adapter_config.json", spoil_bytes, use_merge, parsed=False),
    Kind("adapter: shapes", ADAPTER, field_of("shape"), use_merge),
    Kind("adapter: names", ADAPTER, header_names, use_merge),
    Kind("adapter: coherent, of another model", ADAPTER, coherent, use_merge),
    Kind("adapter: bytes", ADAPTER, spoil_bytes, use_merge, parsed=False),
    Kind("pairs: keys", "pairs.jsonl", rows_of(spoil), use_pairs),
    Kind("pairs: ids", "pairs.jsonl", only("id"), use_pairs),
    Kind("pairs: texts", "pairs.jsonl", rows_of(texts), use_pairs),
    Kind("pairs: numbers", "pairs.jsonl", rows_of(numbers), use_pairs),
    Kind("pairs: doubled, nested", "pairs.jsonl", rows_of(doubled), use_pairs),
    Kind("pairs: bytes", "pairs.jsonl", spoil_bytes, use_pairs, parsed=False),
    Kind("predictions: keys", "predictions.jsonl", rows_of(spoil), use_predictions),
    Kind("predictions: model, stop", "predictions.jsonl", only("model", "stop_reason", "modality"), use_predictions),
    Kind("predictions: texts", "predictions.jsonl", rows_of(texts), use_predictions),
    Kind("predictions: numbers", "predictions.jsonl", rows_of(numbers), use_predictions),
    Kind("predictions: doubled, nested", "predictions.jsonl", rows_of(doubled), use_predictions),
    Kind("predictions: bytes", "predictions.jsonl", spoil_bytes, use_predictions, parsed=False),
    Kind("tokenizer: vocabulary", "tokenizer.json", at("vocab"), use_tokenizer),
    Kind("tokenizer: merges", "tokenizer.json", at("merges"), use_tokenizer),
    Kind("tokenizer: added tokens", "tokenizer.json", at("added_tokens"), use_tokenizer),
    Kind("tokenizer: pipeline", "tokenizer.json", at(*PIPELINE), use_tokenizer),
    Kind("tokenizer: any key", "tokenizer.json", as_json(lambda path: "model" not in path[:-2]), use_tokenizer),
    Kind("tokenizer: bytes", "tokenizer.json", spoil_bytes, use_tokenizer, parsed=False),
    Kind("tokenizer: SentencePiece", "piece/tokenizer.model", pieces, use_piece),
    Kind("tokenizer: tiktoken", "tiktoken/tokenizer.model", ranks, use_tiktoken),
    Kind("Meta: params.json", "meta/params.json", as_json(), use_import),
    Kind("Meta: pickle", "meta/consolidated.00.pth", unpickled, use_import),
    Kind("prompt: any key", "prompt.json", as_json(), use_prompt),
    Kind("job: training", "job.json", at("training"), use_job),
    Kind("job: any key", "job.json", as_json(), use_job),
    Kind("job: bytes", "job.json", spoil_bytes, use_job, parsed=False),
]  # fmt: skip


# ---------------------------------------------------------------- the good folder


def make_base(folder: Path, tokenizer_folder: Path) -> None:
    """The folder that every case spoils: tiny models, an adapter, tokenizers, reports, a training config."""
    import base64

    import sentencepiece
    import torch
    from conftest import SENTENCES, random_llama, tiny_config
    from test_meta import write_meta

    from radllama.checkpoint import quantize_folder, save_model
    from radllama.lora import add_lora, save_adapter
    from radllama.model import RopeScaling

    for file in tokenizer_folder.glob("tokenizer*"):
        shutil.copyfile(file, folder / file.name) if folder.exists() else (
            folder.mkdir(),
            shutil.copyfile(file, folder / file.name),
        )
    scaling = RopeScaling(8.0, 1.0, 4.0, 64)
    model = random_llama(tiny_config(num_hidden_layers=1, rope_scaling=scaling))
    save_model(model, folder / "whole")
    for file in (folder / "whole").iterdir():
        file.rename(folder / file.name)
    (folder / "whole").rmdir()
    save_model(model, folder / "shards", max_shard_bytes=9000)
    (folder / "shards/folder.safetensors").mkdir()
    quantize_folder(folder, folder / "nf4", quant_type="nf4", dtype=torch.float32)
    add_lora(model, rank=2, alpha=4)
    save_adapter(model, folder / "adapter", base_model="base")
    write_meta(random_llama(tiny_config(vocab_size=96, num_hidden_layers=2)), folder / "meta", 1)
    (folder / "piece").mkdir()
    (folder / "tiktoken").mkdir()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(SENTENCES * 20), model_prefix=str(folder / "piece/tokenizer"), vocab_size=100,
        model_type="bpe", byte_fallback=False, minloglevel=2,
    )  # fmt: skip
    (folder / "piece/tokenizer.vocab").unlink()
    lines = [base64.b64encode(bytes([n])) + b" %d" % n for n in range(256)]
    (folder / "tiktoken/tokenizer.model").write_bytes(b"\n".join(lines))
    (folder / "prompt.json").write_text(json.dumps({"format": "llama3", "instructions": ["Conclude.", "Sum up."]}))
    rows = [
        {
            "id": f"r{n}",
            "findings": f"{MARKER} {SENTENCES[n]}",
            "impression": f"{MARKER}.",
            "modality": "CT",
            "dose": 1.5,
        }
        for n in range(6)
    ]
    (folder / "pairs.jsonl").write_bytes(b"\n".join(map(dump, rows)))
    for name in ("predictions", "others"):
        told = [
            {"id": row["id"], "findings": row["findings"], "reference": row["impression"], "prediction": f"{MARKER} a.",
             "model": name, "stop_reason": "stop", "modality": "CT", "patient_id": f"p{row['id']}"}
            for row in rows
        ]  # fmt: skip
        (folder / f"{name}.jsonl").write_bytes(b"\n".join(map(dump, told)))
    job = json.loads((Path(__file__).parents[1] / "qlora.json").read_text())
    job["training"] = {"output": "run", "steps": 4, "epochs": None, "batch_size": 8, "accumulation": 1, "seed": 1,
                       "betas": [0.9, 0.95], "optimizer": "adamw", "warmup": 0.1, "learning_rate": 1e-3}  # fmt: skip
    job |= {"lora": {"rank": 4, "alpha": 8, "targets": ["q_proj"]}, "deepspeed": {"zero_optimization": {"stage": 1}}}
    job["data"]["weights"] = {"modality": {"CT": 2.0}}
    (folder / "job.json").write_text(json.dumps(job))


# ---------------------------------------------------------------- running


def run_case(base: Path, seed: int, case: int) -> tuple[str, str]:
    """("loaded" or "refused", "") or ("finding", what happened); raises nothing that the loaders do not."""
    kind = KINDS[case % len(KINDS)]
    draw = random.Random(f"{seed}/{case}")
    with tempfile.TemporaryDirectory(prefix="fuzz-") as place:
        folder = Path(place) / "case"
        part = kind.file.split("/")[0] if kind.file.startswith(PARTS) else ""
        shutil.copytree(base / part, folder / part, copy_function=os.link,
                        ignore=lambda _, names: [n for n in names if n in PARTS])  # fmt: skip
        if kind.name == "index: shards":
            links = {"outside": Path(place) / "stranger.safetensors", "inside": folder / "shards" / WEIGHTS}
            shutil.copyfile(base / WEIGHTS, Path(place) / "stranger.safetensors")
            chosen = draw.choice(("outside", "inside", "pipe"))
            if chosen == "pipe":
                os.mkfifo(folder / "shards/pipe.safetensors")
            else:
                (folder / f"shards/{chosen}.safetensors").symlink_to(links[chosen])
        file = folder / kind.file
        content = file.read_bytes()
        file.unlink()
        file.write_bytes(kind.change(content, draw))
        try:
            kind.use(folder)
        except ValueError as error:
            message = str(error)
            if str(file) not in message and str(file.parent) not in message:
                return "finding", f"{kind.name}: the message does not name {kind.file}: {error!r:.300}"
            if isinstance(error, UnicodeError | json.JSONDecodeError):
                return "finding", f"{kind.name}: a parser's own error: {error!r:.300}"
            if MARKER in message:
                return "finding", f"{kind.name}: the message quotes a report: {error!r:.300}"
            if len(message) > 20_000:
                return "finding", f"{kind.name}: a message of {len(message)} characters"
            return "refused", ""
        return "loaded", ""


def work(base: Path, seed: int, first: int, count: int) -> None:
    """The child: a line before each case and one after it."""
    import logging

    from radllama import cache, cases, checkpoint  # noqa: F401 - imported before the limit is set

    logging.disable()
    warm = (
        "header: names",
        "4-bit: record",
        "adapter: numbers",
        "pairs: ids",
        "predictions: keys",
        "tokenizer: merges",
    )
    for number, kind in enumerate(KINDS):
        if kind.name in warm:
            run_case(base, -1, number)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, used + MEMORY))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for case in range(first, first + count):
        print(json.dumps({"start": case, "kind": KINDS[case % len(KINDS)].name}), flush=True)
        signal.alarm(TIMEOUT)  # no handler: it ends the process, whatever that is doing
        try:
            outcome, what = run_case(base, seed, case)
        except BaseException as error:  # a finding, whatever it is (pyo3's panics are no Exceptions)
            kind = KINDS[case % len(KINDS)].name
            where = traceback.extract_tb(error.__traceback__)[-1]
            outcome, what = "finding", f"{kind}: {error!r:.300} at {Path(where.filename).name}:{where.lineno}"
        signal.alarm(0)
        now = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        if now - peak > 500_000:
            outcome, what = "finding", f"{KINDS[case % len(KINDS)].name}: took {(now - peak) >> 10} MB"
        peak = max(peak, now)
        print(json.dumps({"case": case, "outcome": outcome, "what": what}), flush=True)


def run(
    base: Path, *, cases: int, seed: int, script: Path = Path(__file__)
) -> tuple[dict[str, Counter[str]], list[str]]:
    """Outcomes by kind, and the findings."""
    outcomes: dict[str, Counter[str]] = {}
    first = 0
    findings: list[str] = []
    end = first + cases
    while first < end:
        command = [sys.executable, str(script), "--work", str(base), str(seed), str(first), str(end - first)]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
        begun = None
        with subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
        ) as child:
            assert child.stdout
            for line in child.stdout:
                if not line.startswith("{"):
                    continue
                told = json.loads(line)
                if "start" in told:
                    begun, name = told["start"], told["kind"]
                    continue
                outcomes.setdefault(name, Counter())[told["outcome"]] += 1
                if told["outcome"] == "finding":
                    findings.append(f"case {told['case']} of seed {seed}: {told['what']}")
                    print(findings[-1], file=sys.stderr, flush=True)
                first, begun = told["case"] + 1, None
            stderr = child.stderr.read() if child.stderr else ""
        if first < end:
            if begun is None:
                raise RuntimeError(f"the cases cannot be started: {stderr[-3000:]}")
            outcomes.setdefault(name, Counter())["finding"] += 1
            findings.append(
                f"case {begun} of seed {seed}: {name}: the process ended ({child.returncode}): {stderr[-300:]}"
            )
            first = begun + 1
    return outcomes, findings


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--cases", type=int, default=200 * len(KINDS), help="default: 200 of each kind, 10,400 in all")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--case", type=int, help="run this case alone, here, and show its traceback")
    parser.add_argument("--work", nargs=4, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.work:
        base, seed, first, count = options.work
        work(Path(base), int(seed), int(first), int(count))
        return 0
    with tempfile.TemporaryDirectory() as place:
        make = [sys.executable, str(Path(__file__).parents[1] / "assets/make_base.py"), "--vocab-size", "450"]
        base = Path(place) / "base"
        subprocess.run([*make, "--texts", "assets/reports/validation.jsonl", "--output", f"{place}/t"], check=True,
                       capture_output=True, cwd=Path(__file__).parents[1])  # fmt: skip
        make_base(base, Path(place) / "t")
        if options.case is not None:
            print(KINDS[options.case % len(KINDS)].name, *run_case(base, options.seed, options.case))
            return 0
        outcomes, findings = run(base, cases=options.cases, seed=options.seed)
    print(table(outcomes))
    print("\n".join(findings) or "no findings")
    return 1 if findings else 0


def table(outcomes: dict[str, Counter[str]]) -> str:
    lines = [f"{'what is spoilt':<38} {'past the parser':>15} {'refused':>8} {'loaded':>7} {'findings':>9}"]
    parsed = {kind.name: kind.parsed for kind in KINDS}
    for name, found in outcomes.items():
        mark = "yes" if parsed[name] else "no"
        lines.append(f"{name:<38} {mark:>15} {found['refused']:>8} {found['loaded']:>7} {found['finding']:>9}")
    total = sum(outcomes.values(), Counter[str]())
    lines.append(f"{'all':<38} {'':>15} {total['refused']:>8} {total['loaded']:>7} {total['finding']:>9}")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
