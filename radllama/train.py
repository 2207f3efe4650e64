"""Fine-tune a Llama on findings/impression pairs: an explicit DeepSpeed engine loop.

    deepspeed radllama/train.py --config qlora.json [--set training.learning_rate=1e-4] [--resume]

The run folder (training.output) afterwards holds

    config.json      the resolved config                 metrics.jsonl  one line a step, one a validation
    last/, best/     the weights at the end, and those with the lowest validation loss: an adapter in PEFT's format,
                     or a full model in Hugging Face's, each with its tokenizer and prompt.json
    loss.png         the loss curve                      checkpoints/   what --resume continues from
"""

from __future__ import annotations

import argparse
import logging
import math
import os
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import deepspeed
import deepspeed.comm as dist
import psutil
import torch
from deepspeed.accelerator import get_accelerator
from torch import Tensor, nn
from tqdm import tqdm

from radllama.attention import row_attention
from radllama.build import build_model, check_disk, partition_of, remove_swapped, swapping
from radllama.cache import open_cache
from radllama.card import write_card
from radllama.checkpoint import atomic_folder, find_model, write_model_into
from radllama.config import Config, read_config
from radllama.data import (
    INSTRUCTIONS,
    Pack,
    Prompt,
    Reports,
    check_vocabulary,
    in_order,
    pack,
    read_examples,
    spread,
)
from radllama.fused import keep_few_kernels, multiplies_bf16
from radllama.guard import Guard, mean_losses
from radllama.heap import keep_freed_memory, return_freed_memory
from radllama.lora import lora_parameters, save_adapter
from radllama.model import Llama, LlamaConfig
from radllama.quant import kept
from radllama.resume import Checkpoints, check_data, check_ranks, everyones
from radllama.run import (
    MetricsLog,
    PeakMemory,
    RunLock,
    TrainingError,
    claim_run_folder,
    draw_losses,
    show,
    write_config,
    writing,
)
from radllama.tokenizer import Tokenizer
from radllama.watch import Watch, free_compile_locks

logger = logging.getLogger("radllama")


@dataclass(frozen=True)
class Place:
    """Where this process computes."""

    rank: int
    world: int
    local_rank: int
    device: torch.device
    dtype: torch.dtype


def train(config: Config, *, resume: bool = False) -> Path:
    """Run the whole job of a config and return the run folder.

    Works alone in one process, and in every process that the deepspeed launcher (or torchrun) starts.
    Raises ValueError for bad input before any weight is loaded, TrainingError where training must stop.
    """
    ours = not dist.is_initialized()
    place = start(config)
    watch, lock = Watch(place.rank, place.world, place.device), RunLock(Path(config.training.output))
    failed = True
    try:
        run, training, validation = prepare(config, place, watch, lock, resume=resume)
        with watch.listening(), dequantized(config, run.engine.module, place):
            run.loop(training, validation, resume=resume)
        dist.barrier()
        remove_swapped(run.engine.config["zero_optimization"])
        failed = False
    except BaseException as error:
        watch.fail(error)
        raise
    finally:
        lock.release()
        watch.close()
        if ours and not (failed and place.world > 1):  # it would wait for ranks that have failed
            dist.destroy_process_group()
    return run.folder


def prepare(
    config: Config, place: Place, watch: Watch, lock: RunLock, *, resume: bool
) -> tuple[Run, Reports, Reports | None]:
    """Check all input, then claim the run folder, then load the model."""
    folder = claim_run_folder(config, resume)
    check_ranks(config, folder, place.world)
    source = find_model(config.model.path, revision=config.model.revision)
    tokenizer = Tokenizer.from_dir(source, prompt_format=config.model.prompt_format)
    wordings = tuple(config.data.instructions or INSTRUCTIONS)
    prompt = Prompt(tokenizer.prompt_format, wordings, config.data.similar)
    shape = LlamaConfig.from_json(source)
    check_vocabulary(tokenizer, shape.vocab_size, source=str(source))
    if config.data.max_length > shape.max_position_embeddings:
        most = shape.max_position_embeddings
        logger.warning("data.max_length: %d tokens, and the model was made for %d", config.data.max_length, most)
    settings = deepspeed_settings(config, place, shape)
    check_disk(settings["zero_optimization"])
    warn_of_untrained_headers(config, source, tokenizer)
    training = read_reports(config, config.data.train, tokenizer, prompt)
    validation = read_reports(config, config.data.validation, tokenizer, prompt) if config.data.validation else None
    if config.training.batch_size < place.world * config.training.accumulation:
        raise ValueError(
            f"training.batch_size: {config.training.batch_size} reports cannot fill {place.world} ranks x "
            f"{config.training.accumulation} accumulation steps"
        )
    dist.barrier()  # every rank has checked; from here on something is written
    if place.rank == 0:
        lock.claim()
        claim_run_folder(config, resume)  # again: a run that has just ended may have left it otherwise
        write_config(config, folder)
    dist.barrier()
    lock.share()
    check_data(config, folder, source, rank=place.rank, world=place.world)
    seed_everything(config.training.seed, -1, 0)  # the same LoRA A on every rank
    model = build_model(
        config, source, device=place.device, dtype=place.dtype, progress=place.rank == 0,
        partition=partition_of(settings, place.device, place.dtype))  # fmt: skip
    model.packed_attention = row_attention
    model.model.gradient_checkpointing = needs_checkpointing(config, model, training, place)
    engine, guard = start_engine(config, model, place, settings)
    if place.device.type == "cpu":
        return_freed_memory()
    return Run(config, place, folder, engine, tokenizer, prompt, source, watch, guard), training, validation


class Run:
    """One training run: the engine, the loop, and what is written to the run folder."""

    def __init__(
        self,
        config: Config,
        place: Place,
        folder: Path,
        engine: Any,
        tokenizer: Tokenizer,
        prompt: Prompt,
        source: Path,
        watch: Watch,
        guard: Guard,
    ) -> None:
        self.config, self.place, self.folder, self.engine = config, place, folder, engine
        self.tokenizer, self.prompt, self.source = tokenizer, prompt, source
        self.watch, self.guard = watch, guard
        self.checkpoints = Checkpoints(
            folder / "checkpoints", rank=place.rank, world=place.world, keep=config.training.keep_checkpoints
        )
        self.best = math.inf

    def loop(self, training: Reports, validation: Reports | None, *, resume: bool) -> None:
        """Batch, forward, backward, step; log, validate, save."""
        t, place, engine = self.config.training, self.place, self.engine
        total = t.steps or max(1, round((t.epochs or 0) * len(training) / t.batch_size))
        first, due = self.resume(total) if resume else (0, False)
        log = MetricsLog(self.folder, keep_below=first, validated=not due) if place.rank == 0 else None
        bar = tqdm(total=total, initial=first, desc="train", unit="step", disable=place.rank != 0, mininterval=0.5)
        started, memory = time.monotonic(), PeakMemory(place.device)
        if due and validation is not None and not self.validate(validation, first, log):
            self.stop(bar, first, total)
            return

        for step in range(first, total):
            begun = time.monotonic()
            seed_everything(t.seed, step, place.rank)
            learning_rate = learning_rate_at(step, total, self.config)
            for group in engine.optimizer.param_groups:
                group["lr"] = learning_rate

            rows = training.step(step, t.batch_size)
            supervised = sum(sum(row.mask[1:]) for row in rows)  # over all ranks: each rank draws the whole step
            mine = spread(rows, place.world * t.accumulation)[place.rank * t.accumulation :][: t.accumulation]
            engine.train()
            losses = []
            for number, members in enumerate(mine):
                batch = pack(members)
                token_losses = self.forward(batch)
                losses.append((batch, token_losses.detach()))
                # The step's loss is sum / supervised tokens of the step. DeepSpeed averages gradients over ranks,
                # and would divide by the accumulation steps: undo the one, switch off the other.
                engine.backward(token_losses.sum() * (place.world / supervised), scale_wrt_gas=False)
                del token_losses  # and its graph, whose nodes would lie all over the memory of the next pass
                if number < len(mine) - 1:
                    engine.step()  # counts the micro-step; weights change at the last one only
            loss, signalled = global_sums(
                [sum(float(values.sum()) for _, values in losses), float(self.watch.signal is not None)], place
            )
            loss /= supervised
            fault = self.guard.judge(loss)  # a bad step leaves weights and moments as they are
            engine.step()
            if step == first and place.device.type == "cpu":
                keep_freed_memory()  # the optimizer's moments are there now
            norm = engine.get_global_grad_norm()
            fault = fault or self.guard.judge_gradient(norm, scaled=place.dtype == torch.float16)
            if fault is not None:
                reports = [report for part in everyones(mean_losses(losses), place.world) for report in part]
                told = self.guard.report(self.folder if place.rank == 0 else None, step + 1, fault, loss, reports)
                logger.warning("%s", told)

            seconds = time.monotonic() - begun
            record = {
                "step": step + 1,
                "loss": loss if math.isfinite(loss) else None,
                "learning_rate": learning_rate,
                "gradient_norm": float(norm) if fault is None and norm is not None else None,
                "reports_per_second": t.batch_size / seconds,
                "supervised_tokens_per_second": supervised / seconds,
                "memory_gb": memory.gigabytes(),
                "seconds": time.monotonic() - started,
            }
            if log is not None:
                log.write(record)
                show(bar, record)
            self.monitor({"Train/loss": loss, "Train/learning_rate": learning_rate}, step + 1)

            last = step + 1 == total
            due = validation is not None and (last or bool(t.validate_every and (step + 1) % t.validate_every == 0))
            if due and validation is not None:
                due = not self.validate(validation, step + 1, log)
            stop = signalled or due  # a signal may have come within the validation
            if last or stop or (t.save_every and (step + 1) % t.save_every == 0):
                state = {"best": self.best, "guard": self.guard.state(), "validation_due": due}
                self.checkpoints.save(engine, step + 1, state)
            if stop:
                self.stop(bar, step + 1, total)
                return
        bar.close()
        self.save_weights("last")
        if log is not None:
            draw_losses(self.folder)

    def stop(self, bar: Any, step: int, total: int) -> None:
        bar.close()
        logger.info("stopped by a signal after step %d of %d; saved; continue with --resume", step, total)

    def resume(self, total: int) -> tuple[int, bool]:
        """Continue from the last good checkpoint: the steps it has done, and whether their validation is due."""
        state = self.checkpoints.load(self.engine)
        if state is None:
            logger.info("no checkpoint was completed before the run ended: from the first step")
            return 0, False
        self.best = state["best"]
        self.guard.load(state["guard"])
        logger.info("resumed from step %d of %d", state["step"], total)
        return int(state["step"]), bool(state["validation_due"])

    def forward(self, batch: Pack) -> Tensor:
        """The cross-entropy of every supervised token of a pack (N,), fp32."""
        device = self.place.device
        losses: Tensor = self.engine(
            batch.tokens.to(device),
            positions=batch.positions.to(device),
            segments=batch.segments,
            label_positions=batch.label_positions.to(device),
            labels=batch.labels.to(device),
        )
        return losses

    def validate(self, reports: Reports, step: int, log: MetricsLog | None) -> bool:
        """Token-weighted loss over all validation reports; the best weights so far are saved. False: a signal came."""
        place, t = self.place, self.config.training
        sums = [0.0, 0.0]  # loss, supervised tokens
        self.engine.eval()
        with torch.no_grad():
            for rows in in_order(reports, max(place.world, t.batch_size // t.accumulation)):
                if self.signalled():
                    return False
                packs = spread(rows, min(place.world, len(rows)))
                spare = place.rank >= len(packs)  # fewer reports than ranks: run along (ZeRO-3 gathers), count nothing
                losses = self.forward(pack(packs[0 if spare else place.rank]))
                if not spare:
                    sums[0] += float(losses.sum())
                    sums[1] += len(losses)
        total, supervised = global_sums(sums, place)
        loss = total / supervised
        if log is not None:
            log.write({"step": step, "validation_loss": loss})
            tqdm.write(f"step {step}: validation loss {loss:.4f}" + (" (best so far)" if loss < self.best else ""))
        self.monitor({"Validation/loss": loss}, step)
        if loss < self.best:
            self.best = loss
            self.save_weights("best")
        return True

    def signalled(self) -> bool:
        """Whether any rank has got a signal: the same answer on all."""
        return bool(global_sums([float(self.watch.signal is not None)], self.place)[0])

    def monitor(self, values: dict[str, float], step: int) -> None:
        """To DeepSpeed's monitors (TensorBoard, CSV, W&B), where its section asks for one."""
        if self.place.rank == 0 and self.engine.monitor.enabled:
            self.engine.monitor.write_events([(name, value, step) for name, value in values.items()])

    def save_weights(self, name: str) -> None:
        """Write last/ or best/: an adapter or a full model, the tokenizer, and how the model was asked."""
        model: Llama = self.engine.module
        if self.config.method == "full":
            tensors = gathered(model)
            if self.place.rank != 0:
                for _ in tensors:  # ZeRO-3: every rank takes part in gathering
                    pass
                return
            with writing(self.folder / name), atomic_folder(self.folder / name) as folder:
                write_model_into(folder, tensors, model.config)
                self.save_prompt(folder)
            return
        with gather(lora_parameters(model)):
            if self.place.rank == 0:
                with writing(self.folder / name), atomic_folder(self.folder / name) as folder:
                    save_adapter(model, folder, base_model=self.config.model.path)
                    self.save_prompt(folder)

    def save_prompt(self, folder: Path) -> None:
        self.tokenizer.save(folder)
        self.prompt.save(folder)
        write_card(folder, self.config, self.folder)


def start(config: Config) -> Place:
    """Join the process group and choose device and dtype; rank 0 says which and why."""
    logging.basicConfig(format="%(levelname)s: %(message)s", level=logging.INFO)
    for name in ("DeepSpeed", "deepspeed", "torch.distributed"):
        logging.getLogger(name).setLevel(logging.WARNING)
    accelerator = get_accelerator().device_name()
    wanted = config.training.device
    if wanted == "cuda" and accelerator != "cuda":
        raise ValueError("training.device: cuda was asked for, but this machine shows no CUDA GPU; use auto or cpu")
    if wanted == "cpu" and accelerator != "cpu":
        raise ValueError("training.device: for cpu on a machine with a GPU set DS_ACCELERATOR=cpu in the environment")
    if "RANK" not in os.environ:  # one process, no launcher
        os.environ |= {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}
        os.environ["MASTER_PORT"] = str(free_port())
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    if accelerator == "cuda":
        torch.cuda.set_device(local_rank)
    if not dist.is_initialized():
        free_compile_locks()
        deepspeed.init_distributed(dist_backend="nccl" if accelerator == "cuda" else "gloo", verbose=False)
    device = torch.device("cuda", local_rank) if accelerator == "cuda" else torch.device("cpu")
    dtype, reason = choose_dtype(config, device)
    keep_few_kernels()
    place = Place(dist.get_rank(), dist.get_world_size(), local_rank, device, dtype)
    if place.rank != 0:
        logger.setLevel(logging.WARNING)
    logger.info("%d x %s, %s: %s", place.world, device.type, str(dtype).removeprefix("torch."), reason)
    return place


def dequantized(config: Config, model: Llama, place: Place) -> AbstractContextManager[None]:
    """Where the config asks for it, hold the frozen 4-bit weights de-quantised for as long as training takes."""
    keep = config.method == "qlora" and config.quantization.keep_dequantized
    return kept(model, place.dtype) if keep else nullcontext()


def choose_dtype(config: Config, device: torch.device) -> tuple[torch.dtype, str]:
    """The dtype to compute in, and why."""
    if config.training.dtype != "auto":
        chosen: torch.dtype = getattr(torch, config.training.dtype)
        if chosen == torch.float16 and not get_accelerator().is_fp16_supported():
            raise ValueError(f"training.dtype: this {device.type} does not compute in float16; choose auto or bfloat16")
        return chosen, "as training.dtype says"
    if device.type == "cuda":
        if torch.cuda.is_bf16_supported(including_emulation=False):
            return torch.bfloat16, "this GPU computes in bf16"
        return torch.float16, "this GPU has no bf16; fp16 with loss scaling"
    if multiplies_bf16():
        return torch.bfloat16, "this CPU multiplies bf16 matrices in hardware (AMX or AVX512-BF16)"
    return torch.float32, "without AMX or AVX512-BF16, fp32 matrix products are faster than bf16 on a CPU"


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


def read_reports(config: Config, path: str, tokenizer: Tokenizer, prompt: Prompt) -> Reports:
    source = open_cache(path, tokenizer, prompt) or read_examples(path)
    weights = config.data.weights if path == config.data.train else None
    return Reports(
        source, tokenizer, prompt, max_length=config.data.max_length, seed=config.training.seed, name=path,
        weights=weights)  # fmt: skip


def warn_of_untrained_headers(config: Config, source: Path, tokenizer: Tokenizer) -> None:
    """A base checkpoint has never seen the chat format's header tokens, and a frozen embedding never learns them."""
    settings = source / "tokenizer_config.json"
    chat = (source / "chat_template.jinja").exists() or (
        settings.exists() and "chat_template" in settings.read_text(encoding="utf-8")
    )
    if config.method != "full" and tokenizer.header_token_ids and not chat:
        logger.warning(
            "%s looks like a base checkpoint: the embeddings of the %s format's header tokens are untrained and stay "
            "frozen with method %s; an instruct checkpoint, or model.prompt_format alpaca, avoids that",
            source, tokenizer.prompt_format, config.method)  # fmt: skip


def needs_checkpointing(config: Config, model: Llama, reports: Reports, place: Place) -> bool:
    """Whether to recompute activations in the backward pass (a third more work) instead of keeping them."""
    choice = config.training.gradient_checkpointing
    if choice != "auto":
        return choice == "on"
    t = config.training
    packs = [
        group for step in range(8) for group in spread(reports.step(step, t.batch_size), place.world * t.accumulation)
    ]
    tokens = max(sum(len(row.ids) for row in group) for group in packs)
    with gather(list(model.model.layers[0].parameters())):
        needed = tokens * activation_bytes(model, place) * model.config.num_hidden_layers
    if place.device.type == "cuda":
        free = torch.cuda.mem_get_info(place.device)[0]
    else:
        free = psutil.virtual_memory().available // place.world
    on = needed > 0.7 * free  # the rest: logits, gradients, optimizer, fragmentation
    on = any(everyones(on, place.world))  # one answer for all: under ZeRO-3 a layer that runs again gathers again
    logger.info("activations of %d tokens need %.1f GB of %.1f GB free: gradient checkpointing %s",
                tokens, needed / 2**30, free / 2**30, "on" if on else "off")  # fmt: skip
    return on


def activation_bytes(model: Llama, place: Place, tokens: int = 64) -> float:
    """Bytes a token that one layer keeps for its backward pass, measured by running it once."""
    kept: dict[int, int] = {}
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}

    def count(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    x = torch.randn(1, tokens, model.config.hidden_size, device=place.device, dtype=place.dtype, requires_grad=True)
    angle = torch.zeros(1, 1, tokens, model.config.head_dim, device=place.device, dtype=place.dtype)
    flat = lambda q, k, v: nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)  # noqa: E731
    with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
        out = model.model.layers[0](x, angle, angle, flat)  # `out` keeps the graph, so that no address is used twice
    del out
    return sum(kept.values()) / tokens


def start_engine(config: Config, model: Llama, place: Place, settings: dict[str, Any]) -> tuple[Any, Guard]:
    """DeepSpeed's engine around the model, only trainable parameters in the optimizer; what keeps it from bad steps."""
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    count = sum(getattr(parameter, "ds_numel", parameter.numel()) for parameter in trainable)
    # DeepSpeed takes this many elements whether or not there are as many gradients: 1 GB in bf16 for any adapter.
    settings["zero_optimization"].setdefault("reduce_bucket_size", min(count, 500_000_000))
    optimizer = build_optimizer(config, trainable, settings)
    guard = Guard(config.training, optimizer, gradients_of=[] if settings["zero_optimization"]["stage"] else trainable)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, model_parameters=trainable, config=settings)
    logger.info(
        "%s: %s trainable parameters, ZeRO stage %d", config.method, f"{count:,}", engine.zero_optimization_stage()
    )
    return engine, guard


def deepspeed_settings(config: Config, place: Place, shape: LlamaConfig) -> dict[str, Any]:
    """The deepspeed section, completed by what `training` says and the model's shape asks for."""
    t = config.training
    zero = {"stage": 1} | config.deepspeed.get("zero_optimization", {})
    if zero["stage"] == 0 and place.dtype != torch.float32:
        logger.info("ZeRO stage 1 in place of 0, which trains half-precision weights less exactly")
        zero["stage"] = 1
    return config.deepspeed | {
        "zero_optimization": swapping(config, zero, shape, place.world),
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": t.accumulation,
        "gradient_clipping": t.gradient_clipping,
        "bf16": {"enabled": place.dtype == torch.bfloat16},
        "fp16": {"enabled": place.dtype == torch.float16, "initial_scale_power": 12},
        "zero_allow_untested_optimizer": True,  # bitsandbytes' optimizers
        "steps_per_print": config.deepspeed.get("steps_per_print", 10**9),  # the loop has its own log
    }


def build_optimizer(config: Config, trainable: list[nn.Parameter], settings: dict[str, Any]) -> Any:
    """AdamW or one of its bitsandbytes forms; matrices decay, norms do not."""
    t = config.training
    groups = [
        {"params": [p for p in trainable if p.dim() > 1], "weight_decay": t.weight_decay},
        {"params": [p for p in trainable if p.dim() <= 1], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    offloaded = settings.get("zero_optimization", {}).get("offload_optimizer", {}).get("device", "none") != "none"
    arguments: dict[str, Any] = {"lr": t.learning_rate, "betas": t.betas, "eps": t.eps}
    if offloaded:
        if t.optimizer != "adamw":
            raise ValueError(f"training.optimizer: {t.optimizer} cannot be offloaded; use adamw with offload_optimizer")
        return deepspeed.ops.adam.DeepSpeedCPUAdam(groups, adamw_mode=True, **arguments)
    makers = {
        "adamw": torch.optim.AdamW,
        "adamw_8bit": bnb.optim.AdamW8bit,
        "paged_adamw": bnb.optim.PagedAdamW32bit,
        "paged_adamw_8bit": bnb.optim.PagedAdamW8bit,
    }
    return makers[t.optimizer](groups, **arguments)


def learning_rate_at(step: int, total: int, config: Config) -> float:
    """The learning rate of step `step` (from 0) of `total`: linear warm-up, then the schedule's decay."""
    t = config.training
    warmup = round(t.warmup * total)
    if step < warmup:
        return t.learning_rate * (step + 1) / (warmup + 1)
    progress = (step - warmup) / max(1, total - warmup)
    share = {"constant": 1.0, "linear": 1.0 - progress, "cosine": 0.5 * (1.0 + math.cos(math.pi * progress))}[
        t.schedule
    ]
    return t.min_learning_rate + (t.learning_rate - t.min_learning_rate) * share


def seed_everything(seed: int, step: int, rank: int) -> None:
    """Dropout draws are a function of (seed, step, rank), so that a resumed run needs no saved generator state."""
    torch.manual_seed(hash((seed, step, rank)) % 2**63)


def global_sums(values: list[float], place: Place) -> list[float]:
    """The sum of each number over all ranks, in fp64 (gloo and NCCL)."""
    totals = torch.tensor(values, dtype=torch.float64, device=place.device)
    dist.all_reduce(totals)
    sums: list[float] = totals.tolist()
    return sums


def gather(parameters: list[nn.Parameter]) -> Any:
    """A context in which ZeRO-3's partitioned parameters are whole on every rank."""
    partitioned = [parameter for parameter in parameters if hasattr(parameter, "ds_id")]
    return deepspeed.zero.GatheredParameters(partitioned) if partitioned else nullcontext()


def gathered(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Name and value of every parameter, one at a time, whole even under ZeRO-3 (then a copy)."""
    for name, parameter in model.named_parameters():
        with gather([parameter]):
            yield name, parameter.detach().cpu().clone()


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description="Fine-tune a Llama on findings/impression pairs.", epilog="Start it with the deepspeed launcher."
    )
    parser.add_argument("--config", required=True, help="JSON config; README.md lists its keys")
    parser.add_argument(
        "--set", action="append", default=[], metavar="SECTION.KEY=VALUE", help="change one key; repeatable"
    )
    parser.add_argument("--resume", action="store_true", help="continue from the run folder's last checkpoint")
    parser.add_argument("--local_rank", type=int, default=0, help=argparse.SUPPRESS)  # the launcher's
    options = parser.parse_args(arguments)
    rank = int(os.environ.get("RANK", "0"))
    try:
        folder = train(read_config(options.config, options.set), resume=options.resume)
    except ValueError as error:  # bad input, found by every rank alike
        if rank == 0:
            print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except (TrainingError, OSError) as error:
        sys.exit(f"error (rank {rank}): {error}")
    if rank == 0 and (folder / "last").exists():
        print(f"wrote {folder}")


if __name__ == "__main__":
    main()
