"""DeepSpeed's memory: what ZeRO holds, gathers and copies in a step, as arithmetic over DeepSpeed 0.19.8's own source.

Each term names what it is there: runtime/zero/stage_1_and_2.py, stage3.py, parameter_offload.py and, for what ZeRO-3
gathers, partitioned_param_coordinator.py, which is run over the order of the model's modules. All in bytes of one rank.
On a CPU what is allocated before the first step counts once it is written to, all else once it is allocated.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from radllama.config import Config
from radllama.dry_run import Visit, Weight

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
    live: int
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
        ahead = device("offload_param") != "nvme"  # build.swapping
        return cls(
            stage=stage,
            offload_optimizer=device("offload_optimizer"),
            offload_param=device("offload_param"),
            reduce_bucket=number("reduce_bucket_size", 0),
            overlap=stage == 3 if overlap is None else bool(overlap),
            prefetch=number("stage3_prefetch_bucket_size", ahead * 5e7),
            persistence=number("stage3_param_persistence_threshold", 1e5),
            reuse=number("stage3_max_reuse_distance", ahead * 1e9),
            live=number("stage3_max_live_parameters", 1e9),
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


@dataclass(eq=False)
class Gather:
    """One all-gather of several parameters: into a flat buffer, from which each is copied when the first is needed."""

    names: list[str]
    flat: int
    waiting: bool = True
    unused: int = 0  # parameters that were not needed yet: until then the flat buffer stays


class Coordinator:
    """ZeRO-3's partitioned_param_coordinator.py over a recorded pass: what it gathers ahead, keeps and releases."""

    def __init__(self, visits: list[Visit], zero: Zero, ranks: int, device: str) -> None:
        self.zero, self.ranks, self.device = zero, ranks, device
        self.sizes = {name: (numel, size) for visit in visits for name, numel, size in visit.own}
        self.order = [[name for name, *_ in visit.own] for visit in visits if visit.begins]
        self.queue = deque((name, step) for step, own in enumerate(self.order) for name in own)
        self.here = {name for name, (numel, _) in self.sizes.items() if numel <= zero.persistence}
        self.stays = frozenset(self.here)
        self.flying: dict[str, Gather] = {}
        self.wanted = dict.fromkeys(self.sizes, -1)  # the last step that a gather was for
        self.live = self.elements = self.step = 0

    def bytes(self) -> int:
        """Of whole parameters and flat buffers; gloo gathers into a copy, two at a time (its threads)."""
        copies = [gather.flat for gather in dict.fromkeys(self.flying.values()) if gather.waiting]
        return self.live + (sum(copies[:2]) if self.device == "cpu" and self.ranks > 1 else 0)

    def gather(self, names: list[str]) -> None:
        names = [name for name in names if name not in self.here and name not in self.flying]
        if names:
            size = sum(self.sizes[name][1] for name in names)
            self.live += size
            self.elements += sum(self.sizes[name][0] for name in names)
            self.flying |= dict.fromkeys(names, Gather(names, size, unused=len(names)))

    def begin(self, own: list[str]) -> None:
        """`fetch_sub_module`."""
        self.gather(own)
        for name in own:
            gather = self.flying.pop(name, None)
            if gather is None:
                continue
            several = len(gather.names) > 1 and self.ranks > 1  # one alone is the buffer itself
            if gather.waiting:
                gather.waiting = False
                self.here |= set(gather.names)
                self.live += gather.flat if several else 0
            gather.unused -= 1
            if not gather.unused and several:
                self.live -= gather.flat
        fresh = {name for name in own if self.wanted[name] < self.step}
        while self.queue and fresh:
            name, self.wanted[name] = self.queue.popleft()
            fresh.discard(name)
        ahead: dict[str, int] = {}
        limit = min(self.zero.live - self.elements, self.zero.prefetch)
        while self.queue and sum(ahead.values()) < limit:
            name, step = self.queue.popleft()
            self.wanted[name] = max(self.wanted[name], step)
            if name not in self.here and name not in self.flying:
                ahead[name] = self.sizes[name][0]
        self.gather(list(ahead))
        self.step += 1

    def end(self, own: list[str]) -> None:
        """`release_sub_module`: what is not wanted again within `max_reuse_distance` elements."""
        gone = {name for name in own if name in self.here - self.stays and self.wanted[name] <= self.step}
        passed = 0
        for names in self.order[self.step :] if gone else []:
            if passed >= self.zero.reuse:
                break
            gone -= set(names)
            passed += sum(self.sizes[name][0] for name in names)
        for name in gone:
            self.here.discard(name)
            self.live -= self.sizes[name][1]
            self.elements -= self.sizes[name][0]


def gathered_bytes(visits: list[Visit], zero: Zero, ranks: int, device: str) -> list[int]:
    """ZeRO-3: bytes of gathered parameters on a rank at each visit; one rank gathers what is on the host."""
    coordinator, found = Coordinator(visits, zero, ranks, device), []
    for visit in visits:
        (coordinator.begin if visit.begins else coordinator.end)([name for name, *_ in visit.own])
        found.append(coordinator.bytes())
    return found


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
        copies = {"gradients": b * N, "DeepSpeed's buckets": b * min(N, BUCKET)}  # buffered_allreduce_fallback
        return {"gradient reduction": copies, "optimizer step": {"gradients": b * N} | work}
    if zero.stage == 3:
        group = min(n, zero.sub_group)
        phases = {"gradient norm": {"optimizer's working memory": 8 * math.ceil(job.largest / job.ranks)}}
        if job.device == "cpu" and job.ranks > 1:
            # reduce_scatter_coalesced flattens, and gloo reduces a clone; what a smaller gather has freed is no room.
            flat, freed = b * job.bucket(zero), b * min(zero.prefetch, N)
            phases["gradient reduction"] = {"DeepSpeed's buckets": 2 * flat, "holes": freed if freed < flat else 0}
        if not offloaded:
            start = 4 * group + (b * group if b != 4 else 0)
            phases["optimizer step"] = {"optimizer's working memory": max(start, 4 * group + 4 * denominators * group)}
        return phases
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
