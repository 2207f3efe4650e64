"""Training and generation on one GPU, against transformers + PEFT + bitsandbytes on the same weights and reports.

    python bench/gpu.py --out DIR [--stages correct,attention,...] [--smoke]
    python bench/gpu.py --table DIR               # the table of what DIR holds, of several runs too
    python bench/gpu.py --carry DIR [--cuda 130]  # bitsandbytes and PEFT as small folders, for a machine without them

Needs no network and no files: weights are random, made on the device layer by layer from their names' seeds, so that
both sides hold the same; reports are random tokens with the lengths of radiology reports (an instruction of 65 tokens
shared by those of one wording, about 230 of findings, 50 of impression). Each stage runs in a process of its own within
its time (correct, attention and train-8b together 8 minutes, peers-8b and train-70b 9, generate 7), and
writes what it has measured as it goes: a failure or an end of time loses nothing that was there.

    correct     kernels, 4-bit codes, losses, gradients and decoding against plain forms and the CPU
    attention   a packed row's attention, forward and backward: variable-length kernel, a call a segment, one mask, Flex
    train-8b    QLoRA (NF4, double-quantised; LoRA on all projections) of Llama 3 8B: pack lengths, ranks, recomputing,
                weights kept de-quantised, compiled norms, and a profile by kernel
    peers-8b    the same reports: as commonly configured (padded batches of 8, checkpointing), and tuned by hand
                (sorted by length, no mask, no checkpointing, the head at labels alone)
    train-70b   the 70B shape
    generate    greedy decoding of 256 prompts by an NF4 8B, over batch sizes, and transformers' generate

tokens/s counts computed tokens (a shared instruction once, no padding); MFU is 4 N tokens/s over 989 TFLOP/s (one
forward and the backward towards activations; N: all parameters). --smoke runs every stage with tiny shapes, in fp32 on
a CPU: there equal work must give equal numbers.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import importlib.metadata
import json
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from gpu_work import (
    TINY,
    Bench,
    Result,
    Still,
    best_rates,
    compile_elementwise,
    gradients,
    heads,
    ours,
    parameters_of,
    rates,
    ratios,
    recompute,
    reports,
    theirs,  # fmt: skip
    values,
)
from torch import Tensor, nn

from radllama.attention import has_kernel, row_attention
from radllama.data import Row, pack
from radllama.generate import generate
from radllama.lora import ALL_LINEAR, lora_parameters
from radllama.model import Llama, packed_attention
from radllama.quant import Linear4bit, kept

PACKAGES = ("torch", "transformers", "peft", "bitsandbytes", "accelerate", "triton")


@dataclass(frozen=True)
class Case:
    """One way to run a step. recompute: the share of layers that keep no activations; keep: hold the 4-bit weights
    de-quantised, too; compile: RMSNorm, RoPE and SwiGLU as compiled kernels, which the cases after it keep."""

    tokens: int
    rank: int = 16
    recompute: float = 0.0
    keep: bool = False
    compile: bool = False


CASES = {
    "8b": [
        *(Case(16_384), Case(8192), Case(16_384, recompute=1.0)),
        *(Case(2048), Case(4096), Case(8192, rank=8), Case(8192, rank=64)),
        *(Case(8192, keep=True), Case(16_384, keep=True)),
        *(Case(8192, compile=True), Case(16_384, compile=True), Case(16_384, keep=True, compile=True)),
        Case(32_768, compile=True),
    ],
    "70b": [
        *(Case(4096, recompute=1.0), Case(8192, recompute=1.0), Case(4096, recompute=0.5), Case(2048)),
        *(Case(4096, recompute=0.25, compile=True), Case(4096, compile=True), Case(8192, recompute=0.5, compile=True)),
    ],
}
SMOKE_CASES = [Case(400, rank=4), Case(300, rank=4, recompute=0.5, keep=True)]
PAPER_REPORTS, GPUS = 4_350_000, 8  # arXiv 2408.11848's training set and machine
EQUAL_TOKENS = 16_384  # the reports that both sides train on
PROFILED = (Case(16_384), Case(16_384, compile=True), SMOKE_CASES[0])


def step_of(model: Llama, rows: list[Row], optimizer: torch.optim.Optimizer, device: torch.device) -> Callable[[], Any]:
    batch = pack(rows)

    def step() -> Tensor:
        losses = model(
            batch.tokens.to(device), positions=batch.positions.to(device), segments=batch.segments,
            label_positions=batch.label_positions.to(device), labels=batch.labels.to(device))  # fmt: skip
        loss: Tensor = losses.sum() / len(batch.labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    return step


def adamw(parameters: list[nn.Parameter], device: torch.device) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=1e-5, fused=device.type == "cuda")


def train(bench: Bench, size: str) -> None:
    model, rank, config = None, -1, bench.config(size)
    count = parameters_of(config)
    for case in SMOKE_CASES if bench.smoke else CASES[size]:
        what = {"size": size, "side": "ours", **vars(case)}
        with bench.attempt(**what):
            if rank != case.rank:
                model, rank = None, -1
                gc.collect()
                model, rank = ours(bench, config, case.rank), case.rank
            assert model is not None
            recompute(model, case.recompute)
            if case.compile:
                compile_elementwise()
            rows = reports(bench, case.tokens, config.vocab_size)
            trained = lora_parameters(model)
            if size == "8b" and case in (SMOKE_CASES[0], Case(EQUAL_TOKENS)):
                loss = step_of(model, rows, Still(trained), bench.device)()
                named = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
                torch.save((float(loss), gradients(named)), bench.out.parent / "first-step.pt")
                model.zero_grad()
            step = step_of(model, rows, adamw(trained, bench.device), bench.device)
            with kept(model, bench.dtype) if case.keep else contextlib.nullcontext():
                seconds, peak = bench.time(step, turns=3 if size == "70b" or bench.smoke else 5)
            computed = pack(rows).tokens.shape[1]
            bench.add(**what, **rates(computed, len(rows), seconds, peak, count))
            if size == "8b" and case in PROFILED:
                profile(bench, step, "compiled" if case.compile else "plain")


def profile(bench: Bench, step: Callable[[], Any], name: str) -> None:
    """Write where a step's time goes, by kernel."""
    on_gpu = bench.device.type == "cuda"
    activities = [torch.profiler.ProfilerActivity.CPU, *[torch.profiler.ProfilerActivity.CUDA] * on_gpu]
    with torch.profiler.profile(activities=activities) as seen:
        step()
        bench.sync()
    order = "self_cuda_time_total" if on_gpu else "self_cpu_time_total"
    text = seen.key_averages().table(sort_by=order, row_limit=40, max_name_column_width=80)
    (bench.out / f"profile-{name}.txt").write_text(text, encoding="utf-8")


# ---------------------------------------------------------------- the peers' training


def padded(rows: list[Row], device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens, attention mask and labels (-100: none), padded on the right."""
    shape = (len(rows), max(len(row.ids) for row in rows))
    tokens, attention, labels = (torch.full(shape, value) for value in (0, 0, -100))
    for place, row in enumerate(rows):
        ids = torch.tensor(row.ids)
        tokens[place, : len(ids)], attention[place, : len(ids)] = ids, 1
        labels[place, : len(ids)] = torch.where(torch.tensor(row.mask), ids, -100)
    return tokens.to(device), attention.to(device), labels.to(device)


def common(model: Any, rows: list[Row], batch: int, bench: Bench) -> Iterator[Tensor]:
    """Losses of padded batches in the order drawn, every logit, through the model's own loss."""
    rows = random.Random(0).sample(rows, len(rows))
    labels = sum(sum(row.mask) for row in rows)
    for start in range(0, len(rows), batch):
        tokens, attention, wanted = padded(rows[start : start + batch], bench.device)
        with torch.autocast(bench.device.type, torch.bfloat16, enabled=bench.dtype != torch.float32):
            yield model(
                input_ids=tokens, attention_mask=attention, labels=wanted, use_cache=False, num_items_in_batch=labels
            ).loss


def tuned(model: Any, rows: list[Row], batch: int, bench: Bench) -> Iterator[Tensor]:
    """Losses of batches of like lengths; padding on the right needs no mask; the head at labels alone."""
    rows, bare = sorted(rows, key=lambda row: len(row.ids)), model.get_base_model()
    labels = sum(sum(row.mask) for row in rows)
    for start in range(0, len(rows), batch):
        tokens, _, wanted = padded(rows[start : start + batch], bench.device)
        at = (wanted[:, 1:] >= 0).nonzero(as_tuple=True)
        hidden = bare.model(input_ids=tokens, use_cache=False).last_hidden_state[at]
        yield F.cross_entropy(bare.lm_head(hidden).float(), wanted[:, 1:][at], reduction="sum") / labels


PEERS: dict[str, tuple[Callable[..., Iterator[Tensor]], tuple[int, ...]]] = {
    "common": (common, (8,)),
    "tuned": (tuned, (8, 16, 32)),
}


def peers(bench: Bench, size: str) -> None:
    import peft

    tokens, rank = (SMOKE_CASES[0].tokens, SMOKE_CASES[0].rank) if bench.smoke else (EQUAL_TOKENS, 16)
    config = bench.config(size)
    rows, count = reports(bench, tokens, config.vocab_size), parameters_of(config)
    computed = sum(len(row.ids) for row in rows)
    for side, (losses, batches) in PEERS.items():
        usual = side == "common"
        model = theirs(bench, config)
        if usual:
            model = peft.prepare_model_for_kbit_training(model)
        model.requires_grad_(False)
        lora = peft.LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=list(ALL_LINEAR), task_type="CAUSAL_LM")
        model = peft.get_peft_model(model, lora, autocast_adapter_dtype=usual).train()
        named = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
        for name, parameter in named.items():
            layer = name.removeprefix("base_model.model.").removesuffix(".default.weight")
            parameter.data = values(layer, parameter.shape, bench, 0.02).to(parameter.dtype)
        for batch in batches:
            what = {"size": size, "side": side, "tokens": tokens, "batch": batch}
            with bench.attempt(**what):
                equal = {}
                if batch == batches[0] and (bench.out.parent / "first-step.pt").exists():
                    loss = their_step(partial(losses, model, rows, batch, bench), Still(list(named.values())))
                    expected, wanted = torch.load(bench.out.parent / "first-step.pt")
                    cosine = F.cosine_similarity(gradients(named), wanted, dim=0)
                    equal = {"loss": loss, "loss_of_ours": expected, "gradient_cosine": float(cosine)}
                    model.zero_grad()
                step = partial(
                    their_step, partial(losses, model, rows, batch, bench), adamw(list(named.values()), bench.device)
                )
                seconds, peak = bench.time(step, turns=3, warm_up=1)
                bench.add(**what, **rates(computed, len(rows), seconds, peak, count), **equal)
        del model, named
        gc.collect()


def their_step(losses: Callable[[], Iterator[Tensor]], optimizer: torch.optim.Optimizer) -> float:
    parts = []
    for loss in losses():
        loss.backward()
        parts.append(loss.detach())
    optimizer.step()
    optimizer.zero_grad()
    return float(torch.stack(parts).sum())


# ---------------------------------------------------------------- generation


def generation(bench: Bench) -> None:
    config = bench.config("8b")
    prompts_wanted, new = (6, 12) if bench.smoke else (256, 128)
    rows = reports(bench, 400 * prompts_wanted, config.vocab_size, wordings=1)[:prompts_wanted]
    prompts = [row.ids[: row.mask.index(True)] for row in rows]
    # Random weights never write an end: a fiftieth of all ids counts as one, which makes about 50 tokens a report.
    stops = random.Random(0).sample(range(config.vocab_size), config.vocab_size // 50)
    outputs: dict[str, list[list[int]]] = {}
    sides: dict[str, tuple[Callable[[], Any], Callable[..., list[list[int]]]]] = {
        "ours": (partial(ours, bench, config, None), our_continuations),
        "transformers": (partial(theirs, bench, config), their_continuations),
    }
    for side, (build, run) in sides.items():
        # Not eval() in the smoke run: bitsandbytes computes in bf16 there on some CPUs.
        model = build().train(bench.smoke)
        with bench.attempt(size="8b", side=side, batch="warm-up"):
            run(model, prompts[:8], stops, 8, 8, bench)
        for batch in (prompts_wanted // 2, prompts_wanted) if bench.smoke else (256, 128, 64, 32):
            what = {"size": "8b", "side": side, "batch": batch}
            with bench.attempt(**what):

                def once(run: Any = run, model: Any = model, batch: int = batch, side: str = side) -> None:
                    outputs[side] = run(model, prompts, stops, new, batch, bench)

                seconds, peak = bench.time(once, turns=1, warm_up=0)
                written = sum(len(ids) for ids in outputs[side])
                bench.add(
                    **what, seconds=seconds, reports_per_second=len(prompts) / seconds, peak_gib=peak,
                    written_tokens=written, written_per_second=written / seconds)  # fmt: skip
        del model
        gc.collect()
    if len(outputs) == 2:
        same = sum(a == b for a, b in zip(*outputs.values(), strict=True))
        first = sum(a[:8] == b[:8] for a, b in zip(*outputs.values(), strict=True))
        bench.add(size="8b", side="both", equal_reports=same, equal_first_eight=first, reports=len(prompts))


def our_continuations(
    model: Llama, prompts: list[list[int]], stops: list[int], new: int, batch: int, bench: Bench
) -> list[list[int]]:
    return generate(model, prompts, stop_ids=stops, max_new_tokens=new, batch_size=batch)


@torch.no_grad()
def their_continuations(
    model: Any, prompts: list[list[int]], stops: list[int], new: int, batch: int, bench: Bench
) -> list[list[int]]:
    """transformers' generate on batches of like lengths, padded on the left."""
    order = sorted(range(len(prompts)), key=lambda place: len(prompts[place]))
    outputs: list[list[int]] = [[] for _ in prompts]
    ends = set(stops)
    for start in range(0, len(order), batch):
        places = order[start : start + batch]
        longest = max(len(prompts[place]) for place in places)
        tokens = torch.tensor([[0] * (longest - len(prompts[place])) + prompts[place] for place in places])
        mask = torch.tensor([[0] * (longest - len(prompts[place])) + [1] * len(prompts[place]) for place in places])
        written = model.generate(
            input_ids=tokens.to(bench.device), attention_mask=mask.to(bench.device), do_sample=False,
            max_new_tokens=new, eos_token_id=stops, pad_token_id=0)[:, longest:].tolist()  # fmt: skip
        for place, ids in zip(places, written, strict=True):
            end = next((number for number, token in enumerate(ids, 1) if token in ends), len(ids))
            outputs[place] = ids[:end]
    return outputs


# ---------------------------------------------------------------- attention alone


def one_mask(segments: Tensor, device: torch.device) -> tuple[Tensor, Tensor]:
    """Each token's segment (T,) and its segment's prefix (T,)."""
    numbers = torch.arange(len(segments)).repeat_interleave(segments[:, 0])
    return numbers.to(device), segments[numbers, 1].to(device)


def masked(segments: Tensor, device: torch.device) -> Any:
    own, prefix = one_mask(segments, device)
    sees = ((own[:, None] == own) | (prefix[:, None] == own)).tril()

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        group = q.shape[1] // k.shape[1]  # repeated, since no fused kernel takes both a mask and grouped heads
        k, v = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=sees)

    return attend


def flex(segments: Tensor, device: torch.device) -> Any:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    own, prefix = one_mask(segments, device)

    def sees(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return (k <= q) & ((own[q] == own[k]) | (prefix[q] == own[k]))

    blocks = create_block_mask(sees, None, None, len(own), len(own), device=str(device))
    return partial(torch.compile(flex_attention), block_mask=blocks, enable_gqa=True)


def attention(bench: Bench) -> None:
    config = bench.config("8b")
    forms: dict[str, Callable[[Tensor], Any]] = {
        "varlen": row_attention, "a call a segment": packed_attention, "one mask": partial(masked, device=bench.device)
    }  # fmt: skip
    if bench.device.type == "cuda":
        forms["flex"] = partial(flex, device=bench.device)
    for tokens in (300,) if bench.smoke else (8192, 16_384):
        segments = pack(reports(bench, tokens, config.vocab_size)).segments
        q, k, v = heads(bench, config, int(segments[:, 0].sum()))
        weights = torch.randn_like(q)
        for name, form in forms.items():
            with bench.attempt(form=name, tokens=tokens):
                attend = form(segments)

                def both(attend: Any = attend, inputs: Any = (q, k, v), weights: Tensor = weights) -> None:
                    torch.autograd.grad((attend(*inputs) * weights).sum(), inputs)

                seconds, peak = bench.time(both)
                bench.add(form=name, tokens=tokens, milliseconds=1000 * seconds, peak_gib=peak)


# ---------------------------------------------------------------- correctness


def distance(found: Tensor, expected: Tensor) -> float:
    """|found - expected| / |expected|."""
    found, expected = found.detach().double(), expected.detach().double()
    return float((found - expected).norm() / expected.norm())


def correct(bench: Bench) -> None:
    for check in (attention_is_right, codes_are_right, training_is_right, decoding_is_right):
        with bench.attempt(check=check.__name__):
            check(bench)


def attention_is_right(bench: Bench) -> None:
    """Outputs and gradients of the kernel and of the plain form, each in the compute dtype, against plain fp32."""
    config = bench.config("8b")
    batch = pack(reports(bench, 300 if bench.smoke else 2048, config.vocab_size))
    inputs = heads(bench, config, int(batch.segments[:, 0].sum()))
    wide = [x.detach().float().requires_grad_() for x in inputs]
    for queries in (None, batch.label_positions):
        chosen = slice(None) if queries is None else queries.to(bench.device)
        expected = packed_attention(batch.segments)(*wide)[:, :, chosen]
        weights = torch.randn_like(expected).to(bench.dtype).float()  # no rounding of their own
        wanted = [expected, *torch.autograd.grad((expected * weights).sum(), wide)]
        q, k, v = inputs
        for name in ("varlen", "a call a segment"):
            if name == "varlen":
                wanted_of = None if queries is None else queries.to(bench.device)
                found = row_attention(batch.segments, wanted_of)(q[:, :, chosen], k, v)
            else:
                found = packed_attention(batch.segments)(q, k, v)[:, :, chosen]
            both = [found, *torch.autograd.grad((found * weights.to(found.dtype)).sum(), inputs)]
            errors = [distance(a, b) for a, b in zip(both, wanted, strict=True)]
            bench.add(
                check="attention", form=name, labels_alone=queries is not None, kernel=has_kernel(q),
                errors=dict(zip(("out", "q", "k", "v"), errors, strict=True)), right=max(errors) < 0.01)  # fmt: skip


def codes_are_right(bench: Bench) -> None:
    """4-bit codes made and de-quantised on the device against the CPU's."""
    weight = values("codes", (1024, 1024), bench)
    here = Linear4bit.from_weight(weight)
    there = Linear4bit.from_weight(weight.cpu())
    share = float((here.weight.cpu() == there.weight).float().mean())
    there.weight, there.statistics = (
        nn.Parameter(x.cpu(), requires_grad=False) for x in (here.weight, here.statistics)
    )
    for dtype in (torch.float32, torch.bfloat16):
        equal = torch.equal(here.dequantize(dtype).cpu(), there.dequantize(dtype))
        bench.add(check="codes", dtype=str(dtype), dequantised_equal=equal, quantised_equal=share, right=equal)


def training_is_right(bench: Bench) -> None:
    """Loss and gradients of a small model on the device, in fp32 and in the compute dtype, against the CPU in fp32."""
    config = replace(TINY, hidden_size=256, intermediate_size=512, head_dim=64, num_hidden_layers=4)
    cpu = replace(bench, device=torch.device("cpu"), dtype=torch.float32, smoke=True)
    rows = reports(cpu, 500, config.vocab_size)

    def run(at: Bench) -> tuple[float, Tensor]:
        # The same numbers everywhere: made, quantised and adapted on the CPU.
        model = ours(cpu, config, 8)
        model = model.to(at.device, at.dtype)
        loss = step_of(model, rows, Still(lora_parameters(model)), at.device)()
        return float(loss), gradients({name: p for name, p in model.named_parameters() if p.requires_grad})

    expected, wanted = run(cpu)
    for dtype, most, least in ((torch.float32, 1e-4, 0.9999), (bench.dtype, 1e-2, 0.99)):
        loss, found = run(replace(bench, dtype=dtype))
        cosine = float(F.cosine_similarity(found, wanted, dim=0))
        off = abs(loss / expected - 1)
        bench.add(
            check="training", dtype=str(dtype), loss=loss, expected=expected, gradient_cosine=cosine,
            right=off < most and cosine > least)  # fmt: skip


@torch.no_grad()
def decoding_is_right(bench: Bench) -> None:
    """Greedy text over the KV cache against the argmax of whole rows computed anew, in fp32."""
    at = replace(bench, dtype=torch.float32)
    model = ours(at, replace(TINY, num_hidden_layers=3), None)
    prompts = [row.ids[: row.mask.index(True)] for row in reports(replace(at, smoke=True), 400, TINY.vocab_size)]
    outputs = generate(model, prompts, stop_ids=[1, 2, 3], max_new_tokens=12, batch_size=4)
    wrong = 0
    for prompt, output in zip(prompts, outputs, strict=True):
        logits = model(torch.tensor([prompt + output], device=at.device))[0, len(prompt) - 1 : -1]
        wrong += int((logits.argmax(-1).cpu() != torch.tensor(output)).sum())
    bench.add(check="decoding", tokens=sum(map(len, outputs)), wrong=wrong, right=wrong == 0)


# ---------------------------------------------------------------- stages, table, command line

STAGES: dict[str, tuple[int, Callable[[Bench], None]]] = {  # seconds, what runs
    "correct": (120, correct),
    "attention": (100, attention),
    "train-8b": (240, partial(train, size="8b")),
    "peers-8b": (240, partial(peers, size="8b")),
    "train-70b": (300, partial(train, size="70b")),
    "generate": (420, generation),
}


def run_stage(name: str, out: Path, *, smoke: bool) -> list[Result]:
    """One stage in this process."""
    device = torch.device("cpu" if smoke else "cuda")
    folder = out / name
    folder.mkdir(parents=True, exist_ok=True)
    seconds, stage = STAGES[name]
    bench = Bench(
        device, torch.float32 if smoke else torch.bfloat16, smoke, folder, time.monotonic() + 0.85 * seconds, []
    )
    torch.manual_seed(0)
    stage(bench)
    return bench.results


def versions() -> str:
    found = []
    for package in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found.append(f"{package} {importlib.metadata.version(package)}")
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    return f"{name}, Python {sys.version.split()[0]}, " + ", ".join(found)


def table(out: Path) -> str:
    """Every stage's results, and the ratios that the peers' stages are for."""
    lines = [(out / "versions.txt").read_text(encoding="utf-8").strip()] if (out / "versions.txt").exists() else []
    found: dict[str, list[Result]] = {}
    for name in STAGES:
        file = out / name / "results.json"
        if not file.exists():
            lines.append(f"\n{name}: nothing measured")
            continue
        found[name] = json.loads(file.read_text(encoding="utf-8"))
        lines.append(f"\n{name}")
        for row in found[name]:
            cells = [f"{key} {value:.5g}" if type(value) is float else f"{key} {value}" for key, value in row.items()]
            lines.append("  " + "  ".join(cells))
    if "train-8b" in found and "peers-8b" in found:
        lines.append("\nreports/s of a training step, ours over theirs")
        lines += ratios([row for row in found["train-8b"] if row["tokens"] == EQUAL_TOKENS] + found["peers-8b"])
    if "generate" in found:
        lines.append("\nreports/s of generation, ours over theirs")
        lines += ratios(found["generate"])
    for name in sorted({"train-8b", "train-70b"} & found.keys()):
        if rate := best_rates(found[name]).get("ours"):
            hours = f"{PAPER_REPORTS / GPUS / rate / 3600:.1f} h"
            lines.append(
                f"\n{name}: an epoch over {PAPER_REPORTS:,} reports {hours}, were {GPUS} GPUs {GPUS} times one"
            )
    return "\n".join(lines)


def carry(target: Path, cuda: str) -> None:
    """Copy this machine's bitsandbytes (its Python files and one GPU library) and PEFT: put `target` on PYTHONPATH."""
    for package, libraries in (("bitsandbytes", {f"libbitsandbytes_cuda{cuda}.so"}), ("peft", set[str]())):
        found = importlib.metadata.distribution(package)
        for file in found.files or []:
            if file.suffix != ".so" or file.name in libraries:
                source, place = Path(str(found.locate_file(file))), target / str(file)
                if ".." not in file.parts and "__pycache__" not in file.parts:
                    place.parent.mkdir(parents=True, exist_ok=True)
                    shutil.copyfile(source, place)
    size = sum(file.stat().st_size for file in target.rglob("*") if file.is_file())
    print(f"{target}: {size / 2**20:.1f} MiB")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="folder for the results")
    parser.add_argument("--stages", default=",".join(STAGES), help=f"default: {','.join(STAGES)}")
    parser.add_argument("--smoke", action="store_true", help="tiny shapes on the CPU")
    parser.add_argument("--table", type=Path, metavar="DIR")
    parser.add_argument("--carry", type=Path, metavar="DIR")
    parser.add_argument("--cuda", default="130", help="which of bitsandbytes' libraries to carry")
    parser.add_argument("--alone", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.carry:
        return carry(options.carry, options.cuda)
    if options.table:
        return print(table(options.table))
    if not options.out:
        parser.error("--out, --table or --carry is needed")
    stages = options.stages.split(",")
    if unknown := sorted(set(stages) - set(STAGES)):
        parser.error(f"--stages: {', '.join(unknown)}: expected some of {', '.join(STAGES)}")
    if options.alone:
        run_stage(stages[0], options.out, smoke=options.smoke)
        return None
    if not options.smoke and not torch.cuda.is_available():
        parser.error("no GPU here; --smoke runs tiny shapes on the CPU")
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "versions.txt").write_text(versions() + "\n", encoding="utf-8")
    failed = []
    for stage in stages:
        print(f"== {stage}", flush=True)
        command = [sys.executable, __file__, "--out", str(options.out), "--stages", stage, "--alone"]
        try:
            subprocess.run(command + ["--smoke"] * options.smoke, check=True, timeout=STAGES[stage][0])
        except (subprocess.CalledProcessError, subprocess.TimeoutExpired) as error:
            failed.append(stage)
            print(f"{stage}: {type(error).__name__}; what it measured before is kept", flush=True)
    print(table(options.out))
    if failed:
        raise SystemExit(f"not finished: {', '.join(failed)}")
    return None


if __name__ == "__main__":
    main()
