"""What a QLoRA step costs as its pack grows, and as the adapters' rank does: a table and a picture.

    python bench/sweep.py [--pairs data/indiana/train.jsonl] [--picture docs/step.png]

The model and the work are those of bench/step.py, and only `ours` runs: one pack of 1, 2, 4, ... reports at rank 64,
then packs of 8 reports at other ranks. Each rank is a process of its own. Memory is the most resident (VmHWM) during a
point's steps, less what was resident when the imports were done. Seconds are medians.
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
import time
from pathlib import Path
from typing import Any

import torch
from step import SHAPE, memory

from radllama.build import random_model
from radllama.data import INSTRUCTIONS, Prompt, Reports, pack, read_examples
from radllama.heap import keep_freed_memory
from radllama.lora import add_lora, lora_parameters, replace_layer
from radllama.model import LlamaConfig
from radllama.quant import Linear4bit
from radllama.tokenizer import Tokenizer

ROOT = Path(__file__).parents[1]
COUNTS, RANKS, RANK, REPORTS = (1, 2, 4, 8, 16, 32, 64), (8, 16, 32, 64, 128), 64, 8
STEPS = 4  # of a point; the first is not timed


def work(options: argparse.Namespace) -> None:
    """Measure the counts of reports of one rank; one JSON line each."""
    torch.set_num_threads(options.threads)
    before = memory("VmRSS")
    model = random_model(LlamaConfig(**SHAPE), 0, device=torch.device("cpu"), dtype=torch.float32)
    for name, layer in list(model.model.named_modules()):
        if isinstance(layer, torch.nn.Linear):
            replace_layer(model, f"model.{name}", Linear4bit.from_weight(layer.weight))
    add_lora(model, rank=options.rank, alpha=2 * options.rank)
    optimizer = torch.optim.AdamW(lora_parameters(model), lr=1e-5, fused=True)
    tokenizer = Tokenizer.from_dir(options.tokenizer)
    prompt = Prompt(tokenizer.prompt_format, INSTRUCTIONS[:1])
    reports = Reports(
        read_examples(options.pairs), tokenizer, prompt, max_length=1024, seed=0, name=str(options.pairs))  # fmt: skip
    keep_freed_memory()
    for count in options.counts:
        seconds, tokens = [], []
        gc.collect()
        Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
        for number in range(STEPS):
            batch = pack(sorted(reports.step(number, count), key=lambda row: len(row.ids)))
            begun = time.perf_counter()
            losses = model(
                batch.tokens, positions=batch.positions, segments=batch.segments,
                label_positions=batch.label_positions, labels=batch.labels)  # fmt: skip
            losses.mean().backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            seconds.append(time.perf_counter() - begun)
            tokens.append(batch.tokens.numel())
            del losses
        point = {"rank": options.rank, "reports": count, "tokens": statistics.median(tokens[1:])}
        print(json.dumps(point | {"seconds": statistics.median(seconds[1:]), "gigabytes": memory("VmHWM") - before}))


def draw(points: list[dict[str, Any]], picture: Path) -> None:
    """Cost of a report and memory against the pack's length; both against the rank."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    packs = [point for point in points if point["rank"] == RANK]
    ranks = sorted((point for point in points if point["reports"] == REPORTS), key=lambda point: point["rank"])
    figure, axes = plt.subplots(1, 3, figsize=(13, 3.8), layout="constrained")
    tokens = [point["tokens"] for point in packs]
    axes[0].plot(tokens, [point["seconds"] / point["reports"] for point in packs], "o-", color="#1f5fa8")
    axes[1].plot(tokens, [point["gigabytes"] for point in packs], "o-", color="#1f5fa8")
    for axis, what in zip(axes[:2], ("seconds a report", "GB at the most"), strict=True):
        axis.set(xscale="log", xlabel="tokens in the pack (number: its reports)", ylabel=what, ylim=(0, None))
        axis.set_xticks(tokens, [f"{count:.0f}" for count in tokens])
        axis.minorticks_off()
        for point, (x, y) in zip(packs, axis.lines[0].get_xydata(), strict=True):
            axis.annotate(str(point["reports"]), (x, y), textcoords="offset points", xytext=(0, 7), ha="center")
    numbers = [point["rank"] for point in ranks]
    lines = (("seconds", "o-", "#1f5fa8", "seconds a step"), ("gigabytes", "s--", "#b5541c", "GB at the most"))
    for key, style, color, label in lines:
        axes[2].plot(numbers, [point[key] for point in ranks], style, color=color, label=label)
    axes[2].set(xscale="log", xlabel=f"rank of the adapters ({REPORTS} reports a step)", ylim=(0, None))
    axes[2].set_xticks(numbers, [str(number) for number in numbers])
    axes[2].minorticks_off()
    axes[2].legend()
    for axis in axes:
        axis.grid(alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
    picture.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(picture, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description="A QLoRA step's seconds and memory against pack length and rank.")
    parser.add_argument("--pairs", type=Path, default=ROOT / "assets/reports/train.jsonl")
    parser.add_argument("--tokenizer", type=Path, help="a folder with Llama 3's; default: the package llama-models'")
    parser.add_argument("--picture", type=Path, default=ROOT / "runs/step.png")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--rank", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--counts", type=int, nargs="+", help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.tokenizer = options.tokenizer or Path(
        str(importlib.metadata.distribution("llama-models").locate_file("llama_models/llama3"))
    )
    if options.rank:
        work(options)
        return
    points = []
    for rank in (RANK, *(rank for rank in RANKS if rank != RANK)):
        counts = [str(count) for count in (COUNTS if rank == RANK else (REPORTS,))]
        command = [sys.executable, __file__, *sys.argv[1:], "--rank", str(rank), "--counts", *counts]
        output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
        for line in output.splitlines():
            if line.startswith("{"):
                points.append(json.loads(line))
                point = points[-1]
                print(f"rank {point['rank']:>3}, {point['reports']:>2} reports, {point['tokens']:>6.0f} tokens: "
                      f"{point['seconds']:6.2f} s, {point['seconds'] / point['reports']:.3f} s a report, "
                      f"{point['gigabytes']:.2f} GB", flush=True)  # fmt: skip
    draw(points, options.picture)
    print(f"wrote {options.picture}")


if __name__ == "__main__":
    main()
