"""DeepSpeed's memory: what ZeRO holds, gathers and copies in a step, as arithmetic over DeepSpeed 0.19.8's own source.

Each term names what it is there: runtime/zero/stage_1_and_2.py, stage3.py and parameter_offload.py. All in bytes of one
rank. On a CPU what is allocated before the first step counts once it is written to, all else once it is allocated.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from radllama.config import Config
from radllama.dry_run import Weight

BUCKET = 500_000_000  # elements: DeepSpeed's default
SWAP_BUFFERS = 10  # build.BUFFERS


@dataclass(frozen=True)
class Zero:
    """DeepSpeed's zero_optimization section, completed as `train.deepspeed_settings` and DeepSpeed do."""

    stage: int
    offload_optimizer: str
    offload_param: str
    reduce_bucket: int  # 0: as many elements as there are gradients
    overlap: bool
    prefetch: int
    persistence: int
    reuse: int
    sub_group: int
    in_cpu: int  # trainable elements that offload_param to nvme keeps in memory
    param_buffers: tuple[int, int]  # how many, of at least how many elements
    optimizer_buffers: int

    @classmethod
    def of(cls, config: Config, dtype: torch.dtype) -> Zero:
        section: dict[str, Any] = {"stage": 1} | config.deepspeed.get("zero_optimization", {})
        stage = section["stage"] or (0 if dtype == torch.float32 else 1)

        def number(key: str, default: float) -> int:
            value = section.get(key, default)
            return int(default if isinstance(value, str) else value)

        def option(key: str, name: str, default: Any) -> Any:
            return (section.get(key) or {}).get(name, default)

        def device(key: str) -> str:
            return str(option(key, "device", "none"))

        overlap = section.get("overlap_comm")
        return cls(
            stage=stage,
            offload_optimizer=device("offload_optimizer"),
            offload_param=device("offload_param"),
            reduce_bucket=number("reduce_bucket_size", 0),
            overlap=stage == 3 if overlap is None else bool(overlap),
            prefetch=number("stage3_prefetch_bucket_size", 5e7),
            persistence=number("stage3_param_persistence_threshold", 1e5),
            reuse=number("stage3_max_reuse_distance", 1e9),
            sub_group=number("sub_group_size", 1e9),
            in_cpu=int(option("offload_param", "max_in_cpu", 1e9 if config.method == "full" else 1e15)),
            param_buffers=(
                int(option("offload_param", "buffer_count", SWAP_BUFFERS)),
                int(option("offload_param", "buffer_size", 0)),
            ),
            optimizer_buffers=int(option("offload_optimizer", "buffer_count", 4)),
        )


def weight_bytes(weights: list[Weight], zero: Zero, ranks: int) -> dict[str, int]:
    """Bytes of the model's own parameters on one rank, by kind. ZeRO-3 splits all; small ones stay whole besides."""
    found: dict[str, int] = {}
    for weight in weights:
        size = weight.size
        if zero.stage == 3 and ranks > 1:
            share = math.ceil(weight.numel / ranks) * weight.width
            size = share + (size if weight.numel <= zero.persistence else 0)
        found[weight.kind] = found.get(weight.kind, 0) + weight.times * size
    return found


def gathered_bytes(weights: list[Weight], zero: Zero, ranks: int) -> int:
    """ZeRO-3: whole parameters that are on a rank at once.

    DeepSpeed keeps what is used again within `max_reuse_distance` elements, there and back, fetches
    `prefetch_bucket_size` ahead, and needs the largest at its turn.
    """
    split = [weight for weight in weights if weight.numel > zero.persistence]
    if zero.stage < 3 or ranks == 1 or not split:
        return 0
    numel, size = sum(w.numel * w.times for w in split), sum(w.size * w.times for w in split)
    window = zero.reuse / 2 + zero.prefetch + max(w.numel for w in split)
    return int(size * min(1.0, window / numel))


def moments_of(numel: int, optimizer: str) -> int:
    """Adam's two moments: fp32, or 8 bits with an fp32 scale for each block of 256."""
    return numel * 2 + math.ceil(numel / 256) * 8 if optimizer.endswith("8bit") else numel * 8


@dataclass(frozen=True)
class Training:
    """What the terms of DeepSpeed's arithmetic are made of: N trainable elements of b bytes over n ranks."""

    numel: int
    largest: int
    groups: int  # of the optimizer: matrices decay, norms do not
    width: int
    ranks: int
    accumulation: int
    optimizer: str
    device: str

    @property
    def part(self) -> int:
        return math.ceil(self.numel / self.ranks)

    def bucket(self, zero: Zero) -> int:
        """Elements of the reduce bucket, as `train.start_engine` sets it; on a CPU those that are written to."""
        if not zero.reduce_bucket:
            return min(self.numel, BUCKET)
        return min(zero.reduce_bucket, self.numel) if self.device == "cpu" else zero.reduce_bucket


def resident_of(job: Training, zero: Zero) -> tuple[dict[str, int], dict[str, int], int]:
    """What DeepSpeed holds from step to step: on the device, on the host (of one rank), on the disk."""
    N, n, b = job.numel, job.part, job.width
    moments = moments_of(n, job.optimizer)
    if zero.stage == 0:
        return {"optimizer moments": moments_of(N, job.optimizer)}, {}, 0
    device, host, disk = {}, {}, 0
    states = {"fp32 master weights": 4 * n, "optimizer moments": moments}
    if zero.stage == 3:
        buffers = 2 if zero.overlap and job.device == "cuda" else 1  # reduce_scatter flattens into a second one
        device["DeepSpeed's buckets"] = b * job.bucket(zero) * buffers
    if zero.offload_optimizer == "none":
        device |= states
        if zero.stage == 3:
            device["gradients"] = b * n  # grad_partitions_flat_buffer
        if job.optimizer.startswith("paged"):
            host["optimizer moments (paged)"] = device.pop("optimizer moments")
        return device, host, disk
    if zero.stage < 3:
        device["DeepSpeed's offload buffer"] = b * job.largest  # temp_grad_buffer_for_gpu_offload
        host["16-bit and gradient buffers"] = b * n + b * job.largest
        if job.accumulation > 1:
            host["accumulated gradients"] = b * (n if job.ranks > 1 else N)
        host |= states | {"fp32 gradients": 4 * n}
    else:
        host |= states | {"fp32 gradients": 4 * n, "accumulated gradients": b * n}
    if zero.offload_optimizer == "nvme":
        disk = sum(host.pop(key) for key in ("fp32 master weights", "optimizer moments", "fp32 gradients"))
        host["swap buffers"] = zero.optimizer_buffers * 4 * min(zero.sub_group, n)
    return device, host, disk


def offloaded_weights(job: Training, zero: Zero, size: int, largest: int) -> tuple[dict[str, int], int]:
    """ZeRO-3 with offload_param: of `size` bytes of weights a rank those on the host, with buffers; those on the disk.

    largest: elements of the largest parameter, which every buffer of `build.swapping` holds.
    """
    if zero.offload_param != "nvme":
        return {"weights": size}, 0
    b, n = job.width, job.part
    kept = b * min(n, zero.in_cpu)  # param_groups_fp16_flat_cpu_memory
    count, least = zero.param_buffers
    buffers = b * count * max(least, math.ceil(largest / job.ranks))
    if n > zero.in_cpu:
        buffers += b * min(zero.sub_group, n)  # partitioned_swap_buffer
    return {"weights": kept, "parameters' swap buffers": buffers}, max(0, size - kept)


def gradients_before(job: Training, zero: Zero) -> tuple[dict[str, int], Callable[[int], int]]:
    """Gradients and buckets at the start of the last micro-step's backward pass, and what each gradient adds then."""
    N, b, several = job.numel, job.width, job.accumulation > 1
    if zero.stage == 3:
        return {}, lambda numel: 0  # into buffers that are there already
    if zero.stage == 0:
        return ({"gradients": b * N}, lambda numel: 0) if several else ({}, lambda numel: b * numel)
    held = {"DeepSpeed's buckets": b * job.bucket(zero) * (2 if zero.overlap else 1)}
    if job.bucket(zero) < N and zero.offload_optimizer == "none":  # else nothing is reduced before the pass is over
        held["gradients"] = b * job.part  # grads_in_partition
    if several and zero.offload_optimizer == "none":
        held["gradients"] = held.get("gradients", 0) + b * (N if zero.stage == 1 else job.part)
    elif several and zero.stage == 1:
        held["gradients"] = b * N
    return held, lambda numel: 0  # a gradient moves into the bucket


def phases_of_step(job: Training, zero: Zero) -> dict[str, dict[str, int]]:
    """What comes and goes after the backward pass: reduction, norm, optimizer; above the resident parts."""
    N, n, b = job.numel, job.part, job.width
    offloaded = zero.offload_optimizer != "none"
    denominators = 0 if offloaded or job.optimizer != "adamw" else 2 if job.device == "cpu" else 1  # foreach on a GPU
    if zero.stage == 0:
        work = {"optimizer's working memory": 4 * denominators * (job.largest if job.device == "cpu" else N)}
        copies = {"gradients": b * N, "DeepSpeed's buckets": b * min(N, BUCKET) if job.ranks > 1 else 0}
        return {"gradient reduction": copies, "optimizer step": {"gradients": b * N} | work}
    if zero.stage == 3:
        group = min(n, zero.sub_group)
        norm = {"optimizer's working memory": 8 * math.ceil(job.largest / job.ranks)}
        if offloaded:
            return {"gradient norm": norm}
        flat = 4 * group + (b * group if b != 4 else 0)
        return {
            "gradient norm": norm,
            "optimizer step": {"optimizer's working memory": max(flat, 4 * group + 4 * denominators * group)},
        }
    held = 0 if offloaded else b * n * (2 if zero.stage == 2 and job.accumulation > 1 else 1)
    bucket = b * job.bucket(zero)
    buckets = bucket * ((2 if zero.overlap and job.device == "cuda" else 1) + (1 if job.ranks > 1 else 0))
    phases = {"gradient reduction": {"gradients": held, "DeepSpeed's buckets": buckets}}
    if not offloaded:
        wide = 8 * min(job.largest, n)  # one gradient at a time in fp64
        phases["gradient norm"] = {"gradients": b * n, "optimizer's working memory": wide}
        start = 2 * b * n + (4 * n if b != 4 else 0)  # the gradients, flattened, cast
        shared = b * n if job.groups > 1 else 0  # one buffer holds all groups' gradients until the last is done
        update = shared + 4 * n + 4 * denominators * n
        phases["optimizer step"] = {"gradients": 4 * n, "optimizer's working memory": max(start, update) - 4 * n}
    return phases
