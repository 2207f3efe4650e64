"""One training step against transformers + PEFT + bitsandbytes, in turn on the same reports.

    python bench/step.py [--pairs data/indiana/train.jsonl] [--method qlora|full] [--wordings 1] [--dtype auto]

A Llama of 230 M parameters (hidden 1024, 8 layers, 16 heads, 4 of keys, intermediate 2816, 128,256 tokens, tied) with
seeded random weights, Llama 3's tokenizer, 8 reports a step, AdamW. qlora: NF4 with double quantisation, LoRA of rank
64 on all seven projections. Contestants, each in a process of its own that loads the same files:

    ours     packs with shared prefixes, as radllama.train runs them
    common   transformers (+ PEFT + bitsandbytes) as commonly configured: padded rows, every logit, and for QLoRA
             prepare_model_for_kbit_training with its gradient checkpointing
    recipe   common with bf16 for all that is not fp32 in it, as recipes for GPUs have it
    tuned    the same stack tuned by hand: one packed row, the head at supervised positions alone, no checkpointing

Before anything is timed: equal losses to 1e-3 at step 1 and trained parameters' gradients of cosine .999 or more (1e-2
and .98 for `recipe`, which rounds to bf16 what the others, in fp32, do not). A turn
is one step of each on the same reports; printed are medians over the turns, and over the turns' ratios. Memory is the
most resident (VmHWM) during the steps, less what was resident when the imports were done.
"""

from __future__ import annotations

import argparse
import gc
import importlib.metadata
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from radllama.fused import multiplies_bf16

ROOT = Path(__file__).parents[1]
LORA = {"rank": 64, "alpha": 128}
CONTESTANTS = {"qlora": ["ours", "common", "tuned", "recipe"], "full": ["ours", "common"]}
PACKAGES = ("torch", "transformers", "peft", "bitsandbytes", "accelerate")
SHAPE = {
    "vocab_size": 128_256, "hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 8,
    "num_attention_heads": 16, "num_key_value_heads": 4, "head_dim": 64, "tie_word_embeddings": True,
}  # fmt: skip


def prepare(folder: Path, options: argparse.Namespace) -> None:
    """What every contestant reads: base, adapter, and the reports of every step as token ids and masks."""
    from radllama.build import random_model
    from radllama.checkpoint import save_model
    from radllama.data import INSTRUCTIONS, Prompt, Reports, read_examples
    from radllama.lora import add_lora, lora_layers, save_adapter
    from radllama.model import LlamaConfig
    from radllama.tokenizer import Tokenizer

    torch.manual_seed(0)
    dtype = getattr(torch, options.dtype)
    model = random_model(LlamaConfig(**SHAPE), 0, device=torch.device("cpu"), dtype=dtype)
    save_model(model, folder / "base")
    if options.method == "qlora":
        add_lora(model, rank=LORA["rank"], alpha=LORA["alpha"])
        with torch.no_grad():  # B starts at zero, which would hide A's gradient
            for _, layer in lora_layers(model):
                nn.init.normal_(layer.lora_B.weight, std=0.01)
        save_adapter(model, folder / "adapter", base_model=str(folder / "base"))
    tokenizer = Tokenizer.from_dir(options.tokenizer)
    prompt = Prompt(tokenizer.prompt_format, INSTRUCTIONS[: options.wordings])
    examples = read_examples(options.pairs)
    reports = Reports(examples, tokenizer, prompt, max_length=options.max_length, seed=0, name=str(options.pairs))
    steps = [
        [{"id": row.id, "ids": row.ids, "mask": row.mask, "wording": row.wording} for row in reports.step(number, 8)]
        for number in range(options.warm_up + options.turns)
    ]
    (folder / "steps.json").write_text(json.dumps(steps), encoding="utf-8")


# ---------------------------------------------------------------- the contestants: (model, loss of a step's rows)


def ours(folder: Path, method: str, dtype: torch.dtype) -> tuple[nn.Module, Callable[[list[Any]], Tensor]]:
    from radllama.attention import row_attention
    from radllama.checkpoint import load_model
    from radllama.data import Row, pack
    from radllama.fused import keep_few_kernels
    from radllama.heap import keep_freed_memory
    from radllama.lora import load_adapter

    keep_few_kernels()  # this, the attention and the heap as radllama.train does
    model = load_model(folder / "base", quantize="nf4" if method == "qlora" else None, dtype=dtype)
    if method == "qlora":
        load_adapter(model, folder / "adapter")
    model.packed_attention = row_attention
    keep_freed_memory()

    def loss(rows: list[Any]) -> Tensor:
        batch = pack(sorted((Row(**row) for row in rows), key=lambda row: (row.wording, len(row.ids))))
        losses = model(
            batch.tokens, positions=batch.positions, segments=batch.segments,
            label_positions=batch.label_positions, labels=batch.labels)  # fmt: skip
        return losses.sum() / len(losses)

    return model, loss


def theirs(folder: Path, method: str, dtype: torch.dtype, *, checkpointing: bool) -> Any:
    import peft
    import transformers

    options: dict[str, Any] = {"dtype": dtype}
    if method == "qlora":
        options["quantization_config"] = transformers.BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
        )
    model = transformers.AutoModelForCausalLM.from_pretrained(folder / "base", **options)
    model.config.use_cache = False
    if method == "qlora":
        model = peft.prepare_model_for_kbit_training(model, use_gradient_checkpointing=checkpointing)
        model = peft.PeftModel.from_pretrained(model, folder / "adapter", is_trainable=True)
    return model.train()


def common(folder: Path, method: str, dtype: torch.dtype) -> tuple[nn.Module, Callable[[list[Any]], Tensor]]:
    model = theirs(folder, method, dtype, checkpointing=True)

    def loss(rows: list[Any]) -> Tensor:
        shape = (len(rows), max(len(row["ids"]) for row in rows))
        tokens, attention, labels = (torch.full(shape, fill, dtype=torch.int64) for fill in (128_001, 0, -100))
        for place, row in enumerate(rows):
            ids, mask = torch.tensor(row["ids"]), torch.tensor(row["mask"])
            tokens[place, : len(ids)], attention[place, : len(ids)] = ids, 1
            labels[place, : len(ids)] = torch.where(mask, ids, -100)
        result: Tensor = model(input_ids=tokens, attention_mask=attention, labels=labels).loss
        return result

    return model, loss


def tuned(folder: Path, method: str, dtype: torch.dtype) -> tuple[nn.Module, Callable[[list[Any]], Tensor]]:
    model = theirs(folder, method, dtype, checkpointing=False)
    bare = model.get_base_model()

    def loss(rows: list[Any]) -> Tensor:
        tokens = torch.tensor([[token for row in rows for token in row["ids"]]])
        positions = torch.tensor([[place for row in rows for place in range(len(row["ids"]))]])
        supervised = torch.tensor([flag for row in rows for flag in row["mask"]]).nonzero().flatten()
        hidden = bare.model(input_ids=tokens, position_ids=positions, use_cache=False).last_hidden_state[0]
        return F.cross_entropy(bare.lm_head(hidden[supervised - 1]).float(), tokens[0, supervised])

    return model, loss


# ---------------------------------------------------------------- a contestant's process


def memory(key: str) -> float:
    """GB: VmRSS now, VmHWM at the most."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key))
    return int(line.split()[1]) / 2**20


def work(options: argparse.Namespace) -> None:
    """Load, then run the step whose number each line of the standard input gives and print what it took, as JSON."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print goes elsewhere
    import bitsandbytes
    import peft
    import transformers

    import radllama.checkpoint
    import radllama.data
    from radllama.quant import kept

    del bitsandbytes, peft, transformers, radllama
    torch.set_num_threads(options.threads)
    before, folder = memory("VmRSS"), options.worker_folder
    torch.manual_seed(0)
    dtype = "bfloat16" if options.worker == "recipe" else options.dtype
    contestants = {"ours": ours, "common": common, "recipe": common, "tuned": tuned}
    model, loss_of = contestants[options.worker](folder, options.method, getattr(torch, dtype))
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    optimizer = torch.optim.AdamW(trained.values(), lr=1e-5, fused=True)
    steps = json.loads((folder / "steps.json").read_text(encoding="utf-8"))
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak of loading
    keep = options.keep_dequantized and options.worker == "ours"
    with kept(model, getattr(torch, dtype)) if keep else nullcontext():
        for line in sys.stdin:
            number = int(line)
            started = time.perf_counter()
            loss = loss_of(steps[number])
            loss.backward()
            if number == 0:
                save_gradients(trained, folder / f"{options.worker}.pt")
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            seconds = time.perf_counter() - started
            answer = {"seconds": seconds, "loss": loss.item(), "memory": memory("VmHWM") - before}
            del loss  # and the graph's nodes with it
            print(json.dumps(answer), file=answers, flush=True)


def save_gradients(trained: dict[str, nn.Parameter], file: Path) -> None:
    strip = "base_model.model."
    named = {name.removeprefix(strip).replace(".default.weight", ".weight"): p for name, p in trained.items()}
    torch.save({name: parameter.grad for name, parameter in named.items()}, file)


# ---------------------------------------------------------------- the benchmark


def check_equal_work(folder: Path, losses: dict[str, float]) -> None:
    """AssertionError unless all contestants have the first step's loss and gradients."""
    expected = torch.load(folder / "ours.pt", mmap=True)
    for name in losses.keys() - {"ours"}:
        loss_bar, cosine_bar = (1e-2, 0.98) if name == "recipe" else (1e-3, 0.999)
        difference = abs(losses["ours"] / losses[name] - 1)
        found = torch.load(folder / f"{name}.pt", mmap=True)
        assert found.keys() == expected.keys(), found.keys() ^ expected.keys()
        cosines = {
            key: F.cosine_similarity(found[key].double().flatten(), expected[key].double().flatten(), dim=0).item()
            for key in expected
        }
        lengths = [(found[key].norm() / expected[key].norm()).item() for key in expected]
        worst = min(cosines, key=lambda key: cosines[key])
        print(
            f"step 1, {name} against ours: loss {losses[name]:.6f}, {losses['ours']:.6f} ({difference:.1e}); lowest "
            f"cosine of {len(cosines)} gradients {cosines[worst]:.6f}, their lengths' ratios {min(lengths):.5f} to "
            f"{max(lengths):.5f}"
        )
        assert difference <= loss_bar, name
        assert cosines[worst] >= cosine_bar, (name, worst)


def main() -> None:
    parser = argparse.ArgumentParser(description="One training step against transformers + PEFT + bitsandbytes.")
    parser.add_argument("--pairs", type=Path, default=ROOT / "assets/reports/train.jsonl")
    parser.add_argument("--tokenizer", type=Path, help="a folder with Llama 3's; default: the package llama-models'")
    parser.add_argument("--method", choices=list(CONTESTANTS), default="qlora")
    parser.add_argument(
        "--dtype",
        choices=["auto", "float32", "bfloat16"],
        default="auto",
        help="auto: what radllama.train chooses",
    )
    parser.add_argument("--wordings", type=int, default=1, help="of the instruction, of our 20")
    parser.add_argument("--max-length", type=int, default=1024)
    parser.add_argument("--turns", type=int, default=10)
    parser.add_argument("--warm-up", type=int, default=2)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--keep-dequantized", action="store_true", help="in ours (quantization.keep_dequantized)")
    parser.add_argument("--only", nargs="*", help="run these contestants alone")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--worker-folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.dtype == "auto":
        options.dtype = "bfloat16" if multiplies_bf16() else "float32"
    if options.worker:
        prepare(options.worker_folder, options) if options.worker == "prepare" else work(options)
        return
    if not options.tokenizer:
        options.tokenizer = Path(
            str(importlib.metadata.distribution("llama-models").locate_file("llama_models/llama3"))
        )
    names = options.only or CONTESTANTS[options.method]
    if options.dtype == "bfloat16":
        names = [name for name in names if name != "recipe"]  # that is `common` then
    print(", ".join(f"{name} {importlib.metadata.version(name)}" for name in PACKAGES))
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        subprocess.run([*command(folder, "prepare"), "--tokenizer", str(options.tokenizer)], check=True)
        run(folder, names, options)


def command(folder: Path, worker: str) -> list[str]:
    return [sys.executable, __file__, *sys.argv[1:], "--worker-folder", str(folder), "--worker", worker]


def run(folder: Path, names: list[str], options: argparse.Namespace) -> None:
    environment = os.environ | {
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "TRANSFORMERS_VERBOSITY": "error",
        "OMP_NUM_THREADS": str(options.threads),
        "TOKENIZERS_PARALLELISM": "false",
    }
    workers = {
        name: subprocess.Popen(
            command(folder, name), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )
        for name in names
    }

    def step(name: str, number: int) -> dict[str, float]:
        worker = workers[name]
        assert worker.stdin
        assert worker.stdout
        print(number, file=worker.stdin, flush=True)
        answer: dict[str, float] = json.loads(worker.stdout.readline())
        return answer

    results: dict[str, list[dict[str, float]]] = {name: [] for name in names}
    for number in range(options.warm_up + options.turns):
        for name in names if number % 2 else reversed(names):
            results[name].append(step(name, number))
        if number == 0 and len(names) > 1:
            check_equal_work(folder, {name: results[name][0]["loss"] for name in names})
    for worker in workers.values():
        assert worker.stdin
        worker.stdin.close()
        worker.wait()
    steps = json.loads((folder / "steps.json").read_text(encoding="utf-8"))[options.warm_up :]
    tokens = [sum(len(row["ids"]) for row in rows) for rows in steps]
    padded = [len(rows) * max(len(row["ids"]) for row in rows) for rows in steps]
    labels = [sum(sum(row["mask"]) for row in rows) for rows in steps]
    print(
        f"{options.method}, {options.dtype}, {options.threads} threads, {options.pairs}, {options.wordings} wordings; "
        f"8 reports (medians): {statistics.median(tokens):.0f} tokens, {statistics.median(padded):.0f} padded, "
        f"{statistics.median(labels):.0f} supervised"
    )
    times = {name: [result["seconds"] for result in results[name][options.warm_up :]] for name in names}
    for name in names:
        peak, median = max(result["memory"] for result in results[name]), statistics.median(times[name])
        line = f"{name:8}{median:8.3f} s{8 / median:8.2f} reports/s{peak:8.2f} GB"
        if name != "ours" and "ours" in names:
            ratios = [theirs / ours for theirs, ours in zip(times[name], times["ours"], strict=True)]
            share = max(result["memory"] for result in results["ours"]) / peak
            line += (
                f"   ours: {statistics.median(ratios):.2f}x as fast [{min(ratios):.2f}, {max(ratios):.2f}], "
                f"{share:.2f}x the memory"
            )
        print(line)


if __name__ == "__main__":
    main()
