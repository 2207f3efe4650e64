"""Findings -> impressions: batched decoding with a KV cache.

python -m radllama.generate --model DIR [--adapter DIR] --input pairs.jsonl --output predictions.jsonl
torchrun --nproc_per_node 8 -m radllama.generate ...        # the same file; so does deepspeed --module

An interrupted run leaves OUTPUT.partial; the same command goes on from it.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import logging
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from radllama.checkpoint import find_model, load_model
from radllama.data import HELD_OUT_INSTRUCTIONS, INSTRUCTIONS, Example, Prompt, check_vocabulary, read_examples
from radllama.decode import Sampler, decode, generate, seed_of
from radllama.files import some, write_rows
from radllama.lora import load_adapter
from radllama.model import Llama
from radllama.parts import Ranks, remove_parts, run_in_parts
from radllama.similar import words
from radllama.tokenizer import Tokenizer

logger = logging.getLogger("radllama")

__all__ = ["common_length", "consensus", "generate", "main", "predict", "predictions", "render"]

CORPUS = 10_000  # impressions that drafts are taken from: 2,000 already found nearly all that there is to find
VOTES = 2  # of a similar report's impression beside each sample's one; chosen on real reports' validation part


def common_length(a: list[str], b: list[str]) -> int:
    """Length of the longest common subsequence, bit-parallel over `a` (Hyyro 2004)."""
    places: dict[str, int] = {}
    for i, word in enumerate(a):
        places[word] = places.get(word, 0) | 1 << i
    full = column = (1 << len(a)) - 1
    for word in b:
        hit = column & places.get(word, 0)
        column = ((column + hit) | (column - hit)) & full
    return len(a) - column.bit_count()


def consensus(candidates: list[str], similar: Sequence[str] = ()) -> int:
    """Which candidate agrees most with all of them: the highest mean F1 of common subsequences of words, the earliest
    of equals. The impressions of similar reports vote, too, but cannot be elected: they speak of other patients.

    Minimum Bayes risk over samples (Kumar and Byrne 2004): what a model says again and again it rather knows; what
    stands in one sample alone it rather made up.
    """
    texts = [words(text) for text in candidates]
    votes = Counter(map(tuple, texts))
    for text in similar:
        votes[tuple(words(text))] += VOTES

    def agreement(one: list[str]) -> float:
        return sum(
            count * 2 * common_length(one, list(other)) / max(1, len(one) + len(other))
            for other, count in votes.items()
        )

    return max(range(len(texts)), key=lambda place: agreement(texts[place]))


def predict(
    model: Llama, tokenizer: Tokenizer, prompt: Prompt, examples: list[Example], *, name: str, **options: Any
) -> list[dict[str, Any]]:
    """Rows of predictions.jsonl for the examples, in their order. `options` go to `predictions`."""
    prompts = render(tokenizer, prompt, examples)
    rows = dict(predictions(model, tokenizer, prompts, examples, range(len(examples)), name=name, **options))
    return [rows[place] for place in range(len(examples))]


def warn_of_length(model: Llama, prompts: list[list[int]], examples: list[Example], new: int) -> None:
    most = model.config.max_position_embeddings
    if long := [e.id for ids, e in zip(prompts, examples, strict=True) if len(ids) + new > most]:
        logger.warning("with %d new tokens %d reports pass the %d tokens that the model was made for, and may come out "
                       "badly: %s", new, len(long), most, some(long))  # fmt: skip


def check_similar(similar: int, examples: list[Example], file: Path) -> None:
    """ValueError where a model was trained with `similar` reports in its prompts, and a file's examples have none."""
    if similar and any("similar" not in example.fields for example in examples):
        raise ValueError(
            f"{file}: this model was trained with {similar} impressions of similar reports in every prompt; "
            "add them with python -m radllama.similar, from the same training file"
        )


def render(tokenizer: Tokenizer, prompt: Prompt, examples: list[Example]) -> list[list[int]]:
    return [tokenizer.render(prompt.messages(prompt.question(e)), add_generation_prompt=True)[0] for e in examples]


def responses(tokenizer: Tokenizer, prompt: Prompt, examples: list[Example]) -> list[list[int]]:
    """The token ids that a model trained on these examples writes for them, the stop id included."""
    rendered = (tokenizer.render(prompt.messages(prompt.question(e), e.impression)) for e in examples)
    return [[token for token, of_response in zip(*row, strict=True) if of_response] for row in rendered]


def predictions(
    model: Llama, tokenizer: Tokenizer, prompts: list[list[int]], examples: list[Example], places: Sequence[int], *,
    name: str, samples: int = 1, temperature: float = 0.0, top_k: int | None = None, top_p: float | None = None,
    seed: int = 0, progress: bool = False, **options: Any) -> Iterator[tuple[int, dict[str, Any]]]:  # fmt: skip
    """Yield (place, row of predictions.jsonl) for the examples at `places`, as each is finished.

    `options` go to `decode`; of several `samples` (seeds `seed`, `seed` + 1, ...) the `consensus` is kept. A row
    depends on its example's place among all, not on which are asked for together.
    """
    repeated = [prompts[place] for place in places for _ in range(samples)]  # decode() computes equal prompts once
    seeds = [seed_of(seed + k, place) for place in places for k in range(samples)]
    drawn: dict[int, dict[int, list[int]]] = {place: {} for place in places}
    bar = tqdm(total=len(places), desc="generate", unit="report", disable=not progress)
    sampler = Sampler(temperature, top_k, top_p)
    for number, ids in decode(model, repeated, seeds, sampler, stop_ids=tokenizer.stop_ids, **options):
        place = places[number // samples]
        candidates = drawn[place]
        candidates[number % samples] = ids
        if len(candidates) < samples:
            continue
        example, texts = examples[place], [tokenizer.decode(candidates[k]).strip() for k in range(samples)]
        chosen = consensus(texts, example.fields.get("similar", []))
        bar.update()
        yield (
            place,
            example.fields
            | {
                "id": example.id,
                "findings": example.findings,
                "reference": example.impression,
                "prediction": texts[chosen],
                "model": name,
                "stop_reason": "stop" if candidates[chosen][-1] in tokenizer.stop_ids else "length",
            },
        )
    bar.close()


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m radllama.generate", description="Write impressions for findings.")
    parser.add_argument("--model", required=True, help="model folder or Hugging Face repository")
    parser.add_argument("--adapter", type=Path, help="LoRA adapter folder (runs/NAME/best, or PEFT's)")
    parser.add_argument(
        "--input", required=True, type=Path, help="JSON lines with id and findings (impression: the reference)"
    )
    parser.add_argument("--output", required=True, type=Path, help="predictions.jsonl to write")
    parser.add_argument("--quantize", choices=["nf4", "fp4"], help="store the weights in 4 bits, as QLoRA trained them")
    parser.add_argument("--dtype", choices=["auto", "float32", "bfloat16", "float16"], default="auto")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--prompt-format", choices=["llama3", "llama2", "alpaca"], help="default: as in training")
    wording = parser.add_mutually_exclusive_group()
    wording.add_argument("--instruction", help="default: the first wording of training")
    wording.add_argument(
        "--instructions",
        metavar="held-out|FILE",
        help="to see how much the wording matters: ask with each of several (five that training never saw, or those of "
        "FILE, one a line) and write OUTPUT's name with .1, .2, ... before its ending",
    )
    parser.add_argument(
        "--corpus",
        type=Path,
        metavar="PAIRS",
        help="pairs whose impressions, up to 10,000, are tried as drafts (the training file): the same "
        "greedy output, sooner",
    )
    parser.add_argument("--max-new-tokens", type=int, default=256)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--temperature", type=float, default=0.0, help="0 is greedy (default)")
    parser.add_argument("--top-k", type=int)
    parser.add_argument("--top-p", type=float)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--consensus",
        type=int,
        default=1,
        metavar="N",
        help="draw N impressions (--temperature 0.6, say) and keep the one that agrees most with the others",
    )
    parser.add_argument("--limit", type=int, help="only the first N reports")
    parser.add_argument(
        "--name", help="what predictions.jsonl calls this model; default: the adapter's or model's folder"
    )
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # deepspeed's launcher
    options = parser.parse_args(arguments)
    try:
        with Ranks() as ranks:
            written = _run(options, ranks)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except torch.OutOfMemoryError:
        print("error: the GPU's memory is full; lower --batch-size, or give --quantize nf4", file=sys.stderr)
        sys.exit(1)
    for file, rows in written.items():
        cut = sum(row["stop_reason"] == "length" for row in rows)
        print(f"wrote {file}: {len(rows)} predictions, {cut} cut at {options.max_new_tokens} tokens")


def _run(options: argparse.Namespace, ranks: Ranks) -> dict[Path, list[dict[str, Any]]]:
    check_device(options.device, ranks.local_rank if ranks.world > 1 else 0)
    for name in ("max_new_tokens", "batch_size", "limit"):
        if (value := getattr(options, name)) is not None and value < 1:
            raise ValueError(f"--{name.replace('_', '-')}: expected at least 1, found {value}")
    Sampler(options.temperature, options.top_k, options.top_p)
    if options.consensus < 1 or (options.consensus > 1 and options.temperature == 0):
        raise ValueError("--consensus: expected at least 1, and with more a --temperature above 0 (0.6, say)")
    if options.corpus and options.temperature > 0:
        raise ValueError("--corpus: drafts serve greedy decoding alone; leave it out with a --temperature")
    if options.output.is_dir():
        raise ValueError(f"--output: {options.output} is a folder; give the file to write")
    if not options.output.parent.is_dir():
        raise ValueError(f"--output: the folder {options.output.parent} does not exist")
    examples = read_examples(options.input, need_impression=False)[: options.limit]
    if any(not example.findings for example in examples):
        raise ValueError(f"{options.input}: expected findings on every line, found plain texts")
    known = [example for example in read_examples(options.corpus) if example.impression] if options.corpus else []
    source = find_model(options.model)
    trained = Prompt.load(options.adapter if options.adapter else source)
    similar = trained.similar if trained else 0
    check_similar(similar, examples, options.input)
    prompt_format = options.prompt_format or (trained.format if trained else None)
    tokenizer = Tokenizer.from_dir(source, prompt_format=prompt_format)
    wordings = _wordings(options, (trained.instructions if trained else INSTRUCTIONS)[0])
    dtype = getattr(torch, options.dtype) if options.dtype != "auto" else _dtype(options.device)
    device = f"cuda:{ranks.local_rank}" if options.device == "cuda" and ranks.world > 1 else options.device
    first = ranks.rank == 0
    model = load_model(source, quantize=options.quantize, dtype=dtype, device=device, progress=first)
    check_vocabulary(tokenizer, model.config.vocab_size, source=str(source))
    if options.adapter:
        load_adapter(model, options.adapter)
    written: dict[Path, list[dict[str, Any]]] = {}
    for number, instruction in enumerate(wordings, 1):
        name, file, extra = options.name or str(options.adapter or options.model), options.output, {}
        if options.instructions:
            name, extra = f"{name} #{number}", {"instruction": instruction}
            file = file.with_name(f"{file.stem}.{number}{file.suffix}")
        prompt = Prompt(tokenizer.prompt_format, (instruction,), similar)
        prompts = render(tokenizer, prompt, examples)
        if first:
            warn_of_length(model, prompts, examples, options.max_new_tokens)
        work = partial(
            predictions, model, tokenizer, prompts, examples, name=name, samples=options.consensus,
            temperature=options.temperature, top_k=options.top_k, top_p=options.top_p, seed=options.seed,
            max_new_tokens=options.max_new_tokens, batch_size=options.batch_size, progress=first,
            corpus=responses(tokenizer, prompt, known[:CORPUS]))  # fmt: skip
        settings = _settings(options, source, str(dtype), name, prompts, [vars(example) for example in examples])
        rows = run_in_parts(ranks, file, settings, [len(ids) for ids in prompts], work)
        if first:
            written[file] = [row | extra for row in rows]
            write_rows(file, written[file])
    for file in written:  # only now: after an interruption the wordings that were done are not done again
        remove_parts(file)
    return written


def check_device(name: str, local_rank: int) -> None:
    """ValueError where this machine has no such device for this rank."""
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"--device: {name} is no device; expected cpu, cuda or cuda:N") from None
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"--device: expected cpu, cuda or cuda:N, found {name}")
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if device.type == "cuda" and not count:
        raise ValueError("--device: cuda was asked for, but this machine shows no CUDA GPU; use cpu")
    if device.type == "cuda" and (device.index or local_rank) >= count:
        raise ValueError(f"--device: this machine shows {count} GPUs; number {device.index or local_rank} is not there")


def _settings(options: argparse.Namespace, source: Path, *more: Any) -> str:
    """A fingerprint of all that a prediction depends on: how it is drawn, weights' files (sizes, times), `more`."""
    keys = ("quantize", "max_new_tokens", "consensus", "temperature", "top_k", "top_p", "seed")
    drawn = {key: getattr(options, key) for key in keys}
    folders = [source, options.adapter] if options.adapter else [source]
    files = [file for folder in folders for kind in ("*.safetensors", "*.json") for file in sorted(folder.glob(kind))]
    stats = [(str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    return hashlib.sha256(json.dumps([drawn, stats, *more]).encode()).hexdigest()


def _wordings(options: argparse.Namespace, default: str) -> list[str]:
    if options.instructions == "held-out":
        return list(HELD_OUT_INSTRUCTIONS)
    if not options.instructions:
        return [options.instruction or default]
    try:
        lines = Path(options.instructions).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"--instructions: expected held-out or a text file, one wording a line ({error})") from None
    if not any(line.strip() for line in lines):
        raise ValueError(f"--instructions: {options.instructions} holds no wording; expected one a line")
    return [line.strip() for line in lines if line.strip()]


def _dtype(device: str) -> torch.dtype:
    """bf16 where the GPU has it, else fp16; fp32 on a CPU, the dtype that is exact."""
    if not device.startswith("cuda"):
        return torch.float32
    return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16


if __name__ == "__main__":
    main()
