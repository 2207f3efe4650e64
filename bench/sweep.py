"""What a QLoRA step costs with more reports, longer ones, and adapters of higher rank: a table and a picture.

    python bench/sweep.py [--pairs data/indiana/train.jsonl] [--picture docs/step.png]

The model and the work are those of bench/step.py, and only `ours` runs. Each sweep changes one thing: 1 to 64 reports
of about the median length in a pack; 8 reports of about one length each, from the shortest to the longest of the file;
8 reports of the median length at ranks 8 to 128. Each point is a process of its own. Memory is the most resident
(VmHWM) during its steps, less what was resident when the imports were done. Seconds are medians.
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

import numpy as np
import torch
from step import SHAPE, memory
from tqdm import tqdm

from radllama.attention import row_attention
from radllama.build import random_model
from radllama.data import INSTRUCTIONS, Prompt, Reports, Row, pack, read_examples
from radllama.fused import keep_few_kernels, multiplies_bf16
from radllama.heap import keep_freed_memory
from radllama.lora import add_lora, lora_parameters, replace_layer
from radllama.model import LlamaConfig
from radllama.quant import Linear4bit
from radllama.tokenizer import Tokenizer

ROOT = Path(__file__).parents[1]
COUNTS, RANKS, RANK, REPORTS = (1, 2, 4, 8, 16, 32, 64), (8, 16, 32, 64, 128), 64, 8
SHARES = (0.01, 0.1, 0.25, 0.5, 0.75, 0.9, 0.99)  # of the reports that are shorter
STEPS = 6  # of a point; the first is not timed
BLUE, RED = "#1f5fa8", "#b5541c"


def about(rows: list[Row], share: float, count: int) -> list[Row]:
    """`count` of the rows, which ascend in length, around that share of them, in random order."""
    first = round(min(max(share * len(rows) - count / 2, 0), len(rows) - count))
    order = np.random.default_rng(0).permutation(count)
    return [rows[first + place] for place in order]


def work(options: argparse.Namespace) -> None:
    """Measure one point, and print it as a JSON line."""
    rank, count, share = options.point
    torch.set_num_threads(options.threads)
    keep_few_kernels()
    before = memory("VmRSS")
    dtype = torch.bfloat16 if multiplies_bf16() else torch.float32  # as radllama.train would choose
    model = random_model(LlamaConfig(**SHAPE), 0, device=torch.device("cpu"), dtype=dtype)
    model.packed_attention = row_attention
    for name, layer in list(model.model.named_modules()):
        if isinstance(layer, torch.nn.Linear):
            replace_layer(model, f"model.{name}", Linear4bit.from_weight(layer.weight))
    add_lora(model, rank=rank, alpha=2 * rank)
    optimizer = torch.optim.AdamW(lora_parameters(model), lr=1e-5, fused=True)
    tokenizer = Tokenizer.from_dir(options.tokenizer)
    prompt = Prompt(tokenizer.prompt_format, INSTRUCTIONS[:1])
    reports = Reports(
        read_examples(options.pairs), tokenizer, prompt, max_length=1024, seed=0, name=str(options.pairs))  # fmt: skip
    rows = sorted((reports.row(index, 0) for index in range(len(reports))), key=lambda row: len(row.ids))
    chosen = about(rows, share, STEPS * count)
    keep_freed_memory()
    seconds, tokens = [], []
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak of loading
    for number in range(STEPS):
        batch = pack(sorted(chosen[number * count :][:count], key=lambda row: len(row.ids)))
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
    point = {"rank": rank, "reports": count, "share": share, "tokens": statistics.median(tokens[1:])}
    print(json.dumps(point | {"seconds": statistics.median(seconds[1:]), "gigabytes": memory("VmHWM") - before}))


def draw(points: list[dict[str, Any]], picture: Path) -> None:
    """Seconds a report and memory: against the reports in a pack, their length, and the rank."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    middle = [point for point in points if point["share"] == 0.5]
    sweeps = [
        ("reports", f"reports in a pack (rank {RANK})", [p for p in middle if p["rank"] == RANK]),
        ("tokens", f"tokens in a pack of {REPORTS} reports (rank {RANK})",
         [p for p in points if (p["rank"], p["reports"]) == (RANK, REPORTS)]),
        ("rank", f"rank of the adapters ({REPORTS} reports)", [p for p in middle if p["reports"] == REPORTS]),
    ]  # fmt: skip
    figure, axes = plt.subplots(1, 3, figsize=(13, 3.8), layout="constrained")
    most = max(point["gigabytes"] for point in points) * 1.1
    for axis, (key, label, found) in zip(axes, sweeps, strict=True):
        found.sort(key=lambda point: point[key])
        places = [point[key] for point in found]
        right = axis.twinx()
        axis.plot(places, [point["seconds"] / point["reports"] for point in found], "o-", color=BLUE)
        right.plot(places, [point["gigabytes"] for point in found], "s--", color=RED)
        axis.set(xscale="log", xlabel=label, ylim=(0, max(p["seconds"] / p["reports"] for p in found) * 1.1))
        axis.set_xticks(places, [f"{place:.0f}" for place in places])
        axis.minorticks_off()
        right.set_ylim(0, most)
        axis.set_ylabel("seconds a report (circles)", color=BLUE)
        right.set_ylabel("GB at the most (squares)", color=RED)
        axis.grid(alpha=0.3)
        for side in (axis, right):
            side.spines["top"].set_visible(False)
    picture.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(picture, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description="A QLoRA step's seconds and memory against reports, length and rank.")
    parser.add_argument("--pairs", type=Path, default=ROOT / "assets/reports/train.jsonl")
    parser.add_argument("--tokenizer", type=Path, help="a folder with Llama 3's; default: the package llama-models'")
    parser.add_argument("--picture", type=Path, default=ROOT / "runs/step.png")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--point", type=json.loads, help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.tokenizer = options.tokenizer or Path(
        str(importlib.metadata.distribution("llama-models").locate_file("llama_models/llama3"))
    )
    if options.point:
        work(options)
        return
    wanted = [(RANK, count, 0.5) for count in COUNTS]
    wanted += [(RANK, REPORTS, share) for share in SHARES if share != 0.5]
    wanted += [(rank, REPORTS, 0.5) for rank in RANKS if rank != RANK]
    points = []
    for one in tqdm(wanted, unit="point"):
        command = [sys.executable, __file__, *sys.argv[1:], "--point", json.dumps(one)]
        output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
        point = json.loads(next(line for line in output.splitlines() if line.startswith("{")))
        points.append(point)
        tqdm.write(
            f"rank {point['rank']:>3}, {point['reports']:>2} reports, {point['tokens']:>6.0f} tokens: "
            f"{point['seconds']:6.2f} s, {point['seconds'] / point['reports']:.3f} s a report, "
            f"{point['gigabytes']:.2f} GB"
        )
    draw(points, options.picture)
    print(f"wrote {options.picture}")


if __name__ == "__main__":
    main()
