"""Greedy impressions for 64 reports against transformers + bitsandbytes, in turn on the same prompts.

    python bench/generate.py [--pairs data/indiana/test.jsonl] [--learn 30] [--corpus data/indiana/train.jsonl]

A Llama of 220 M parameters (hidden 1024, 8 layers, 16 heads, 4 of keys, intermediate 2816, 128,256 tokens, tied) in NF4
with double quantisation; Llama 3's tokenizer. With `--learn N` it learns the reports of the benchmark by heart first
(N passes, minutes; kept in `--work`: it holds what it learnt from), so that it writes real impressions and stops
where they end. Without, its weights are random, and a report's output ends where it is as long as the report's own
impression; ours then guesses no drafts, which random weights would confirm far too often. Contestants:

    ours     radllama.decode.generate; with `--corpus` it takes drafts from the impressions of the training part, too,
             which lies beside the reports of the benchmark and holds none of them
    exact    model.generate(do_sample=False), the same stop ids, prompts sorted by length, its best batch size
    rounded  the same with the fused AVX512-BF16 kernels that bitsandbytes takes by itself on CPUs that have them: they
             round activations to bf16, whatever the compute dtype, so its texts may differ

`ours` and `exact` agree on every token or it fails; of `rounded` the number of equal outputs is printed. A peer's batch
size is the fastest of `--batch-sizes`, one run each. Then runs alternate; printed are medians, and medians of the
turns' ratios.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import random
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import transformers
from bitsandbytes.functional import has_avx512bf16
from torch import Tensor

from radllama import decode
from radllama.checkpoint import load_model, save_model
from radllama.data import INSTRUCTIONS, Example, Prompt, Row, pack, read_examples
from radllama.decode import generate
from radllama.generate import responses
from radllama.model import Llama, LlamaConfig
from radllama.tokenizer import Tokenizer

ROOT = Path(__file__).parents[1]
PACKAGES = ("torch", "transformers", "bitsandbytes")
SHAPE: dict[str, Any] = {
    "vocab_size": 128_256, "hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 8,
    "num_attention_heads": 16, "num_key_value_heads": 4, "head_dim": 64, "tie_word_embeddings": True,
}  # fmt: skip


@dataclass(frozen=True)
class Work:
    """When outputs end: at a stop id, or, without stop ids, each at its length."""

    stop_ids: list[int]
    lengths: list[int]


Contestant = Callable[[], list[list[int]]]


def rows_of(examples: list[Example], tokenizer: Tokenizer, prompt: Prompt) -> list[Row]:
    rendered = [tokenizer.render(prompt.messages(e.findings, e.impression)) for e in examples]
    return [Row(e.id, ids, mask, 0) for e, (ids, mask) in zip(examples, rendered, strict=True)]


def learn(model: Llama, rows: list[Row], passes: int) -> None:
    """By heart: every layer, not the embedding (which is the head, too). Stops early where nothing is left to learn."""
    model.requires_grad_(False)
    model.model.layers.requires_grad_(True)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-3, betas=(0.9, 0.95), weight_decay=0.0)
    started, draw = time.perf_counter(), random.Random(0)
    for number in range(passes):
        total = count = 0.0
        for group in optimizer.param_groups:
            group["lr"] = 1e-3 * min(1.0, (number + 1) / 3, 2 * (1 - number / passes))
        order = draw.sample(rows, len(rows))
        for start in range(0, len(order), 16):
            batch = pack(order[start : start + 16])
            losses = model(
                batch.tokens, positions=batch.positions, segments=batch.segments,
                label_positions=batch.label_positions, labels=batch.labels)  # fmt: skip
            losses.mean().backward()
            torch.nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            optimizer.zero_grad()
            total, count = total + losses.sum().item(), count + len(losses)
        print(f"pass {number + 1}: loss {total / count:.4f}, {time.perf_counter() - started:.0f} s", flush=True)
        if total / count < 0.005:
            break


def prepare(folder: Path, examples: list[Example], tokenizer: Tokenizer, prompt: Prompt, passes: int) -> None:
    """Write the model that every contestant loads."""
    model = Llama(LlamaConfig(**SHAPE))
    torch.manual_seed(0)
    with torch.no_grad():
        for weight in model.parameters():
            torch.nn.init.normal_(weight, std=0.02) if weight.dim() > 1 else weight.fill_(1)
    if passes:
        learn(model, rows_of(examples, tokenizer, prompt), passes)
    folder.mkdir(parents=True, exist_ok=True)
    save_model(model, folder)
    tokenizer.save(folder)


def peer(folder: Path, *, rounded: bool) -> Any:
    quantization = transformers.BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32)  # fmt: skip
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, quantization_config=quantization
    ).eval()
    if not rounded:
        for module in model.modules():
            if hasattr(module, "support_avx512bf16_for_cpu"):
                module.support_avx512bf16_for_cpu = False
    return model


class AtLength(transformers.StoppingCriteria):  # type: ignore[misc]
    """Each row ends at its own length."""

    def __init__(self, lengths: list[int]) -> None:
        self.lengths = torch.tensor(lengths)

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        return input_ids.shape[1] >= self.lengths


def ours(
    model: Llama, prompts: list[list[int]], work: Work, batch_size: int, corpus: list[list[int]]
) -> list[list[int]]:
    if work.stop_ids:
        return generate(
            model, prompts, stop_ids=work.stop_ids, max_new_tokens=max(work.lengths), batch_size=batch_size,
            corpus=corpus)  # fmt: skip
    wanted = {tuple(prompt): length for prompt, length in zip(prompts, work.lengths, strict=True)}
    plain = decode._accept

    def accept(row: decode.Row, *rest: Any) -> bool:
        return plain(row, *rest) or len(row.output) == wanted[tuple(row.text[: row.prompt_length])]

    with patch.object(decode, "_accept", accept):
        return generate(
            model, prompts, stop_ids=(), max_new_tokens=max(work.lengths), batch_size=batch_size, draft_tokens=0
        )


def peer_generate(model: Any, prompts: list[list[int]], work: Work, batch_size: int) -> list[list[int]]:
    order = sorted(range(len(prompts)), key=lambda place: -len(prompts[place]))
    outputs: list[list[int]] = [[] for _ in prompts]
    pad = 128_004  # <|finetune_right_pad_id|>
    for start in range(0, len(order), batch_size):
        places = order[start : start + batch_size]
        longest = max(len(prompts[place]) for place in places)
        tokens = torch.tensor([[pad] * (longest - len(prompts[place])) + prompts[place] for place in places])
        with torch.inference_mode():
            ends = [AtLength([longest + work.lengths[place] for place in places])] if not work.stop_ids else []
            found = model.generate(
                tokens, attention_mask=(tokens != pad).long(), do_sample=False, max_new_tokens=max(work.lengths),
                pad_token_id=pad, eos_token_id=work.stop_ids or None,
                stopping_criteria=transformers.StoppingCriteriaList(ends))  # fmt: skip
        for place, row in zip(places, found[:, longest:].tolist(), strict=True):
            end = next((n + 1 for n, token in enumerate(row) if token in work.stop_ids), work.lengths[place])
            outputs[place] = row[:end]
    return outputs


def timed(run: Contestant) -> tuple[float, list[list[int]]]:
    started = time.perf_counter()
    outputs = run()
    return time.perf_counter() - started, outputs


def main() -> None:
    parser = argparse.ArgumentParser(description="Greedy impressions against transformers + bitsandbytes.")
    parser.add_argument("--pairs", type=Path, default=ROOT / "assets/reports/test.jsonl")
    parser.add_argument("--tokenizer", type=Path, help="a folder with Llama 3's; default: the package llama-models'")
    parser.add_argument("--work", type=Path, default=ROOT / "runs/bench-generate", help="where the models are kept")
    parser.add_argument("--learn", type=int, default=0, metavar="N", help="passes over the reports; 0: random weights")
    parser.add_argument("--reports", type=int, default=64)
    parser.add_argument("--max-new-tokens", type=int, default=128)
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 8, 16, 32, 64], help="the peers'")
    parser.add_argument("--our-batch-size", type=int, default=64)
    parser.add_argument("--corpus", type=Path, help="training pairs whose impressions ours takes drafts from, too")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--layers", type=int, default=SHAPE["num_hidden_layers"], help="fewer: to try the script")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    SHAPE["num_hidden_layers"] = options.layers
    source = options.tokenizer or importlib.metadata.distribution("llama-models").locate_file("llama_models/llama3")
    tokenizer = Tokenizer.from_dir(str(source))
    prompt = Prompt(tokenizer.prompt_format, INSTRUCTIONS[:1])
    chosen = {example.findings: example for example in read_examples(options.pairs)}  # no findings twice
    examples = random.Random(0).sample(list(chosen.values()), min(options.reports, len(chosen)))
    folder = options.work / f"{options.pairs.parent.name}-{len(examples)}-{options.layers}-{options.learn}"
    if not (folder / "config.json").is_file():
        prepare(folder, examples, tokenizer, prompt, options.learn)
    prompts = [tokenizer.render(prompt.messages(e.findings), add_generation_prompt=True)[0] for e in examples]
    impressions = [sum(row.mask) for row in rows_of(examples, tokenizer, prompt)]
    most = options.max_new_tokens
    if options.learn:
        work = Work(sorted(tokenizer.stop_ids), [most] * len(prompts))
    else:
        work = Work([], [min(most, length) for length in impressions])

    known = read_examples(options.corpus) if options.corpus else []
    assert not {e.id for e in known} & {e.id for e in examples}, "--corpus holds reports of the benchmark"
    corpus = responses(tokenizer, prompt, known)
    print(", ".join(f"{name} {importlib.metadata.version(name)}" for name in PACKAGES))
    model = load_model(folder, quantize="nf4", dtype=torch.float32)
    contestants: dict[str, Contestant] = {"ours": lambda: ours(model, prompts, work, options.our_batch_size, corpus)}
    short = Work(work.stop_ids, [2, 2])
    ours(model, prompts[:2], short, 2, corpus)
    for name in ("exact", "rounded") if has_avx512bf16() else ("exact",):
        theirs, seconds = peer(folder, rounded=name == "rounded"), {}
        peer_generate(theirs, prompts[:2], short, 2)
        for size in options.batch_sizes:
            seconds[size], _ = timed(lambda: peer_generate(theirs, prompts, work, size))  # noqa: B023
        best = min(seconds, key=lambda size: seconds[size])
        print(f"{name}: " + ", ".join(f"batch {size}: {value:.1f} s" for size, value in seconds.items()), flush=True)
        contestants[name] = lambda theirs=theirs, best=best: peer_generate(theirs, prompts, work, best)  # type: ignore[misc]

    times: dict[str, list[float]] = {name: [] for name in contestants}
    outputs: dict[str, list[list[int]]] = {}
    for turn in range(options.turns):
        for name in contestants if turn % 2 else reversed(contestants):
            taken, outputs[name] = timed(contestants[name])
            times[name].append(taken)
        different = [
            e.id for e, one, other in zip(examples, outputs["ours"], outputs["exact"], strict=True) if one != other
        ]
        assert not different, f"other ids than transformers': {different}"

    written = [len(output) for output in outputs["ours"]]
    lengths = [len(ids) for ids in prompts]
    right = sum(
        tokenizer.decode(output).strip() == e.impression for e, output in zip(examples, outputs["ours"], strict=True)
    )
    print(
        f"{len(examples)} reports of {options.pairs.parent.name}/{options.pairs.name}, {options.threads} threads; "
        f"prompts of {statistics.mean(lengths):.0f} tokens (longest {max(lengths)}), "
        f"outputs of {statistics.mean(written):.1f} (longest {max(written)}), "
        f"{right} of them the report's own impression; ours and exact: equal ids"
    )
    for name, values in times.items():
        line = f"{name:8}{statistics.median(values):8.2f} s{len(examples) / statistics.median(values):8.2f} reports/s"
        if name != "ours":
            ratios = [theirs / ours for theirs, ours in zip(values, times["ours"], strict=True)]
            equal = sum(one == other for one, other in zip(outputs["ours"], outputs[name], strict=True))
            spread = f"[{min(ratios):.2f}, {max(ratios):.2f}]"
            line += f"   ours: {statistics.median(ratios):.2f}x as fast {spread}; {equal} outputs equal"
        print(line)


if __name__ == "__main__":
    sys.exit(main())
