"""Memory per GPU, predicted part by part before an hour is spent on one; and what to change where it does not fit.

    python -m radllama.plan --config C --gpus 8 --gpu-memory 80GB [--shape llama3-70b] [--json]

The model's part comes from a dry run of the real code (dry_run.py), DeepSpeed's from its source (zero.py). A few
constants remain, below: those of a CPU are fitted to real runs (bench/plan.py), those of a GPU are estimates. On a CPU
this is the memory of a process whose tensors live in the heap of heap.py; without a compiler it takes more.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import hf_hub_download

from radllama.cache import open_cache
from radllama.config import Config, parse_config, read_config
from radllama.data import INSTRUCTIONS, Prompt, Reports, pack, read_examples, spread
from radllama.dry_run import PackShape, Pass, Visit, meta_model, micro_step, visits_of, weights_of
from radllama.fused import multiplies_bf16
from radllama.model import LlamaConfig
from radllama.tokenizer import Tokenizer
from radllama.zero import (
    Training,
    Zero,
    gathered_bytes,
    gradients_before,
    offloaded_weights,
    phases_of_step,
    resident_of,
    weight_bytes,
)

GB = 2**30
# A GPU: the CUDA context with cuBLAS' workspaces, NCCL's channels with more than one rank, what the caching allocator
# loses of the memory that comes and goes, and what the driver keeps of the nominal size. Estimates, not fitted.
CONTEXT, NCCL, FRAGMENTATION, DRIVER = 0.8 * GB, 1.0 * GB, 0.05, 0.015
# A CPU: the process itself (threads, modules that DeepSpeed imports late, reports, oneDNN's kernels, holes of its heap)
# above its first imports, fitted on the calibration set of bench/plan.py.
PROCESS = 0.08 * GB
# Without data: reports beyond the shared prefix spread by half of their mean length (Indiana chest X-rays: 0.50), and
# the largest step of a run lies about three standard deviations above the mean; a seventh of the tokens is labelled.
SPREAD, DEVIATIONS, LABELLED = 0.5, 3.0, 1 / 7
DRAWN_STEPS = 64  # with data: this many steps are drawn to find the largest pack

SHAPES = {
    "llama3-8b": LlamaConfig(128256, 4096, 14336, 32, 32, 8, 128),
    "llama3-70b": LlamaConfig(128256, 8192, 28672, 80, 64, 8, 128),
}


@dataclass(frozen=True)
class Machine:
    """What is planned for: `ranks` processes, one a device, of `memory` bytes each."""

    ranks: int
    memory: int
    device: str  # cuda or cpu


@dataclass
class Plan:
    """Bytes a device by part, in each phase of a step; on a GPU also those on the host, for all ranks of a node."""

    machine: Machine
    pack: PackShape
    checkpointing: bool
    phases: dict[str, dict[str, int]]
    host: dict[str, int] = field(default_factory=dict)
    disk: int = 0

    @property
    def peak_phase(self) -> str:
        return max(self.phases, key=lambda name: sum(self.phases[name].values()))

    @property
    def parts(self) -> dict[str, int]:
        return self.phases[self.peak_phase]

    @property
    def total(self) -> int:
        return sum(self.parts.values())

    @property
    def usable(self) -> int:
        return int(self.machine.memory * (1 - DRIVER)) if self.machine.device == "cuda" else self.machine.memory

    @property
    def fits(self) -> bool:
        return self.total <= self.usable


def plan(config: Config, shape: LlamaConfig, machine: Machine, packing: PackShape) -> Plan:
    """Predict the memory of a job.

    Raises ValueError where the optimizer cannot be offloaded (as `train` does).
    """
    t = config.training
    dtype = dtype_of(config, machine.device)
    zero = Zero.of(config, dtype)
    if zero.offload_optimizer != "none" and t.optimizer != "adamw":
        raise ValueError(f"training.optimizer: {t.optimizer} cannot be offloaded; use adamw with offload_optimizer")
    layers = shape.num_hidden_layers
    model = meta_model(config, replace(shape, num_hidden_layers=min(layers, 3)), dtype)
    parameters = weights_of(model, layers)
    trainable = [weight for weight in parameters if weight.trainable]
    job = Training(
        numel=sum(weight.numel * weight.times for weight in trainable),
        largest=max(weight.numel for weight in trainable),
        groups=2 if config.method == "full" else 1,
        width=dtype.itemsize,
        ranks=machine.ranks,
        accumulation=t.accumulation,
        optimizer=t.optimizer,
        device=machine.device,
    )
    weights = weight_bytes(parameters, zero, machine.ranks)
    resident, host, disk = resident_of(job, zero)
    if zero.offload_param != "none" and zero.stage == 3:
        moved = {kind: weights.pop(kind) for kind in list(weights)}
        largest = max(weight.numel for weight in parameters)
        beside, swapped = offloaded_weights(job, zero, sum(moved.values()), largest)
        host, disk = host | beside, disk + swapped
    base = weights | resident
    if config.method == "qlora" and config.quantization.keep_dequantized:
        codes = sum(weight.size * weight.times for weight in parameters if weight.kind == "4-bit codes")
        base["de-quantised weights"] = 2 * codes * dtype.itemsize  # two weights a byte
    before, grow = gradients_before(job, zero)

    def run(checkpointing: bool) -> Pass:
        return micro_step(model, packing, layers=layers, checkpointing=checkpointing, device=machine.device, grow=grow)

    checkpointing = t.gradient_checkpointing == "on"
    passed = run(checkpointing)
    if t.gradient_checkpointing == "auto":  # `train.needs_checkpointing`: 70 % of what is free beside the model
        free = machine.memory - sum(weights.values()) - (CONTEXT if machine.device == "cuda" else 0)
        if passed.kept > 0.7 * free:
            checkpointing, passed = True, run(True)
    passes, left = {"activations kept for the backward pass": passed.kept}, {}
    if zero.stage == 3 and (machine.ranks > 1 or zero.offload_param != "none"):
        visits = visits_of(model, packing, layers=layers, checkpointing=checkpointing, device=machine.device)
        gathered = gathered_bytes(visits, zero, machine.ranks, machine.device)
        passes, left = gathering(visits, gathered, passed.kept), {"ZeRO-3's gathered weights": gathered[-1]}
    passes["working memory of the passes"] = passed.peak - passed.kept
    phases = {"forward and backward": added(base, before, passes)}
    for name, parts in phases_of_step(job, zero).items():
        phases[name] = added(base, left if name == "gradient reduction" else {}, parts)
    if machine.device == "cpu" and zero.stage == 0:  # the flat copy finds no hole: gradients lie all over the heap
        bucket = {"DeepSpeed's buckets": phases["gradient reduction"]["DeepSpeed's buckets"]}
        phases["gradient reduction"] = added(phases["forward and backward"], bucket)
    stays = sum(base.values())
    for parts in phases.values():
        if machine.device == "cuda":
            parts["CUDA context and NCCL"] = int(CONTEXT + (NCCL if machine.ranks > 1 else 0))
            parts["fragmentation (estimate)"] = int(FRAGMENTATION * (sum(parts.values()) - stays))
        else:
            parts["process"] = int(PROCESS)
            for key, size in host.items():  # the host is the device
                parts[key] = parts.get(key, 0) + size
    on_host = {key: size * machine.ranks for key, size in host.items()} if machine.device == "cuda" else {}
    return Plan(machine, packing, checkpointing, phases, on_host, disk * machine.ranks)


def gathering(visits: list[Visit], gathered: list[int], kept: int) -> dict[str, int]:
    """Activations and ZeRO-3's gathered weights at the moment when both together take the most."""
    _, most, share = max(
        (size + visit.kept * kept, size, visit.kept) for visit, size in zip(visits, gathered, strict=True)
    )
    return {"activations kept for the backward pass": int(share * kept), "ZeRO-3's gathered weights": most}


def added(*tables: dict[str, int]) -> dict[str, int]:
    total: dict[str, int] = {}
    for table in tables:
        for key, size in table.items():
            total[key] = total.get(key, 0) + size
    return {key: size for key, size in total.items() if size}


def dtype_of(config: Config, device: str) -> torch.dtype:
    """As `train.choose_dtype` on such a device."""
    if config.training.dtype != "auto":
        chosen: torch.dtype = getattr(torch, config.training.dtype)
        return chosen
    return torch.bfloat16 if device == "cuda" or multiplies_bf16() else torch.float32


def estimated_pack(config: Config, ranks: int, *, tokens_per_report: int, prefix: int) -> PackShape:
    """The largest pack of a run whose reports have this mean length, `prefix` tokens of it shared by their wording."""
    t = config.training
    packs = ranks * t.accumulation
    if t.batch_size < packs:
        raise ValueError(
            f"training.batch_size: {t.batch_size} reports cannot fill {ranks} ranks x {t.accumulation} accumulation "
            "steps"
        )
    own = min(tokens_per_report, config.data.max_length) - prefix
    if own < 1:
        raise ValueError(f"--prefix-tokens: {prefix} leaves nothing of reports of {tokens_per_report} tokens")
    step = t.batch_size * own + DEVIATIONS * SPREAD * own * math.sqrt(t.batch_size)
    step = min(step, t.batch_size * (config.data.max_length - prefix))
    reports = math.ceil(t.batch_size / packs)
    wordings = len(config.data.instructions or INSTRUCTIONS)
    groups = min(reports, math.ceil(wordings / packs) + (1 if packs > 1 else 0))  # a group may be cut between packs
    length = math.ceil(step / packs / reports)
    segments = [(prefix, -1) for _ in range(groups)] + [(length, number % groups) for number in range(reports)]
    labels = math.ceil(reports * tokens_per_report * LABELLED)
    return PackShape(tuple(segments), labels, f"reports of {tokens_per_report} tokens, {prefix} of them shared")


def measured_pack(config: Config, ranks: int) -> PackShape | None:
    """The largest pack of the first steps of the job's own data; None where data or tokenizer are not there."""
    source, t = Path(config.model.path), config.training
    if not source.is_dir() or not Path(config.data.train).is_file():
        return None
    tokenizer = Tokenizer.from_dir(source, prompt_format=config.model.prompt_format)
    prompt = Prompt(tokenizer.prompt_format, tuple(config.data.instructions or INSTRUCTIONS), config.data.similar)
    rows = open_cache(config.data.train, tokenizer, prompt) or read_examples(config.data.train)
    reports = Reports(
        rows, tokenizer, prompt, max_length=config.data.max_length, seed=t.seed, name=config.data.train,
        weights=config.data.weights)  # fmt: skip
    total = t.steps or max(1, round((t.epochs or 0) * len(reports) / t.batch_size))
    steps = min(total, DRAWN_STEPS)
    packs = (
        pack(rows) for step in range(steps) for rows in spread(reports.step(step, t.batch_size), ranks * t.accumulation)
    )
    largest = max(packs, key=lambda batch: batch.tokens.numel())
    segments = tuple((int(length), int(prefix)) for length, prefix in largest.segments.tolist())
    return PackShape(segments, len(largest.labels), f"the largest of the first {steps} steps of {config.data.train}")


def shape_of(config: Config, known: str | None = None) -> LlamaConfig:
    """The model's shape: a known one, the folder's config.json, or that file alone of a Hugging Face repository."""
    if known is not None:
        return SHAPES[known]
    name = config.model.path
    if Path(name).is_dir():
        return LlamaConfig.from_json(name)
    if name.startswith((".", "/", "~")) or name.count("/") != 1:
        raise ValueError(f"model.path: {name}: no such folder; make it, or give --shape {' or '.join(SHAPES)}")
    try:
        return LlamaConfig.from_json(hf_hub_download(name, "config.json", revision=config.model.revision))
    except ValueError:
        raise
    except Exception as error:  # offline, refused, missing: the classes differ between hub versions
        raise ValueError(
            f"model.path: {name}: no folder here, and its config.json cannot be downloaded ({type(error).__name__}); "
            f"log in (hf auth login), or give --shape {' or '.join(SHAPES)}"
        ) from None


def changes(config: Config, ranks: int) -> Iterator[tuple[str, list[str]]]:
    """What could make a job smaller, the cheapest first: its description, and the config's keys to set."""
    t, zero = config.training, config.deepspeed.get("zero_optimization", {})
    if t.gradient_checkpointing == "off":
        yield "recompute activations", ["training.gradient_checkpointing=on"]
    for times in (2, 4, 8):
        if t.batch_size >= ranks * t.accumulation * times:
            yield f"packs of 1/{times}", [f"training.accumulation={t.accumulation * times}"]
    stage = zero.get("stage", 1)
    for higher in range(max(stage, 1) + 1, 4):
        if ranks > 1 and (higher == 3 or config.method == "full"):  # adapters' gradients are too small to matter
            yield f"ZeRO-{higher}", [f"deepspeed.zero_optimization.stage={higher}"]
    if config.method == "full" and t.optimizer == "adamw" and not zero.get("offload_optimizer"):
        least = max(stage, 2)
        offload = (
            f"deepspeed.zero_optimization.stage={least}",
            "deepspeed.zero_optimization.offload_optimizer.device=cpu",
        )
        yield "optimizer on the host", list(offload)
    if config.method == "full" and not zero.get("offload_param"):
        section = "deepspeed.zero_optimization"
        yield "weights on the host", [f"{section}.stage=3", f"{section}.offload_param.device=cpu"]
    if config.method == "lora":
        yield "4-bit weights", ["method=qlora"]


def changed(config: Config, settings: list[str]) -> Config:
    """The config with some keys set to other values, each given as section.key=value."""
    raw = config.resolved()
    for setting in settings:
        path, _, text = setting.partition("=")
        *sections, key = path.split(".")
        place = raw
        for section in sections:
            place = place.setdefault(section, {})
        try:
            place[key] = json.loads(text)
        except json.JSONDecodeError:
            place[key] = text
    return parse_config(raw)


Planner = Callable[[Config], Plan]


def advice(config: Config, ranks: int, planner: Planner) -> list[tuple[list[str], Plan]]:
    """Changes that make a job fit: single ones; where none is enough, as many as it takes, one after another."""
    tried = [(settings, planner(changed(config, settings))) for _, settings in changes(config, ranks)]
    if single := [(settings, found) for settings, found in tried if found.fits]:
        return single[:4]
    together: list[str] = []
    now = planner(config)
    while True:
        better = [
            (together + settings, planner(changed(config, together + settings)))
            for _, settings in changes(changed(config, together), ranks)
        ]
        better = [(settings, found) for settings, found in better if found.total < now.total]
        if not better:
            return []
        fitting = next(((settings, found) for settings, found in better if found.fits), None)
        if fitting:
            return [fitting]
        together, now = min(better, key=lambda pair: pair[1].total)


def bytes_of(text: str) -> int:
    """80GB, 24G or 81920MB in bytes (1 GB = 2^30)."""
    number, unit = text.upper().removesuffix("B").rstrip("GMT"), text.upper().removesuffix("B")[-1:]
    scale = {"G": 2**30, "M": 2**20, "T": 2**40}.get(unit)
    try:
        size = int(float(number) * (scale or 0))
    except ValueError:
        size = 0
    if size < 1:
        raise ValueError(f"--gpu-memory {text}: expected a size such as 80GB")
    return size


def render(found: Plan, name: str) -> str:
    """The prediction as a small table for people."""
    machine, pack_shape = found.machine, found.pack
    unit = "GPU" if machine.device == "cuda" else "CPU process"
    lines = [
        f"{name}: {machine.ranks} x {unit} of {machine.memory / GB:.1f} GB",
        f"  packs of up to {pack_shape.tokens:,} tokens ({pack_shape.source})",
        f"  gradient checkpointing {'on' if found.checkpointing else 'off'}",
        "",
    ]
    width = max(len(part) for part in [*found.parts, *found.host, "at the peak"])
    lines += [f"  {part:{width}}  {size / GB:8.2f} GB" for part, size in found.parts.items() if size >= GB / 1000]
    lines += [f"  {'at the peak':{width}}  {found.total / GB:8.2f} GB  ({found.peak_phase})", ""]
    others = ", ".join(f"{key} {sum(parts.values()) / GB:.1f}" for key, parts in found.phases.items())
    lines += [f"  phases of a step, GB: {others}"]
    if found.host:
        host = ", ".join(f"{part} {size / GB:.0f}" for part, size in found.host.items())
        lines += [f"  host memory, all ranks: {sum(found.host.values()) / GB:.0f} GB ({host})"]
    if found.disk:
        lines += [f"  NVMe, all ranks: {found.disk / GB:.0f} GB"]
    left = found.usable - found.total
    verdict = f"fits: {left / GB:.1f} GB left" if found.fits else f"does not fit: {-left / GB:.1f} GB too much"
    return "\n".join([*lines, f"  {verdict} of {found.usable / GB:.1f} GB usable. Computed, not measured."])


def as_json(found: Plan) -> dict[str, Any]:
    """The prediction as plain values, in bytes."""
    return {
        "fits": found.fits,
        "total": found.total,
        "usable": found.usable,
        "ranks": found.machine.ranks,
        "device": found.machine.device,
        "gradient_checkpointing": found.checkpointing,
        "pack_tokens": found.pack.tokens,
        "pack_source": found.pack.source,
        "peak_phase": found.peak_phase,
        "phases": found.phases,
        "host": found.host,
        "disk": found.disk,
    }


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m radllama.plan", description="Predict the memory of a training job per GPU, part by part."
    )
    parser.add_argument("--config", required=True, help="the job's JSON config")
    parser.add_argument("--set", action="append", default=[], metavar="SECTION.KEY=VALUE", help="change one key")
    parser.add_argument("--gpus", type=int, default=1, help="ranks: GPUs, or CPU processes with --device cpu")
    parser.add_argument("--gpu-memory", default="80GB", help="of each; with --device cpu, of each process")
    parser.add_argument("--device", choices=["cuda", "cpu"], help="default: training.device, else cuda")
    parser.add_argument("--shape", choices=list(SHAPES), help="instead of the model folder's config.json")
    parser.add_argument(
        "--tokens-per-report", type=int, help="mean, prompt and answer; default: the data's own, or 345"
    )
    parser.add_argument("--prefix-tokens", type=int, default=65, help="of these, shared by reports of one wording")
    parser.add_argument("--json", action="store_true", help="print JSON, in bytes")
    options = parser.parse_args(arguments)
    try:
        config = read_config(options.config, options.set)
        if options.gpus < 1:
            raise ValueError(f"--gpus: expected at least 1, found {options.gpus}")
        device = options.device or ("cpu" if config.training.device == "cpu" else "cuda")
        machine = Machine(options.gpus, bytes_of(options.gpu_memory), device)
        shape = shape_of(config, options.shape)

        def planner(config: Config) -> Plan:
            found = None if options.tokens_per_report else measured_pack(config, machine.ranks)
            tokens = options.tokens_per_report or 345
            found = found or estimated_pack(
                config, machine.ranks, tokens_per_report=tokens, prefix=options.prefix_tokens
            )
            return plan(config, shape, machine, found)

        found = planner(config)
        helpful = [] if found.fits else advice(config, machine.ranks, planner)
    except ValueError as error:
        parser.exit(2, f"error: {error}\n")
    if options.json:
        ways = [{"set": settings, "total": better.total, "host": better.host} for settings, better in helpful]
        print(json.dumps(as_json(found) | {"changes": ways}, indent=2))
        return
    print(render(found, options.config))
    for settings, better in helpful:
        print(f"  fits with {' '.join(f'--set {setting}' for setting in settings)}: {better.total / GB:.1f} GB"
              + (f", host {sum(better.host.values()) / GB:.0f} GB" if better.host else ""))  # fmt: skip
    if not found.fits and not helpful:
        print("  no setting makes it fit: more GPUs, method qlora, or a smaller model")


if __name__ == "__main__":
    main()
